"""What one rounding costs, and a sum, and a product of three matrices.  Derivation: specs/bounds.md."""

from collections.abc import Iterable
from functools import reduce
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..cases import HostArray
from ..precision import Precision

_LEAST = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 2.0**-150, "float64": 0.0}


def largest(values: Iterable[HostArray]) -> HostArray:
    """Return the largest of some arrays, entry by entry."""
    return reduce(np.maximum, values)


class Unit(NamedTuple):
    """Variances of one rounding of a value of 1: in a sum, of a stored value, of an operand."""

    sum: float
    store: float
    operand: float
    drift: float  # of a truncated sum's course around its mean one, over the square of its length
    least: float  # of a stored value among the subnormal numbers, absolute, s being folded into it or not

    def stored(self, value: HostArray) -> HostArray:
        """Variance of storing a value once."""
        out: HostArray = self.store * np.square(value) + self.least  # (bounds.1)
        return out

    def summed(self, squares: HostArray, value: HostArray, K: int) -> HostArray:
        """Variance of a sum of K products, whose squares add up to squares and themselves to value."""
        rounded = self.sum * ((K + 1) / 2 * squares + K / 3 * np.square(value))  # (bounds.2)
        out: HostArray = rounded + (2 * self.operand + self.drift * K * K) * squares  # (bounds.3), (bounds.4)
        return out

    def added(self, *terms: HostArray) -> HostArray:
        """Variance of adding a few terms in the worst order, each partial sum being stored."""
        total: HostArray = self.stored(sum(terms[1:], terms[0]))
        for count in range(2, len(terms)):  # (bounds.5)
            partial = (np.square(sum(some[1:], some[0])) for some in combinations(terms, count))
            total = total + self.store * largest(partial)
        return total


def unit(p: Precision, s: float) -> Unit:
    """Return the variances of a profile's roundings, in a layer that scales by s."""
    truncates = p.rounding == "toward zero"
    return Unit(
        p.accumulate**2 / 3,
        p.store**2 / 3,
        p.operand**2 / 3,
        p.accumulate**2 / 12 if truncates else 0.0,
        _LEAST[p.dtype] ** 2 / 3 * max(1.0, 1 / s**2 if s else 1.0),
    )


class Chain(NamedTuple):
    """A product XYZ: its value and variance, and what relative errors of 1 in an array make of it."""

    value: HostArray
    variance: HostArray
    middle: HostArray  # errors of Y
    left: HostArray  # errors of XY, or of Z
    right: HostArray  # errors of YZ, or of X


def chain(u: Unit, X: HostArray, Y: HostArray, Z: HostArray) -> Chain:
    """Product of three matrices, from the left or from the right, with a constant folded in anywhere."""
    XY, YZ, X2, Y2, Z2 = X @ Y, Y @ Z, X * X, Y * Y, Z * Z
    value = XY @ Z
    m, l, r, v2 = X2 @ Y2 @ Z2, (XY * XY) @ Z2, X2 @ (YZ * YZ), value * value  # (bounds.6)
    K, J = Y.shape

    def order(K: int, J: int, one: HostArray, other: HostArray) -> HostArray:  # (bounds.7)
        sums = u.sum * ((K + 1) / 2 * m + (K / 3 + (J + 1) / 2) * one + J / 3 * v2)
        truncated = u.drift * (K * K * m + J * J * one)
        out: HostArray = sums + u.store * one + truncated + u.operand * (m + 2 * one + other)
        return out

    variance = np.maximum(order(K, J, l, r), order(J, K, r, l))
    variance += u.store * np.maximum(np.maximum(m, l), r)  # (bounds.8)
    if u.least:  # (bounds.40)
        x, z = X2.sum(axis=1)[:, None], Z2.sum(axis=0)
        variance += u.least * (x + z + x * z + (XY * XY).sum(axis=1)[:, None] + (YZ * YZ).sum(axis=0))
    return Chain(value, variance, m, l, r)
