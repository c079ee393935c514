"""Files and folders that appear at once or not at all: made beside their place, then renamed."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import FormatError


def beside(path: Path) -> Path:
    """A free name in the same folder, hidden, so that a rename stays on one file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be written; it takes its place, replacing another file, when the block ends well."""
    if path.is_dir():
        raise FormatError(f"{path}: expected a place for a file, got a directory")
    part = beside(path)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raise FormatError where there is a file, or a folder with something in it."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FormatError(f"{path}: expected no such path or an empty directory, got one that holds something")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled; it takes its place when the block ends well. What is there must be empty.

    Raises FormatError where there is a file or a folder with something in it.
    """
    check_free(path)
    part = beside(path)
    part.mkdir()
    try:
        yield part
        if path.exists():
            path.rmdir()
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
