"""The header of a GGUF file: numbers, keys, and where tensors lie, each checked before it is used."""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from ..errors import FormatError
from .ggml import TYPES, GgmlType
from .safetensors import PICKLE, show

MAGIC = b"GGUF"
VERSIONS = 2, 3
ALIGNMENT = 32  # where the file does not say otherwise
MAX_AXES = 4
MAX_NAME = 64  # bytes of a tensor's name, which ggml keeps in an array of so many
MAX_KEY = 65535  # bytes of a key
MOST = (1 << 63) - 1
# The kinds of values, by their number: the word, and NumPy's type where all values have one size.
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY, BOOL = 8, 9, 7
WORDS = {0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", 7: "bool"}
WORDS |= {8: "string", 9: "array", 10: "uint64", 11: "int64", 12: "float64"}


class Tensor(NamedTuple):
    """Where a tensor lies, and as what."""

    kind: GgmlType
    shape: tuple[int, ...]  # as NumPy has it, slowest axis first
    begin: int  # in bytes from the start of the file
    size: int


class Value(NamedTuple):
    """Where a value lies: its kind, how many, whether in an array, and its first byte."""

    kind: int
    items: int
    array: bool
    begin: int


def refuse(where: Path | str, wanted: str, came: object) -> NoReturn:
    """Raise FormatError: where, what was wanted, what came."""
    raise FormatError(f"{where}: expected {wanted}, got {came}") from None


def text(where: str, raw: bytes) -> str:
    """Bytes as text. Raises FormatError where they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        refuse(where, "text in UTF-8", show(raw))


def check_head(path: Path, head: bytes) -> None:
    """Check the first 24 bytes: the word, the version, and that they are 24."""
    if head.startswith(PICKLE):
        refuse(path, "a GGUF file", "a pickle or a zip of pickles, which can run code and is never loaded")
    if not head.startswith(MAGIC):
        refuse(path, "a GGUF file, whose first four bytes are GGUF", repr(head[:4]))
    if len(head) < 24:
        refuse(path, "at least 24 bytes, a GGUF file's first part", len(head))
    version = int.from_bytes(head[4:8], "little")
    if version not in VERSIONS:
        other = int.from_bytes(head[4:8], "big")
        came = f"version {other} in big-endian order" if other in VERSIONS else version
        refuse(f"{path}: version", f"one of {VERSIONS}, little-endian", came)


def tiled(
    path: Path, listed: dict[str, tuple[GgmlType, tuple[int, ...], int]], start: int, alignment: int, size: int
) -> dict[str, Tensor]:
    """Each tensor begins where the one before ends, padded, and the file ends with the last."""
    found, covered, end = {}, start, start
    for name, (kind, shape, offset) in listed.items():
        where = f"{path}: {show(name)}: offset"
        nbytes = math.prod(shape) // kind.values * kind.size
        begin, end = start + offset, start + offset + nbytes
        if begin != covered:
            what = "overlaps the tensor before it" if begin < covered else "leaves a hole"
            refuse(where, str(covered - start), f"{offset}, which {what}")
        if end > size:
            refuse(where, f"{nbytes} bytes of {kind.name} within the file's {size}", f"an end at {end}")
        found[name] = Tensor(kind, shape, begin, nbytes)
        covered = -(-end // alignment) * alignment
    if found and not end <= size <= covered:
        refuse(path, "the file to end with the last tensor and its padding", f"{size - end} bytes more")
    return found


class Header:
    """A place in the mapped header, and what is read there; no read goes past the end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        """Begin after the word and the version."""
        self.path, self.map, self.at = path, mapped, 8
        self.size = len(mapped)

    def skip(self, n: int, what: str) -> int:
        """Pass over n bytes; return where they begin."""
        begin = self.at
        if n > self.size - begin:
            refuse(f"{self.path}: {what}", f"at most the {self.size - begin} bytes that are left", n)
        self.at = begin + n
        return begin

    def number(self, code: str, what: str) -> int:
        """Read one integer."""
        begin = self.skip(struct.calcsize(code), what)
        found: int = struct.unpack_from(code, self.map, begin)[0]
        return found

    def check_count(self, n: int, least: int, what: str) -> None:
        """Check that n things of at least so many bytes each fit into what is left."""
        left = self.size - self.at
        if n > left // least:
            refuse(f"{self.path}: {what}", f"at most {left // least}, for {left} bytes are left", n)

    def name(self, what: str, most: int, taken: Mapping[str, object]) -> str:
        """Read a name that is not taken yet."""
        n = self.number("<Q", f"length of {what}")
        if not 1 <= n <= most:
            refuse(f"{self.path}: length of {what}", f"1 to {most} bytes", n)
        begin = self.skip(n, what)
        found = text(f"{self.path}: {what}", self.map[begin : begin + n])
        if found in taken:
            refuse(f"{self.path}: {what}", "each once", f"{show(found)} twice")
        return found

    def value(self, key: str) -> Value:
        """Pass over one value and say where it lies."""
        what = show(key)
        kind, count, array = self.number("<I", what), 1, False
        if kind == ARRAY:
            kind, count, array = self.number("<I", what), self.number("<Q", what), True
        if kind not in SCALARS and kind != STRING:
            wanted = "numbers, bools or strings" if array else "a number, bool, string or array"
            refuse(f"{self.path}: {what}", wanted, WORDS.get(kind, f"kind {kind}"))
        if kind in SCALARS:
            return Value(kind, count, array, self.skip(count * np.dtype(SCALARS[kind]).itemsize, what))
        self.check_count(count, 8, what)
        begin = at = self.at
        last = self.size - 8
        for _ in range(count):
            if at > last:
                refuse(f"{self.path}: {what}", "a length in 8 bytes", f"{self.size - at} that are left")
            at += 8 + int.from_bytes(self.map[at : at + 8], "little")
        if at > self.size:
            refuse(f"{self.path}: {what}", f"text within the file's {self.size} bytes", f"an end at {at}")
        self.at = at
        return Value(kind, count, array, begin)

    def tensor(self, name: str) -> tuple[GgmlType, tuple[int, ...], int]:
        """Read one tensor's type, shape and offset, checked by themselves."""
        where = f"{self.path}: {show(name)}"
        axes = self.number("<I", where)
        if axes > MAX_AXES:
            refuse(where, f"at most {MAX_AXES} axes", axes)
        shape = tuple(self.number("<Q", where) for _ in range(axes))[::-1]
        number, offset = self.number("<I", where), self.number("<Q", where)
        if number not in TYPES:
            refuse(f"{where}: type", "a number of a type that is known", number)
        kind = TYPES[number]
        if any(n > MOST for n in shape) or math.prod(n for n in shape if n) * kind.size > MOST:
            refuse(f"{where}: shape", f"at most {MOST} bytes", f"{shape} of {kind.name}")
        if (shape[-1] if shape else 1) % kind.values:
            refuse(f"{where}: shape", f"rows of whole blocks of {kind.values} for {kind.name}", f"{shape}")
        if offset > MOST:
            refuse(f"{where}: offset", f"at most {MOST}", offset)
        return kind, shape, offset
