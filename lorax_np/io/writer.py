"""The safetensors format, written: streamed tensor by tensor, whole or not at all.

The bytes are those of the safetensors library, release 0.8.0: layout.py. What a file promises, and how it
appears at once: specs/checkpoints.md.
"""

import math
import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ..backend import Array, to_host
from ..errors import ConfigError, DtypeError, FormatError, ShapeError
from .layout import Entry, header_of, pieces, place_of, word_of
from .safetensors import BITS, show
from .system import copy_range, read_at, sync_folder, write_at

PAGE, PAGES = 4096, 4  # of some bytes of a tensor, evenly spread, by which they are known again

Buffer = bytes | bytearray | memoryview


class _Slot(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # in bytes from the start of the file
    size: int


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays into one file: at once, whole, or, where anything fails, not at all.

    tensors  : arrays by name, of any library, strides and byte order; each is asked for twice
    metadata : words by name, which the header carries

    Raises DtypeError for a dtype the format lacks; ConfigError for a name or metadata that a header cannot
    hold; the system's OSError, as for a full disk. A file that was there stays until the new one is whole.
    Source: the module's first lines.

    >>> import numpy as np
    >>> from tempfile import TemporaryDirectory
    >>> from lorax_np.io.safetensors import open_safetensors
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.safetensors"
    ...     write_safetensors(path, {"w": np.eye(3)[:2].T})
    ...     open_safetensors(path)["w"].tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    entries = {name: (word_of(array, show(name)), tuple(array.shape)) for name, array in tensors.items()}
    with SafetensorsWriter(path, entries, metadata) as file:
        for name in file.names:
            file.write(name, tensors[name])


class SafetensorsWriter:
    """A file in the making: a header is written first, then tensors in any order and from any thread.

    entries  : the format's word for the dtype and the shape of each tensor, by name
    metadata : words by name
    part     : where the file lies until it is whole, on the same file system; what is there is written on, and
               stays after an interrupt. Without it that is beside its place, under a name of chance

    Within its `with` block the file lies under that other name. At the end of the block it is brought to the
    disk and renamed; where the block ends in an error or, without a part, in an interrupt, it is removed.
    Raises ConfigError where entries cannot be held by a header.

    >>> import numpy as np
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.safetensors"
    ...     with SafetensorsWriter(path, {"w": ("I8", (2,))}) as file:
    ...         file.write("w", np.array([3, -1], "i1"))
    ...     path.read_bytes()[-2:]
    b'\\x03\\xff'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str] | None = None,
        *,
        part: Path | None = None,
    ) -> None:
        """Lay out the file; nothing is written yet."""
        self.path, self._given = Path(path), part
        order = sorted(entries, key=lambda name: (place_of(name, entries[name]), name))
        self.header, offsets = header_of({name: entries[name] for name in order}, metadata)
        start = len(self.header)
        self._slots = {
            name: _Slot(entries[name][0], tuple(entries[name][1]), start + begin, end - begin)
            for name, (begin, end) in offsets.items()
        }
        self.size = start + max((end for _, end in offsets.values()), default=0)  # of the whole file, in bytes
        self._left = {name: slot.size for name, slot in self._slots.items()}
        self._lock = threading.Lock()
        self._part: Path | None = None
        self._file = -1

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of their bytes."""
        return tuple(self._slots)

    def __enter__(self) -> Self:
        """Make the file under another name, and write its header."""
        if self.path.is_dir():
            raise FormatError(f"{self.path}: expected a place for a safetensors file, got a directory")
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        part = self._given
        if part is None:
            part = self.path.with_name(f".{self.path.name[:200]}.{secrets.token_hex(4)}.part")
            flags |= os.O_EXCL
        try:
            self._part = part
            self._file = os.open(part, flags, 0o666)  # the umask decides, as for any new file
            self._put(memoryview(self.header), 0)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the file to its place, if nothing went wrong and nothing is missing."""
        try:
            if kind is None:
                self._finish()
            elif self._given is not None and not issubclass(kind, Exception):
                self._part = None  # which leaves it there
        finally:
            self._discard()

    def write(self, name: str, tensor: Array | Buffer) -> None:
        """Write one tensor: an array of the entry's dtype and shape, or its bytes as the format has them.

        Raises KeyError for an unknown name, DtypeError and ShapeError for an array that is not as the entry
        says, FormatError for bytes of another number, and ConfigError for a tensor that is written already.
        """
        slot = self._slot(name)
        if not isinstance(tensor, (bytes, bytearray, memoryview)) and tuple(tensor.shape) != slot.shape:
            raise ShapeError(
                f"{show(name)}: expected {slot.shape}, set by the entries, got {tuple(tensor.shape)}"
            )
        self.write_part(name, 0, tensor, whole=True)

    def write_part(self, name: str, start: int, part: Array | Buffer, *, whole: bool = False) -> None:
        """Write some of a tensor: an array whose entries follow each other in it, or bytes, from a byte on.

        start : offset in bytes from where the tensor begins
        whole : whether the part has to be all of it
        """
        slot, offset = self._slot(name), start
        if isinstance(part, (bytes, bytearray, memoryview)):
            found: Iterable[Any] = [part]
            size = memoryview(part).nbytes
        else:
            found, size = pieces(to_host(part)), _nbytes(part, slot, name)
        self._account(name, start, size, whole)
        for piece in found:
            offset += self._put(memoryview(piece), slot.begin + offset)

    def copy_part(self, name: str, start: int, source: int, offset: int, size: int) -> None:
        """Write some of a tensor's bytes from another file, by the system where it can, without seeing them.

        start  : offset in bytes from where the tensor begins
        source : descriptor of the other file, open for reading; its position is left alone
        offset, size : where the bytes lie in it, and how many
        """
        place = self._slot(name).begin + start
        self._account(name, start, size, whole=False)
        while size:
            done = copy_range(source, self._file, size, offset, place)
            if not done:
                raise FormatError(f"{self.path}: {show(name)}: expected {size} more bytes to copy, got the end")
            offset, place, size = offset + done, place + done, size - done

    def hurry(self, name: str, start: int, size: int) -> None:
        """Hint that some bytes may go to the disk now, while others are computed; it changes nothing else."""
        if hasattr(os, "posix_fadvise") and size:
            place = self._slot(name).begin + start
            os.posix_fadvise(self._file, place, size, os.POSIX_FADV_DONTNEED)

    def skip(self, name: str, start: int, size: int) -> None:
        """Count some bytes of a tensor as written that the part holds already."""
        self._slot(name)
        self._account(name, start, size, whole=False)

    def sync(self) -> None:
        """Bring what is written so far to the disk."""
        os.fsync(self._file)

    def pages(self, name: str, start: int, size: int) -> str:
        """A hash of pages spread over some bytes of a tensor, as the part holds them; "" for none of it."""
        slot = self._slots.get(name)
        if slot is None or start < 0 or size < 0 or start + size > slot.size:
            return ""
        begin, found = slot.begin + start, sha256(f"{start} {size}".encode())
        for i in range(PAGES):
            offset = max(0, size - PAGE) * i // (PAGES - 1)
            want = min(PAGE, size - offset)
            page = read_at(self._file, want, begin + offset)
            if len(page) < want:
                return ""
            found.update(page)
        return found.hexdigest()

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor lies in the file: its first byte, and how many. Raises KeyError."""
        slot = self._slot(name)
        return slot.begin, slot.size

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            raise KeyError(f"{self.path}: no tensor named {show(name)} in the entries")
        return self._slots[name]

    def _account(self, name: str, start: int, size: int, whole: bool) -> None:
        """Check that bytes lie within a tensor and are not more than it still wants, and count them."""
        wanted = self._slots[name].size
        if start < 0 or start + size > wanted or (whole and size != wanted):
            words = f"{wanted} bytes" if whole else f"bytes 0 to {wanted}"
            raise FormatError(f"{show(name)}: expected {words}, got {size} from {start} on")
        with self._lock:
            if size > self._left[name]:
                raise ConfigError(f"{show(name)}: expected a tensor that is not yet written, got it twice")
            self._left[name] -= size

    def _put(self, data: memoryview, offset: int) -> int:
        """Write bytes at an offset in the file, and return how many they were."""
        if data.nbytes:
            view = memoryview(data if data.c_contiguous else data.tobytes()).cast("B")
            while len(view):
                done = write_at(self._file, view, offset)
                view, offset = view[done:], offset + done
        return data.nbytes

    def _finish(self) -> None:
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise FormatError(f"{self.path}: expected every tensor, got none or a part of {show(missing[0])}")
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        if self._part is not None:
            self._part.replace(self.path)
            self._part = None
            sync_folder(self.path.parent)

    def _discard(self) -> None:
        """Close and remove what is not finished; what is finished is gone from here."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None


def _nbytes(array: Array, slot: _Slot, name: str) -> int:
    if word_of(array, show(name)) != slot.dtype:
        raise DtypeError(f"{show(name)}: expected {slot.dtype}, set by the entries, got {array.dtype}")
    return math.prod(array.shape) * BITS[slot.dtype] // 8
