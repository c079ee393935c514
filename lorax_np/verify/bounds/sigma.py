"""How far roundings usually carry an implementation: one standard deviation of the error, entry by entry.

Every rounding counts as an independent draw, uniform within half a unit of the last place. Through the linear
steps after it each draw reaches an output with a known weight, so variances add. Where an implementer may
choose the order of evaluation, or where to apply s, each entry gets the largest variance of the choices. Errors
that many terms share (of k = m/n in a row, of A over all tokens) are weighted before they are squared.
Derivation: specs/bounds.md. The worst case is in ceiling.py, a test for an error that a whole tensor shares in
slope.py, and what single roundings and products cost in units.py.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from ..precision import PRECISIONS, Precision
from .ceiling import ceiling
from .units import chain, largest, unit

__all__ = ["THRESHOLD", "ceiling", "deviations", "replay", "tolerance"]

THRESHOLD = 8.0
"""An entry further than this many deviations from the truth is no rounding: the only tuned constant.

A normal variable is that far out with probability 1.2e-15, so that among 10⁹ entries one false alarm has the
chance 1e-6. Sums of few roundings have shorter tails still: one alone stays within √3 deviations.
"""


def deviations(case: Case, precision: Precision) -> dict[str, HostArray]:
    """Return one standard deviation of the error of y and of the gradients by x, W, A, B, m, b and bB.

    Shapes are those of y = gy and of the arrays; a tensor is there where the case has it. float64.
    """
    _, found = replay(case, precision)
    shapes = {name: value.shape for name, value in case.arrays().items()} | {"y": case.gy.shape}
    return {name: np.sqrt(value).reshape(shapes[name]) for name, value in found.items() if name in shapes}


def replay(case: Case, precision: Precision) -> tuple[Any, dict[str, HostArray]]:
    """Return the steps of the layer with their variances, and those of the results, leading axes folded."""
    t = _prepare(case, precision)
    _magnitude(t)
    found = {"y": _forward(t), "x": _gx(t)}
    _norm(t)
    found |= {"W": _gW(t), "A": _gA(t), "B": _gB(t), **_biases(t)}
    if t.dora:
        found["m"] = t.gk_var / t.n**2 + t.gm**2 * t.rho_n + 2 * t.u.stored(t.gm)  # (bounds.24)
    if precision.rounding == "toward zero":
        for name, lean in _leanings(t, precision.accumulate / 2).items():
            found[name] = found[name] + lean * lean  # (bounds.30)
    return t, found


def tolerance(case: Case, precision: Precision) -> dict[str, HostArray]:
    """How far from a float64 truth a right implementation may be: 8 deviations of its own and 8 of the truth's.

    The truth counts with the terms of the norm wherever there is one, since holding it still costs them.
    """
    widest = replace(case, norm_gradient=case.m is not None)
    truth = deviations(widest, PRECISIONS["fp64"])
    alike = precision == PRECISIONS["fp64"] and widest.norm_gradient == case.norm_gradient
    own = truth if alike else deviations(case, precision)
    return {name: THRESHOLD * (value + truth[name]) for name, value in own.items()}


# ---- the parts: variances, in arrays of tokens (N, ...) ----------------------------------------------------


def _prepare(case: Case, precision: Precision) -> Any:
    """The case in float64, leading axes folded, and the products that several parts use."""
    v = {name: value.astype(np.float64) for name, value in case.arrays().items()}
    t = SimpleNamespace(
        u=unit(precision, case.scaling), s=case.scaling, s2=case.scaling**2, dora=case.m is not None
    )
    t.W, t.A, t.B, t.b, t.bB, t.m = (v.get(name) for name in ("W", "A", "B", "b", "bB", "m"))
    t.x, t.G = (v[name].reshape(-1, v[name].shape[-1]) for name in ("x", "gy"))
    t.mask, t.other, t.out = (
        None if mask is None else mask.astype(np.float64).reshape(len(t.x), mask.shape[-1])
        for mask in (case.input_mask, case.product_mask, case.output_mask)
    )
    t.xd = t.x if t.mask is None else t.x * t.mask
    t.xp = t.x if t.other is None else t.x * t.other  # what DoRA's P sees
    t.alike = t.out is None and (t.mask is None or case.dora == "peft")  # P and Q see one input
    t.scaled = case.scales_bias and t.b is not None
    t.alike = t.alike and not t.scaled
    t.full, t.N, (t.d_out, t.d_in), t.r = t.dora and case.norm_gradient, len(t.x), t.W.shape, len(t.A)
    t.W2, t.A2, t.B2, t.G2 = (a * a for a in (t.W, t.A, t.B, t.G))
    t.x2, t.xd2, t.xp2 = (a * a for a in (t.x, t.xd, t.xp))
    # whether P may be the base's output, less b again
    t.reused = t.dora and t.other is None and t.b is not None and not t.scaled
    t.masked = 0.0 if t.mask is None else t.u.store  # variance of a relative error in x∘mask
    t.often = 2 * (t.u.store + t.u.sum)  # of a result and of s times it, and of two constants
    t.floor = t.u.least * (1 + t.s2)  # of a small result, and of s times it
    t.rho_n = t.rho = np.zeros(t.d_out)
    t.k, t.n = np.ones(t.d_out), np.ones(t.d_out)
    return t


def _magnitude(t: Any) -> None:
    """V = W + s·BA, its norm n and k = m/n, with variances; rho is k's, relative."""
    t.gV = np.zeros_like(t.W)
    if not t.dora:
        return
    u, BA, t.BA2 = t.u, t.B @ t.A, t.B2 @ t.A2
    update = t.s * BA
    t.V = V = t.W + update
    inner = u.summed(t.BA2, BA, t.r) + u.store * t.BA2 + u.stored(BA)
    t.V_var = t.s2 * inner + u.stored(update) + u.stored(V)  # (bounds.11)
    V2 = V * V
    S, fourth = V2.sum(axis=1), (V2 * V2).sum(axis=1)
    S_var = 4 * (V2 * t.V_var).sum(axis=1) + np.square(t.V_var.sum(axis=1))  # (bounds.12)
    S_var += 4 * t.s2 * (u.store + u.operand) * (t.B2 * np.square(V @ t.A.T)).sum(axis=1)  # (bounds.13)
    S_var += 4 * u.sum * np.square((V * update).sum(axis=1))  # s itself, rounded
    S_var += u.sum * ((t.d_in + 1) / 2 * fourth + t.d_in / 3 * S * S) + u.drift * t.d_in**2 * fourth
    S_var += u.store * fourth + u.stored(S)  # (bounds.14)
    t.n = np.sqrt(S)
    t.rho_n = S_var / (4 * S * S) + 2 * u.stored(t.n) / S  # (bounds.15)
    t.k = t.m / t.n
    t.rho = t.rho_n + 2 * u.store + u.least / np.maximum(t.k * t.k, u.least or 1.0)  # (bounds.16)
    t.turn = (V * update).sum(axis=1) / S  # what a relative error of the update does to n


def _forward(t: Any) -> HostArray:
    """Variance of y; keeps P and Q with theirs."""
    u, s = t.u, t.s
    y0 = t.y0 = t.x @ t.W.T
    y0_var = u.summed(t.x2 @ t.W2.T, y0, t.d_in) + u.stored(y0)  # (bounds.9)
    low = chain(u, t.xd, t.A.T, t.B.T)
    L = t.L = s * low.value
    t.L_var = t.s2 * (low.variance + t.masked * low.right) + t.often * L * L + t.floor  # (bounds.10)
    if t.out is not None:
        L = t.L = L * t.out
        t.L_var = t.out * t.out * t.L_var + 2 * u.stored(L)  # (bounds.46)
    terms = [y0, L]
    extra = t.L_var
    if t.dora:
        c, k2, W2 = t.k - 1, t.k * t.k, t.W2.T
        t.P, t.P_var = y0, y0_var
        read: Any = 0.0
        again: Any = 0.0
        if t.reused:
            read, again = u.stored(y0 + t.b), u.stored(y0)
            t.P_var = y0_var + read + again  # (bounds.51)
        if t.other is not None:
            t.P, squares = t.xp @ t.W.T, t.xp2 @ W2
            t.P_var = u.summed(squares, t.P, t.d_in) + u.store * squares + u.stored(t.P)
        if t.scaled:
            t.P = t.P + t.b
            t.P_var = t.P_var + u.stored(t.P) + u.stored(t.b)  # (bounds.47)
        whole = t.P + L
        terms = [y0, c * t.P, t.k * L]
        once = c * c * t.P_var
        if t.other is None:
            once = np.maximum(c * c, k2 - 1) * (y0_var + read) + c * c * again
        if t.scaled:
            once = once + k2 * (t.P_var - y0_var if t.other is None else 0)
        extra = once + k2 * (t.L_var + u.stored(whole) + t.rho * whole * whole)  # (bounds.17)
        extra = extra + 2 * u.stored(terms[1]) + u.stored(terms[2])  # (bounds.18)
    if t.bB is not None:
        terms.append(np.broadcast_to(s * t.bB, y0.shape) * (1.0 if t.out is None else t.out))
        extra = extra + 2 * u.stored(terms[-1])
    if t.b is not None:
        terms.append(np.broadcast_to(t.b, y0.shape))
    out: HostArray = y0_var + extra + u.added(*terms) + t.r * u.sum * y0 * y0  # (bounds.19)
    return out


def _gx(t: Any) -> HostArray:
    """Variance of the gradient by x; keeps its parts."""
    u, mask, other = t.u, 1.0 if t.mask is None else t.mask, 1.0 if t.other is None else t.other
    t.Gk = t.G * t.k if t.dora else t.G
    t.Gk2, t.Go = t.Gk * t.Gk, t.Gk if t.out is None else t.Gk * t.out  # what reaches the update
    t.often_G = u.store * (t.dora + (t.out is not None))  # variance of a relative error in gy∘k∘mask
    base, squares = t.G @ t.W, t.G2 @ t.W2
    back = chain(u, t.Go, t.B, t.A)
    lo = t.s * back.value
    variance = t.s2 * (back.variance + t.often_G * back.right) + t.often * lo * lo + t.floor
    terms = [base, mask * lo]
    variance = mask * mask * variance
    if t.dora:
        G1 = t.G * (t.k - 1)
        side, W2 = G1 @ t.W, (G1 * G1) @ t.W2
        rounded = W2 if t.other is not None else np.maximum(W2, t.Gk2 @ t.W2)
        product = u.summed(W2, side, t.d_out) + 2 * u.store * rounded + u.stored(side)  # (bounds.20)
        product += u.least * t.W2.sum(axis=0)
        variance = variance + other * other * product
        if t.alike:
            variance += mask * mask * ((t.Gk2 * t.rho) @ (t.V * t.V))  # (bounds.21)
        else:  # (bounds.48)
            U, both = t.V - t.W, t.Gk * t.Go * t.rho
            variance += other * other * ((t.Gk2 * t.rho) @ t.W2) + 2 * other * mask * (both @ (t.W * U))
            variance += mask * mask * ((t.Go * t.Go * t.rho) @ (U * U))
        variance = variance + u.stored(other * side + mask * lo) + mask * other * u.least
        terms.append(other * side)
    t.gx_terms = terms
    variance = variance + sum(u.stored(term) for term in terms[1:])
    variance += u.summed(squares, base, t.d_out) + u.stored(base)
    out: HostArray = variance + u.added(*terms) + t.r * u.sum * base * base  # (bounds.22)
    return out


def _norm(t: Any) -> None:
    """The gradient by k, and by V through the norm, with variances; M = Gᵀxd is kept for what follows."""
    u = t.u
    t.M, t.M2 = t.G.T @ t.xp, t.G2.T @ t.xp2  # M2: of squared products
    t.Mk = t.Go.T @ t.xd  # what reaches the update, k in it
    if not t.dora:
        return
    k = t.k[:, None]
    t.Mp = k * t.M  # what reaches W under k
    MM, V2 = t.M * t.M, t.V * t.V
    whole = t.P + t.L
    q = t.G * whole
    q2, t.gk = (q * q).sum(axis=0), q.sum(axis=0)
    token = (t.G2 * (t.P_var + t.L_var + u.stored(whole))).sum(axis=0) + u.store * q2 + t.N * u.least
    token += u.summed(q2, t.gk, t.N) - 2 * u.operand * q2
    Mo = t.M if t.alike else (t.G if t.out is None else t.G * t.out).T @ t.xd
    if t.alike:
        products = (MM * V2).sum(axis=1)
        dense = (u.summed(t.M2, t.M, t.N) * V2 + MM * t.V_var + u.least * V2).sum(
            axis=1
        ) + 2 * u.store * products
        dense += u.summed(products, t.gk, t.d_in)
    else:  # (bounds.49)
        dense = np.zeros(t.d_out)
    shared = (Mo * Mo * t.s2 * (u.store + u.operand) * t.BA2 + MM * u.operand * t.W2).sum(axis=1)
    shared += (u.store + u.operand) * t.s2 * (t.B2 * np.square(Mo @ t.A.T)).sum(axis=1)
    shared += u.operand * q2
    t.gk_var = np.maximum(token, dense) + shared  # (bounds.23)
    t.gm = t.gk / t.n
    if t.full:
        t.c = -t.gk * t.m / t.n**3
        t.c_var = np.square(t.m / t.n**3) * t.gk_var + 4 * u.store * t.c**2  # (bounds.25)
        t.c_var = t.c_var + u.least * np.square(1 + (1 + np.abs(t.m)) / t.n + 1 / t.n**2)
        t.gV = t.c[:, None] * t.V
        t.gV_own = (np.square(t.c) + t.c_var)[:, None] * t.V_var + 2 * u.stored(t.gV)  # (bounds.26)
        t.joint = u.store * np.square(t.Mk + t.gV)


def _gA(t: Any) -> HostArray:
    u, B2 = t.u, t.B2.T
    c = chain(u, t.B.T, t.Go.T, t.xd)
    gA = t.s * c.value
    variance = c.variance + t.masked * c.left + t.often_G * c.middle
    if t.dora:
        row = np.square(t.Mk + 3 * t.gV)
        variance = variance + B2 @ (t.rho[:, None] * row)  # (bounds.27)
    variance = t.s2 * variance + t.often * gA * gA + t.floor
    t.gA_terms = [gA]
    if t.full:
        more, squares = t.B.T @ t.gV, B2 @ (t.gV * t.gV)
        own = B2 @ (t.c_var[:, None] * t.V * t.V + t.gV_own + t.joint) + u.summed(squares, more, t.d_out)
        own += u.store * squares + (u.store + u.operand) * np.square((t.B.T * t.c) @ t.B) @ t.A2 * t.s2
        t.gA_terms.append(t.s * more)
        variance += t.s2 * own + (2 * u.store + u.sum) * np.square(t.s * more) + t.floor  # (bounds.28)
        variance += t.d_out * u.sum * largest(np.square(term) for term in t.gA_terms)
    out: HostArray = variance + u.added(*t.gA_terms)
    return out


def _gB(t: Any) -> HostArray:
    u, A2 = t.u, t.A2.T
    c = chain(u, t.Go.T, t.xd, t.A.T)
    gB = t.s * c.value
    variance = t.s2 * (c.variance + t.masked * c.middle + t.often_G * c.right)
    variance = variance + t.often * gB * gB + t.floor
    t.gB_terms = [gB]
    if t.full:
        VA = t.V @ t.A.T
        more, squares = t.c[:, None] * VA, (t.gV * t.gV) @ A2
        own = t.c_var[:, None] * VA * VA + (t.gV_own + t.joint) @ A2 + u.summed(squares, more, t.d_in)
        own += u.store * squares
        own += (u.store + u.operand) * np.square(t.c)[:, None] * t.B2 @ np.square(t.A @ t.A.T) * t.s2
        t.gB_terms.append(t.s * more)
        variance += t.s2 * own + (2 * u.store + u.sum) * np.square(t.s * more) + t.floor  # (bounds.29)
        variance += t.d_in * u.sum * largest(np.square(term) for term in t.gB_terms)
    weight = gB if not t.full else gB + 3 * t.gB_terms[1]
    out: HostArray = variance + t.rho[:, None] * weight * weight + u.added(*t.gB_terms)
    return out


def _gW(t: Any) -> HostArray:
    u = t.u
    plain, squares = t.G.T @ t.x, t.G2.T @ t.x2
    plain_var = u.summed(squares, plain, t.N) + u.stored(plain)
    if not t.dora:
        out: HostArray = plain_var
        return out
    c = (t.k - 1)[:, None]
    c2, k2 = c * c, np.square(t.k)[:, None]
    terms = [plain, c * t.M] + ([t.gV] if t.full else [])
    often = (1 + (t.other is not None)) * u.store
    if t.other is None:
        c2 = np.maximum(c2, k2)
    own = u.summed(t.M2, t.M, t.N) + often * t.M2 + 2 * u.stored(t.M)
    variance = plain_var + c2 * own + u.least * t.xp2.sum(axis=0)  # (bounds.31)
    variance += t.rho[:, None] * np.square(t.Mp + 3 * t.gV) + u.added(*terms)  # (bounds.32)
    if t.full:
        variance += t.c_var[:, None] * t.V * t.V + t.gV_own
    out = variance
    return out


def _biases(t: Any) -> dict[str, HostArray]:
    u = t.u

    def once(G: HostArray) -> tuple[HostArray, HostArray, HostArray]:
        total, squares = G.sum(axis=0), (G * G).sum(axis=0)
        return total, squares, u.summed(squares, total, t.N) - 2 * u.operand * squares

    total, squares, variance = once(t.Gk if t.scaled else t.G)
    b = variance + u.stored(total)  # (bounds.33)
    if t.scaled:
        b = b + u.store * squares + t.rho * total * total  # (bounds.50)
    if t.reused:  # b's share of the base's output, less what DoRA takes off
        parts = [once(t.Gk), once(t.G * (t.k - 1))]
        own = sum(variance + u.stored(part) for part, _, variance in parts)
        b = np.maximum(b, own + u.stored(t.Gk).sum(axis=0) + u.stored(total))  # (bounds.52)
    total, squares, variance = once(t.Go)
    variance = variance + (u.store + t.often_G) * squares
    bB = t.s2 * variance + t.often * t.s2 * total * total + t.floor  # (bounds.34)
    return {"b": b, "bB": bB}


def _leanings(t: Any, half: float) -> dict[str, HostArray]:
    """What sums that are always truncated lose together; half of their unit roundoff for each term of each."""
    size = {
        "y": half * (t.d_in + t.r + 1) * np.abs(t.y0),
        "x": half * (t.d_out + t.r + 1) * np.abs(t.gx_terms[0]),
    }
    kappa = np.zeros(t.d_out)
    if t.dora:
        kappa = half * (t.d_in / 2 + 1 + t.r * np.abs(t.turn))  # (bounds.35)
    whole = (t.P if t.dora else 0.0) + t.L
    size["y"] = size["y"] + half * (t.d_in + t.r + 2) * np.abs(t.k * t.L) + kappa * np.abs(t.k * whole)
    adapter = sum(np.abs(term) for term in t.gx_terms[1:])
    size["x"] = size["x"] + half * (t.d_out + t.r + 2) * adapter
    if t.dora:
        size["y"] = size["y"] + half * (t.d_in + 1) * np.abs((t.k - 1) * t.P)
        mask, other = (1.0 if m is None else m for m in (t.mask, t.other))
        if t.alike:
            size["x"] = size["x"] + (np.abs(t.Gk) * kappa) @ np.abs(t.V) * mask
        else:
            size["x"] = size["x"] + (np.abs(t.Gk) * kappa) @ np.abs(t.W) * other
            size["x"] = size["x"] + (np.abs(t.Go) * kappa) @ np.abs(t.V - t.W) * mask
    shared = kappa[:, None] * np.abs(t.Mk + 3 * t.gV)
    longest = t.N + t.d_out + 2 * (t.d_in + t.r)
    size["A"] = half * (t.N + t.d_out + 2) * np.abs(t.gA_terms[0]) + abs(t.s) * np.abs(t.B.T) @ shared
    size["B"] = half * (t.N + t.d_in + 2) * np.abs(t.gB_terms[0])
    size["B"] = size["B"] + kappa[:, None] * np.abs(sum(t.gB_terms) + 2 * sum(t.gB_terms[1:]))
    size["W"] = half * (t.N + 1) * (np.abs(t.G.T @ t.x) + np.abs((t.k - 1)[:, None] * t.M))
    size["W"] = size["W"] + kappa[:, None] * np.abs((t.Mp if t.dora else t.M) + 3 * t.gV)
    if t.full:
        for name, term in (("A", t.gA_terms[1]), ("B", t.gB_terms[1]), ("W", t.gV)):
            size[name] = size[name] + half * longest * np.abs(term)
    size["b"] = half * (t.N + 1) * np.abs(t.G.sum(axis=0))
    size["bB"] = abs(t.s) * half * (t.N + 1) * np.abs(t.Go.sum(axis=0))
    if t.scaled:
        size["b"] = (half * (t.N + 1) + kappa) * np.abs(t.Gk.sum(axis=0))
    if t.reused:
        both = np.abs(t.Gk.sum(axis=0)) + np.abs((t.G * (t.k - 1)).sum(axis=0))
        size["b"] = np.maximum(size["b"], half * (t.N + 1) * both)
    if t.dora:
        size["m"] = (half * (t.N + t.d_in + t.r + 2) + kappa) * np.abs(t.gm)
    return size
