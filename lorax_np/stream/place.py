"""Where a new checkpoint is made: beside its place, with a journal of the files that are finished.

The folder `.NAME.part` holds the journal and, in `whole`, the files. When all are there, `whole` is renamed to
NAME. So NAME is absent or whole, whatever ends the process; and the same work, begun again, goes on after the
files that the journal names.  specs/checkpoints.md.
"""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import ConfigError
from ..io.writer import sync_folder

PAGE, PAGES = 4096, 64  # of a file, evenly spread, by which a finished one is known again


class Workplace:
    """A folder in the making.

    out    : the folder that is to be; it is not there yet, or empty
    digest : a word for the work; finished files of other work are not kept
    resume : whether finished files of this work are
    """

    def __init__(self, out: Path, digest: str, *, resume: bool = True) -> None:
        """Check that the place is free; nothing is written yet."""
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ConfigError(
                f"out: expected no such path or an empty directory, got {out}, which holds something"
            )
        if not out.parent.is_dir():
            raise ConfigError(f"out: expected a folder to make it in, got none at {out.parent}")
        self.out, self.digest, self.resume = out, digest, resume
        self.home = out.parent / f".{out.name}.part"
        self.folder, self.journal = self.home / "whole", self.home / "journal"
        self.finished: set[str] = set()
        self._log = -1

    def __enter__(self) -> Self:
        """Make the folder, or find what is finished in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = os.open(self.journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            lines = self._lines()
            if not self.resume or not lines or lines[0].get("work") != self.digest:
                os.ftruncate(self._log, 0)
                self._say({"work": self.digest})
                lines = []
            self.finished = {line["file"] for line in lines[1:] if self._holds(line)}
            for path in self.folder.iterdir():
                if path.name not in self.finished:
                    path.unlink()
        except BaseException:
            os.close(self._log)
            raise
        return self

    def done(self, name: str) -> None:
        """Put down that a file is finished."""
        path = self.folder / name
        self._say({"file": name, "size": path.stat().st_size, "pages": known(path)})
        self.finished.add(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the folder to its place; keep it after an interrupt, but not after an error."""
        try:
            if kind is None:
                sync_folder(self.folder)
                if self.out.exists():
                    self.out.rmdir()
                self.folder.rename(self.out)
                sync_folder(self.out.parent)
        finally:
            os.close(self._log)
            kept = kind is not None and not issubclass(kind, Exception) and bool(self.finished)
            if not kept:
                shutil.rmtree(self.home, ignore_errors=True)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # a system without it trusts its user
            return
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"out: expected one process to make {self.out}, got another at work on it"
            ) from None

    def _lines(self) -> list[dict[str, Any]]:
        """What the journal says, up to the first line that is not whole."""
        found: list[dict[str, Any]] = []
        good = 0
        for line in self.journal.read_bytes().splitlines(keepends=True):
            try:
                value = json.loads(line)
            except ValueError:  # cut off by whatever ended the process
                break
            if not isinstance(value, dict) or not line.endswith(b"\n"):
                break
            found.append(value)
            good += len(line)
        os.ftruncate(self._log, good)
        return found

    def _say(self, line: dict[str, Any]) -> None:
        os.write(self._log, (json.dumps(line) + "\n").encode())
        os.fsync(self._log)

    def _holds(self, line: dict[str, Any]) -> bool:
        """Whether a file that the journal names is there as it was."""
        path = self.folder / str(line.get("file"))
        if path.parent != self.folder or not path.is_file() or path.stat().st_size != line.get("size"):
            return False
        return known(path) == line.get("pages")


def known(path: Path) -> str:
    """Return a word for a file: a hash of its size and of pages all over it, the first and the last too."""
    size = path.stat().st_size
    found = sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(PAGES):
            file.seek(max(0, size - PAGE) * i // (PAGES - 1))
            found.update(file.read(PAGE))
    return found.hexdigest()


def check_apart(out: Path, *sources: Path) -> None:
    """Raise ConfigError where the new folder would lie in one that is read, or be one."""
    for source in sources:
        folder = (source if source.is_dir() else source.parent).resolve()
        here = out.resolve()
        if here == folder or (source.is_dir() and folder in here.parents):
            raise ConfigError(f"out: expected a place outside {source}, which is read, got {out}")
    if out.name in ("", ".."):
        raise ConfigError(f"out: expected a folder with a name, got {out}")
