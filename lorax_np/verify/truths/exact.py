"""The truth for small layers: the layer written out from its definition, in 640-bit fixed-point arithmetic.

Nothing of the engine is used here, and no derivative is written down: y comes from the dense definition, every
gradient from the difference quotient (L(θ + h) − L(θ − h))/2h of L = Σ gy∘y with h = 2⁻¹⁶⁰. Its truncation
error is of the order h², about 1e-96; that of the arithmetic about 1e-144.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import numpy as np

from ..cases import Case, HostArray

BITS = 640
STEP = 1 << (BITS - 160)


def _fixed(value: float) -> int:
    top, bottom = float(value).as_integer_ratio()
    return (top << BITS) // bottom


fixed = np.frompyfunc(_fixed, 1, 1)  # float array -> array of Python integers, in units of 2**-640
_root = np.frompyfunc(lambda v: isqrt(int(v) << BITS), 1, 1)
_float = np.frompyfunc(lambda v: int(v) / (1 << BITS), 1, 1)


def to_float(values: Any) -> HostArray:
    """Round fixed-point numbers to float64, once."""
    return np.asarray(_float(values), dtype=np.float64)


def _forward(case: Case, v: Mapping[str, Any], s: int, n: Any | None) -> Any:
    """y of one layer; n stands in for the row norms where the norm counts as a constant."""

    delta = (s * ((v["B"] @ v["A"]) >> BITS)) >> BITS
    x, y, b = v["x"], (v["x"] @ v["W"].T) >> BITS, v.get("b", 0)
    xd = x if case.input_mask is None else (x * v["mask"]) >> BITS
    update = (xd @ delta.T) >> BITS
    if "bB" in v:
        update = update + ((s * v["bB"]) >> BITS)
    if case.output_mask is not None:
        update = (update * v["mask"]) >> BITS
    if "m" not in v:
        return y + b + update
    k = (v["m"] << BITS) // (norms(v["W"] + delta) if n is None else n)
    P = _product(case, v, xd, y)
    inside, outside = (b, 0) if case.scales_bias else (0, b)
    return y + outside + (((k - (1 << BITS)) * P + k * (update + inside)) >> BITS)


def _product(case: Case, v: Mapping[str, Any], xd: Any, y: Any) -> Any:
    """P, the base product under k, of x dropped as the form has it; y without mask."""
    if case.product_mask is None:
        return y
    dropped = xd if case.dora == "peft" else (v["x"] * v["base_mask"]) >> BITS
    return (dropped @ v["W"].T) >> BITS


def norms(V: Any) -> Any:
    """Row norms of a fixed-point matrix."""
    return _root((V * V).sum(axis=1) >> BITS)


def truth(case: Case) -> dict[str, Any]:
    """y and the gradient by x, W, A, B, m, b and bB, as far as they are there, in fixed point."""
    v = {name: np.asarray(fixed(value), dtype=object) for name, value in case.arrays().items()}
    for name in ("x", "gy", "mask", "base_mask"):
        if name in v:
            v[name] = v[name].reshape(-1, v[name].shape[-1])
    s = _fixed(case.scaling)
    n = None
    if case.m is not None and not case.norm_gradient:
        n = norms(v["W"] + ((s * ((v["B"] @ v["A"]) >> BITS)) >> BITS))

    def loss(name: str, at: tuple[int, ...], step: int) -> Any:
        moved = v[name].copy()
        moved[at] += step
        return (v["gy"] * _forward(case, {**v, name: moved}, s, n)).sum() >> BITS

    found: dict[str, Any] = {"y": _forward(case, v, s, n).reshape(case.gy.shape)}
    for name in (*case.wanted, "W"):
        gradient = np.empty(v[name].shape, dtype=object)
        for at in np.ndindex(gradient.shape):
            rise = loss(name, at, STEP) - loss(name, at, -STEP)
            gradient[at] = (rise << BITS) // (2 * STEP)
        found[name] = gradient.reshape(getattr(case, name).shape)
    return found


def merged(case: Case) -> dict[str, Any]:
    """The weight and bias that compute the same without dropout, in fixed point."""
    v = {name: np.asarray(fixed(value), dtype=object) for name, value in case.arrays().items()}
    s = _fixed(case.scaling)
    V = v["W"] + ((s * ((v["B"] @ v["A"]) >> BITS)) >> BITS)
    if "m" in v:
        k = (v["m"] << BITS) // norms(V)
        V = k[:, None] * V >> BITS
    found = {"W": V}
    if "bB" in v:
        found["b"] = v.get("b", 0) + ((s * v["bB"]) >> BITS)
    elif "b" in v:
        found["b"] = (k * v["b"]) >> BITS if case.scales_bias else v["b"]
    return found
