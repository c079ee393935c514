"""A file that appears at once or not at all: made beside its place, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import FormatError
from .system import sync_folder


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be written; it takes its place, replacing another file, when the block ends well."""
    if path.is_dir():
        raise FormatError(f"{path}: expected a place for a file, got a directory")
    part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raise FormatError where there is a file, or a folder with something in it."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FormatError(f"{path}: expected no such path or an empty directory, got one that holds something")
