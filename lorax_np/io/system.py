"""What the operating system does for files: bytes at a place, copies unseen, and names that stay."""

import errno
import os
import threading
from pathlib import Path

from .layout import PIECE

_POSITION = threading.Lock()  # where the system reads and writes at a file's one position only


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        except OSError:  # some file systems know no such thing of a folder
            pass
        finally:
            os.close(handle)


def copy_range(source: int, target: int, size: int, offset: int, place: int) -> int:
    """Copy at most `size` bytes from one open file to another; return how many, 0 at the end of the source."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, size, offset, place)
        except OSError as error:  # two file systems, or one that cannot
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF):
                raise
    data = memoryview(read_at(source, min(size, PIECE), offset))
    done = 0
    while done < len(data):
        done += write_at(target, data[done:], place + done)
    return done


def read_at(file: int, size: int, offset: int) -> bytes:
    """Bytes of an open file from an offset on; fewer at its end."""
    if hasattr(os, "pread"):
        return os.pread(file, size, offset)
    with _POSITION:
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, size)


def write_at(file: int, view: memoryview, offset: int) -> int:
    """Write bytes to an open file from an offset on; return how many, which may be fewer."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, view, offset)
    with _POSITION:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, view)
