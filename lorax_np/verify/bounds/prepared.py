"""What the variances of a layer's results are made of: its arrays, and DoRA's norm with its gradient.

Arrays of tokens are (N, ...): leading axes are folded. Derivation: specs/bounds.md.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from ..cases import Case
from ..precision import Precision
from .units import unit


def prepared(case: Case, precision: Precision) -> Any:
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
    t.x2, t.xp2 = t.x * t.x, t.xp * t.xp
    # whether P may be the base's output, less b again
    t.reused = t.dora and t.other is None and t.b is not None and not t.scaled
    t.masked = 0.0 if t.mask is None else t.u.store  # variance of a relative error in x∘mask
    t.often = 2 * (t.u.store + t.u.sum)  # of a result and of s times it, and of two constants
    t.floor = t.u.least * (1 + t.s2)  # of a small result, and of s times it
    t.rho_n = t.rho = np.zeros(t.d_out)
    t.k, t.n = np.ones(t.d_out), np.ones(t.d_out)
    return t


def magnitude(t: Any) -> None:
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


def norm_gradient(t: Any) -> None:
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
