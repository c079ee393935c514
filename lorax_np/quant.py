"""Weights in 4 bits, as NF4, and in 8: their codes, and the numbers these stand for.  Spec: specs/quant.md.

On the host, in pieces that stay in a core's cache, so that no copy of a whole weight is made but the result.
"""

from collections.abc import Iterator
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np

from .backend import FLOATS, Array, HostArray, all_finite, cast, dtype_name, namespace_of, quiet, to_host
from .errors import ConfigError, DtypeError, ShapeError

PIECE = 1 << 16  # entries that are handled at a time; a multiple of every block
BLOCKS = 32, 64, 128, 256, 512, 1024, 2048, 4096  # entries that share one absmax
NESTED = 256  # absmax that share one, where they are quantised themselves
LEAST = np.finfo(
    np.float32
).tiny  # normal, so that it has a reciprocal also where subnormal numbers are flushed to 0
MOST = np.finfo(np.float32).max / np.float32(128)  # an absmax above, 127 times, passes float32

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


class Absmax(NamedTuple):
    """Absmax in 8 bits each, as QLoRA's double quantisation keeps them: offset + table[codes]·absmax."""

    codes: HostArray  # (blocks,)        uint8
    absmax: HostArray  # (blocks/256,)    float32, rounded up
    offset: float  # their mean, a float32
    table: HostArray  # (256,)           float32


class NF4(NamedTuple):
    """A weight in 4 bits: LEVELS[code]·absmax, blocks of entries in C order sharing one absmax."""

    codes: HostArray  # (n/2,)           uint8, rounded up; two a byte, the first in the high four bits
    absmax: HostArray | Absmax  # (n/block,) float32, rounded up
    shape: tuple[int, ...]
    block: int = 64


class Int8(NamedTuple):
    """A weight in 8 bits: codes·absmax/127, the rows, or blocks of entries in C order, sharing one absmax."""

    codes: HostArray  # of the weight's shape, int8, -127 to 127
    absmax: HostArray  # (rows,) or (n/block,), float32
    block: int | None = None


# ---- 4 bits ------------------------------------------------------------------------------------------------


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
    host = _weight(W)
    codes = np.empty(-(-host.size // 2), np.uint8)
    absmax = np.empty(-(-host.size // block), np.float32)
    for at, values in _pieces(host, block):
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
    n, block = _count(q.shape), q.block
    absmax = expand_absmax(q.absmax) if isinstance(q.absmax, Absmax) else q.absmax
    _part("codes", q.codes, (-(-n // 2),), "uint8")
    _part("absmax", absmax, (-(-n // block),), "float32")
    out = _buffer(q.shape, out, dtype)
    flat, piece = out.reshape(-1), np.empty(min(PIECE, n + n % 2), np.float32)
    plain = flat.dtype == np.float32
    for at in range(0, n, PIECE):
        end = min(at + PIECE, n)
        even = plain and (end - at) % 2 == 0
        values = flat[at:end] if even else piece[: end - at + (end - at) % 2]  # a byte is two of them
        np.take(PAIRS, q.codes[at // 2 : -(-end // 2)], axis=0, out=values.reshape(-1, 2), mode="clip")
        _scale(values[: end - at], absmax[at // block : -(-end // block)], block)  # (quant.4)
        if not even:
            flat[at:end] = cast(values[: end - at], dtype_name(out))
    return out


def compress_absmax(q: NF4) -> NF4:
    """The same codes, with absmax in 8 bits each: less their mean, over the largest of 256.

    Half a byte an entry and 4 bytes in 64 become half a byte and 1 byte in 64. Raises as dequantise_nf4.
    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; specs/quant.md.
    """
    if isinstance(q.absmax, Absmax):
        return q
    offset = np.float32(np.mean(q.absmax, dtype=np.float64))
    rest, table = q.absmax - offset, dynamic_levels()
    count = -(-rest.size // NESTED)
    blocks = np.zeros((count, NESTED), np.float32)
    blocks.reshape(-1)[: rest.size] = rest
    top = np.abs(blocks).max(axis=1)
    x = np.clip(blocks * (np.float32(1) / np.maximum(top, LEAST))[:, None], -1, 1)
    codes = np.searchsorted((table[:-1] + table[1:]) / np.float32(2), x.reshape(-1)[: rest.size])
    return q._replace(absmax=Absmax(codes.astype(np.uint8), top, float(offset), table))  # (quant.5)


def expand_absmax(absmax: Absmax) -> HostArray:
    """The absmax, one for each block, in float32: table[codes]·absmax + offset.

    Raises ShapeError, DtypeError where the parts do not fit.
    """
    _part("absmax.codes", absmax.codes, (absmax.codes.size,), "uint8")
    _part("absmax.absmax", absmax.absmax, (-(-absmax.codes.size // NESTED),), "float32")
    _part("absmax.table", absmax.table, (256,), "float32")
    values = absmax.table.take(absmax.codes)
    _scale(values, absmax.absmax, NESTED)
    values += np.float32(absmax.offset)  # (quant.6)
    return values


def dynamic_levels() -> HostArray:
    """The 256 numbers of bitsandbytes' dynamic map, ascending, by the roundings that make its bits there.

    Of each power of ten 10⁰ to 10⁻⁶ with 64, 32, ... 1 numbers, the midpoints of as many equal parts of
    (0.1, 1), either sign; and 0 and 1.
    """
    found = [np.float32(0), np.float32(1)]
    for i in range(7):
        parts, low, high = 2**i, np.float32(0.1), np.float32(1)
        step, k = (high - low) / np.float32(parts), np.arange(parts + 1)
        up, down = float(low) + float(step) * k, float(high) - float(step) * (parts - k)
        ends = np.where(k < (parts + 1) // 2, up, down).astype(np.float32)  # torch.linspace's, from both ends
        middles = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))  # (quant.7)
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


# ---- 8 bits ------------------------------------------------------------------------------------------------


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
    host = _weight(W)
    wide = host.shape[-1] if block is None else block
    codes = np.empty(host.size, np.int8)
    absmax = np.empty(-(-host.size // wide), np.float32)
    for at, values in _pieces(host, wide):
        end = at + values.size
        top = np.maximum.reduceat(np.abs(values), np.arange(0, values.size, wide))  # (quant.8)
        if top.max() > MOST:
            raise ConfigError(
                f"W: expected numbers up to {MOST:.2g} to quantise to 8 bits, got {top.max():.2g}"
            )
        _scale(values, np.float32(127) * (np.float32(1) / np.maximum(top, 128 * LEAST)), wide)
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
    shape, n = tuple(q.codes.shape), _count(tuple(q.codes.shape))
    wide = shape[-1] if q.block is None else q.block
    _part("codes", q.codes, shape, "int8")
    _part("absmax", q.absmax, (-(-n // wide),), "float32")
    out = _buffer(shape, out, dtype)
    flat, step = out.reshape(-1), max(1, PIECE // wide) * wide
    codes = np.ascontiguousarray(q.codes).reshape(-1)
    plain = flat.dtype == np.float32
    for at in range(0, n, step):
        end = min(at + step, n)
        values = flat[at:end] if plain else np.empty(end - at, np.float32)
        values[...] = codes[at:end]
        _scale(values, q.absmax[at // wide : -(-end // wide)], wide)
        values *= np.float32(1 / 127)  # (quant.10)
        if not plain:
            flat[at:end] = cast(values, dtype_name(out))
    return out


# ---- parts of both -----------------------------------------------------------------------------------------


def _weight(W: Array) -> HostArray:
    """W on the host, where it is one that can be quantised."""
    namespace_of(W=W)
    if dtype_name(W) not in FLOATS or dtype_name(W) == "complex128":
        raise DtypeError(f"W: expected one of {', '.join(FLOATS[:-1])}, got {dtype_name(W)}")
    host = to_host(W)
    _count(host.shape)
    return host


def _count(shape: tuple[int, ...]) -> int:
    if not shape or prod(shape) == 0:
        raise ShapeError(f"W: expected (..., d) with axes of at least 1, got {shape}")
    return prod(shape)


def _pieces(W: HostArray, block: int) -> Iterator[tuple[int, HostArray]]:
    """W's entries in C order as float32 copies, whole blocks each but for the last; with where each begins."""
    row = W.size // len(W)
    whole = block // gcd(block, row)  # rows that end where a block does
    step = max(PIECE // row // whole, 1) * whole
    for start in range(0, len(W), step):
        with quiet():
            values = np.array(cast(W[start : start + step], "float32"), order="C").reshape(-1)
        if not all_finite(values):
            raise ConfigError("W: expected finite numbers, within the range of float32, to quantise")
        yield start * row, values


def _scale(values: HostArray, factors: HostArray, block: int) -> None:
    """Multiply each block of values, the last of which may be short, by its factor, in place."""
    whole = values.size // block * block
    blocks = values[:whole].reshape(-1, block)
    blocks *= factors[: len(blocks), None]
    if whole < values.size:
        values[whole:] *= factors[-1]


def _part(name: str, value: Any, shape: tuple[int, ...], dtype: str) -> None:
    if not isinstance(value, np.ndarray) or value.dtype.name != dtype:
        raise DtypeError(
            f"{name}: expected a NumPy array of {dtype}, got {getattr(value, 'dtype', type(value))}"
        )
    if value.shape != shape:
        raise ShapeError(f"{name}: expected {shape} set by shape and block, got {value.shape}")


def _buffer(shape: tuple[int, ...], out: HostArray | None, dtype: str | None) -> HostArray:
    """The array to write to: out where it fits, else a new one."""
    if dtype is not None and (dtype not in FLOATS or dtype == "complex128"):
        raise DtypeError(f"dtype: expected one of {', '.join(FLOATS[:-1])}, got {dtype!r}")
    if out is None:
        return np.empty(shape, cast(np.zeros(0, np.float32), dtype or "float32").dtype)
    if not isinstance(out, np.ndarray) or not out.flags.c_contiguous or not out.flags.writeable:
        raise ShapeError("out: expected a C-contiguous NumPy array that can be written to, got another")
    if out.shape != shape:
        raise ShapeError(f"out: expected {shape} set by q, got {out.shape}")
    if dtype_name(out) not in FLOATS[:-1] or dtype not in (None, dtype_name(out)):
        raise DtypeError(f"out: expected {dtype or 'a floating dtype'}, got {dtype_name(out)}")
    return out
