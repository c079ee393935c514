"""Arrays to a safetensors file: the whole format in one page, for what the harness hands to other programs.

A file is a little-endian length n in 8 bytes, n bytes of JSON, and the tensors' bytes, little-endian in C
order, which tile the rest. Equal tensors and metadata give equal bytes; open_safetensors reads it.
Source: https://huggingface.co/docs/safetensors, section Format.
"""

import json
import sys
from collections.abc import Mapping

import numpy as np

from .. import DtypeError
from .cases import HostArray

ALIGNMENT = 8  # bytes: the tensors begin at a multiple of it
WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
WORDS |= {f"{kind}int{bits}": f"{kind.upper() or 'I'}{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)}


def encode(tensors: Mapping[str, HostArray], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file that holds some arrays, widest elements first and then by name.

    Widest first keeps each array aligned to its elements: the format allows no holes between them.
    Raises DtypeError for a dtype that the format has no word for.

    >>> data = encode({"w": np.ones((1, 2), np.float32)}, {"made by": "hand"})
    >>> len(data) % 8, data[-8:].hex()
    (0, '0000803f0000803f')
    """
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    body = bytearray()
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if value.dtype.name not in WORDS:
            raise DtypeError(f"{name}: expected a dtype among {', '.join(WORDS)}, got {value.dtype.name}")
        raw = _little_endian(value)
        header[name] = {
            "dtype": WORDS[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def _little_endian(value: HostArray) -> bytes:
    raw = np.ascontiguousarray(value)
    swapped = raw.dtype.byteorder == ">" or (raw.dtype.byteorder == "=" and sys.byteorder == "big")
    return (raw.byteswap() if swapped else raw).tobytes()
