"""How far from the truth roundings can carry an implementation: worst-case bounds, derived, entry by entry.

Every entry of y and of a gradient is a sum of products. Whatever the order of evaluation, its error is at most
γ(c) times the same sum taken over absolute values (its size), where γ(c) = cu/(1 − cu), u is the unit roundoff
and c counts the roundings that one product can meet: the lengths of the sums that it passes through, and a few
for scalings, casts of constants and the last rounding.
Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1; specs/verify.md.

DoRA's k = m/n is known only to a relative ρ in each row, where V = W + s·BA may have cancelled: every term that
holds k gets ρ of its size besides.
"""

import numpy as np

from ..cases import Case, HostArray

FEW = 12  # roundings of scalars and single operations along the longest path, counted generously


def bounds(case: Case, u: float, *, y_alone: bool = False) -> dict[str, HostArray]:
    """Return, for y and the gradients by x, W, A, B, m, b, bB, the most that roundings of size u explain.

    y_alone : nothing but y, in a third of the time
    """
    v = {name: np.abs(value).astype(np.float64) for name, value in case.arrays().items()}
    W, A, B, s = v["W"], v["A"], v["B"], abs(case.scaling)
    x, G = (v[name].reshape(-1, v[name].shape[-1]) for name in ("x", "gy"))
    mask, other, out = masks(case)
    xd, xp, d_out, d_in, r, N = x * mask, x * other, *W.shape, A.shape[0], x.shape[0]

    def gamma(count: int) -> float:  # (verify.1)
        return count * u / (1 - count * u)

    k, rho, n, m = _magnitude(case, u)
    P, Q, b = xp @ W.T, s * (xd @ A.T) @ B.T * out, v.get("b", np.zeros(d_out))
    base, c = (k + 1 if case.m is not None else 0 * k), FEW + 4  # of the terms (k − 1)∘P, and its roundings
    inside = P + b if case.scales_bias else P
    whole = inside + Q  # what k multiplies

    y = gamma(d_in + r + c) * (x @ W.T + b + base * inside + k * Q + s * v.get("bB", 0.0) * out)
    y = y + rho * k * whole  # (verify.2)
    if y_alone:
        return {"y": y.reshape(case.gy.shape)}
    Gk, Gc, Go = G * k, G * base, G * k * out
    gB = (gamma(N + d_in + c) + rho[:, None]) * (s * Go.T @ (xd @ A.T))  # (verify.4)
    gA = s * (B.T @ ((gamma(d_out + N + c) + rho[:, None]) * (Go.T @ xd)))  # (verify.3)
    adapter = gamma(d_out + r + c) * s * (Go @ B) @ A + s * ((Go * rho) @ B) @ A
    product = gamma(d_out + r + c) * (Gc @ W) + (Gk * rho) @ W
    gx = gamma(d_out + r + c) * (G @ W) + adapter * mask + product * other  # (verify.5)
    gW = gamma(N + c) * (G.T @ x + Gc.T @ xp) + rho[:, None] * (Gk.T @ xp)  # (verify.6)
    gk = (G * whole).sum(axis=0)
    gm = (gamma(N + d_in + r + c) + rho) * gk / n  # (verify.8)
    if case.norm_gradient:
        V = W + s * B @ A
        gV = ((gamma(N + d_in + d_out + 2 * r + 2 * c) + 4 * rho) * gk * m / n**3)[:, None] * V  # (verify.10)
        gA, gB, gW = gA + s * B.T @ gV, gB + s * gV @ A.T, gW + gV
    found = {"y": y, "x": gx, "W": gW, "A": gA, "B": gB, "m": gm}
    found["b"] = gamma(N + FEW) * G.sum(axis=0)  # (verify.7)
    if case.scales_bias:
        found["b"] = (gamma(N + FEW) + rho) * Gk.sum(axis=0)
    found["bB"] = gamma(N + FEW) * s * (G * out).sum(axis=0)
    shapes = {name: value.shape for name, value in case.arrays().items()} | {"y": case.gy.shape}
    return {name: value.reshape(shapes[name]) for name, value in found.items() if name in shapes}


def masks(case: Case) -> tuple[HostArray, HostArray, HostArray]:
    """The masks on A's input, on P's input and on the update, tokens as rows; ones where there is none."""
    d_out, d_in = case.W.shape
    N = case.gy.size // d_out
    three = (case.input_mask, d_in), (case.product_mask, d_in), (case.output_mask, d_out)
    one, other, last = (
        np.ones((N, d)) if mask is None else mask.astype(np.float64).reshape(N, d) for mask, d in three
    )
    return one, other, last


def merged_bounds(case: Case, u: float) -> dict[str, HostArray]:
    """Return the largest error of a merged weight and bias that roundings of size u explain."""
    v = {name: np.abs(value).astype(np.float64) for name, value in case.arrays().items()}
    k, rho, _, _ = _magnitude(case, u)
    count = (case.A.shape[0] + FEW) * u
    size = v["W"] + abs(case.scaling) * v["B"] @ v["A"]
    bias = v.get("b", np.zeros(size.shape[0])) + abs(case.scaling) * v.get("bB", np.zeros(size.shape[0]))
    bias = (count + rho) * k * bias if case.scales_bias else count * bias
    return {"W": (count + rho[:, None]) * k[:, None] * size, "b": bias}


def _magnitude(case: Case, u: float) -> tuple[HostArray, HostArray, HostArray, HostArray]:
    """|k|, the relative uncertainty ρ of k, n and |m|, each (d_out,); 1, 0, 1, 1 without DoRA."""
    d_out, d_in = case.W.shape
    if case.m is None:
        return np.ones(d_out), np.zeros(d_out), np.ones(d_out), np.ones(d_out)
    W, A, B, m = (value.astype(np.float64) for value in (case.W, case.A, case.B, case.m))
    s, r = case.scaling, A.shape[0]
    V = W + s * B @ A
    n = np.linalg.norm(V, axis=1)
    error = (r + 4) * u * abs(s) * np.abs(B) @ np.abs(A) + 2 * u * (np.abs(W) + np.abs(V))  # of V's entries
    rho = (np.abs(V) * error).sum(axis=1) / n**2 + (d_in / 2 + 6) * u  # (verify.9)
    return np.abs(m) / n, rho, n, np.abs(m)
