"""A directory put in the place of another: whole, at once, or not at all."""

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ..errors import FormatError
from .system import sync_folder

EXCHANGE = 2  # of renameat2 and of renamex_np
HERE = -100  # AT_FDCWD: paths are as they stand


@contextmanager
def new_directory(target: Path, own: Collection[str]) -> Iterator[Path]:
    """Within this context a new directory is filled; at its end it stands where `target` says.

    own : the entries that belong to what is written; whatever else an old directory holds is taken along

    Until the end nothing is seen of it, and a directory that was there stays as it was; where anything fails it
    is kept. On Linux and macOS the two change places in one step of the file system. Where that cannot be done,
    the old one is renamed first and back again on failure, and is left beside the target, with .old at its end,
    where the process is killed in between. A killed process may leave a directory that begins with a dot and
    ends in .part. Raises FormatError where the target is a file; the system's OSError.
    """
    place = Path(os.path.realpath(target))  # of a link, what it points to
    if place.exists() and not place.is_dir():
        raise FormatError(f"{target}: expected a place for a directory, got a file")
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name[:200]}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        yield part
        if place.exists():
            _take_along(place, part, own)
            shutil.copymode(place, part)
        sync_folder(part)
        here = Path.cwd()
        put(part, place)
        sync_folder(place.parent)
        if here == place or place in here.parents:
            os.chdir(here)  # into the new one; whoever else stands in the old one has to do the same
    finally:
        shutil.rmtree(part, ignore_errors=True)  # the new one, if it failed; else the old one


def put(part: Path, place: Path) -> None:
    """Put a directory at a place; what was there is at the other's path afterwards."""
    if not place.exists():
        part.rename(place)
    elif not exchange(part, place):
        old = part.with_suffix(".old")
        place.rename(old)
        try:
            part.rename(place)
        except BaseException:
            old.rename(place)
            raise
        old.rename(part)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, or say that this system or file system cannot."""
    call = _exchange()
    return call is not None and call(os.fsencode(one), os.fsencode(other)) == 0


@cache
def _exchange() -> Callable[[bytes, bytes], int] | None:
    try:
        system = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = system.renamex_np
            return lambda one, other: int(swap(one, other, ctypes.c_uint(EXCHANGE)))
        rename = system.renameat2
    except (AttributeError, OSError, TypeError):  # no such call, or no such library
        return None
    return lambda one, other: int(rename(HERE, one, HERE, other, ctypes.c_uint(EXCHANGE)))


def _take_along(old: Path, new: Path, own: Collection[str]) -> None:
    """What else lies in the old directory, in the new one too: the same files, under a second name."""
    for entry in old.iterdir():
        if entry.name in own or (new / entry.name).exists():
            continue
        there = new / entry.name
        if entry.is_symlink():
            there.symlink_to(entry.readlink())
        elif entry.is_dir():
            shutil.copytree(entry, there, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(there))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without second names
        shutil.copy2(source, target, follow_symlinks=False)
    return target
