"""Products of float32 by sums of bfloat16, which a processor's matrix unit multiplies.  See specs/speed.md.

A float32 number is the sum of three bfloat16 numbers; products of two bfloat16 numbers are exact in float32.
"""

from typing import Any

import numpy as np

from ..backend import HostArray, cast
from .cblas import Multiply

LEAST = 128  # entries along each axis of a product that is worth splitting its factors


def parts(x: HostArray, count: int) -> list[HostArray] | None:
    """x as `count` bfloat16 arrays that add up to it, the largest first; None where one is not finite.

    x : float32, of any shape and strides. Three add up to x itself, two to within 2⁻¹⁶ of it: (speed.18).
    """
    found: list[HostArray] = []
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(count):
            part: Any = cast(x, "bfloat16")
            found.append(part)
            x = x - part.astype(np.float32)  # exact
    return found if np.isfinite(x).all() else None


def mixed(stored: Multiply, a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> bool:
    """out ← α·ab + β·out, as accurate as in float32, of float32 a and bfloat16 b; (speed.19).

    a : (m, k), b : (k, n), out : (m, n) float32;  stored : a product of bfloat16 matrices into float32
    Returns whether it could: False, with nothing written, where a or b is not finite.
    """
    pieces = parts(a, 3)
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
