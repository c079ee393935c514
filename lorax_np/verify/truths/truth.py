"""The truth for layers too large for exact arithmetic: the dense definition in float64, and complex steps.

No derivative that somebody wrote down is used. y comes from V = W + s·BA written out, which the engine avoids;
a gradient is the imaginary part of the engine's forward at θ + 1e-30·i, where nothing cancels. Where DoRA's
norm counts as a constant, m moves with the norm, so that k = m/n stays where it was.
"""

from typing import Any

import numpy as np

from ... import Adapter, Linear, lora_linear_forward, row_norms
from ..cases import Case, HostArray

STEP = 1e-30


def _wide(case: Case) -> dict[str, Any]:
    return {name: value.astype(np.float64) for name, value in case.arrays().items()}


def dense(case: Case) -> HostArray:
    """y : (*lead, d_out) in float64, from the definition with V = W + s·BA written out."""
    v = _wide(case)
    W, b = v["W"], v.get("b", 0.0)
    V = W + case.scaling * v["B"] @ v["A"]
    xd = v["x"] * v["mask"] if "mask" in v else v["x"]
    if "m" in v:
        V = (v["m"] / np.linalg.norm(V, axis=1))[:, None] * V
    y: HostArray = v["x"] @ W.T + xd @ (V - W).T + b + case.scaling * v.get("bB", 0.0)
    return y


def _step(case: Case, v: dict[str, Any], name: str, direction: HostArray, still: HostArray | None) -> float:
    """The derivative of Σ gy∘y along a direction in one argument; still: the norms, where they are constant."""
    moved = {**v, name: v[name] + 1j * STEP * direction}
    base, m = Linear(moved["W"]), moved.get("m")
    if still is not None and name in ("W", "A", "B"):
        m = m * row_norms(base, Adapter(moved["A"], moved["B"]), scaling=case.scaling) / still
    adapter = Adapter(moved["A"], moved["B"], m, moved.get("b"), moved.get("bB"))
    y, _ = lora_linear_forward(moved["x"], base, adapter, scaling=case.scaling, mask=v.get("mask"))
    return float(np.sum(v["gy"] * np.asarray(y).imag) / STEP)


def _still(case: Case, v: dict[str, Any]) -> HostArray | None:
    if case.m is None or case.norm_gradient:
        return None
    return np.asarray(row_norms(Linear(v["W"]), Adapter(v["A"], v["B"]), scaling=case.scaling))


def gradients(case: Case) -> dict[str, HostArray]:
    """The gradients that case.wanted names, entry by entry."""
    v = _wide(case)
    still, found = _still(case, v), {}
    for name in case.wanted:
        unit, flat = np.zeros(v[name].shape), []
        for at in np.ndindex(unit.shape):
            unit[at] = 1.0
            flat.append(_step(case, v, name, unit, still))
            unit[at] = 0.0
        found[name] = np.array(flat).reshape(unit.shape)
    return found


def along(case: Case, name: str, direction: HostArray) -> float:
    """The derivative of Σ gy∘y in one argument along one direction, for layers too large for every entry."""
    v = _wide(case)
    return _step(case, v, name, direction, _still(case, v))
