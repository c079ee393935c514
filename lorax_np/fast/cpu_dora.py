"""DoRA on the CPU: P + Q of (dora.7) formed once, and gy∘k a few features at a time."""

from typing import Any, NamedTuple

import numpy as np

from ..backend import HostArray, compute_dtype, dtype_name
from .buffers import empty
from .cpu_branch import base_back, base_product, down, dropped, factor_of, wider
from .gemm import gemm
from .norms import Norms, row_norms
from .weights import add_product, back_through, product, row_blocks, through, to

FEATURES = 256  # of gy that are multiplied by k at a time; about as many as BLAS adds up at a time itself


class DoraSaved(NamedTuple):
    """What DoRA's backward reads besides."""

    PQ: HostArray  # (N, d_out)  P + Q of (dora.7), in the dtype the adapter computes in
    norms: Norms


def magnified(
    X: HostArray,
    W: HostArray,
    b: Any,
    A: HostArray,
    B: HostArray,
    m: HostArray,
    s: float,
    drop: Any,
    narrow: str,
) -> tuple[HostArray, HostArray, DoraSaved]:
    """y, z, and what the backward reads: (dora.5) to (dora.7)."""
    low, wide = dtype_name(A), compute_dtype(X)
    norms = row_norms(W, A, B, s)
    k, c = (m / norms.n).astype(low), ((m - norms.n) / norms.n).astype(low)
    PQ = empty((len(X), len(W)), low)
    if drop is None:
        xd, factor = to(X, low), 1.0
    else:
        xd, factor = empty(X.shape, low), factor_of(drop, low)
        for part, _, block, _ in dropped(X, drop, low):
            xd[part] = block * factor
    z = down(xd, A, None)
    through(xd, W, PQ)
    if drop is None and narrow == wide == low:
        gemm(z, B.T, PQ, s, 1.0)
        y = empty(PQ.shape, low)
        for part in row_blocks(PQ):  # k∘(P + Q) + b
            np.multiply(PQ[part], k, out=y[part])
            if b is not None:
                y[part] += b
    else:
        y = to(base_product(X, W, b, narrow), wider(wide, low))
        for part in row_blocks(PQ):
            y[part] += c * PQ[part]
        add_product(z, (k[:, None] * B).T, y, s)
        gemm(z, B.T, PQ, s, 1.0)
    return y, z, DoraSaved(PQ, norms)


def total(G: HostArray, PQ: HostArray) -> HostArray:
    """gk = Σ gy∘(P + Q), the sums of blocks in float64: (dora.10)."""
    gk = np.zeros(G.shape[1])
    for part in row_blocks(G):
        gk += np.einsum("ij,ij->j", G[part], PQ[part])
    return gk


def magnified_back(
    G: HostArray, W: HostArray, k: HostArray, c: HostArray, drop: Any, wide: str, low: str, both: str
) -> tuple[HostArray, HostArray | None]:
    """What of gx comes through W: all of it, or what the mask leaves alone and what it does not, (dora.14)."""
    Gl = to(G, low)
    if drop is None and wide == low:
        gx = empty((len(G), W.shape[1]), low)
        back_times(Gl, k, W, gx)
        return gx, None
    gx, under = base_back(G, W, both), empty((len(G), W.shape[1]), low)
    back_times(Gl, c, W, under)
    if drop is None:
        gx += under
        return gx, None
    return gx, under


def back_times(G: HostArray, v: HostArray, W: HostArray, out: HostArray) -> None:
    """out ← (gy∘v) W, where gy has many features some of them at a time, so that gy∘v is never whole."""
    step = FEATURES if G.shape[1] > 2 * FEATURES else G.shape[1]
    scaled = empty((len(G), step), dtype_name(G))
    for start in range(0, G.shape[1], step):
        part = slice(start, min(start + step, G.shape[1]))
        block = np.multiply(G[:, part], v[part], out=scaled[:, : part.stop - start])
        back_through(block, W[part], out, 1.0, float(start > 0))


def add_norm_gradient(
    gA: HostArray,
    gB: HostArray,
    gm: HostArray,
    m: Any,
    W: HostArray,
    A: HostArray,
    B: HostArray,
    s: float,
    norms: Norms,
) -> None:
    """Add what comes through the norm: (lora.13), (lora.14) of gV = e∘V, (dora.4); no V is formed."""
    e = (-(gm * m) / norms.n / norms.n).astype(A.dtype)[:, None]  # (dora.12), gn/n
    eB = e * B
    back_through(eB.T, W, gA, s, 1.0)  # (speed.12)
    gemm(product(eB.T, B), A, gA, s * s, 1.0)
    gB += s * e * norms.T  # (speed.13)
    gemm(eB, product(A, A.T), gB, s * s, 1.0)
