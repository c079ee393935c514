"""Normal numbers of torch's stream, by the words that torch spends on them and the roundings of its kernels.

From 16 numbers on torch takes float32 logarithms, sines and cosines by polynomials of the Cephes library
(Moshier 1989), each product fused with the sum behind it, on processors with AVX2; elsewhere its bits differ.
Source: Box and Muller 1958; specs/embedding.md.
"""

from collections.abc import Sequence
from math import pi
from typing import Any

import numpy as np

from ..backend import HostArray

FEW = 16  # torch draws fewer than these one by one, in float64
f32 = np.float32
# From the highest power down
LOG = (  # of (ln(1 + t) − t + t²/2)/t³
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
COS = 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2  # of (cos t − 1 + t²/2)/t⁴, in t²
SIN = -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1  # of (sin t − t)/t³, in t²
LN2 = -2.12194440e-4, 0.693359375  # small part and large part
QUARTER = -0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8  # −π/4 in three parts


def torch_normals(rng: np.random.Generator, counts: Sequence[int]) -> list[HostArray]:
    """Return standard normals in float32, as many as each count says, drawn one after another.

    From a Mersenne twister, the bits of torch's CPU kernels for tensors of these sizes, on a processor with
    AVX2; from any other generator, NumPy's own. Where a tensor of fewer than 16 leaves half a pair, the next
    such tensor of this call begins with it.

    >>> torch_normals(np.random.Generator(np.random.RandomState(0)._bit_generator), [16])[0][:2].tolist()
    [-1.1258398294448853, -1.152360200881958]
    """
    if not isinstance(rng.bit_generator, np.random.MT19937):
        return [np.asarray(rng.standard_normal(count), dtype=f32) for count in counts]
    found, left = [], np.empty(0)
    for count in counts:
        if count >= FEW:
            found.append(_many(rng.bit_generator, count))
            continue
        while len(left) < count:
            left = np.concatenate([left, _pair(rng.bit_generator)])
        found.append(left[:count].astype(f32))
        left = left[count:]
    return found


def _pair(words: np.random.MT19937) -> HostArray:
    """Two normals of four words, 53 bits of each two, the upper word first, in float64.  (embedding.14)"""
    high, low, high2, low2 = (int(word) for word in words.random_raw(4))
    u, v = (((a << 32 | b) & (1 << 53) - 1) * 2.0**-53 for a, b in ((high, low), (high2, low2)))
    radius = np.sqrt(-2.0 * np.log1p(-v))
    return np.asarray([radius * np.cos(2.0 * pi * u), radius * np.sin(2.0 * pi * u)])


def _many(words: np.random.MT19937, count: int) -> HostArray:
    """Sixteen at a time, of eight pairs; where some are left over, the last sixteen are drawn anew."""
    u = _unit(words, count)
    whole = count - count % 16
    found = np.empty(count, f32)
    found[:whole] = _box_muller(u[:whole].reshape(-1, 16)).reshape(-1)
    if whole < count:
        found[count - 16 :] = _box_muller(_unit(words, 16).reshape(1, 16)).reshape(-1)
    return found


def _unit(words: np.random.MT19937, count: int) -> HostArray:
    """24 bits of each word, uniform in [0, 1)."""
    return np.asarray((words.random_raw(count) & 0xFFFFFF) * 2.0**-24, dtype=f32)


def _box_muller(u: HostArray) -> HostArray:
    """√(−2 ln(1 − u))·cos 2πv and the same with sin, u the first eight of a row, v the rest.  (embedding.14)"""
    radius = np.sqrt(f32(-2) * _log(f32(1) - u[:, :8]))
    cosine, sine = _cos_sin(f32(2 * pi) * u[:, 8:])
    return np.concatenate([radius * cosine, radius * sine], axis=1)


def _fused(a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(f32)


def _horner(coefficients: Sequence[float], t: Any) -> Any:
    y = np.full_like(t, coefficients[0])
    for c in coefficients[1:]:
        y = _fused(y, t, f32(c))
    return y


def _log(x: Any) -> Any:
    """ln of numbers in (0, 1]: x = 2ᵉ·(1 + t), with 1 + t from √½ to √2."""
    bits = x.view(np.int32)
    e = ((bits >> 23) - 126).astype(f32)
    t = ((bits & 0x007FFFFF) | 0x3F000000).view(f32)  # from ½ to 1
    low = t < f32(0.5**0.5)
    e, t = e - np.where(low, f32(1), f32(0)), (t - f32(1)) + np.where(low, t, f32(0))
    z = t * t
    y = _fused(_horner(LOG, t) * t, z, e * f32(LN2[0]))
    return _fused(e, f32(LN2[1]), t + _fused(z, f32(-0.5), y))


def _cos_sin(x: Any) -> tuple[Any, Any]:
    """Cosine and sine of angles from 0 to 2π, by the eighth of the circle that they lie in."""
    eighth = ((x * f32(4 / pi)).astype(np.int32) + 1) & ~1
    turned = x
    for part in QUARTER:
        turned = _fused(eighth.astype(f32), f32(part), turned)
    z = turned * turned
    c = _fused(_horner(COS, z) * z, z, -(z * f32(0.5))) + f32(1)
    s = _fused(_horner(SIN, z) * z, turned, turned)
    straight = (eighth & 2) == 0
    sine, cosine = np.where(straight, s, c), np.where(straight, c, s)
    return np.where((eighth - 2) & 4 == 0, -cosine, cosine), np.where(eighth & 4 != 0, -sine, sine)
