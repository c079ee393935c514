"""The GGUF format, written: one file, whole and at once.  Its numbers: specs/gguf.md.

The bytes are those of the package gguf 0.19.0 for the same keys and tensors in the same order.
"""

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, dtype_name, to_host
from ..errors import ConfigError, DtypeError
from .ggml import NUMBERS
from .gguf_header import ALIGNMENT, ARRAY, BOOL, MAGIC, MAX_AXES, MAX_KEY, MAX_NAME, SCALARS, STRING, WORDS
from .safetensors import show
from .whole import whole_file

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
KINDS = {word: number for number, word in WORDS.items() if number != ARRAY}
FLOATS = KINDS["float32"], KINDS["float64"]
Pair = tuple[
    str, Any
]  # the format's word for the kind of a value, as "float32" or "array of string"; the value


def write_gguf(
    path: str | os.PathLike[str], metadata: Mapping[str, Pair], tensors: Mapping[str, Array]
) -> None:
    """Write a file: at once, whole, or, where anything fails, not at all.

    metadata : by key, the word for the kind of a value, and the value
    tensors  : float32, float16 or bfloat16 arrays of 1 to 4 axes by name

    Raises DtypeError for another dtype, ConfigError for what the format cannot hold, and the system's OSError.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.gguf"
    ...     write_gguf(path, {"general.architecture": ("string", "llama")}, {})
    ...     path.read_bytes()[:8]
    b'GGUF\\x03\\x00\\x00\\x00'
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, (word, value) in metadata.items():
        head += _string(key, "key", MAX_KEY) + _value(key, word, value)
    offset = 0
    for name, tensor in tensors.items():
        dtype = dtype_name(tensor)
        if dtype not in DTYPES:
            raise DtypeError(f"{show(name)}: expected one of {', '.join(DTYPES)} in a GGUF file, got {dtype}")
        if not 1 <= tensor.ndim <= MAX_AXES:
            raise ConfigError(f"{show(name)}: expected 1 to {MAX_AXES} axes, got {tensor.ndim}")
        head += _string(name, "name", MAX_NAME - 1)
        head += struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
        head += struct.pack("<IQ", NUMBERS[DTYPES[dtype]], offset)
        offset += _padded(_nbytes(tensor))
    with whole_file(Path(path)) as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for tensor in tensors.values():
            raw = _little(tensor)
            file.write(raw)
            file.write(bytes(_padded(len(raw)) - len(raw)))


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _nbytes(tensor: Array) -> int:
    return int(np.prod(tensor.shape)) * (4 if dtype_name(tensor) == "float32" else 2)


def _little(tensor: Array) -> bytes:
    host = np.ascontiguousarray(to_host(tensor))
    if dtype_name(tensor) == "bfloat16":
        host = host.view(np.uint16)
    return host.astype(host.dtype.newbyteorder("<"), copy=False).tobytes()


def _string(text: str, what: str, most: int = (1 << 63) - 1) -> bytes:
    raw = text.encode("utf-8")
    if not 1 <= len(raw) <= most and what:
        raise ConfigError(f"{what}: expected 1 to {most} bytes of UTF-8, got {len(raw)} in {show(text)}")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, word: str, value: Any) -> bytes:
    single = word.removeprefix("array of ")
    if single not in KINDS:
        raise ConfigError(f"{show(key)}: expected one of {', '.join(KINDS)}, or an array of one, got {word!r}")
    kind = KINDS[single]
    if single == word:
        return struct.pack("<I", kind) + _items(key, kind, [value])
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + _items(key, kind, value)


def _items(key: str, kind: int, items: Sequence[Any]) -> bytes:
    wanted = str if kind == STRING else bool if kind == BOOL else (int, float) if kind in FLOATS else int
    if not all(isinstance(item, wanted) and isinstance(item, bool) == (kind == BOOL) for item in items):
        raise ConfigError(f"{show(key)}: expected {WORDS[kind]}, got {show(items)}")
    if kind == STRING:
        return b"".join(_string(item, "") for item in items)
    try:
        return np.array(items, SCALARS[kind]).tobytes()
    except OverflowError:
        raise ConfigError(f"{show(key)}: expected {WORDS[kind]}, got {show(items)}") from None
