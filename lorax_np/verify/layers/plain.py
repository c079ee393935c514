"""The layer as a table of steps in plain NumPy, any of which can be replaced: what faults are planted in.

A step is a function of the steps before it. With none replaced this is one more right implementation, written
from specs/lora.md and specs/dora.md in another order than the engine's; with one replaced, it is a known fault.
"""

from collections.abc import Callable, Mapping
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from ..conventions import Spec

Step = Callable[[Any], Any]  # reads t.<earlier step>, and t.<array of the case>; arrays of tokens are (N, ...)


def rows(value: HostArray) -> HostArray:
    """Fold leading axes into one."""
    return value.reshape(prod(value.shape[:-1]), value.shape[-1])


FORWARD: Mapping[str, Step] = {
    "s": lambda t: t.c.scaling,
    "keep": lambda t: t.mask,  # (N, d_in), all ones without dropout
    "xb": lambda t: t.x,  # what the base path sees
    "xd": lambda t: t.x * t.keep,
    "z": lambda t: t.xd @ t.A.T,
    "u": lambda t: t.z @ t.B.T,
    "L": lambda t: t.s * t.u + (0 if t.bB is None else t.s * t.bB),  # (conventions.1)
    "Q": lambda t: t.L * t.out,  # (conventions.2)
    "y0": lambda t: t.xb @ t.W.T,
    "bias": lambda t: 0 if t.b is None else t.b,
    "V": lambda t: t.W + t.s * (t.B @ t.A),
    "n": lambda t: np.sqrt(np.sum(t.V * t.V, axis=1)),
    "k": lambda t: np.ones_like(t.n) if t.m is None else t.m / t.n,
    "xp": lambda t: t.xd if t.c.dora == "peft" else t.x * t.other,  # (conventions.3)
    "P": lambda t: t.xp @ t.W.T,
    "whole": lambda t: t.P + t.Q + (t.bias if t.c.scales_bias else 0),  # what k multiplies
    "bias_k": lambda t: t.k * t.bias if t.c.scales_bias else t.bias,
    "y": lambda t: t.y0 + t.bias_k + (t.Q if t.m is None else (t.k - 1) * t.P + t.k * t.Q),  # (conventions.4)
}
BACKWARD: Mapping[str, Step] = {
    "Gk": lambda t: t.G * t.k,
    "gu": lambda t: t.s * t.Gk * t.out,  # (conventions.5)
    "gz": lambda t: t.gu @ t.B,
    "back": lambda t: t.keep,  # the mask that backward applies
    "gB": lambda t: t.gu.T @ t.z,
    "gA": lambda t: t.gz.T @ t.xd,
    "gx_lora": lambda t: (t.gz @ t.A) * t.back,
    "gx_base": lambda t: t.G @ t.W,
    "back_P": lambda t: t.back if t.c.dora == "peft" else t.other,  # (conventions.6)
    "gx_dora": lambda t: 0 if t.m is None else ((t.G * (t.k - 1)) @ t.W) * t.back_P,
    "gb": lambda t: (t.Gk if t.c.scales_bias else t.G).sum(axis=0),
    "gbB": lambda t: t.gu.sum(axis=0),
    "gk": lambda t: (t.G * t.whole).sum(axis=0),  # (conventions.7)
    "gm": lambda t: t.gk / t.n,
    "gV": lambda t: np.zeros_like(t.W) if not t.full else -(t.gk * t.m / t.n**3)[:, None] * t.V,
    "gA_norm": lambda t: t.s * t.B.T @ t.gV,
    "gB_norm": lambda t: t.s * t.gV @ t.A.T,
    "gW": lambda t: t.G.T @ t.x + (0 if t.m is None else (t.G * (t.k - 1)).T @ t.xp) + t.gV,
}


def arrays(case: Case, gy: HostArray) -> dict[str, Any]:
    """What the steps read besides each other: the case's arrays, leading axes folded, and its masks."""
    v = case.arrays()
    found: dict[str, Any] = {"c": case, "full": case.m is not None and case.norm_gradient}
    found |= {name: v.get(name) for name in ("W", "b", "A", "B", "bB", "m")}
    found |= {"x": rows(case.x), "G": rows(gy)}
    found["mask"] = np.ones_like(found["x"]) if case.input_mask is None else rows(case.input_mask)
    found["out"] = 1 if case.output_mask is None else rows(case.output_mask)  # the mask on the update
    found["other"] = 1 if case.product_mask is None else rows(case.product_mask)  # on P, where it is no xd
    return found


def run(
    case: Case, gy: HostArray, changed: Mapping[str, Step] | None = None
) -> tuple[HostArray, dict[str, HostArray]]:
    """y and the gradients of a case, with some steps changed. All in the dtype of the case's arrays."""
    t = SimpleNamespace(**arrays(case, gy))
    for name, step in {**FORWARD, **BACKWARD, **(changed or {})}.items():
        setattr(t, name, step(t))
    y = np.asarray(t.y, dtype=case.x.dtype).reshape(gy.shape)
    found = {"x": t.gx_base + t.gx_lora + t.gx_dora, "A": t.gA + t.gA_norm, "B": t.gB + t.gB_norm, "W": t.gW}
    found |= {"m": t.gm} if case.m is not None else {}
    found |= {"b": t.gb} if case.train_b else {}
    found |= {"bB": t.gbB} if case.bB is not None else {}
    found["x"] = found["x"].reshape(case.x.shape)
    return y, {name: np.asarray(value, dtype=case.x.dtype) for name, value in found.items()}


def whole(case: Case) -> HostArray:
    """What DoRA's k multiplies, (N, d_out), in the dtype of the case's arrays."""
    t = SimpleNamespace(**arrays(case, case.gy))
    for name, step in FORWARD.items():
        setattr(t, name, step(t))
    return np.asarray(t.whole)


class Plain:
    """These steps as a subject, some of them changed."""

    def __init__(self, changed: Mapping[str, Step] | None = None) -> None:
        """changed : step name to what stands in for it."""
        self.changed, self.spec = changed, Spec(norm_gradient=(False, True), strided=True)

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients."""
        return run(case, gy, self.changed)
