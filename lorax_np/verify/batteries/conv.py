"""Convolutions: the layer on windows, with every stride, padding, dilation and grouping that a kernel can have.

y = W∗x + b + s·B∗(A∗xd): windows as rows make it the linear layer. Derivation: specs/subjects.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ... import LoraConfig
from ..bounds.worst import merged_bounds
from ..cases import PROFILES, UNIT, HostArray
from ..conventions import spec_of
from ..report import Check
from .conv_case import NAMES, ConvCase, as_conv, as_linear, conv_bounds, merged, truth, wide
from .tensors import Absent, Crash, ask, by_name, chosen, judge, refusal


class ConvReference:
    """The convolution and its adjoint on windows, by the engine's linear layer in the case's dtype."""

    def conv_forward(self, case: ConvCase) -> HostArray:
        """y : (N, d_out, *P)."""
        return truth(case, y_alone=True)["y"]

    def conv_backward(self, case: ConvCase, gy: HostArray) -> dict[str, HostArray]:
        """The gradients by all that the case has."""
        found = truth(replace(case, gy=gy))
        return {name: value for name, value in found.items() if name != "y"}

    def conv_merge(self, case: ConvCase) -> dict[str, HostArray]:
        """The merged weight and bias."""
        found = {name: value.astype(case.W.dtype) for name, value in merged(case).items()}
        return found if case.b is not None or case.bB is not None else {"W": found["W"]}

    def conv_init(self, W: HostArray, config: LoraConfig, seed: int) -> dict[str, HostArray]:
        """A within 1/√(d_in·∏κ), and B = 0."""
        shape = (config.r, *W.shape[1:])
        A = np.random.default_rng(seed).uniform(-1, 1, shape) / np.sqrt(prod(W.shape[1:]))
        return {"A": A.astype(W.dtype), "B": np.zeros((len(W), config.r, *(1 for _ in W.shape[2:])), W.dtype)}


# ---- the battery -------------------------------------------------------------------------------------------

#        what   N  d_in  d_out  r  κ  L  stride  padding  dilation  groups  mode  form
LAYOUTS: tuple[tuple[Any, ...], ...] = (
    ("one axis", 2, 3, 4, 2, (3,), (7,), (1,), (0,), (1,), 1, "zeros", "bias"),
    ("stride", 2, 3, 4, 2, (2, 2), (7, 6), (3, 2), (1, 1), (1, 1), 1, "zeros", "dropout"),
    ("dilation", 2, 3, 5, 2, (2, 3), (6, 7), (1, 1), (1, 2), (3, 2), 1, "zeros", "bias"),
    ("groups", 2, 4, 6, 4, (3, 2), (5, 4), (1, 1), (1, 0), (1, 1), 2, "zeros", "bias of B"),
    ("reflect", 1, 3, 4, 2, (3, 2), (5, 4), (1, 1), (2, 1), (1, 1), 1, "reflect", "bias"),
    ("replicate", 1, 3, 4, 2, (3,), (5,), (2,), (3,), (1,), 1, "replicate", "bias"),
    ("circular", 1, 3, 4, 2, (3, 3), (4, 5), (1, 2), (2, 1), (1, 1), 1, "circular", "dropout"),
    ("square", 2, 3, 3, 3, (3, 3), (4, 4), (1, 1), (1, 1), (1, 1), 1, "zeros", "bias of B"),
    ("three axes", 1, 2, 3, 2, (2, 1, 3), (3, 2, 4), (1, 1, 2), (1, 0, 1), (1, 1, 1), 1, "zeros", "bias"),
    ("one by one", 2, 5, 4, 3, (1, 1), (3, 2), (1, 1), (0, 0), (1, 1), 1, "zeros", "dropout"),
    ("no item", 0, 3, 4, 2, (2, 2), (3, 3), (1, 1), (0, 0), (1, 1), 1, "zeros", "bias"),
    ("dora", 2, 3, 5, 2, (3, 2), (5, 4), (1, 1), (1, 0), (1, 1), 1, "zeros", "dora"),
    ("dora, dropout", 2, 3, 4, 2, (3,), (6,), (2,), (1,), (2,), 1, "zeros", "dora dropout"),
    ("dora, groups", 2, 4, 6, 2, (2, 2), (4, 3), (1, 1), (0, 1), (1, 1), 2, "zeros", "dora"),
    ("dora full norm", 2, 3, 4, 3, (2, 2), (4, 3), (1, 1), (0, 1), (1, 1), 1, "zeros", "dora full"),
)


def draw(id: str, layout: int, dtype: str, seed: tuple[int, ...]) -> ConvCase:
    """Draw one case: B is not 0, m is not n, and no two constants are equal."""
    kind, N, d_in, d_out, r, kernel, L, stride, padding, dilation, groups, mode, form = LAYOUTS[layout]
    rng, one = np.random.default_rng(seed), tuple(1 for _ in kernel)

    def normal(*shape: int) -> HostArray:
        return rng.standard_normal(shape).astype(dtype)

    config = LoraConfig(r=r, lora_alpha=5.3, use_rslora=layout % 2 == 1, use_dora="dora" in form)
    case = ConvCase(
        id,
        f"conv, {kind}",
        config,
        x=normal(N, d_in, *L),
        W=normal(d_out, d_in // groups, *kernel),
        A=normal(r, d_in, *kernel),
        B=normal(d_out, r // groups, *one),
        gy=np.zeros(0),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        mode=mode,
        b=normal(d_out),
        m=(0.5 + 2.5 * rng.random(d_out)).astype(dtype) * np.linalg.norm(normal(d_out, 5), axis=1).astype(dtype)
        if config.use_dora
        else None,
        bB=normal(d_out) if form == "bias of B" else None,
        mask=((rng.random((N, d_in, *L)) > 0.45) / 0.55).astype(dtype) if "dropout" in form else None,
        norm_gradient="full" in form,
    )
    return replace(case, gy=normal(N, d_out, *case.places.shape[:-1]))


def cases(subject: Any, profile: str, seed: int, level: str, only: str, stem: str) -> Iterator[ConvCase]:
    """The cases whose norm is differentiated as the subject's is, by the segments of their ids."""
    norms = spec_of(subject).norm_gradient
    for i, layout in enumerate(LAYOUTS):
        for j in range(1 if level == "quick" else 3):
            id = f"{stem}/{layout[0].replace(', ', '-').replace(' ', '-')}/{j}"
            if chosen(id, only) and ("dora" not in layout[0] or ("full" in layout[0]) in norms):
                yield draw(id, i, PROFILES[profile], (seed, 71, i, j))


def battery_conv(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Convolutions, for subjects with conv_forward and conv_backward; merged, where they have conv_merge."""
    if hasattr(subject, "conv_forward"):
        for case in cases(subject, profile, seed, level, only, "conv"):
            yield judge_conv(subject, case)


def judge_conv(subject: Any, case: ConvCase) -> list[Check]:
    """y, the gradients and the merged weight of a case, and what has to be 0 exactly."""
    dtype, check = case.x.dtype.name, partial(Check, battery="conv", kind=case.kind)
    try:
        got = by_name("conv_forward", {"y": ask(subject, "conv_forward", case.copy())}, ("y",))
        if hasattr(subject, "conv_backward"):
            again = case.copy()
            got |= by_name("conv_backward", ask(subject, "conv_backward", again, again.gy), NAMES)
        mergeable = hasattr(subject, "conv_merge") and case.groups == 1
        folded = by_name("conv_merge", ask(subject, "conv_merge", case.copy()), ("W", "b")) if mergeable else {}
    except (Absent, Crash) as error:
        return [check(f"{case.id}/y", tensor="y", verdict=refusal(error), note=str(error))]
    want, bound = truth(wide(case)), conv_bounds(case, UNIT[dtype] + UNIT["float64"])
    found = [
        judge(case.id, "conv", case.kind, name, got.get(name), want[name], bound[name], dtype)
        for name in want
        if want[name].any() and (name in got or name not in ("W", "b"))
    ]
    if folded:
        exact, limit = merged(case), as_conv(case, merged_bounds(as_linear(case), UNIT[dtype]))
        found += [
            judge(
                f"{case.id}/merged",
                "conv",
                case.kind,
                name,
                folded.get(name),
                exact[name],
                2 * limit[name],
                dtype,
            )
            for name in ("W", "b")
        ]
    law, wrong = "gradients where no window and no item reaches are 0", _not_zero(case, got)
    found.append(check(f"{case.id}/zero", tensor=law, verdict="fail" if wrong else "pass", note=wrong))
    return found


def _not_zero(case: ConvCase, got: dict[str, HostArray]) -> str:
    """What has a gradient without cause, bit by bit; or nothing."""
    for name, value in got.items():
        shape = case.gy.shape if name == "y" else getattr(case, name).shape
        if value.shape != shape:
            return f"{name}: expected shape {shape}, got {value.shape}"
    held = np.bincount(case.places.ravel(), minlength=prod(case.x.shape[2:]) + 1)[1:] > 0
    flat = (*case.x.shape[:2], held.size)
    if "x" in got and got["x"].reshape(flat)[:, :, ~held].any():
        return "gx of an entry in no window is not 0"
    if not len(case.x) and any(value.any() for value in got.values()):
        return "a gradient without an item is not 0"
    return ""
