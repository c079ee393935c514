"""The GGUF format, read as a file from a stranger: every number is checked before it is used.

A file is the word GGUF, a version, two counts, so many keys with values, so many tensors' names, shapes, types
and offsets, and then the tensors' bytes, each at a multiple of the alignment. All numbers are little-endian.
Source: ggml, docs/gguf.md and the checks of gguf.cpp as of version 3; specs/gguf.md.
"""

import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .ggml import READ, GgmlType, values
from .gguf_header import (
    ALIGNMENT,
    BOOL,
    MAX_KEY,
    MAX_NAME,
    SCALARS,
    STRING,
    WORDS,
    Header,
    Tensor,
    Value,
    check_head,
    refuse,
    text,
    tiled,
)
from .safetensors import HostArray, show


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class GgufFile(Mapping[str, HostArray]):
    """Tensors of one open file by name, in the order of the file; made by open_gguf.

    The file stays mapped while this object or an array taken from it lives. Nobody may shorten or rewrite it
    in that time: replace a file by renaming a new one over it, which leaves the mapped one whole.
    """

    path: Path
    metadata: "Metadata"
    _tensors: dict[str, Tensor]
    _map: mmap.mmap

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of the file."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, slowest axis first, without touching its bytes. Raises KeyError."""
        return self._find(name).shape

    def type(self, name: str) -> str:
        """The format's word for how one tensor is stored, as "Q4_1". Raises KeyError."""
        return self._find(name).kind.name

    def __getitem__(self, name: str) -> HostArray:
        """One tensor, read-only: over the mapped bytes where NumPy has its type, else a new float32 array.

        F32, F16, BF16, F64 and the integers come as they are stored; Q4_0, Q4_1 and Q8_0 as the float32 that
        ggml computes with, (gguf.1) to (gguf.3).
        Raises KeyError for an unknown name; FormatError for a type whose values cannot be read here, for BF16
        without ml_dtypes, and where the file is shorter than when it was opened.
        """
        kind, shape, begin, size = self._find(name)
        where, length = f"{self.path}: {show(name)}", len(self._map)
        if self._map.size() < length:  # a read past the end of a mapped file kills the process
            refuse(self.path, f"{length} bytes, as when it was opened", self._map.size())
        if kind.name not in READ:
            refuse(where, f"a type whose values can be read ({', '.join(READ)})", kind.name)
        raw: HostArray = np.frombuffer(self._map, np.uint8, size, begin)
        try:
            array = values(raw, kind.name)
        except ImportError:
            refuse(where, "ml_dtypes to read BF16 values", "no such package: pip install 'lorax-np[bf16]'")
        array.flags.writeable = False
        return array.reshape(shape)

    def release(self) -> None:
        """Have the system take back the file's pages that were read. Arrays stay valid: they are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<GgufFile {str(self.path)!r}: {len(self)} tensors, {len(self._map)} bytes>"

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(f"{self.path}: no tensor named {show(name)}")
        return self._tensors[name]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Metadata(Mapping[str, Any]):
    """What a file says of itself, by key: Python's numbers, bools and strings; lists of them for arrays.

    A value is made when it is asked for; long lists, such as a tokenizer's words, are made anew each time.
    """

    path: Path
    _values: dict[str, Value]
    _map: mmap.mmap

    def __getitem__(self, key: str) -> Any:
        """One value. Raises KeyError, and FormatError for a string that is not UTF-8 or a bool not 0 or 1."""
        if key not in self._values:
            raise KeyError(f"{self.path}: no key {show(key)}")
        kind, count, array, at = self._values[key]
        where = f"{self.path}: {show(key)}"
        if kind == STRING:
            found: list[Any] = []
            for _ in range(count):
                (n,) = struct.unpack_from("<Q", self._map, at)
                found.append(text(where, self._map[at + 8 : at + 8 + n]))
                at += 8 + n
        else:
            raw = np.frombuffer(self._map, SCALARS[kind] if kind != BOOL else "<u1", count, at)
            if kind == BOOL and raw.max(initial=0) > 1:
                refuse(where, "a bool of 0 or 1", raw.max())
            found = (raw.astype(bool) if kind == BOOL else raw).tolist()
        return found if array else found[0]

    def word(self, key: str) -> str:
        """The format's word for the kind of one value, as "uint32" or "array of string". Raises KeyError."""
        if key not in self._values:
            raise KeyError(f"{self.path}: no key {show(key)}")
        value = self._values[key]
        return f"array of {WORDS[value.kind]}" if value.array else WORDS[value.kind]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Metadata of {str(self.path)!r}: {len(self)} keys>"


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Map a file and check its whole header; no tensor is read before it is asked for.

    Raises FormatError, one line with the path, for whatever is no regular file or breaks the format, and the
    system's own OSError where there is no such path or no permission.
    Source: the module's first lines. As ggml does, this refuses arrays of arrays, a key or name that comes
    twice, and tensors that do not follow each other; besides it refuses bytes after the last tensor.

    >>> from tempfile import TemporaryDirectory
    >>> from lorax_np.io.gguf_writer import write_gguf
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.gguf"
    ...     write_gguf(path, {"general.type": ("string", "model")}, {"w": np.float32([[1, 2, 3]])})
    ...     file = open_gguf(path)
    ...     file.metadata["general.type"], file.type("w"), file["w"].tolist()
    ('model', 'F32', [[1.0, 2.0, 3.0]])
    """
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        refuse(path, "a GGUF file", "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket")
    with path.open("rb") as file:
        head = file.read(24)
        check_head(path, head)
        mapped = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_READ)
    header = Header(path, mapped)
    n_tensors, n_keys = header.number("<Q", "tensor count"), header.number("<Q", "key count")
    header.check_count(n_keys, 8 + 4 + 1, "key count")
    header.check_count(n_tensors, 8 + 4 + 4 + 8, "tensor count")
    found: dict[str, Value] = {}
    for _ in range(n_keys):
        key = header.name("a key", MAX_KEY, found)
        found[key] = header.value(key)
    metadata = Metadata(path, found, mapped)
    alignment = _alignment(path, metadata)
    listed: dict[str, tuple[GgmlType, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = header.name("a tensor's name", MAX_NAME - 1, listed)
        listed[name] = header.tensor(name)
    start = -(-header.at // alignment) * alignment
    return GgufFile(path, metadata, tiled(path, listed, start, alignment, len(mapped)), mapped)


def _alignment(path: Path, metadata: Metadata) -> int:
    key = "general.alignment"
    if key not in metadata:
        return ALIGNMENT
    if metadata.word(key) != "uint32":
        refuse(f"{path}: {key}", "a uint32", metadata.word(key))
    n: int = metadata[key]
    if n == 0 or n & (n - 1):
        refuse(f"{path}: {key}", "a power of two", n)
    return n
