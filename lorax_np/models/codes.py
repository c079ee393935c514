"""One weight in few bits, wherever it lives: NF4, 8 bits by rows, or bfloat16.  See specs/qlora.md.

On the host quant/ does it. On a device the codes lie there, in whole blocks, and a few array expressions give
the same bits.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..backend import FLOATS, Array, HostArray, cast, compute_dtype, dtype_name, from_host, namespace_of
from ..errors import ConfigError, DtypeError, ShapeError
from ..kinds import nearest
from ..quant import (
    NESTED,
    NF4,
    PAIRS,
    Absmax,
    Int8,
    compress_absmax,
    dequantise_int8,
    dequantise_nf4,
    quantise_int8,
    quantise_nf4,
)

WAYS = "nf4", "int8", "bf16"


class Code(NamedTuple):
    """A weight of a linear layer, or of experts, in few bits.

    held : of the weight as (d_out, d_in), so that 8 bits have one scale for each output
    transposed : bool  whether a checkpoint has it as (d_in, d_out), and so do those who ask for it
    dtype : str        what it is written out in: float64 where it came so, else float32
    """

    held: Any  # NF4, Int8, or an array of bfloat16
    transposed: bool
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As the weight is stored."""
        held = self.held
        shape = held.shape if not isinstance(held, Int8) else held.codes.shape
        return tuple(int(n) for n in (shape[::-1] if self.transposed else shape))

    @property
    def nbytes(self) -> int:
        """Bytes that are held, but for the table that all doubly quantised absmax share."""
        if isinstance(self.held, Int8):
            return int(_bytes(self.held.codes) + _bytes(self.held.absmax))
        if not isinstance(self.held, NF4):
            return _bytes(self.held)
        absmax = self.held.absmax
        scales = (
            _bytes(absmax.codes) + _bytes(absmax.absmax) + 4 if isinstance(absmax, Absmax) else _bytes(absmax)
        )
        return _bytes(self.held.codes) + scales


def encode(W: Array, way: str, *, transposed: bool = False, block: int = 64, double: bool = False) -> Code:
    """A weight in few bits, in W's library.

    W : (..., d) as it is stored, floating and finite;  way : nf4, int8 or bf16
    block, double : of nf4, how many entries share one absmax, and whether absmax have 8 bits themselves

    Raises ConfigError for another way or block, and as quantise_nf4 does.

    >>> encode(np.eye(2), "nf4").nbytes, encode(np.eye(2), "int8").nbytes
    (6, 12)
    """
    check_way(way, double=double)
    plain = W.T if transposed else W
    dtype = compute_dtype(W)
    if way == "bf16":
        return Code(_narrow(plain), transposed, dtype)
    if way == "int8":
        rows = quantise_int8(plain)
        return Code(Int8(from_host(rows.codes, W), from_host(rows.absmax, W)), transposed, dtype)
    q = quantise_nf4(plain, block=block)
    q = compress_absmax(q) if double else q
    return Code(q if namespace_of(W=W) is np else _placed(q, W), transposed, dtype)


def decode(code: Code, out: HostArray | None = None) -> Array:
    """The numbers that a code stands for, as the weight is stored.

    out : (on the host) C-contiguous, written to and returned, in its dtype; None: a new array

    Raises ShapeError, DtypeError where out does not fit.

    >>> decode(encode(np.array([[4.0, -4.0, 0.0]]), "nf4")).tolist()
    [[4.0, -4.0, 0.0]]
    """
    if out is not None and code.transposed:
        if out.shape != code.shape:
            raise ShapeError(f"out: expected {code.shape}, set by the weight, got {out.shape}")
        out[...] = decode(code)
        return out
    held, dtype = code.held, code.dtype if out is None else None
    if not isinstance(held, NF4 | Int8):
        found = _widened(held, out, code.dtype)
    elif namespace_of(codes=held.codes) is not np:
        found = cast(_on_device(held), code.dtype)
    elif isinstance(held, NF4):
        found = dequantise_nf4(held, out, dtype=dtype)
    else:
        found = dequantise_int8(held, out, dtype=dtype)
    return found.T if code.transposed else found


def code_bytes(shape: Sequence[int], way: str, *, block: int = 64, double: bool = False) -> int:
    """Bytes of a weight (..., d) in few bits, as encode holds it.  (qlora.1) to (qlora.3)

    >>> code_bytes((576, 576), "nf4"), code_bytes((576, 576), "nf4", double=True)
    (186624, 171160)
    """
    check_way(way, double=double)
    n, blocks = prod(shape), -(-prod(shape) // block)
    if way == "bf16":
        return 2 * n
    if way == "int8":
        return n + 4 * (n // shape[-1])  # (qlora.1)
    scales = blocks + 4 * -(-blocks // NESTED) + 4 if double else 4 * blocks  # (qlora.2)
    return -(-n // 2) + scales  # (qlora.3)


def check_way(way: str, *, double: bool = False) -> None:
    """Raise ConfigError for another way to hold weights."""
    if way not in WAYS:
        raise ConfigError(f"way: expected one of {', '.join(WAYS)}, got {way!r}{nearest(str(way), WAYS)}")
    if double and way != "nf4":
        raise ConfigError(f"double: expected nf4, whose absmax it quantises, got {way}")


# ---- bfloat16 ----------------------------------------------------------------------------------------------


def _narrow(W: Array) -> Array:
    """W in bfloat16, C-contiguous, and itself where it is so: a file's pages stay where they are mapped."""
    found = cast(W, "bfloat16")
    return np.ascontiguousarray(found) if namespace_of(W=W) is np else found


def _widened(held: Array, out: HostArray | None, dtype: str) -> Array:
    if out is None:
        return cast(held, dtype)
    if out.shape != held.shape:
        raise ShapeError(f"out: expected {tuple(held.shape)}, set by the weight, got {out.shape}")
    if dtype_name(out) not in FLOATS:
        raise DtypeError(f"out: expected a floating dtype, got {dtype_name(out)}")
    out[...] = held
    return out


# ---- on a device -------------------------------------------------------------------------------------------


def _placed(q: NF4, like: Array) -> NF4:
    """Codes where `like` lives, the last block filled up."""
    codes = _filled(q.codes, -(-prod(q.shape) // q.block) * q.block // 2)
    if isinstance(absmax := q.absmax, Absmax):
        nested = _filled(absmax.codes, len(absmax.absmax) * NESTED)
        parts = [from_host(part, like) for part in (nested, absmax.absmax, absmax.table)]
        return q._replace(
            codes=from_host(codes, like), absmax=Absmax(parts[0], parts[1], absmax.offset, parts[2])
        )
    return q._replace(codes=from_host(codes, like), absmax=from_host(absmax, like))


def _filled(values: HostArray, count: int) -> HostArray:
    found = np.zeros(count, values.dtype)
    found[: len(values)] = values
    return found


def _on_device(q: NF4 | Int8) -> Array:
    """The numbers in float32, by the roundings of quant/."""
    xp = namespace_of(codes=q.codes)
    if isinstance(q, Int8):
        rows = xp.reshape(cast(q.codes, "float32"), (-1, q.codes.shape[-1]))
        return xp.reshape(rows * q.absmax[:, None] * (1 / 127), q.codes.shape)  # type: ignore[no-any-return]
    absmax: Any = q.absmax
    if isinstance(absmax, Absmax):
        spread = _scaled(absmax.table, absmax.codes, absmax.absmax, NESTED) + absmax.offset  # (quant.6)
        absmax = xp.reshape(spread, (-1,))[: -(-prod(q.shape) // q.block)]
    values = _scaled(from_host(PAIRS, q.codes), q.codes, absmax, q.block)  # (quant.4)
    return xp.reshape(xp.reshape(values, (-1,))[: prod(q.shape)], q.shape)  # type: ignore[no-any-return]


def _scaled(table: Array, codes: Array, factors: Array, wide: int) -> Array:
    """What codes stand for in a table, rows of so many by their factors."""
    xp = namespace_of(table=table)
    found: Array = xp.reshape(xp.take(table, cast(codes, "int32"), axis=0), (-1, wide)) * factors[:, None]
    return found


def _bytes(x: Array) -> int:
    """Bytes of an array."""
    return prod(x.shape) * (int(np.asarray(x).itemsize) if isinstance(x, np.ndarray) else _width(x))


def _width(x: Array) -> int:
    return {"uint8": 1, "int8": 1, "bfloat16": 2, "float32": 4}[dtype_name(x)]
