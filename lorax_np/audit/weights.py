"""What an update does to the base: its share of W, rows without direction, and what 16 bits lose of it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..backend import HostArray

ENTRIES = 1 << 22  # of the rows that are looked at together
SAMPLE = 256  # rows whose merge is rounded


class Against(NamedTuple):
    """One site beside its weight."""

    relative: float  # ‖update‖/‖W‖
    lost: float  # ‖(round16(W + update) − round16(W)) − update‖/‖update‖
    zero_rows: tuple[int, ...]  # of W + s·BA
    k: tuple[float, float] | None  # under DoRA, the quartiles of m over the row norms


def against(W: HostArray, A: HostArray, B: HostArray, s: float, m: HostArray | None, bits: int) -> Against:
    """Compare in float64, some rows at a time. W : (d_out, n), A : (r, n), B : (d_out, r), m : (d_out,).

    bits : the significant bits of the dtype that is merged into, 8 for bfloat16 and 11 for float16
    """
    size = change = 0.0
    zero: list[int] = []
    ks: list[HostArray] = []
    error = seen = 0.0
    every = max(1, len(W) // SAMPLE)
    for start, rows in _blocks(W):
        w = rows.astype(np.float64)
        V = w + s * (B[start : start + len(w)] @ A)
        if m is not None:
            n = np.sqrt((V * V).sum(axis=1))
            zero += (start + np.flatnonzero(n == 0)).tolist()
            k = m[start : start + len(w)] / np.where(n == 0, 1, n)
            ks.append(k)
            V = k[:, None] * V
        update = V - w
        size, change = size + float((w * w).sum()), change + float((update * update).sum())
        some = slice(-start % every, None, every)
        stored = rounded(w[some], bits)
        off = (rounded(stored + update[some], bits) - stored) - update[some]
        error, seen = error + float((off * off).sum()), seen + float((update[some] ** 2).sum())
    quartiles = np.quantile(np.concatenate(ks), (0.25, 0.75)) if ks else None
    return Against(
        relative=float(np.sqrt(change / size)) if size else float("inf"),
        lost=float(np.sqrt(error / seen)) if seen else 0.0,
        zero_rows=tuple(zero),
        k=None if quartiles is None else (float(quartiles[0]), float(quartiles[1])),
    )


def _blocks(W: HostArray) -> Iterator[tuple[int, HostArray]]:
    step = max(1, ENTRIES // max(1, W.shape[1]))
    for start in range(0, len(W), step):
        yield start, W[start : start + step]


def rounded(values: HostArray, bits: int) -> HostArray:
    """Round to so many significant bits, ties to even; the range of exponents is left as it is.

    >>> rounded(np.array([1.00390625, 1.01171875]), 8).tolist()
    [1.0, 1.015625]
    """
    mantissa, exponent = np.frexp(values)
    found: HostArray = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return found
