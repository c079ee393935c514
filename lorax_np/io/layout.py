"""How a safetensors file is laid out when it is written: the order of its tensors, its header, and their bytes.

The layout is that of the safetensors library, release 0.8.0: tensors in falling order of their dtypes and then
by name, a header without spaces, padded with them to a multiple of 8. Where the library orders metadata by
chance, here it is by name. Derivation: specs/checkpoints.md.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..backend import Array, dtype_name
from ..errors import ConfigError, DtypeError
from .safetensors import BITS, MAX_AXES, MAX_HEADER, HostArray, show

# The format's words in the order in which the library lays tensors down, and NumPy's name for each.
ORDER = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
}
ORDER |= {"I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16"}
ORDER |= {"F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu"}
ORDER |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8"}
ORDER |= {"F6_E3M2": "", "F6_E2M3": "", "F4": "", "BOOL": "bool"}  # packed: no array has these
WORDS = {name: word for word, name in ORDER.items() if name}
PLACE = {word: place for place, word in enumerate(ORDER)}
PIECE = 1 << 24  # bytes of an array that are encoded at a time

Entry = tuple[str, tuple[int, ...]]  # the format's word for the dtype, and the shape


def word_of(array: Array, name: str = "array") -> str:
    """Return the format's word for an array's dtype, as "F32". Raises DtypeError where it has none."""
    found = WORDS.get(dtype_name(array))
    if found is None:
        raise DtypeError(f"{name}: expected one of {', '.join(WORDS)} in a safetensors file, got {array.dtype}")
    return found


def place_of(name: object, entry: Entry) -> int:
    """Where tensors of an entry's dtype stand, once the entry is one that a header can hold."""
    if not isinstance(name, str) or name == "__metadata__" or not _encodable(name):
        raise ConfigError(f"name: expected text in UTF-8 other than __metadata__, got {show(name)}")
    word, shape = entry
    if word not in PLACE:
        raise ConfigError(f"{show(name)}: dtype: expected one of {', '.join(ORDER)}, got {show(word)}")
    if len(shape) > MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise ConfigError(f"{show(name)}: shape: expected at most {MAX_AXES} ints of at least 0, got {shape}")
    if math.prod(shape) * BITS[word] % 8:
        raise ConfigError(f"{show(name)}: shape: expected whole bytes, got {shape} of {word}")
    return PLACE[word]


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def header_of(
    entries: Mapping[str, Entry], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The length and the header in bytes, and each tensor's begin and end after it."""
    found: dict[str, Any] = {}
    if metadata is not None:
        for text in (*metadata, *metadata.values()):
            if not isinstance(text, str) or not _encodable(text):
                raise ConfigError(f"metadata: expected text in UTF-8 by name, got {show(text)}")
        found["__metadata__"] = {str.__str__(key): str.__str__(metadata[key]) for key in sorted(metadata)}
    offsets, end = {}, 0
    for name, (word, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * BITS[word] // 8
        offsets[name] = begin, end
        found[name] = {"dtype": word, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise ConfigError(f"entries: expected a header of at most {MAX_HEADER} bytes, got {len(raw)}")
    return len(raw).to_bytes(8, "little") + raw, offsets


# ---- the tensors' bytes -------------------------------------------------------------------------------------


def pieces(array: HostArray) -> Iterator[HostArray]:
    """An array's bytes in C order and little-endian, as arrays of uint8 of about PIECE each."""
    if array.flags.c_contiguous and _little(array.dtype):
        yield array.reshape(-1).view(np.uint8)
    elif array.ndim > 1 and array.nbytes > PIECE and len(array) > 1:
        step = max(1, len(array) * PIECE // array.nbytes)
        for start in range(0, len(array), step):
            yield from pieces(array[start : start + step])
    else:
        flat = np.ascontiguousarray(array).reshape(-1)
        yield (flat if _little(flat.dtype) else flat.byteswap()).view(np.uint8)


def _little(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize == 1 or np.dtype("<u2").isnative == dtype.isnative
