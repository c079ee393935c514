"""The 16-bit number that is nearest to an exact one, in integers: nothing is rounded twice on the way."""

from math import inf, ldexp
from typing import Any

import numpy as np

from ..cases import HostArray
from .exact import BITS

FORMATS = {"bfloat16": (8, -133, 127), "float16": (11, -24, 15)}  # bits, exponents of the least and the last


def _step(value: int, dtype: str) -> int:
    """The exponent of a number's last place, in units of 2**-BITS."""
    bits, least, _ = FORMATS[dtype]
    return max(abs(value).bit_length() - bits, BITS + least)


def _nearest(value: int, dtype: str) -> float:
    e = _step(value, dtype)
    whole, rest = divmod(abs(value), 1 << e)
    whole += 2 * rest + (whole & 1) > 1 << e  # ties to even
    found = ldexp(whole, e - BITS) if whole.bit_length() + e - BITS <= FORMATS[dtype][2] + 1 else inf
    return -found if value < 0 else found


def nearest(values: Any, dtype: str) -> HostArray:
    """Fixed-point numbers, each rounded once to the nearest of a dtype, in float64 that holds them.  (merge.9)

    >>> from lorax_np.verify.truths.exact import fixed
    >>> tie = fixed(np.array([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, 5 * 2.0**-134]))
    >>> nearest(tie, "bfloat16").tolist() == [1.0, 1.0078125, 2.0**-132]
    True
    """
    return np.asarray(np.frompyfunc(lambda v: _nearest(int(v), dtype), 1, 1)(values), dtype=np.float64)


def places(values: Any, dtype: str) -> HostArray:
    """The distance between a dtype's neighbours around each fixed-point number."""
    return np.asarray(np.frompyfunc(lambda v: ldexp(1, _step(int(v), dtype) - BITS), 1, 1)(values), np.float64)
