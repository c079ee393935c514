"""What a judge and its worker say to each other: requests as the judge's own pickles, answers as plain bytes.

A request is a length in 8 bytes, and a pickle: the worker trusts the judge. An answer is 4 bytes of a mark, the
lengths of a JSON header and of a body in 4 and 8 bytes, the header, and the body, which holds arrays one after
the other. Nothing that a subject wrote is ever unpickled, and every number is checked before it is used.
"""

import importlib
import io
import json
import math
import pickle
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..batteries.tensors import Crash, by_name
from ..cases import HostArray

Read = Callable[[int], bytes]  # exactly so many bytes, or fewer at the end of the stream

MARK = b"lxn1"
HEAD = struct.Struct("<4sIQ")
MAX_HEADER = 1 << 20  # bytes of JSON
MAX_AXES = 64
DTYPE = re.compile(r"[<>|=]?[biufc]\d{1,2}|bfloat16")
SLACK = 1 << 20  # bytes that any answer may take


class Damaged(Exception):
    """A stream that ends, or goes on, where it must not."""


class Excess(Exception):
    """More than an answer may take."""


# ---- requests ----------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Pickles as usual, and keeps the layout of arrays that are strided or read-only."""

    def reducer_override(self, value: Any) -> Any:
        """How one object is pickled."""
        if type(value) is not np.ndarray or (value.flags.c_contiguous and value.flags.writeable):
            return NotImplemented
        how = (value.tobytes(), value.dtype, value.shape, value.strides, value.flags.writeable)
        return laid_out, how


def laid_out(
    raw: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], writeable: bool
) -> HostArray:
    """An array of these values and strides, in memory of its own."""
    reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)] if 0 not in shape else []
    low, high = sum(min(0, r) for r in reach), sum(max(0, r) for r in reach) + dtype.itemsize
    value: HostArray = np.ndarray(shape, dtype, bytearray(high - low), -low, strides)
    value[...] = np.frombuffer(raw, dtype).reshape(shape)
    value.flags.writeable = writeable
    return value


def request_bytes(request: Any) -> bytes:
    """A request as it goes over the pipe."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=5).dump(request)
    raw = stream.getvalue()
    return len(raw).to_bytes(8, "little") + raw


def read_request(read: Read) -> tuple[Any, int]:
    """The next request, and the bytes that its answer may take. Raises EOFError where there is none."""
    head = read(8)
    if len(head) < 8:
        raise EOFError
    length = int.from_bytes(head, "little")
    return pickle.loads(read(length)), room(8 + length)


def arrays_of(arguments: tuple[Any, ...]) -> dict[str, HostArray]:
    """Every array among the arguments of a call, cases opened, by a name that both processes give it."""
    found = {}
    for i, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray):
            found[str(i)] = argument
        elif hasattr(argument, "arrays"):
            found |= {f"{i}.{name}": value for name, value in argument.arrays().items()}
    return found


# ---- answers -----------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What a worker says of one call.

    state : hello, answer, absent or raised;  kind, text : of an exception;  value : what the method returned
    written : arguments that the subject wrote to, as they are now;  more : of a hello, what the subject offers
    """

    state: str
    kind: str = ""
    text: str = ""
    value: Any = None
    written: dict[str, HostArray] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


def room(sent: int) -> int:
    """How many bytes the answer to a request of so many may take: far more than any right one does."""
    return 16 * sent + SLACK


def answer_bytes(answer: Answer, limit: int) -> list[bytes]:
    """An answer as it goes over the pipe. Raises Excess where its arrays take more than limit bytes."""
    arrays: list[HostArray] = []
    tree = _tree(answer.value, arrays, limit)
    written = {name: _tree(value, arrays, limit) for name, value in answer.written.items()}
    header = {
        "state": answer.state,
        "kind": answer.kind[:200],
        "text": answer.text[:2000],
        "value": tree,
        "written": written,
        "more": answer.more,
        "arrays": [[_dtype_name(array), list(array.shape)] for array in arrays],
    }
    text, body = json.dumps(header).encode(), [array.tobytes() for array in arrays]
    if len(text) > MAX_HEADER:
        raise Excess(f"{len(text)} bytes of names, at most {MAX_HEADER} are taken")
    return [HEAD.pack(MARK, len(text), sum(map(len, body))), text, *body]


def _tree(value: Any, arrays: list[HostArray], limit: int) -> Any:
    """What a method returned as JSON: an array by its number, a dict, a pair, null, or the name of a type."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {"dict": [[str(name), _tree(part, arrays, limit)] for name, part in value.items()]}
    if isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], dict | None):
        return {"pair": [_tree(part, arrays, limit) for part in value]}
    size = _size(value)
    taken = sum(array.nbytes for array in arrays)
    if size is not None and taken + size > limit:
        raise Excess(f"an array of shape {tuple(value.shape)}, {size} bytes or more; at most {limit} are taken")
    try:
        array = by_name("", {"": None if isinstance(value, tuple) else value}, ("",)).get("")
    except Crash:
        array = None
    if array is None or not DTYPE.fullmatch(_dtype_name(array)):
        return {"type": type(value).__name__}
    if taken + array.nbytes > limit:
        raise Excess(f"{array.dtype} of shape {array.shape}, {array.nbytes} bytes; at most {limit} are taken")
    arrays.append(array)
    return {"array": len(arrays) - 1}


def _size(value: Any) -> int | None:
    """The least bytes that an array of any library takes, before anything is copied."""
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or not all(isinstance(n, int) for n in shape):
        return None
    return math.prod(shape) * (value.itemsize if isinstance(value, np.ndarray) else 1)


def _dtype_name(array: HostArray) -> str:
    return "bfloat16" if array.dtype.name == "bfloat16" else array.dtype.str


def read_answer(read: Read, limit: Callable[[], int]) -> Answer:
    """The next answer. Raises EOFError at the end of the stream, Damaged for what is no answer."""
    head = read(HEAD.size)
    if not head:
        raise EOFError
    if len(head) < HEAD.size or not head.startswith(MARK):
        raise Damaged(f"expected an answer, got {head[:8]!r}")
    _, length, size = HEAD.unpack(head)
    if length > MAX_HEADER or size > limit():
        raise Damaged(f"expected at most {limit()} bytes, got an answer of {length} and {size}")
    text, body = read(length), read(size)
    if len(text) < length or len(body) < size:
        raise Damaged("the answer ends before its end")
    try:
        return _answer(json.loads(text), body)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, AttributeError) as error:
        raise Damaged(f"the answer is garbled: {type(error).__name__}") from None


def _answer(header: dict[str, Any], body: bytes) -> Answer:
    arrays, begin = [], 0
    for name, shape in header["arrays"]:
        if not DTYPE.fullmatch(name) or len(shape) > MAX_AXES:
            raise ValueError(name)
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(shape)
        dtype = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
        end = begin + math.prod(shape) * dtype.itemsize
        if end > len(body):
            raise ValueError(end)
        arrays.append(np.frombuffer(body[begin:end], dtype).reshape(shape).copy())
        begin = end
    if begin != len(body):
        raise ValueError(begin)
    written = {str(name): _value(tree, arrays) for name, tree in header["written"].items()}
    state, kind, text = (str(header[name]) for name in ("state", "kind", "text"))
    return Answer(state, kind, text, _value(header["value"], arrays), written, dict(header["more"]))


def _value(tree: Any, arrays: list[HostArray]) -> Any:
    if tree is None:
        return None
    ((form, content),) = tree.items()
    if form == "array":
        return arrays[content]
    if form == "dict":
        return {str(name): _value(part, arrays) for name, part in content}
    if form == "pair":
        return tuple(_value(part, arrays) for part in content)
    return stranger(str(content))


def stranger(type_name: str) -> Any:
    """An object of a type of this name that refuses to be an array."""

    def refuse(self: Any, *arguments: Any, **named: Any) -> Any:
        raise TypeError("no array")

    return type(type_name[:80] or "object", (), {"__array__": refuse})()


def exactly(read: Callable[[int], bytes], n: int) -> bytes:
    """So many bytes from a reader that may give fewer at once; fewer only where the stream ends."""
    parts: list[bytes] = []
    while n > 0 and (part := read(min(n, 1 << 20))):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
