"""The parts of a layer on the CPU: products with the base, and the branch, whose mask is made by blocks."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..backend import HostArray, compute_dtype, dtype_name, to_host
from ..random import DropoutKey
from ..shapes import rows
from .buffers import empty
from .gemm import gemm
from .weights import add_product, back_through, row_blocks, through, to

# ---- the base ---------------------------------------------------------------------------------------------


def base_product(X: HostArray, W: HostArray, b: Any, narrow: str) -> HostArray:
    """xWᵀ + b in the dtype X computes in, rounded to `narrow`: (linear.1), (linear.2), (linear.6)."""
    y = empty((len(X), len(W)), compute_dtype(X))
    if b is not None:
        y[...] = to_host(b)
    through(X, W, y, 0.0 if b is None else 1.0)
    rounded(y, narrow)
    return y


def biases(b: Any, bB: HostArray | None, s: float, wide: str, narrow: str) -> Any:
    """b, and s·bB with it where nothing is rounded in between."""
    if bB is None or narrow != wider(wide, dtype_name(bB)):
        return b
    return s * bB if b is None else b + s * bB


def rounded(y: HostArray, narrow: str) -> None:
    """Round y to a storage dtype in place, a few rows at a time.  (linear.6)"""
    if y.dtype != narrow:
        for part in row_blocks(y):
            y[part] = to(y[part], narrow)


def base_back(G: HostArray, W: HostArray, both: str) -> HostArray:
    """gy W in the wider dtype: (linear.3)."""
    gx = empty((len(G), W.shape[1]), compute_dtype(G))
    back_through(G, W, gx)
    return to(gx, both)


# ---- the update -------------------------------------------------------------------------------------------


def dropped(X: HostArray, drop: Any, low: str) -> Iterator[tuple[slice, HostArray, HostArray, float]]:
    """Blocks of rows: which, what of the mask stands there, x times that, and the factor left to apply."""
    fill = drop.blocks() if isinstance(drop, DropoutKey) else None
    mask = X if fill else token_rows(drop)
    factor = factor_of(drop, low)
    parts = list(row_blocks(X))
    height = max((part.stop - part.start for part in parts), default=0)
    keeps, dropped = (empty((height, X.shape[1]), low) for _ in range(2))
    for part in parts:
        keep, xd = keeps[: part.stop - part.start], dropped[: part.stop - part.start]
        if fill is not None:
            fill(keep)
        elif mask.dtype == low:
            keep = mask[part]
        else:
            keep[...] = mask[part]
        np.multiply(keep, to(X[part], low), out=xd)
        yield part, keep, xd, factor


def factor_of(drop: Any, low: str) -> float:
    """What the blocks of _dropped lack: 1/(1 − p) as a mask of that dtype holds it, or 1 for a mask given."""
    return float(np.dtype(low).type(drop.scale)) if isinstance(drop, DropoutKey) else 1.0


def down(X: HostArray, A: HostArray, drop: Any) -> HostArray:
    """z = xd Aᵀ: (dropout.1), (lora.1)."""
    z = empty((len(X), len(A)), dtype_name(A))
    if drop is None:
        gemm(to(X, dtype_name(A)), A.T, z)
        return z
    for part, _, xd, factor in dropped(X, drop, dtype_name(A)):
        gemm(xd, A.T, z[part], factor)
    return z


def up(G: HostArray, z: HostArray, B: HostArray, s: float) -> tuple[HostArray, HostArray]:
    """gz = s·gy B and gB = s·gyᵀz: (lora.5) to (lora.7)."""
    gz, gB = empty(z.shape, dtype_name(z)), empty(B.shape, dtype_name(B))
    gemm(G, B, gz, s)
    gemm(G.T, z, gB, s)
    return gz, gB


def down_back(
    X: HostArray, gz: HostArray, A: HostArray, drop: Any, gx: HostArray | None, back: HostArray | None
) -> HostArray:
    """gA = gzᵀ xd; adds (gz A)∘mask to gx, and what DoRA has to add under the mask: (lora.8), (lora.9)."""
    gA, low = empty(A.shape, dtype_name(A)), dtype_name(A)
    if drop is None:
        gemm(gz.T, to(X, low), gA)
        if gx is not None:
            add_product(gz, A, gx)
        return gA
    if not len(X):
        gA[...] = 0
    for part, keep, xd, factor in dropped(X, drop, low):
        gemm(gz[part].T, xd, gA, factor, float(part.start > 0))
        if gx is not None:
            under = xd  # no longer needed
            if back is not None:
                under[...] = back[part]
            gemm(gz[part], A, under, factor, 0.0 if back is None else factor)
            under *= keep  # (dropout.2)
            gx[part] += under  # (linear.8)
    return gA


# ---- shapes and dtypes ----------------------------------------------------------------------------------


def token_rows(x: Any) -> HostArray:
    """x or a mask by rows of tokens: (N, d)."""
    return to_host(rows(x))


def wider(one: str, other: str) -> str:
    """Of float32 and float64, the one that holds both."""
    return "float64" if "float64" in (one, other) else one
