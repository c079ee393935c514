"""The truth for layers too large for exact arithmetic: the dense definition in float64, and complex steps.

No derivative that somebody wrote down is used. y comes from V = W + s·BA written out, which the engine avoids;
a gradient is the imaginary part of a forward at θ + 1e-30·i, where nothing cancels: the engine's own or, where
a subject has other conventions than the engine, the definition's. Where DoRA's norm counts as a constant, m
moves with the norm, so that k = m/n stays where it was.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from ... import Adapter, Linear, lora_linear_forward, row_norms
from ..cases import Case, HostArray
from ..layers.plain import run

STEP = 1e-30


def of(case: Case) -> dict[str, HostArray]:
    """y and every gradient: by complex steps for float64 layers, by the equations in float64 for narrower ones.

    The equations are those of layers/plain.py, which complex steps prove for every convention (tests).
    """
    if case.x.dtype == np.float64:
        return {"y": dense(case), **gradients(case)}
    return derived(case)


def derived(case: Case) -> dict[str, HostArray]:
    """y by its definition, and the gradients by their equations, step by step in float64."""
    wide = widened(case)
    return {"y": dense(case), **run(wide, wide.gy)[1]}


def widened(case: Case) -> Case:
    """The same layer in float64."""
    arrays: Any = {name: value.astype(np.float64) for name, value in case.arrays().items()}
    return replace(case, **arrays)


def dense(case: Case) -> HostArray:
    """y : (*lead, d_out) in float64, from the definition with V = W + s·BA written out."""
    return np.asarray(_definition(case, widened(case).arrays()))


def _definition(case: Case, v: dict[str, Any]) -> Any:
    """y from the definition, for arrays of real or complex numbers."""

    def masked(value: Any, mask: HostArray | None) -> Any:
        return value if mask is None else value * mask.astype(np.float64)

    W, b = v["W"], v.get("b", 0.0)
    V = W + case.scaling * v["B"] @ v["A"]
    Q = masked(masked(v["x"], case.input_mask) @ (V - W).T + case.scaling * v.get("bB", 0.0), case.output_mask)
    if "m" not in v:
        return v["x"] @ W.T + b + Q
    k, P = v["m"] / np.sqrt((V * V).sum(axis=1)), masked(v["x"], case.product_mask) @ W.T
    return v["x"] @ W.T + (k * b if case.scales_bias else b) + (k - 1) * P + k * Q


def _step(case: Case, v: dict[str, Any], name: str, direction: HostArray, still: HostArray | None) -> float:
    """The derivative of Σ gy∘y along a direction in one argument; still: the norms, where they are constant."""
    moved = {**v, name: v[name] + 1j * STEP * direction}
    base = Linear(moved["W"])
    if still is not None and name in ("W", "A", "B"):
        moved["m"] = moved["m"] * row_norms(base, Adapter(moved["A"], moved["B"]), scaling=case.scaling) / still
    if (case.dora, case.dropout) == ("peft", "pre"):
        adapter = Adapter(moved["A"], moved["B"], moved.get("m"), moved.get("b"), moved.get("bB"))
        y, _ = lora_linear_forward(moved["x"], base, adapter, scaling=case.scaling, mask=v.get("mask"))
    else:
        y = _definition(case, moved)
    return float(np.sum(v["gy"] * np.asarray(y).imag) / STEP)


def _still(case: Case, v: dict[str, Any]) -> HostArray | None:
    if case.m is None or case.norm_gradient:
        return None
    return np.asarray(row_norms(Linear(v["W"]), Adapter(v["A"], v["B"]), scaling=case.scaling))


def gradients(case: Case) -> dict[str, HostArray]:
    """The gradients that case.wanted names, entry by entry."""
    v = widened(case).arrays()
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
    v = widened(case).arrays()
    return _step(case, v, name, direction, _still(case, v))
