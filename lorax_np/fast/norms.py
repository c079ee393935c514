"""Row norms of W + s·BA without forming it, from sums in float64.  Derivation and cost: specs/speed.md."""

from typing import NamedTuple

import numpy as np

from ..backend import HostArray, dtype_name, quiet, to_host
from ..ops.dora import row_norm_forward
from .buffers import empty
from .gemm import gemm
from .weights import product, row_blocks, to, wide_rows

SEGMENT = 64  # entries of a row whose squares are summed in the row's own dtype, before float64 takes over
CANCELLED = 0.25  # where n² is below this part of ‖W‖² + ‖s·BA‖², the row is computed directly


class Norms(NamedTuple):
    """What the backward pass reads of the norms."""

    n: HostArray  # (d_out,)    float64
    T: HostArray  # (d_out, r)  WAᵀ


def row_norms(W: HostArray, A: HostArray, B: HostArray, s: float) -> Norms:
    """n of (dora.3) for V = W + s·BA, by n² = ‖W‖² + 2s·Σ T∘B + s²·Σ (BG)∘B by rows, T = WAᵀ, G = AAᵀ.

    W : (d_out, d_in)  float16, bfloat16, or the dtype of A and B, which is float32 or float64

    Rows where these terms cancel, overflow or vanish are computed from V itself, in float64. So is a row of
    zeros, whose n is NaN as in row_norm_forward.
    """
    T, squares = empty((W.shape[0], A.shape[0]), dtype_name(A)), np.empty(W.shape[0])
    wide_A, wide_B = A.astype("float64"), B.astype("float64")
    with quiet():
        for part in row_blocks(W):
            block = wide_rows(W, part, A.dtype)
            gemm(block, A.T, T[part])  # (speed.7)
            squares[part] = _squares(block)  # (speed.8)
        BG = product(wide_B, product(wide_A, wide_A.T))
        update = s * s * np.einsum("ij,ij->i", BG, wide_B)  # (speed.9)
        terms = squares + update
        n2 = terms + 2 * s * np.einsum("ij,ij->i", T, wide_B)  # (speed.10)
    least = np.finfo(A.dtype).tiny * 2.0**64
    good = (n2 >= CANCELLED * terms) & (squares >= least) & (n2 < np.finfo(A.dtype).max)
    n = np.sqrt(np.where(good, n2, 1.0))
    rest = np.flatnonzero(~good)
    for part in row_blocks(W, len(rest)):
        few = rest[part]
        V = to(W[few], "float64") + product(wide_B[few], wide_A, s)
        n[few] = to_host(row_norm_forward(V))  # (speed.11)
    return Norms(n, T)


def _squares(block: HostArray) -> HostArray:
    """‖W‖² by rows: short sums as they lie, the sums of these in float64."""
    whole = block.shape[1] - block.shape[1] % SEGMENT
    parts = block[:, :whole].reshape(len(block), -1, SEGMENT)
    found: HostArray = np.einsum("ijk,ijk->ij", parts, parts).sum(axis=1, dtype="float64")
    tail = block[:, whole:]
    return np.asarray(found + np.einsum("ij,ij->i", tail, tail))
