"""GELU and its slope, block by block, in arrays of one block.  Equations: specs/activation.md."""

from math import pi, sqrt

import numpy as np

from ...backend import HostArray, to_host
from ...ops import activation as reference
from ...ops.erf import SINGLE_D, SINGLE_END, SINGLE_N
from ..buffers import empty

BLOCK = 32768  # entries: six arrays of them are 768 kB, which a core's own cache holds
HALF = sqrt(0.5)
# of erf's quotient, in powers of u² and not of u²/2; the numerator times the √½ that stands before it
ABOVE = [c * HALF ** (2 * i + 1) for i, c in enumerate(SINGLE_N)]
BELOW = [c * 0.5**i for i, c in enumerate(SINGLE_D)]


def gelu_sloped(u: HostArray) -> tuple[HostArray, HostArray]:
    """y = uΦ(u) and its slope, as ops.gelu_sloped, to rounding.  (activation.9) to (activation.11)

    >>> [each.round(5).tolist() for each in gelu_sloped(np.array([0.0, 1.0, -50.0], "float32"))]
    [[0.0, 0.8413400053977966, -0.0], [0.5, 1.0833200216293335, 0.0]]
    """
    if u.dtype != np.float32:
        y, slope = reference.gelu_sloped(u)
        return to_host(y), to_host(slope)
    flat = np.ascontiguousarray(u).reshape(-1)
    y, slope = empty(flat.shape, "float32"), empty(flat.shape, "float32")
    room = empty((3, min(BLOCK, flat.size)), "float32")
    for start in range(0, flat.size, BLOCK):
        part = slice(start, min(start + BLOCK, flat.size))
        _block(flat[part], y[part], slope[part], *room[:, : part.stop - start])
    return y.reshape(u.shape), slope.reshape(u.shape)


def gelu_forward(u: HostArray) -> HostArray:
    """y = uΦ(u), the bits of gelu_sloped's: a block that is computed again finds what it found."""
    return gelu_sloped(u)[0]


def _block(u: HostArray, y: HostArray, slope: HostArray, s: HostArray, t: HostArray, d: HostArray) -> None:
    """y and slope of a block; s, t and d are overwritten."""
    np.multiply(u, u, out=s)
    np.minimum(s, 2 * SINGLE_END**2, out=slope)
    _horner(ABOVE, slope, t)
    _horner(BELOW, slope, d)
    t /= d
    t += HALF
    t *= u
    np.tanh(t, out=t)  # erf(u/√2)  (activation.24)
    t += 1
    t *= 0.5  # Φ          (activation.9)
    np.multiply(u, t, out=y)  # uΦ         (activation.10)
    s *= -0.5
    np.exp(s, out=s)
    s *= 1 / sqrt(2 * pi)  # Φ′         (activation.11)
    s *= u
    np.add(t, s, out=slope)  # Φ + uΦ′    (activation.25)


def _horner(coefficients: list[float], s: HostArray, out: HostArray) -> None:
    """out ← Σ cᵢ sⁱ."""
    np.multiply(s, coefficients[-1], out=out)
    for c in coefficients[-2:0:-1]:
        out += c
        out *= s
    out += coefficients[0]
