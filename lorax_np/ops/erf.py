"""The error function by array operations alone.  Derivation: specs/activation.md."""

from math import exp, factorial, pi, sqrt
from typing import Any

from ..backend import Array, namespace_of, real

SERIES = [2.0 / sqrt(pi) * (-1.0) ** n / (factorial(n) * (2 * n + 1)) for n in range(20)]
STEP = 0.5
NODES = [((k * STEP) ** 2, exp(-((k * STEP) ** 2))) for k in range(1, 14)]


def erf(u: Array) -> Array:
    """erf(u) = 2/√π ∫₀ᵘ e^(−t²) dt, of u : (...), float32, float64 or a complex step beside the real line.

    Source: specs/activation.md.

    >>> import numpy as np
    >>> erf(np.array([0.0, 0.5, -3.0, 9.0])).round(12).tolist()
    [0.0, 0.520499877813, -0.999977909503, 1.0]
    """
    xp = namespace_of(u=u)
    part: Any = real(u)
    left = part < 0.0
    a = xp.where(left, -u, u)
    near = abs(part) < 1.0
    one = xp.ones_like(u)
    x = xp.where(near, a, one)
    s = x * x
    inner = SERIES[-1] + 0.0 * s
    for c in SERIES[-2::-1]:
        inner = inner * s + c
    inner = inner * x
    x = xp.where(near, one, xp.where(abs(part) > 6.0, 6.0 * one, a))
    s = x * x
    total = 1.0 / s
    for node, weight in NODES:
        total = total + 2.0 * weight / (s + node)
    outer = 1.0 - ((STEP / pi) * x * xp.exp(-s) * total + 2.0 / (1.0 - xp.exp((2.0 * pi / STEP) * x)))
    right = xp.where(near, inner, outer)
    y: Array = xp.where(left, -right, right)
    return y
