"""Convolutions: the layer on windows, with every stride, padding, dilation and grouping that a kernel can have.

y = W∗x + b + s·B∗(A∗xd): windows as rows make it the linear layer. Derivation: specs/subjects.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import Any

import numpy as np

from ... import (
    Adapter,
    Linear,
    LoraConfig,
    lora_linear_backward,
    lora_linear_backward_base,
    lora_linear_forward,
)
from ..bounds.worst import FEW, bounds, merged_bounds
from ..cases import PROFILES, UNIT, Case, HostArray
from ..conventions import spec_of
from ..report import Check
from .tensors import Absent, Crash, ask, by_name, chosen, judge, refusal

Sizes = tuple[int, ...]
PADS: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
NAMES = ("x", "W", "b", "A", "B", "m", "bB")
ARRAYS = (*NAMES, "mask", "gy")


@dataclass(frozen=True, eq=False)
class ConvCase:
    """N items at one point. All NumPy arrays of the profile's dtype.

    x, mask : (N, d_in, *L), W : (d_out, d_in/groups, *κ), b, m, bB : (d_out,), gy : (N, d_out, *P)
    A : (r, d_in, *κ), B : (d_out, r/groups, *1);  stride, padding, dilation : one number an axis
    norm_gradient : under DoRA, whether the gradient runs through the norm
    """

    id: str
    kind: str
    config: LoraConfig
    x: HostArray
    W: HostArray
    A: HostArray
    B: HostArray
    gy: HostArray
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    mode: str = "zeros"
    b: HostArray | None = None
    m: HostArray | None = None
    bB: HostArray | None = None
    mask: HostArray | None = None
    norm_gradient: bool = False

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.config.scaling

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's sizes."""
        return tuple(self.W.shape[2:])

    def arrays(self) -> dict[str, HostArray]:
        """Every array that the case has, by name."""
        return {name: value for name in ARRAYS if (value := getattr(self, name)) is not None}

    def copy(self) -> "ConvCase":
        """The same case in arrays of its own."""
        return replace(self, **{name: value.copy() for name, value in self.arrays().items()})  # type: ignore[arg-type]

    @property
    def places(self) -> HostArray:
        """For each window and entry of the kernel, (*P, ∏κ), the entry of a flat item from 1; 0 for padding."""
        return _places(self.x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, self.mode)


@lru_cache(maxsize=256)
def _places(L: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, mode: str) -> HostArray:
    numbers = np.arange(1, prod(L) + 1).reshape(L)
    wide = np.pad(numbers, [(p, p) for p in padding], mode=PADS[mode])
    parts = []
    for t in product(*map(range, kernel)):
        cuts = []
        for a, size in enumerate(wide.shape):
            P = (size - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
            first = t[a] * dilation[a]
            cuts.append(slice(first, first + (P - 1) * stride[a] + 1, stride[a]))
        parts.append(wide[tuple(cuts)])
    return np.stack(parts, axis=-1)


# ---- windows and blocks, by NumPy alone --------------------------------------------------------------------


def windows(case: ConvCase, x: HostArray) -> HostArray:
    """x : (N, d_in, *L) as rows : (N, *P, d_in·∏κ)."""
    flat = x.reshape(*x.shape[:2], prod(x.shape[2:]))
    padded = np.concatenate([np.zeros_like(flat[:, :, :1]), flat], axis=2)
    rows = np.moveaxis(padded[:, :, case.places], 1, -2)  # (N, *P, d_in, ∏κ)
    return np.ascontiguousarray(rows).reshape(*rows.shape[:-2], prod(rows.shape[-2:]))


def unwindowed(case: ConvCase, rows: HostArray) -> HostArray:
    """The adjoint of windows: every entry of x gets the sum over the windows that hold it."""
    N, d_in, *L = case.x.shape
    parts = np.moveaxis(rows.reshape(*rows.shape[:-1], d_in, prod(case.kernel)), -2, 1)
    found = np.zeros((N, d_in, prod(L) + 1), rows.dtype)
    everywhere: Any = (slice(None), slice(None), case.places)
    np.add.at(found, everywhere, parts)
    return found[:, :, 1:].reshape(case.x.shape)


def whole(W: HostArray, groups: int) -> HostArray:
    """(d_out, d, ...) of groups as (d_out, groups·d·...), zero outside of the blocks."""
    flat = W.reshape(len(W), -1)
    rows, width = len(W) // groups, flat.shape[1]
    found = np.zeros((len(W), groups * width), W.dtype)
    for g in range(groups):
        found[g * rows : (g + 1) * rows, g * width : (g + 1) * width] = flat[g * rows : (g + 1) * rows]
    return found


def blocks(dense: HostArray, like: HostArray, groups: int) -> HostArray:
    """The blocks of whole again, in the shape of like."""
    rows, width = len(like) // groups, dense.shape[1] // groups
    own = [dense[g * rows : (g + 1) * rows, g * width : (g + 1) * width] for g in range(groups)]
    return np.concatenate(own).reshape(like.shape)


def as_linear(case: ConvCase) -> Case:
    """The linear layer that the case is: windows for tokens, whole matrices for groups.  (conv.11)"""
    return Case(
        case.id,
        "dora full norm" if case.norm_gradient else "dora" if case.m is not None else "lora",
        case.config,
        x=windows(case, case.x),
        W=whole(case.W, case.groups),
        A=case.A.reshape(len(case.A), -1),
        B=whole(case.B, case.groups),
        gy=np.moveaxis(case.gy, 1, -1),
        mask=None if case.mask is None else windows(case, case.mask),
        norm_gradient=case.norm_gradient,
        **{name: getattr(case, name) for name in ("b", "m", "bB")},
    )


def as_conv(case: ConvCase, found: dict[str, HostArray]) -> dict[str, HostArray]:
    """Tensors of the linear layer in the shapes of the convolution's."""
    shaped: dict[str, Callable[[HostArray], HostArray]] = {
        "y": lambda v: np.moveaxis(v, -1, 1),
        "x": lambda v: unwindowed(case, v),
        "A": lambda v: v.reshape(case.A.shape),
        "B": lambda v: blocks(v, case.B, case.groups),
        "W": lambda v: blocks(v, case.W, case.groups),
    }
    return {name: shaped[name](value) if name in shaped else value for name, value in found.items()}


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


# ---- truth and bounds --------------------------------------------------------------------------------------


def truth(case: ConvCase, *, y_alone: bool = False) -> dict[str, HostArray]:
    """y and all gradients by the engine's linear layer on windows, in the dtype of the case."""
    flat = as_linear(case)
    base, adapter = Linear(flat.W, flat.b), Adapter(flat.A, flat.B, flat.m, None, flat.bB)
    y, saved = lora_linear_forward(flat.x, base, adapter, scaling=case.scaling, mask=flat.mask)
    if y_alone:
        return as_conv(case, {"y": np.asarray(y)})
    how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
    gx, g = lora_linear_backward(flat.gy, saved, base, adapter, **how)
    gbase = lora_linear_backward_base(flat.gy, saved, base, adapter, **how)
    engine: Any = {"y": y, "x": gx, "W": gbase.W, "b": gbase.b, "A": g.A, "B": g.B, "m": g.m, "bB": g.bB}
    return as_conv(case, {name: value for name, value in engine.items() if value is not None})


def wide(case: ConvCase) -> ConvCase:
    """The case in float64."""
    return replace(case, **{name: value.astype(np.float64) for name, value in case.arrays().items()})  # type: ignore[arg-type]


def merged(case: ConvCase) -> dict[str, HostArray]:
    """W' and b' in float64."""
    v = as_linear(wide(case))
    V, b = v.W + case.scaling * v.B @ v.A, np.zeros(len(v.W)) if v.b is None else v.b
    if v.m is not None:
        V = (v.m / np.linalg.norm(V, axis=1))[:, None] * V
    return {"W": V.reshape(case.W.shape), "b": b if v.bB is None else b + case.scaling * v.bB}


def conv_bounds(case: ConvCase, u: float, *, y_alone: bool = False) -> dict[str, HostArray]:
    """The most that roundings of size u explain: the linear layer's on windows, and gx's sums over them.

    y_alone : nothing but y, in a third of the time
    """
    found = bounds(as_linear(case), u, y_alone=y_alone)
    if not y_alone:
        overlaps = np.bincount(case.places.ravel(), minlength=2)[1:].max()
        found["x"] = found["x"] * (1 + overlaps / (len(case.W) + len(case.A) + FEW))  # (subjects.19)
    kept = {name: value for name, value in found.items() if name == "y" or getattr(case, name) is not None}
    return as_conv(case, kept)


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
