"""Products of float32 by sums of bfloat16, which a processor's matrix unit multiplies.  See specs/speed.md.

A float32 number is the sum of three bfloat16 numbers; products of two bfloat16 numbers are exact in float32.
"""

import numpy as np

from ..backend import HostArray
from .buffers import empty
from .cblas import Multiply

LEAST = 128  # entries along each axis of a product that is worth splitting both its factors
WIDE = 1024  # columns of a product that is worth splitting its left factor in three
ENTRIES = 1 << 17  # that are split at a time, in the core's own cache


def parts(x: HostArray, count: int) -> list[HostArray] | None:
    """x as `count` bfloat16 arrays that add up to it, the largest first; None where one is not finite.

    x : (m, k) float32, of any strides. Three add up to x itself, two to within 2⁻¹⁶ of it: (speed.18).
    """
    if x.flags.f_contiguous and not x.flags.c_contiguous:
        turned = parts(x.T, count)
        return None if turned is None else [piece.T for piece in turned]
    found = [
        empty(x.shape, "bfloat16") for _ in range(count)
    ]  # a name that NumPy knows: `stored` was proved by it
    step = max(1, ENTRIES // x.shape[1])
    wide, rest = (empty((min(step, len(x)), x.shape[1]), "float32") for _ in range(2))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(x), step):
            here = slice(start, start + step)
            left = x[here]
            for k, piece in enumerate(found):
                piece[here] = left
                if k + 1 < count:
                    wide[: len(left)] = piece[here]
                    left = np.subtract(left, wide[: len(left)], out=rest[: len(left)])  # exact
            if not np.isfinite(left).all():
                return None
    return found


def mixed(stored: Multiply, a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> bool:
    """out ← α·ab + β·out, as accurate as in float32, of float32 a and bfloat16 b; (speed.19).

    a : (m, k), b : (k, n), out : (m, n) float32;  stored : a product of bfloat16 matrices into float32
    Returns whether it could: False, with nothing written, where a or b is not finite, or where splitting a
    costs more than three products save.
    """
    pieces = parts(a, 3) if b.shape[1] >= WIDE else None
    if pieces is None or not (b.view(np.uint16) & 0x7F80 != 0x7F80).all():
        return False
    for piece in reversed(pieces):  # the smallest first
        if piece is pieces[0] or piece.view(np.uint16).any():
            stored(piece, b, out, alpha, beta)
            beta = 1.0
    return True


def split3(stored: Multiply, plain: Multiply) -> Multiply:
    """Products of float32 by three of bfloat16, off by up to 5e-5 of their terms: (speed.20), (speed.21).

    stored : a product of bfloat16 matrices into float32
    plain : what computes all others: float64, factors that are not finite, an axis shorter than 128
    """

    def multiply(a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> None:
        worth = out.dtype == np.float32 and min(*a.shape, b.shape[1]) >= LEAST
        left, right = (parts(x, 2) if worth else None for x in (a, b))
        if left is None or right is None:
            plain(a, b, out, alpha, beta)
            return
        for i, j in ((1, 0), (0, 1), (0, 0)):  # the smaller first
            stored(left[i], right[j], out, alpha, beta)
            beta = 1.0

    return multiply
