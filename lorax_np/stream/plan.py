"""What each file of a new checkpoint will hold, before anything is written: a plan of plain values.

A plan can be printed (a dry run), hashed (so that a later run knows whether it goes on with the same work), and
sent to another process.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import prod
from typing import Any, Literal

from ..config.fields import MARK
from ..errors import ConfigError
from ..io.checkpoint import SINGLE, Checkpoint
from ..io.layout import word_of
from ..io.safetensors import BITS, show

Kind = Literal["copy", "cast", "update", "bias", "saved", "rows", "original"]
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what is computed with
NAMES = {word: name for name, word in FLOATS.items()}


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor of a new file, and where it comes from."""

    name: str
    kind: Kind
    word: str  # the format's word for its dtype
    shape: tuple[int, ...]
    source: str = ""  # the base's tensor that is read; empty for none
    site: str = ""  # the site whose update it gets, or whose bias it is
    saved: str = ""  # the adapter's tensor that stands in for it before an update, or whose rows do

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * BITS[self.word] // 8


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One new file: its name, its tensors, and what its header says of itself."""

    name: str
    tasks: tuple[Task, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(task.nbytes for task in self.tasks)

    def entries(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a SafetensorsWriter is told."""
        return {task.name: (task.word, task.shape) for task in self.tasks}


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """All files of a new checkpoint, and what a reader of the result has to know."""

    files: tuple[FilePlan, ...]
    index: Mapping[str, Any] | None  # the metadata of the old index, where the new one gets one
    config: Mapping[str, Any]  # what config.json says differently
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Every tensor, file by file."""
        return tuple(task for file in self.files for task in file.tasks)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.nbytes for file in self.files)

    def digest(self, *more: object) -> str:
        """Return a word that is the same for the same plan and the same further facts."""
        text = json.dumps([asdict(self), more], sort_keys=True, default=str)
        return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def index_text(self) -> str:
        """The content of the index, as transformers writes it."""
        metadata = dict(self.index or {}) | {"total_size": self.nbytes}
        where = {task.name: file.name for file in self.files for task in file.tasks}
        return json.dumps({"metadata": metadata, "weight_map": where}, indent=2, sort_keys=True) + "\n"


# ---- from a checkpoint and an adapter to tasks -------------------------------------------------------------


def copied(base: Checkpoint, dtype: str | None) -> dict[str, Task]:
    """Every tensor as it is, or, where it is of floats and another dtype is wanted, in that one."""
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype: expected one of {', '.join(FLOATS)}, got {show(dtype)}")
    tasks = {}
    for name in base:
        word = base.shard(name).dtype(name) if base.shards else word_of(base[name], show(name))
        wanted = FLOATS[dtype] if dtype is not None and word in NAMES else word
        kind: Kind = "copy" if wanted == word and base.shards else "cast"
        tasks[name] = Task(name, kind, wanted, base.shape(name), name)
    return tasks


def filed(
    base: Checkpoint, tasks: Mapping[str, Task], beside: Mapping[str, str], max_shard_size: int | None
) -> tuple[tuple[FilePlan, ...], Mapping[str, Any] | None]:
    """Lay tasks into files, and say what the old index said of itself where the new files get one.

    tasks  : by the new tensor's name, in the base's order
    beside : for a tensor that the base lacks, the one beside which it is put
    max_shard_size : in bytes of tensors; None keeps the base's files
    """
    metadata = _said(next((file.metadata for file in base.shards.values()), {}) or {"format": "pt"})
    old = (base.index or {}).get("metadata") or {}
    if max_shard_size is None and base.shards:
        where = {name: base.shard(beside.get(name, name)).path.name for name in tasks}
        files = tuple(
            FilePlan(
                file, tuple(task for task in tasks.values() if where[task.name] == file), _said(shard.metadata)
            )
            for file, shard in base.shards.items()
        )
        return files, (old if base.index is not None else None)
    groups: list[list[Task]] = [[]]
    room = max_shard_size
    for task in tasks.values():
        if room is not None and groups[-1] and sum(t.nbytes for t in groups[-1]) + task.nbytes > room:
            groups.append([])
        groups[-1].append(task)
    if len(groups) == 1:
        return (FilePlan(SINGLE, tuple(groups[0]), metadata),), None
    name = "model-{:05d}-of-{:05d}.safetensors"
    files = tuple(
        FilePlan(name.format(i, len(groups)), tuple(group), metadata) for i, group in enumerate(groups, 1)
    )
    return files, old


def _said(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a new file says of itself: what the old one did, but that it is what a start left."""
    return {key: value for key, value in metadata.items() if key != MARK}
