"""A file in the making that outlives its process: what of it is on the disk is written down beside it.

From time to time all that was written is brought to the disk, and only then named in a record. Whoever goes on
takes the record's word for parts that his plan has too, and that still look as they did.  specs/checkpoints.md.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ..io.layout import Entry
from ..io.system import sync_folder
from ..io.writer import SafetensorsWriter
from .journal import Journal

EVERY = 1.0  # seconds between two marks at least, which is what a kill may cost
SHARE = 0.05  # of the time, at most, is for marks
RECORD = ".record"  # the end of the name of a file's record


class Piece(NamedTuple):
    """Some bytes of one tensor, from a byte of it on."""

    name: str
    start: int
    size: int


class Clock:
    """When it is time for a mark: not too soon after the last, and later where marks take long."""

    def __init__(self) -> None:
        """Count from now on."""
        self._next = time.monotonic() + EVERY

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self._next

    def marked(self, seconds: float) -> None:
        """Count anew, after a mark that took so long."""
        self._next = time.monotonic() + max(EVERY, seconds / SHARE) if EVERY else 0.0


class Begun:
    """A safetensors file in the making, in a `with` block, and what of it is there from a run before.

    path   : where the file is to be, once it is whole
    folder : where it lies until then, under the same name, and its record beside it
    work   : a word for all that decides its bytes; what was begun of other work is not taken up
    entries, metadata : as SafetensorsWriter takes them
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        work: str,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is written yet."""
        self._work = work
        self.part, self._record = folder / path.name, folder / (path.name + RECORD)
        self.writer = SafetensorsWriter(path, entries, metadata, part=self.part)
        self.kept = 0  # bytes that were taken up
        self._held: set[Piece] = set()
        self._new: list[Piece] = []
        self._clock = Clock()
        self._lock, self._marking = threading.Lock(), threading.Lock()

    def __enter__(self) -> Self:
        """Take up the file, or begin it; pieces that are not as the record says are not taken."""
        if not self.part.exists():
            self._record.unlink(missing_ok=True)
        self._journal = Journal(self._record)
        try:
            self.writer.__enter__()
            work = {"work": self._work, "header": sha256(self.writer.header).hexdigest()}
            for name, start, size, pages in _said(self._journal.begin(work) or []):
                if self.writer.pages(name, start, size) == pages:
                    self._held.add(Piece(name, start, size))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the file in its place; an interrupt leaves it where it is, if anything of it is recorded."""
        self._journal.close()
        self.writer.__exit__(kind, error, trace)
        if kind is not None and not self._held:
            self.part.unlink(missing_ok=True)
            self._record.unlink(missing_ok=True)

    def holds(self, piece: Piece) -> bool:
        """Whether a piece is on the disk, and recorded."""
        return piece in self._held

    def take(self, piece: Piece) -> bool:
        """Whether a piece is there from a run before; then it counts as written, and is not written again."""
        if piece not in self._held:
            return False
        self.writer.skip(piece.name, piece.start, piece.size)
        with self._lock:
            self.kept += piece.size
        return True

    def put(self, piece: Piece) -> None:
        """Note that a piece is written; now and then bring all that are to the disk, and record them."""
        with self._lock:
            self._new.append(piece)
        if self._clock.due() and self._marking.acquire(blocking=False):
            try:
                self.mark()
            finally:
                self._marking.release()

    def mark(self) -> None:
        """Bring what is written to the disk, and then record it."""
        begun = time.monotonic()
        with self._lock:
            new, self._new = self._new, []
        if new:
            self.writer.sync()
            if not self._held:
                sync_folder(self._record.parent)  # the names of the part and of its record
            self._journal.say({"pieces": [(*piece, self.writer.pages(*piece)) for piece in new]})
            self._held.update(new)
        self._clock.marked(time.monotonic() - begun)


def _said(lines: list[dict[str, Any]]) -> Iterator[tuple[str, int, int, str]]:
    """What lines of a record say of pieces, as far as it has the form of that."""
    for line in lines:
        said = line.get("pieces")
        for entry in said if isinstance(said, list) else ():
            if isinstance(entry, list) and [type(part) for part in entry] == [str, int, int, str]:
                yield entry[0], entry[1], entry[2], entry[3]
