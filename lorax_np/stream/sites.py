"""Adapters as they are started, kept on the disk, so that a start which was interrupted goes on after them.

Beside them is the state of the source of random values, so that what follows is drawn as it would have been.
specs/checkpoints.md.
"""

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..backend import to_host
from ..config import Plan
from ..errors import FormatError
from ..io.safetensors import open_safetensors
from ..io.writer import write_safetensors
from ..params import Adapter, AnyAdapter, ConvAdapter
from .begun import RECORD, Clock
from .journal import Journal
from .place import Workplace, known
from .rest import Rest

BROKEN = AttributeError, KeyError, TypeError, ValueError, FormatError
PARTS = "A", "B", "m", "b", "bB"


class Sites:
    """Adapters by name, in a `with` block: those of a run before, and those that are added.

    work  : where they lie until all are there
    found : which ones are started
    rng   : the source that they are drawn from, which is set to where the run before left it
    rest  : what their starts leave of the weights, where they leave something
    """

    def __init__(self, work: Workplace, found: Plan, rng: np.random.Generator, rest: Rest | None) -> None:
        """Nothing is read or written yet."""
        self.work, self.found, self.rng, self.rest = work, found, rng, rest
        self.adapters: dict[str, AnyAdapter] = {}
        self._new: list[str] = []
        self._lines = 0
        self._clock = Clock()

    def __enter__(self) -> Self:
        """Take what was recorded, up to the first that is not as it was."""
        self._journal = Journal(self.work.begun / f"sites{RECORD}")
        work = {"work": self.work.digest}
        lines = self._journal.begin(work) or []
        for line in lines:
            try:
                found = self._read(line)
                if found is None:
                    break
                self.rng.bit_generator.state = _state(line["rng"])
            except BROKEN:  # a line that nobody wrote so
                break
            if self.rest is not None:
                self.rest.take(*self._weights(line))
            self.adapters |= found
            self._lines += 1
        if self._lines < len(lines):
            self._journal.begin(work, anew=True)
            for line in lines[: self._lines]:
                self._journal.say(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the record, and remove one that names nothing."""
        self._journal.close()
        if not self._lines:
            self._journal.path.unlink()

    def put(self, name: str, adapter: AnyAdapter) -> None:
        """Add the adapter that was started last; now and then, bring all to the disk."""
        self.adapters[name] = adapter
        self._new.append(name)
        if self._clock.due():
            begun = time.monotonic()
            if self.rest is not None:
                self.rest.mark()
            self._write()
            self._clock.marked(time.monotonic() - begun)

    def _write(self) -> None:
        path = self.work.begun / f"sites-{self._lines:06d}.safetensors"
        arrays = {
            f"{name}.{part}": to_host(array)
            for name in self._new
            for part in PARTS
            if (array := getattr(self.adapters[name], part)) is not None
        }
        write_safetensors(path, arrays)
        line = {"sites": self._new, "file": path.name, "pages": known(path)}
        self._journal.say({**line, "rng": _plain(self.rng.bit_generator.state)})
        self._lines += 1
        self._new = []

    def _weights(self, line: dict[str, Any]) -> list[str]:
        """The weights of a line's sites."""
        return [self.found.sites[name].weight for name in line["sites"] if name in self.found.sites]

    def _read(self, line: dict[str, Any]) -> dict[str, AnyAdapter] | None:
        """The adapters of one line, or None where they are not as it says."""
        path = self.work.begun / Path(str(line.get("file"))).name
        if not path.is_file() or known(path) != line.get("pages"):
            return None
        if self.rest is not None and not all(map(self.rest.holds, self._weights(line))):
            return None
        file = open_safetensors(path)
        found: dict[str, AnyAdapter] = {}
        for name in line["sites"]:
            keys = {part: f"{name}.{part}" for part in PARTS}
            arrays = {part: np.array(file[key]) if key in file else None for part, key in keys.items()}
            kernel = arrays["A"] is not None and arrays["A"].ndim > 2
            record: Any = ConvAdapter if kernel else Adapter
            found[name] = record(*(arrays[part] for part in PARTS))
        return found


def _plain(state: Any) -> Any:
    """A generator's state as JSON has it: arrays of integers become lists."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


def _state(plain: Any) -> Any:
    """The way back."""
    if isinstance(plain, dict):
        return {key: _state(value) for key, value in plain.items()}
    return np.array(plain, dtype=np.uint64) if isinstance(plain, list) else plain
