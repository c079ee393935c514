"""What is in an adapter or a checkpoint: sites with their spectra, or tensors grouped over the layers."""

import os
import re
from collections.abc import Callable
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import cast, dtype_name, to_host
from ..errors import FormatError
from ..io.checkpoint import Checkpoint, open_checkpoint
from .keys import natural
from .report import Row, table
from .run import audit

WHOLE = "BOOL", *(f"{kind}{bits}" for kind in "IU" for bits in (8, 16, 32, 64))  # whose norm tells nothing
PIECE = 1 << 22  # entries that are squared at a time
FIELDS = "r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights", "target_modules", "task_type"


class Group(NamedTuple):
    """Tensors whose names differ in numbers alone, as those of the layers do."""

    name: str  # with * for each number
    tensors: int
    dtype: str
    shape: tuple[int, ...]
    entries: int  # of all of them
    nbytes: int
    norms: tuple[float, ...]  # by Frobenius, in the order of the names; empty where they were not asked for


class Contents(NamedTuple):
    """What was found; rows of an adapter, or groups of a checkpoint."""

    path: str
    kind: str  # adapter, or checkpoint
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    files: int

    @property
    def entries(self) -> int:
        """How many numbers there are in all."""
        return sum(group.entries for group in self.groups)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return sum(group.nbytes for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """JSON content."""
        return {
            "schema": "lorax_np.contents/1",
            **self._asdict(),
            "rows": [row._asdict() for row in self.rows],
            "groups": [group._asdict() for group in self.groups],
        }

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.settings.items()]
        lines += ["", *table(self.rows)] if self.rows else [""]
        wide = max((len(group.name) for group in self.groups), default=0) + 2
        for group in self.groups:
            shape = " x ".join(map(str, group.shape)) or "scalar"
            line = (
                f"{group.name:<{wide}}{group.tensors:>4} x {group.dtype:<9}{shape:<18}{_size(group.nbytes):>10}"
            )
            if group.norms:
                line += f"   norm {min(group.norms):.4g} to {max(group.norms):.4g}"
            lines.append(line.rstrip())
        total = f"{self.entries:,} numbers, {_size(self.nbytes)}, {self.files} file{'s' * (self.files != 1)}"
        return "\n".join([*lines, "", f"{self.kind}  {self.path}  {total}"]).lstrip("\n")


def contents(
    path: str | os.PathLike[str],
    *,
    norms: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Contents:
    """Say what is in an adapter directory, a checkpoint's directory, a safetensors file or a GGUF file.

    norms : read every tensor of a checkpoint for its norm; an adapter's are always computed
    progress : called with the tensors done, all of them, and the next one's name

    Raises FormatError as the readers do, and OSError where there is no such path.
    """
    where = Path(path)
    adapter = (where / "adapter_config.json").is_file()
    say = progress or (lambda done, total, name: None)
    if not adapter:
        found = open_checkpoint(where)
        return Contents(
            str(where), "checkpoint", _settings(found), (), _groups(found, norms, say), len(found.files)
        )
    looked = audit(where, progress=say)
    weights = where / "adapter_model.safetensors"
    if not weights.is_file():
        raise FormatError(f"{weights}: expected the weights of an adapter, got no such file")
    groups = _groups(open_checkpoint(weights), False, say)
    settings = {name: looked.config[name] for name in FIELDS if looked.config.get(name) not in (None, False)}
    return Contents(str(where), "adapter", settings, looked.rows, groups, 1)


def _settings(found: Checkpoint) -> dict[str, Any]:
    names = (
        "model_type",
        "architectures",
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "tie_word_embeddings",
    )
    return {name: found.config[name] for name in names if name in found.config}


def _groups(found: Checkpoint, norms: bool, say: Callable[[int, int, str], None]) -> tuple[Group, ...]:
    groups: dict[tuple[Any, ...], Group] = {}
    for done, name in enumerate(sorted(found, key=natural)):
        say(done, len(found), name)
        if found.shards:
            dtype, shape = found.shard(name).dtype(name), found.shape(name)
            nbytes = found.shard(name).nbytes(name)
        else:
            array = to_host(found[name])
            dtype, shape = dtype_name(array), tuple(array.shape)
            nbytes = array.nbytes
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        old = groups.get((pattern, dtype, shape), Group(pattern, 0, dtype, shape, 0, 0, ()))
        groups[pattern, dtype, shape] = old._replace(
            tensors=old.tensors + 1,
            entries=old.entries + prod(shape),
            nbytes=old.nbytes + nbytes,
            norms=(*old.norms, _norm(found[name])) if norms and dtype not in WHOLE else (),
        )
    return tuple(groups.values())


def _norm(array: Any) -> float:
    flat, total = to_host(array).reshape(-1), 0.0
    for start in range(0, flat.size, PIECE):
        piece = to_host(cast(flat[start : start + PIECE], "float64"))
        total += float(np.dot(piece, piece))
    return sqrt(total)


def _size(nbytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000  # type: ignore[assignment]
    return f"{nbytes:.4g} GB"
