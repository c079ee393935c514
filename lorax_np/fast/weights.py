"""Products with a weight as it is stored: in one call, or widened a few rows at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..backend import HostArray, cast, dtype_name
from .buffers import empty
from .gemm import gemm, gemm_stored

ENTRIES = 1 << 17  # of a block of rows: a few of them stay in a core's own cache in float32


def to(x: Any, dtype: str) -> HostArray:
    """x in a dtype, in this machine's byte order; x itself where nothing changes."""
    found: HostArray = cast(x, dtype)
    return found if found.dtype.isnative else found.astype(dtype)


def row_blocks(x: HostArray, count: int | None = None) -> Iterator[slice]:
    """Slices of the rows of x : (count, d), or of so many like them, in blocks of about ENTRIES entries."""
    total, step = len(x) if count is None else count, max(4, ENTRIES // x.shape[1] // 4 * 4)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def wide_rows(W: HostArray, part: slice, dtype: Any) -> HostArray:
    """Some rows of W in a dtype that can be computed in, each of them contiguous."""
    block = to(W[part], dtype.name)
    return block if block.strides[1] == block.itemsize else np.ascontiguousarray(block)


def through(x: HostArray, W: HostArray, out: HostArray, beta: float = 0.0) -> None:
    """out ← x Wᵀ + β·out, as (linear.1).  out : (N, d_out) in the dtype computed in."""
    if gemm_stored(x, W.T, out, 1.0, beta):
        return
    x = to(x, dtype_name(out))
    if W.dtype == out.dtype:
        gemm(x, W.T, out, 1.0, beta)
        return
    for part in row_blocks(W):
        gemm(x, wide_rows(W, part, out.dtype).T, out[:, part], 1.0, beta)


def back_through(g: HostArray, W: HostArray, out: HostArray, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out ← α·g W + β·out, as (linear.3).  out : (N, d_in) in the dtype computed in."""
    if gemm_stored(g, W, out, alpha, beta):
        return
    g = to(g, dtype_name(out))
    if W.dtype == out.dtype:
        gemm(g, W, out, alpha, beta)
        return
    for part in row_blocks(W):
        gemm(g[:, part], wide_rows(W, part, out.dtype), out, alpha, beta)
        beta = 1.0


def product(a: HostArray, b: HostArray, alpha: float = 1.0) -> HostArray:
    """α·ab, in an array of its own."""
    out = empty((a.shape[0], b.shape[1]), dtype_name(a))
    gemm(a, b, out, alpha)
    return out


def add_product(a: HostArray, b: HostArray, out: HostArray, alpha: float = 1.0) -> None:
    """out ← α·ab + out, where the product may be of a narrower dtype than what it is added to."""
    if a.dtype == out.dtype:
        gemm(a, b, out, alpha, 1.0)
        return
    out += product(a, b, alpha)
