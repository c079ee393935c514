"""A checkpoint while it is started: its weights, read one by one, and what a start leaves of them, written."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..backend import Array
from ..config import Plan
from ..config.fields import MARK
from ..io.checkpoint import SINGLE, Checkpoint
from ..io.layout import Entry
from .begun import Begun, Piece
from .place import Workplace
from .reading import opened, read_tensor
from .written import index_name, other_files

BASE = "base"  # the folder, within the adapter's, of what a start left of the base


class Weights(Mapping[str, Array]):
    """A checkpoint's tensors in memory of their own, which goes when they do; mapped pages would stay."""

    def __init__(self, base: Checkpoint, stack: ExitStack) -> None:
        """Nothing is read yet; files stay open as long as the stack does."""
        self.base, self._files = base, opened(stack)

    @property
    def config(self) -> dict[str, Any]:
        """As the checkpoint's."""
        return self.base.config

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.base.shape(name)

    def __getitem__(self, name: str) -> Any:
        if not self.base.shards:
            return self.base[name]
        found = read_tensor(self.base.shard(name), name, self._files)
        found.flags.writeable = False
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


class Rest(ExitStack):
    """What a start leaves of a checkpoint, written in the order in which sites are started.

    work  : where; what is on the disk there of a run before is taken up
    found : which weights are started;  start : the name of what takes something out of them
    """

    def __init__(self, base: Checkpoint, work: Workplace, found: Plan, start: str) -> None:
        """Nothing is written yet."""
        super().__init__()
        self.base, self.work, self.start = base, work, start
        self.weights = {site.weight for site in found.sites.values()}
        self.folder = work.folder / BASE
        self._files = opened(self)
        self._begun: dict[str, Begun] = {}  # by the names of tensors

    def __enter__(self) -> "Rest":
        """Make the files that hold started weights, with all else in them, and copy the others."""
        super().__enter__()
        self.folder.mkdir(exist_ok=True)
        for path in [*other_files(self.base)]:
            shutil.copyfile(path, self.folder / path.name)
        if not self.base.shards:  # a GGUF file, whose config is in its metadata
            entries = {name: (self.base.word(name), self.base.shape(name)) for name in self.base}
            self._open(SINGLE, entries, {"format": "pt"})
            if self.base.config and not (self.folder / "config.json").exists():
                text = json.dumps(self.base.config, indent=2, ensure_ascii=False) + "\n"
                (self.folder / "config.json").write_text(text, encoding="utf-8")
        for file, shard in self.base.shards.items():
            self._open(
                file, {name: (shard.dtype(name), shard.shape(name)) for name in shard.names}, shard.metadata
            )
        if self.base.index is not None:
            index = index_name(self.base)
            shutil.copyfile(self.base.folder / index, self.folder / index)
        return self

    def _open(self, file: str, entries: Mapping[str, Entry], said: Mapping[str, str]) -> None:
        """Begin one file, with all in it that is not started."""
        said = {**said, MARK: self.start}
        begun = Begun(self.folder / file, self.work.begun, self.work.digest, entries, said)
        self.enter_context(begun)
        for name in entries:
            self._begun[name] = begun
            if name not in self.weights:
                self._copy(name)

    def holds(self, name: str) -> bool:
        """Whether what is left of one weight is there from a run before."""
        return self._begun[name].holds(self._piece(name))

    def take(self, *names: str) -> None:
        """Leave those of some weights so."""
        for name in names:
            self._begun[name].take(self._piece(name))

    def put(self, name: str, residual: Array | None) -> None:
        """Write what is left of one weight: all of it, where its start took nothing."""
        if residual is None:
            self._copy(name)
        else:
            self._begun[name].writer.write(name, np.asarray(residual))
            self._begun[name].put(self._piece(name))

    def mark(self) -> None:
        """Bring all that is written to the disk, and record it."""
        for begun in dict.fromkeys(self._begun.values()):
            begun.mark()

    def _piece(self, name: str) -> Piece:
        return Piece(name, 0, self._begun[name].writer.place(name)[1])

    def _copy(self, name: str) -> None:
        begun, piece = self._begun[name], self._piece(name)
        if begun.take(piece):
            return
        if self.base.shards:
            shard = self.base.shard(name)
            begun.writer.copy_part(name, 0, self._files(shard.path), shard.place(name)[0], piece.size)
        else:
            begun.writer.write(name, np.asarray(self.base[name]))
        begun.put(piece)
