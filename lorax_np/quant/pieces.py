"""What both codecs share: a weight in pieces that stay in a core's cache, blocks of entries, and buffers."""

from collections.abc import Iterator
from math import gcd, prod
from typing import Any

import numpy as np

from ..backend import FLOATS, Array, HostArray, all_finite, cast, dtype_name, namespace_of, quiet, to_host
from ..errors import ConfigError, DtypeError, ShapeError

PIECE = 1 << 16  # entries that are handled at a time; a multiple of every block
BLOCKS = 32, 64, 128, 256, 512, 1024, 2048, 4096  # entries that share one absmax
LEAST = np.finfo(np.float32).tiny  # normal: it has a reciprocal also where subnormal ones are flushed to 0


def host_weight(W: Array) -> HostArray:
    """W on the host, where it is one that can be quantised."""
    namespace_of(W=W)
    if dtype_name(W) not in FLOATS or dtype_name(W) == "complex128":
        raise DtypeError(f"W: expected one of {', '.join(FLOATS[:-1])}, got {dtype_name(W)}")
    host = to_host(W)
    count(host.shape)
    return host


def count(shape: tuple[int, ...]) -> int:
    """How many entries a weight has; none is refused."""
    if not shape or prod(shape) == 0:
        raise ShapeError(f"W: expected (..., d) with axes of at least 1, got {shape}")
    return prod(shape)


def pieces(W: HostArray, block: int) -> Iterator[tuple[int, HostArray]]:
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


def scale(values: HostArray, factors: HostArray, block: int) -> None:
    """Multiply each block of values, the last of which may be short, by its factor, in place."""
    whole = values.size // block * block
    blocks = values[:whole].reshape(-1, block)
    blocks *= factors[: len(blocks), None]
    if whole < values.size:
        values[whole:] *= factors[-1]


def check_part(name: str, value: Any, shape: tuple[int, ...], dtype: str) -> None:
    """Refuse a part of what was quantised that does not fit the others."""
    if not isinstance(value, np.ndarray) or value.dtype.name != dtype:
        got = getattr(value, "dtype", type(value))
        raise DtypeError(f"{name}: expected a NumPy array of {dtype}, got {got}")
    if value.shape != shape:
        raise ShapeError(f"{name}: expected {shape} set by shape and block, got {value.shape}")


def buffer(shape: tuple[int, ...], out: HostArray | None, dtype: str | None) -> HostArray:
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
