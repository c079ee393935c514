"""Tensors and rows of them, read by position into memory of one's own; a mapping's pages would stay."""

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import HostArray
from ..errors import FormatError
from ..io.safetensors import NUMPY, SafetensorsFile, _bfloat16


def opened(stack: ExitStack) -> Callable[[Path], int]:
    """Return what opens files for reading, each once, and closes them at the end of the stack."""
    found: dict[Path, int] = {}
    lock = threading.Lock()

    def file(path: Path) -> int:
        with lock:
            if path not in found:
                found[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                stack.callback(os.close, found[path])
            return found[path]

    return file


def read_tensor(file: SafetensorsFile, name: str, files: Callable[[Path], int]) -> HostArray:
    """One tensor in memory of its own."""
    found = np.empty(file.shape(name), stored_dtype(file.dtype(name), str(file.path)))
    read_into(files(file.path), found, file.place(name)[0], file.path)
    return found


def stored_dtype(word: str, where: str) -> np.dtype[Any]:
    """The dtype behind a word of the format. Raises FormatError for one without values."""
    if word == "BF16":
        return _bfloat16(where)
    if word not in NUMPY:
        raise FormatError(f"{where}: expected a dtype whose values can be read, got {word}")
    return np.dtype(NUMPY[word])


def read_into(file: int, found: HostArray, offset: int, path: Path) -> None:
    """Fill an array with a file's bytes from an offset on."""
    view = memoryview(found.reshape(-1).view(np.uint8).data)
    while len(view):
        done = os.preadv(file, [view], offset)
        if not done:
            raise FormatError(f"{path}: expected {len(view)} more bytes at {offset}, got the end of the file")
        view, offset = view[done:], offset + done
