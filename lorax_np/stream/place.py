"""Where a new checkpoint is made: beside its place, with a journal of the files that are finished.

The folder `.NAME.part` holds the journal, in `whole` the files, and in `begun` those that are not finished. At
the end `whole` is renamed to NAME. So NAME is absent or whole, whatever ends the process; and the same work,
begun again, goes on after the files that the journal names, and within the one that was begun.
specs/checkpoints.md.
"""

import shutil
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import ConfigError
from ..io.system import sync_folder
from .begun import RECORD
from .journal import Journal

PAGE, PAGES = 4096, 64  # of a file, evenly spread, by which a finished one is known again


class Workplace:
    """A folder in the making.

    out    : the folder that is to be; it is not there yet, or empty
    digest : a word for the work; finished files of other work are not kept
    resume : whether finished files of this work are
    """

    def __init__(self, out: Path, digest: str, *, resume: bool = True) -> None:
        """Check that the place is free; nothing is written yet."""
        check_free(out)
        if not out.parent.is_dir():
            raise ConfigError(f"out: expected a folder to make it in, got none at {out.parent}")
        self.out, self.digest, self.resume = out, digest, resume
        self.home = out.parent / f".{out.name}.part"
        self.folder, self.begun = self.home / "whole", self.home / "begun"
        self.finished: set[str] = set()

    def __enter__(self) -> Self:
        """Make the folders, or find what is finished in them."""
        for folder in (self.folder, self.begun):
            folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.home / "journal")
        try:
            if not self._journal.lock():
                raise ConfigError(f"out: expected one process to make {self.out}, got another at work on it")
            lines = self._journal.begin({"work": self.digest}, anew=not self.resume)
            if lines is None:
                for path in self.begun.iterdir():
                    path.unlink()
            self.finished = {line["file"] for line in lines or () if self._holds(line)}
            self._take_back(self.folder)
        except BaseException:
            self._journal.close()
            raise
        return self

    def _take_back(self, folder: Path) -> None:
        """Remove what is not finished; but a file that was put in its place and not yet named is begun."""
        for path in folder.iterdir():
            if path.is_dir():
                self._take_back(path)
                path.rmdir()
            elif path.name not in self.finished and (self.begun / (path.name + RECORD)).exists():
                path.replace(self.begun / path.name)
            elif path.name not in self.finished:
                path.unlink()

    def done(self, name: str) -> None:
        """Put down that a file is finished."""
        path = self.folder / name
        self._journal.say({"file": name, "size": path.stat().st_size, "pages": known(path)})
        self.finished.add(name)
        (self.begun / (name + RECORD)).unlink(missing_ok=True)

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
            self._journal.close()
            kept = kind is not None and not issubclass(kind, Exception)
            if not kept or not (self.finished or any(self.begun.iterdir())):
                shutil.rmtree(self.home, ignore_errors=True)

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


def check_free(out: Path) -> None:
    """Raise ConfigError where something is that the new folder would take the place of."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"out: expected no such path or an empty directory, got {out}, which holds something")


def check_apart(out: Path, *sources: Path) -> None:
    """Raise ConfigError where the new folder would lie in one that is read, or be one."""
    for source in sources:
        folder = (source if source.is_dir() else source.parent).resolve()
        here = out.resolve()
        if here == folder or (source.is_dir() and folder in here.parents):
            raise ConfigError(f"out: expected a place outside {source}, which is read, got {out}")
    if out.name in ("", ".."):
        raise ConfigError(f"out: expected a folder with a name, got {out}")
