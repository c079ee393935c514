"""The safetensors format, read as a file from a stranger: every number is checked before it is used.

A file is a little-endian length n in 8 bytes, n bytes of JSON, and the tensors' bytes, which tile the rest.
Source: https://huggingface.co/docs/safetensors, section Format; in that project's repository, release 0.8.0,
the JSON schema and the checks of the Rust reader.
"""

import importlib
import json
import math
import mmap
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..errors import FormatError

HostArray = np.ndarray[Any, np.dtype[Any]]

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_AXES = 64  # NumPy's limit
FIELDS = ["data_offsets", "dtype", "shape"]
# The format's words, with NumPy's name where it has one; BF16 takes another package.
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8", "BOOL": "?"}
NUMPY |= {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (8, 4, 2, 1)}
BITS = {word: 8 * np.dtype(code).itemsize for word, code in NUMPY.items()} | {"BF16": 16, "F4": 4}
BITS |= dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)
BITS |= dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
PICKLE = (b"PK\x03\x04", b"PK\x05\x06", *(bytes([0x80, version]) for version in range(2, 6)))

_short = Repr()
_short.maxstring = _short.maxother = 100
show = _short.repr  # whatever a file holds, a message stays one short printable line


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the tensors
    end: int


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class SafetensorsFile(Mapping[str, HostArray]):
    """Tensors of one open file by name, in the order of their bytes; made by open_safetensors.

    The file stays mapped while this object or an array taken from it lives. Nobody may shorten or rewrite it
    in that time: replace a file by renaming a new one over it, which leaves the mapped one whole.
    """

    path: Path
    _entries: dict[str, _Entry]
    _metadata: dict[str, str]
    _map: mmap.mmap
    _start: int  # where the tensors begin

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of their bytes."""
        return tuple(self._entries)

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself under __metadata__, as a new dict; empty where it says nothing."""
        return dict(self._metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without touching its bytes. Raises KeyError."""
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """The format's word for the dtype of one tensor, as "F32". Raises KeyError."""
        return self._find(name).dtype

    def place(self, name: str) -> tuple[int, int]:
        """Where one tensor's bytes lie in the file: the first one, and how many. Raises KeyError."""
        entry = self._find(name)
        return self._start + entry.begin, entry.end - entry.begin

    def nbytes(self, name: str) -> int:
        """Size of one tensor in bytes. Raises KeyError."""
        entry = self._find(name)
        return entry.end - entry.begin

    def __getitem__(self, name: str) -> HostArray:
        """One tensor as a read-only array over the mapped bytes, never a copy.

        A writer that did not align its tensors gets arrays with flags.aligned False: NumPy computes with them
        rightly but slowly, and numpy.require(array, requirements="A") is the copy that cures it.

        Raises KeyError for an unknown name; FormatError for a dtype that has no array here, for BF16 without
        ml_dtypes, for a BOOL byte that is neither 0 nor 1, and where the file is shorter than when opened.
        """
        word, shape, begin, end = self._find(name)
        where, size = f"{self.path}: {show(name)}", len(self._map)
        if self._map.size() < size:  # a read past the end of a mapped file kills the process
            _refuse(self.path, f"{size} bytes, as when it was opened", self._map.size())
        raw: HostArray = np.frombuffer(self._map, np.uint8, end - begin, self._start + begin)
        if word == "BF16":
            array = raw.view("<u2").astype(np.uint16, copy=False).view(_bfloat16(where))
        elif word in NUMPY:
            if word == "BOOL" and raw.max(initial=0) > 1:
                _refuse(where, "BOOL bytes of 0 or 1", raw.max())
            array = raw.view(NUMPY[word])
        else:
            _refuse(where, f"a dtype whose values can be read ({', '.join(NUMPY)}, BF16)", word)
        array.flags.writeable = False  # also where a big-endian host had to copy BF16
        return array.reshape(shape)

    def release(self) -> None:
        """Have the system take back the file's pages that were read. Arrays stay valid: they are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<SafetensorsFile {str(self.path)!r}: {len(self)} tensors, {len(self._map)} bytes>"

    def _find(self, name: str) -> _Entry:
        if name not in self._entries:
            raise KeyError(f"{self.path}: no tensor named {show(name)}")
        return self._entries[name]


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Map a file and check its whole header; no tensor is read before it is asked for.

    Raises FormatError, one line with the path, for whatever is no regular file or breaks the format, and the
    system's own OSError where there is no such path or no permission. A pickle is recognised, never loaded.
    Source: the module's first lines. Keys that come twice, unknown fields, and whitespace before the header
    are refused, as the format's text and schema ask, although the Rust reader lets them pass.

    >>> from tempfile import TemporaryDirectory
    >>> header = b'{"w": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}'
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.safetensors"
    ...     _ = path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([3, 255]))
    ...     open_safetensors(path)["w"].tolist()
    [3, -1]
    """
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        _refuse(path, "a safetensors file", kind)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = _header_end(path, file.read(9), size)
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    header = _parsed(path, mapped[8:start])
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _refuse(f"{path}: __metadata__", "strings by name", show(metadata))
    entries = {name: _entry(f"{path}: {show(name)}", info) for name, info in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_tiling(path, entries, size - start)
    return SafetensorsFile(path, entries, metadata, mapped, start)


def _refuse(where: Path | str, wanted: str, came: object) -> NoReturn:
    raise FormatError(f"{where}: expected {wanted}, got {came}") from None


def _header_end(path: Path, head: bytes, size: int) -> int:
    """Offset of the first tensor, from the first 9 bytes of a file and its size."""
    n, most = int.from_bytes(head[:8], "little"), min(MAX_HEADER, size - 8)
    if 2 <= n <= most and head[8:] == b"{":
        return 8 + n
    if head.startswith(PICKLE):
        _refuse(
            path,
            "a safetensors file",
            "a pickle or a zip of pickles, as torch writes .bin and .pt; it can run code and is never loaded "
            "here: convert it once, with torch.load(weights_only=True) and safetensors.torch.save_file",
        )
    if size < 10:
        _refuse(path, "at least 10 bytes, a length of 8 and a header of 2", size)
    if not 2 <= n <= most:
        _refuse(f"{path}: header length", f"2 to {most}", f"{n}, from the bytes {head[:8]!r}")
    _refuse(f"{path}: header", "{ as its first byte", repr(head[8:]))


def _parsed(path: Path, raw: bytes) -> dict[str, Any]:
    """The header as Python objects: strict JSON, each key once, no number that could not measure a file."""
    try:
        header: dict[str, Any] = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_integer
        )
    except RecursionError:
        _refuse(f"{path}: header", "JSON of three levels", "JSON nested too deep")
    except ValueError as error:  # from the decoder, the parser, or one of the two functions below
        _refuse(f"{path}: header", "JSON in UTF-8", error)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {show(key)} twice")
        for text in (key, value):
            if isinstance(text, str):
                text.encode("utf-8")  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
        found[key] = value
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or digits in ("-0", "NaN", "Infinity", "-Infinity"):
        raise ValueError(f"the number {show(digits)}")
    return int(digits)


def _entry(where: str, info: Any) -> _Entry:
    """One tensor's part of the header, checked by itself."""
    if not isinstance(info, dict) or sorted(info) != FIELDS:
        _refuse(where, f"an object of {', '.join(FIELDS)}", show(info))
    word, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(word, str) or word not in BITS:
        _refuse(f"{where}: dtype", f"one of {', '.join(BITS)}", show(word))
    if not _sizes(shape) or len(shape) > MAX_AXES:
        _refuse(f"{where}: shape", f"at most {MAX_AXES} integers from 0 to {sys.maxsize}", show(shape))
    if math.prod(n for n in shape if n) * BITS[word] > 8 * sys.maxsize:  # NumPy counts past an axis of 0 too
        _refuse(f"{where}: shape", f"at most {sys.maxsize} bytes", f"{show(shape)} of {word}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(f"{where}: data_offsets", "[begin, end] with 0 <= begin <= end", show(offsets))
    nbytes, bits = divmod(math.prod(shape) * BITS[word], 8)
    if bits:
        _refuse(f"{where}: shape", "whole bytes", f"{show(shape)} of {word}, with {bits} bits over")
    begin, end = offsets
    if end - begin != nbytes:
        _refuse(f"{where}: data_offsets", f"{nbytes} bytes for {show(shape)} of {word}", end - begin)
    return _Entry(word, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= sys.maxsize for n in value)


def _check_tiling(path: Path, entries: dict[str, _Entry], size: int) -> None:
    """Each tensor begins where the one before ends, and the last ends with the file: no overlap, no hole."""
    covered = 0
    for name, entry in entries.items():
        where = f"{path}: {show(name)}: data_offsets"
        if entry.end > size:
            _refuse(where, f"an end within the {size} bytes of tensors", entry.end)
        if entry.begin != covered:
            what = "an overlap" if entry.begin < covered else "a hole"
            _refuse(where, f"begin {covered}", f"{entry.begin}, which makes {what}")
        covered = entry.end
    if covered != size:
        _refuse(path, "the last tensor to end with the file", f"{size - covered} trailing bytes")


def _bfloat16(where: str) -> np.dtype[Any]:
    try:
        bfloat16: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        _refuse(where, "ml_dtypes to read BF16 values", "no such package: pip install 'lorax-np[bf16]'")
    return bfloat16
