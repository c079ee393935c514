"""Variances of y and of each gradient, entry by entry.  Derivation: specs/bounds.md.

Each takes what prepared.py made, reads the parts before it there, and keeps its own for those after.
"""

from typing import Any

import numpy as np

from ..cases import HostArray
from .units import chain, largest


def of_y(t: Any) -> HostArray:
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


def of_x(t: Any) -> HostArray:
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


def of_A(t: Any) -> HostArray:
    """Variance of the gradient by A; keeps the terms it is the sum of."""
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


def of_B(t: Any) -> HostArray:
    """Variance of the gradient by B; keeps the terms it is the sum of."""
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


def of_W(t: Any) -> HostArray:
    """Variance of the gradient by W."""
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


def of_m(t: Any) -> HostArray:
    """Variance of the gradient by m."""
    out: HostArray = t.gk_var / t.n**2 + t.gm**2 * t.rho_n + 2 * t.u.stored(t.gm)  # (bounds.24)
    return out


def of_biases(t: Any) -> dict[str, HostArray]:
    """Variances of the gradients by b and bB."""
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
