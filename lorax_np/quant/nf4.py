"""Weights in 4 bits, as NF4: their codes, and the numbers these stand for.  Spec: specs/quant.md."""

from typing import NamedTuple

import numpy as np

from ..backend import Array, HostArray, cast, dtype_name
from ..errors import ConfigError
from .absmax import Absmax, compress, expand_absmax
from .pieces import BLOCKS, LEAST, PIECE, buffer, check_part, count, host_weight, pieces, scale

# The levels of NF4, exact in float32: quantiles of a normal, scaled to ±1, with a 0 of their own.
LEVELS: HostArray = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)
PAIRS: HostArray = np.stack(  # both levels of each byte, the high four bits first
    [np.repeat(LEVELS, 16), np.tile(LEVELS, 16)], axis=1
)
BOUNDS: HostArray = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)  # (quant.2)
CELLS = 1024  # to 1; no two bounds share a cell
BELOW: HostArray = np.searchsorted(  # bounds in the cells before each cell
    ((BOUNDS + np.float32(1)) * np.float32(CELLS)).astype(np.intp), np.arange(2 * CELLS + 1)
).astype(np.uint8)
NEXT: HostArray = np.append(BOUNDS, np.float32(np.inf))[BELOW]  # the bound within a cell, or one behind it


class NF4(NamedTuple):
    """A weight in 4 bits: LEVELS[code]·absmax, blocks of entries in C order sharing one absmax."""

    codes: HostArray  # (n/2,)           uint8, rounded up; two a byte, the first in the high four bits
    absmax: HostArray | Absmax  # (n/block,) float32, rounded up
    shape: tuple[int, ...]
    block: int = 64


def quantise_nf4(W: Array, *, block: int = 64) -> NF4:
    """The nearest levels of each block of W, divided by its largest absolute value.

    W : (..., d)   floating, finite; any library, any strides. float64 is rounded to float32 first
    block : 32, 64, ... 4096, entries in C order; the last block may be shorter

    An entry halfway between two levels takes the lower, and a block of zeros stays one. The codes are those of
    bitsandbytes. Raises ShapeError, DtypeError; ConfigError for NaN, infinity and another block.
    Source: Dettmers et al. 2023, arXiv:2305.14314; specs/quant.md.

    >>> q = quantise_nf4(np.array([[4.0, -4.0, 0.0], [1.0, 2.0, 3.0]]))
    >>> q.codes.tolist(), q.absmax.tolist(), q.shape
    ([240, 122, 206], [4.0], (2, 3))
    """
    if block not in BLOCKS:
        raise ConfigError(f"block: expected one of {', '.join(map(str, BLOCKS))}, got {block!r}")
    host = host_weight(W)
    codes = np.empty(-(-host.size // 2), np.uint8)
    absmax = np.empty(-(-host.size // block), np.float32)
    for at, values in pieces(host, block):
        blocks = np.resize(values, -(-values.size // block) * block).reshape(-1, block)
        blocks.reshape(-1)[values.size :] = 0.0
        top = np.abs(blocks).max(axis=1)  # (quant.1)
        levels = _levels(blocks * (np.float32(1) / np.maximum(top, LEAST))[:, None]).reshape(-1)
        bytes_ = levels[0::2] << 4 | levels[1::2]  # (quant.3)
        last = min(at + values.size, host.size)
        codes[at // 2 : -(-last // 2)] = bytes_[: -(-values.size // 2)]
        absmax[at // block : -(-last // block)] = top
    return NF4(codes, absmax, host.shape, block)


def _levels(x: HostArray) -> HostArray:
    """How many bounds are below each x in [−1, 1], which is the level nearest to it: by cell, and one look."""
    x = np.clip(x, np.float32(-1), np.float32(1))
    cell = ((x + np.float32(1)) * np.float32(CELLS)).astype(np.intp)
    found: HostArray = BELOW.take(cell) + (x > NEXT.take(cell))
    return found


def dequantise_nf4(q: NF4, out: HostArray | None = None, *, dtype: str | None = None) -> HostArray:
    """The numbers that NF4 codes stand for, LEVELS[code]·absmax in float32, rounded to the dtype.

    out : of q's shape, C-contiguous, written to and returned: one buffer for many weights;  None: a new array
    dtype : float32 unless said, or the dtype of out

    Raises ShapeError, DtypeError where the parts, or out, do not fit.
    Source: specs/quant.md.

    >>> dequantise_nf4(quantise_nf4(np.array([4.0, -4.0, 0.0]))).tolist()
    [4.0, -4.0, 0.0]
    """
    n, block = count(q.shape), q.block
    absmax = expand_absmax(q.absmax) if isinstance(q.absmax, Absmax) else q.absmax
    check_part("codes", q.codes, (-(-n // 2),), "uint8")
    check_part("absmax", absmax, (-(-n // block),), "float32")
    out = buffer(q.shape, out, dtype)
    flat, piece = out.reshape(-1), np.empty(min(PIECE, n + n % 2), np.float32)
    plain = flat.dtype == np.float32
    for at in range(0, n, PIECE):
        end = min(at + PIECE, n)
        even = plain and (end - at) % 2 == 0
        values = flat[at:end] if even else piece[: end - at + (end - at) % 2]  # a byte is two of them
        np.take(PAIRS, q.codes[at // 2 : -(-end // 2)], axis=0, out=values.reshape(-1, 2), mode="clip")
        scale(values[: end - at], absmax[at // block : -(-end // block)], block)  # (quant.4)
        if not even:
            flat[at:end] = cast(values[: end - at], dtype_name(out))
    return out


def compress_absmax(q: NF4) -> NF4:
    """The same codes, with absmax in 8 bits each: less their mean, over the largest of 256.

    Half a byte an entry and 4 bytes in 64 become half a byte and 1 byte in 64. Raises as dequantise_nf4.
    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; specs/quant.md.
    """
    return q if isinstance(q.absmax, Absmax) else q._replace(absmax=compress(q.absmax))
