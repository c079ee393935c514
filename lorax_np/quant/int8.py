"""Weights in 8 bits: their codes, and the numbers these stand for.  Spec: specs/quant.md."""

from typing import NamedTuple

import numpy as np

from ..backend import Array, HostArray, cast, dtype_name
from ..errors import ConfigError
from .pieces import BLOCKS, LEAST, PIECE, buffer, check_part, count, host_weight, pieces, scale

MOST = np.finfo(np.float32).max / np.float32(128)  # an absmax above, 127 times, passes float32


class Int8(NamedTuple):
    """A weight in 8 bits: codes·absmax/127, the rows, or blocks of entries in C order, sharing one absmax."""

    codes: HostArray  # of the weight's shape, int8, -127 to 127
    absmax: HostArray  # (rows,) or (n/block,), float32
    block: int | None = None


def quantise_int8(W: Array, *, block: int | None = None) -> Int8:
    """W/absmax·127 rounded to whole numbers, ties to even, absmax the largest |W| of a row or of a block.

    W : (..., d)   as in quantise_nf4
    block : None for one absmax a row of the last axis, as LLM.int8 has it; else 32, 64, ... 4096 entries

    Raises ShapeError, DtypeError; ConfigError for NaN, infinity and another block.
    Source: Dettmers et al. 2022, arXiv:2208.07339; specs/quant.md.

    >>> q = quantise_int8(np.array([[2.0, -1.0], [0.0, 0.0]]))
    >>> q.codes.tolist(), q.absmax.tolist()
    ([[127, -64], [0, 0]], [2.0, 0.0])
    """
    if block is not None and block not in BLOCKS:
        raise ConfigError(f"block: expected None or one of {', '.join(map(str, BLOCKS))}, got {block!r}")
    host = host_weight(W)
    wide = host.shape[-1] if block is None else block
    codes = np.empty(host.size, np.int8)
    absmax = np.empty(-(-host.size // wide), np.float32)
    for at, values in pieces(host, wide):
        end = at + values.size
        top = np.maximum.reduceat(np.abs(values), np.arange(0, values.size, wide))  # (quant.8)
        if top.max() > MOST:
            raise ConfigError(
                f"W: expected numbers up to {MOST:.2g} to quantise to 8 bits, got {top.max():.2g}"
            )
        scale(values, np.float32(127) * (np.float32(1) / np.maximum(top, 128 * LEAST)), wide)
        codes[at:end] = np.rint(values)  # (quant.9)
        absmax[at // wide : -(-end // wide)] = top
    return Int8(codes.reshape(host.shape), absmax, block)


def dequantise_int8(q: Int8, out: HostArray | None = None, *, dtype: str | None = None) -> HostArray:
    """The numbers that 8-bit codes stand for, codes·absmax/127 in float32, rounded to the dtype.

    out, dtype : as in dequantise_nf4

    Raises ShapeError, DtypeError where the parts, or out, do not fit.
    Source: specs/quant.md.

    >>> dequantise_int8(quantise_int8(np.array([[127.0, -64.0]]))).tolist()
    [[127.0, -64.0]]
    """
    shape, n = tuple(q.codes.shape), count(tuple(q.codes.shape))
    wide = shape[-1] if q.block is None else q.block
    check_part("codes", q.codes, shape, "int8")
    check_part("absmax", q.absmax, (-(-n // wide),), "float32")
    out = buffer(shape, out, dtype)
    flat, step = out.reshape(-1), max(1, PIECE // wide) * wide
    codes = np.ascontiguousarray(q.codes).reshape(-1)
    plain = flat.dtype == np.float32
    for at in range(0, n, step):
        end = min(at + step, n)
        values = flat[at:end] if plain else np.empty(end - at, np.float32)
        values[...] = codes[at:end]
        scale(values, q.absmax[at // wide : -(-end // wide)], wide)
        values *= np.float32(1 / 127)  # (quant.10)
        if not plain:
            flat[at:end] = cast(values, dtype_name(out))
    return out
