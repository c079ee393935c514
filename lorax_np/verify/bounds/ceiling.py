"""The most that roundings of a profile explain: sums, stored values and operands each of their own width.

The counting is that of bounds.py, whose one u is three here. Derivation: specs/bounds.md, specs/verify.md.
"""

import numpy as np

from ..cases import Case, HostArray
from ..precision import Precision
from .worst import FEW, masks

_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 0.0}


def ceiling(case: Case, precision: Precision) -> dict[str, HostArray]:
    """The most that a profile's roundings explain of y and the gradients by x, W, A, B, m, b, bB, by entry.

    As bounds.bounds, its special case where sums and stored values are rounded alike. Infinite where
    counting to first order ends: where a row of V is lost in rounding, or a count of roundings reaches 1/u.
    """
    v = {name: np.abs(value).astype(np.float64) for name, value in case.arrays().items()}
    W, A, B, s = v["W"], v["A"], v["B"], abs(case.scaling)
    x, G = (v[name].reshape(-1, v[name].shape[-1]) for name in ("x", "gy"))
    mask, other, out = masks(case)
    xd, xp, d_out, d_in, r, N = x * mask, x * other, *W.shape, A.shape[0], x.shape[0]
    each = precision.accumulate * (2 if precision.rounding == "toward zero" else 1)

    def gamma(length: int, few: int = FEW + 4, products: int = 2) -> float:  # (bounds.38)
        total = length * each + few * max(precision.store, each) + 2 * products * precision.operand
        return total / (1 - total) if total < 1 else np.inf

    least = _NORMAL[precision.dtype] * max(1.0, 1 / s if s else 1.0)  # what is smaller is rounded as this is
    k, rho, n = np.ones(d_out), np.zeros(d_out), np.ones(d_out)
    if case.m is not None:
        k, rho, n = _magnitude(case, v, precision, each)
        k = k + least
    Gk, xA = G * k + least * (case.m is not None), xd @ A.T + least
    Go = Gk * out
    M, GB = Go.T @ xd + least, Go @ B + least
    P, Q = xp @ W.T, (s * xA @ B.T + least * (1 + xd.sum(axis=1)[:, None])) * out
    b, bB = v.get("b", np.zeros(d_out)), s * v.get("bB", np.zeros(d_out)) * out
    far = k + 1 if case.m is not None else 0 * k  # of the terms (k − 1)∘P
    sums = G
    if case.m is not None and case.product_mask is None and "b" in v:  # (bounds.53)
        P, sums = P + b, G * (1 + 2 * far)
    Gc, shared = G * far, rho[:, None] * M
    inside = P + b if case.scales_bias else P
    whole = inside + Q  # what k multiplies
    with np.errstate(invalid="ignore", over="ignore"):
        y = gamma(d_in + r) * (x @ W.T + b + far * inside + k * Q + bB) + rho * k * whole
        gB = gamma(N + d_in) * s * (Go.T @ xA + least * A.sum(axis=1)) + s * shared @ A.T
        gA = gamma(d_out + N) * s * (B.T @ M + least * xd.sum(axis=0)) + s * B.T @ shared
        small = least * Gk.sum(axis=1)[:, None]
        gx = gamma(d_out + r) * (G @ W + (Gc @ W + small) * other + (s * GB @ A + small) * mask)
        gx = gx + (Gk * rho) @ W * other + (Go * rho) @ (s * B @ A) * mask
        gW = gamma(N) * (G.T @ x + Gc.T @ xp) + rho[:, None] * (Gk.T @ xp + least)
        gk = (G * whole).sum(axis=0)
        gm = (gamma(N + d_in + r) + rho) * gk / n
        if case.norm_gradient and case.m is not None:
            V = W + s * B @ A
            c = gk * v["m"] / n**3 + least * (1 + 1 / n) ** 2
            gV = ((gamma(N + d_in + d_out + 2 * r, 3 * FEW, 4) + 4 * rho) * c)[:, None] * V
            gA, gB, gW = gA + s * B.T @ gV, gB + s * gV @ A.T, gW + gV
    total = gamma(N, FEW, 0) * sums.sum(axis=0)
    if case.scales_bias:
        total = (gamma(N) + rho) * Gk.sum(axis=0)
    found = {"y": y, "x": gx, "W": gW, "A": gA, "B": gB, "m": gm, "b": total}
    found["bB"] = gamma(N, FEW, 0) * s * (G * out).sum(axis=0)
    shapes = {name: value.shape for name, value in case.arrays().items()} | {"y": case.gy.shape}
    found = {name: value + precision.store * least * (1 + s) for name, value in found.items()}
    found = {name: np.nan_to_num(value, nan=np.inf, posinf=np.inf) for name, value in found.items()}
    return {name: value.reshape(shapes[name]) for name, value in found.items() if name in shapes}


def merged_ceiling(case: Case, precision: Precision) -> dict[str, HostArray]:
    """The most that a profile's roundings explain of a merged weight and bias, by entry.  (merge.12)"""
    v = {name: np.abs(value).astype(np.float64) for name, value in case.arrays().items()}
    total = len(case.A) * precision.accumulate + FEW * precision.store
    count = total / (1 - total) if total < 1 else np.inf
    k, rho = np.ones(len(case.W)), np.zeros(len(case.W))
    if case.m is not None:
        k, rho, _ = _magnitude(case, v, precision, precision.accumulate)
    s, nothing = abs(case.scaling), np.zeros(len(k))
    size, least = v["W"] + s * v["B"] @ v["A"], _NORMAL[precision.dtype] * precision.store
    bias = v.get("b", nothing) + s * v.get("bB", nothing)
    return {"W": (count + rho[:, None]) * k[:, None] * size + least, "b": count * bias + least}


def _magnitude(
    case: Case, v: dict[str, HostArray], p: Precision, each: float
) -> tuple[HostArray, HostArray, HostArray]:
    """|k|, how far it can be off, relative, and n, each (d_out,)."""
    W, A, B = (value.astype(np.float64) for value in (case.W, case.A, case.B))
    V = W + case.scaling * B @ A
    n = np.linalg.norm(V, axis=1)
    update = abs(case.scaling) * v["B"] @ v["A"]
    error = (len(A) * each + 4 * p.store + 3 * p.operand) * update + 2 * p.store * (v["W"] + np.abs(V))
    error = error * 1.01 + 0.01 * p.store * update
    off = (np.abs(V) * error + error * error).sum(axis=1) / n**2 + W.shape[1] / 2 * each + 6 * p.store
    rho = np.where(off < 1, off / np.maximum(1 - off, 1e-300), np.inf)  # (bounds.39)
    return v["m"] / n, rho, n
