"""The layer as a table of steps in plain NumPy, any of which can be replaced: what faults are planted in.

A step is a function of the steps before it. With none replaced this is one more right implementation, written
from specs/lora.md and specs/dora.md in another order than the engine's; with one replaced, it is a known fault.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..cases import Case, HostArray

Step = Callable[[Any], Any]  # reads t.<earlier step>, and t.<array of the case>; arrays of tokens are (N, ...)


def rows(value: HostArray) -> HostArray:
    """Fold leading axes into one."""
    return value.reshape(int(np.prod(value.shape[:-1])), value.shape[-1])


FORWARD: Mapping[str, Step] = {
    "s": lambda t: t.c.scaling,
    "keep": lambda t: t.mask,  # (N, d_in), all ones without dropout
    "xb": lambda t: t.x,  # what the base path sees
    "xd": lambda t: t.x * t.keep,
    "z": lambda t: t.xd @ t.A.T,
    "u": lambda t: t.z @ t.B.T,
    "Q": lambda t: t.s * t.u + (0 if t.bB is None else t.s * t.bB),
    "y0": lambda t: t.xb @ t.W.T,
    "bias": lambda t: 0 if t.b is None else t.b,
    "V": lambda t: t.W + t.s * (t.B @ t.A),
    "n": lambda t: np.sqrt(np.sum(t.V * t.V, axis=1)),
    "k": lambda t: np.ones_like(t.n) if t.m is None else t.m / t.n,
    "P": lambda t: t.xd @ t.W.T,
    "y": lambda t: t.y0 + t.bias + (t.Q if t.m is None else (t.k - 1) * t.P + t.k * t.Q),
}
BACKWARD: Mapping[str, Step] = {
    "Gk": lambda t: t.G * t.k,
    "gu": lambda t: t.s * t.Gk,
    "gz": lambda t: t.gu @ t.B,
    "back": lambda t: t.keep,  # the mask that backward applies
    "gB": lambda t: t.gu.T @ t.z,
    "gA": lambda t: t.gz.T @ t.xd,
    "gx_lora": lambda t: (t.gz @ t.A) * t.back,
    "gx_base": lambda t: t.G @ t.W,
    "gx_dora": lambda t: 0 if t.m is None else ((t.G * (t.k - 1)) @ t.W) * t.back,
    "gb": lambda t: t.G.sum(axis=0),
    "gbB": lambda t: t.gu.sum(axis=0),
    "gk": lambda t: (t.G * (t.P + t.Q)).sum(axis=0),
    "gm": lambda t: t.gk / t.n,
    "gV": lambda t: np.zeros_like(t.W) if not t.full else -(t.gk * t.m / t.n**3)[:, None] * t.V,
    "gA_norm": lambda t: t.s * t.B.T @ t.gV,
    "gB_norm": lambda t: t.s * t.gV @ t.A.T,
    "gW": lambda t: t.G.T @ t.x + (0 if t.m is None else (t.G * (t.k - 1)).T @ t.xd) + t.gV,
}


def run(
    case: Case, gy: HostArray, changed: Mapping[str, Step] | None = None
) -> tuple[HostArray, dict[str, HostArray]]:
    """y and the gradients of a case, with some steps changed. All in the dtype of the case's arrays."""
    v = case.arrays()
    t = SimpleNamespace(c=case, full=case.m is not None and case.norm_gradient)
    for name in ("W", "b", "A", "B", "bB", "m"):
        setattr(t, name, v.get(name))
    t.x, t.G = rows(case.x), rows(gy)
    t.mask = np.ones_like(t.x) if case.mask is None else rows(case.mask)
    for name, step in {**FORWARD, **BACKWARD, **(changed or {})}.items():
        setattr(t, name, step(t))
    y = np.asarray(t.y, dtype=case.x.dtype).reshape(gy.shape)
    found = {"x": t.gx_base + t.gx_lora + t.gx_dora, "A": t.gA + t.gA_norm, "B": t.gB + t.gB_norm, "W": t.gW}
    found |= {"m": t.gm} if case.m is not None else {}
    found |= {"b": t.gb} if case.train_b else {}
    found |= {"bB": t.gbB} if case.bB is not None else {}
    found["x"] = found["x"].reshape(case.x.shape)
    return y, {name: np.asarray(value, dtype=case.x.dtype) for name, value in found.items()}


class Plain:
    """These steps as a subject, some of them changed."""

    def __init__(self, changed: Mapping[str, Step] | None = None) -> None:
        """changed : step name to what stands in for it."""
        from ..subjects import Spec

        self.changed, self.spec = changed, Spec(norm_gradient=(False, True), strided=True)

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients."""
        return run(case, gy, self.changed)
