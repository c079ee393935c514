"""The r largest singular triples of a weight, without the others: exact, or from a sketch.  See specs/init.md.

On the host, by NumPy's own products and factorisations, so that one pool of threads does all the work.
"""

from contextlib import suppress
from typing import NamedTuple

import numpy as np

from .backend import HostArray, quiet

SPARE = 16  # columns of a basis beyond r; specs/decisions/pissa.md
DEPTH = 5  # products with WᵀW before the basis is looked at
SEED = 0  # of the columns that the exact search starts from: one weight, one start


class Triples(NamedTuple):
    """W ≈ U·diag(S)·Vh, the best of that rank."""

    U: HostArray  # (d_out, r)  orthonormal columns
    S: HostArray  # (r,)        descending
    Vh: HostArray  # (r, d_in)   orthonormal rows


def largest(W: HostArray, r: int) -> Triples:
    """The r largest singular triples of W, exact: U : (d_out, r), S : (r,), Vh : (r, d_in).

    W : (d_out, d_in)   float32 or float64, finite;  r at most min(d_out, d_in). Nothing is checked.

    By a search in float64, whose error (init.18) bounds; by the SVD of all of W, in W's dtype, where W is small
    or its values lie so close to one another that the search does not end. One W gives one answer.
    Source: specs/init.md.

    >>> largest(np.diag([3.0, 8.0, 0.0]), 1).S.tolist()
    [8.0]
    """
    found = None
    if 2 * (DEPTH + 1) * (r + SPARE) <= min(W.shape):
        power = int(np.frexp(np.max(np.abs(W)))[1])  # squares of what is left neither overflow nor vanish
        M, unit = np.ldexp(W.astype(np.float64), -power), float(np.finfo(W.dtype).eps) / 2
        if len(W) >= W.shape[1]:
            found = _searched(M, r, unit)
        elif (turned := _searched(M.T, r, unit)) is not None:
            found = Triples(turned.Vh.T, turned.S, turned.U.T)
    if found is not None:
        return found._replace(S=np.ldexp(found.S, power))
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return Triples(U[:, :r], S[:r], Vh[:r])


def sketched(W: HostArray, r: int, rounds: int, rng: np.random.Generator) -> Triples:
    """Approximations to the same from r + 16 random columns, multiplied by W and Wᵀ `rounds` times more."""
    columns = min(r + SPARE, *W.shape)
    draw = rng.standard_normal((W.shape[1], columns)).astype(W.dtype)
    Q = _basis(W @ draw)  # (init.6)
    for _ in range(rounds):
        Q = _basis(W.T @ Q)
        Q = _basis(W @ Q)  # (init.7)
    U, S, Vh = np.linalg.svd(Q.T @ W, full_matrices=False)  # (init.8)
    return Triples(Q @ U[:, :r], S[:r], Vh[:r])


def _basis(Y: HostArray) -> HostArray:
    """Orthonormal columns that span those of Y, in its dtype.

    By the Cholesky factor of YᵀY in float64, twice; by QR where that cannot do it.  (init.22)
    """
    Q = Y.astype(np.float64)
    with suppress(np.linalg.LinAlgError), quiet():  # squares of float64 may overflow
        Q = Q @ np.linalg.inv(np.linalg.cholesky(Q.T @ Q)).T
        G = Q.T @ Q
        if np.abs(G - np.eye(len(G))).max() < 2.0**-6:
            return (Q @ np.linalg.inv(np.linalg.cholesky(G)).T).astype(Y.dtype)
    return np.linalg.qr(Y)[0]


def _searched(W: HostArray, r: int, unit: float) -> Triples | None:
    """By bases of what WᵀW makes of r + 16 columns; None after about the time of the whole SVD.

    W : (m, n) in float64, m ≥ n, its largest entry near 1;  unit : roundoff of the dtype it came in
    """
    m, n = W.shape
    c, eps = r + SPARE, 2.0**-52
    P, WP = (np.empty((length, (DEPTH + 1) * c), order="F") for length in (n, m))
    Q = np.linalg.qr(np.random.default_rng(SEED).standard_normal((n, c)))[0]
    for _ in range(n // (4 * c) - 1):  # (init.19)
        for k in range(0, DEPTH * c + 1, c):
            P[:, k : k + c] = Q
            WP[:, k : k + c] = W @ Q
            if k < DEPTH * c:
                Q = _orthonormal(W.T @ WP[:, k : k + c], P[:, : k + c])  # (init.16)
        U, S, Vh = np.linalg.svd(WP, full_matrices=False)
        Q = P @ Vh[:c].T
        U, S, V = U[:, :r], S[:r], Q[:, :r]  # (init.17)
        rest = np.linalg.norm(W.T @ U - V * S, axis=0).max()
        skew = np.abs(V.T @ V - np.eye(r)).max()
        if rest <= max(unit * S[-1], m * eps * S[0]) and skew <= m * eps:  # (init.18)
            return Triples(U, S, V.T)
    return None


def _orthonormal(Q: HostArray, P: HostArray) -> HostArray:
    """An orthonormal basis of Q's columns without what lies in P's, which are orthonormal.

    Three times: the first may leave nothing but roundings, of which QR makes columns of any direction; from
    those twice is enough.
    """
    for _ in range(3):
        Q = np.linalg.qr(Q - P @ (P.T @ Q))[0]
    return Q
