"""metrics.jsonl: one JSON object a line, appended as the run goes, and cut where a resumed run goes on."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .state import write_whole


class Log:
    """The lines of one run, in a file."""

    def __init__(self, path: Path, *, after: int | None = None) -> None:
        """Open the file for appending.

        after : the step that the run goes on from: lines of later steps, and one that was never finished, are
            cut; None begins a new file
        """
        self.path = path
        kept = [] if after is None else [line for line, record in lines(path) if record.get("step", 0) <= after]
        write_whole(path, "".join(kept).encode())
        self._file = path.open("ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line, whole or not at all as far as other readers see."""
        try:
            self._file.write((json.dumps(dict(record), allow_nan=False) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.path}: expected room for a line, got: {error.strerror or error}") from None

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def with_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append lines to a file, which need not be there."""
    with path.open("ab") as file:
        for record in records:
            file.write((json.dumps(dict(record)) + "\n").encode())


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a file, each with what it says; a damaged one and what follows it are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            try:
                text = raw.decode()
                record = json.loads(text)
            except ValueError:
                return
            if not text.endswith("\n") or not isinstance(record, dict):
                return
            yield text, record


def records(path: Path) -> list[dict[str, Any]]:
    """What all whole lines of a file say."""
    return [record for _, record in lines(path)]
