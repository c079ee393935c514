"""Lines of JSON that outlive their process: each is on the disk before the next thing is done."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A file of such lines, which are added to its end; a last one that was cut off is forgotten.

    path : of the file; its folder is there
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it."""
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o666)

    def lock(self) -> bool:
        """Keep other processes from it until it is closed, or say that one is at it."""
        try:
            import fcntl
        except ImportError:  # a system without it trusts its user
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def lines(self) -> list[dict[str, Any]]:
        """What it says, up to the first line that is not whole, from which on it is cut off."""
        found: list[dict[str, Any]] = []
        good = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                value = json.loads(line)
            except ValueError:  # cut off by whatever ended the process
                break
            if not isinstance(value, dict) or not line.endswith(b"\n"):
                break
            found.append(value)
            good += len(line)
        os.ftruncate(self._file, good)
        return found

    def begin(self, line: dict[str, Any], *, anew: bool = False) -> list[dict[str, Any]] | None:
        """What it says after a first line like this one; None where it begins anew, with this line."""
        found = self.lines()
        if found[:1] == [line] and not anew:
            return found[1:]
        os.ftruncate(self._file, 0)
        self._write(line)  # which the next line takes to the disk
        return None

    def say(self, line: dict[str, Any]) -> None:
        """Add a line, and bring it to the disk with all before it."""
        self._write(line)
        os.fsync(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Let go of the file, and of its lock."""
        os.close(self._file)
