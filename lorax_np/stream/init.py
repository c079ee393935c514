"""A start for a whole checkpoint: the adapter's directory, and, where a start takes s·BA out of W, the rest.

Site by site: beside the adapters there is one weight in memory, and what its start makes of it.
specs/checkpoints.md.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array
from ..config import LoraConfig, Plan, start_name
from ..config.fields import MARK
from ..inject import plan, saved_tensors, started
from ..io.checkpoint import SINGLE, Checkpoint, open_checkpoint
from ..io.layout import Entry
from ..io.peft import save_adapter
from ..io.peft.check import RESIDUAL
from ..io.replace import new_directory
from ..io.safetensors import BITS
from ..io.writer import SafetensorsWriter
from ..params import AnyAdapter
from ..random import torch_generator
from .place import check_apart
from .work import opened, read_tensor
from .written import index_name, other_files

PathLike = str | os.PathLike[str]
UNREAD: Any = {"loftq_config": {}, "corda_config": None, "lora_ga_config": None}  # settings of those starts
BASE = "base"  # the folder, within the adapter's, of what a start left of the base


@dataclass(frozen=True, slots=True)
class Started:
    """What was started, or would be.

    out : the adapter's directory;  base : the residual checkpoint, None where the start leaves the base alone
    nbytes : of all files that were written; in a dry run, of the tensors that they would hold
    """

    out: Path
    base: Path | None
    start: str
    sites: int
    trainable: int
    total: int
    nbytes: int
    seconds: float = 0.0
    dry: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        names = "start", "sites", "trainable", "total", "nbytes", "seconds", "dry"
        plain = {"bytes" if name == "nbytes" else name: getattr(self, name) for name in names}
        return {"out": str(self.out), "base": None if self.base is None else str(self.base), **plain}


def init_checkpoint(
    base: PathLike,
    config: LoraConfig,
    out: PathLike,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    dry_run: bool = False,
    inputs: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Array] | None = None,
) -> Started:
    """Start the adapters that a config means on a checkpoint, and save them as a PEFT directory.

    base   : what open_checkpoint takes
    config : LoraConfig; its init_lora_weights says how, its target_modules and the like say where
    out    : a folder that is not there, or empty. A start that takes s·BA out of W, as PiSSA does, leaves the
             rest as a checkpoint of its own in out/base, which the adapter is then for
    seed   : of torch_generator, so that the default start is PEFT's, bit for bit
    progress : called with the numbers of the weights that are through, and of all that are adapted
    inputs, gradients : by site, for the starts that take them, as inject does

    Raises as inject and save_adapter do; ConfigError for a place that is not free; the system's OSError. After
    an error or an interrupt nothing is left. Source: specs/init.md, specs/starts.md, specs/checkpoints.md.
    """
    begun = time.perf_counter()
    out = Path(out)
    checkpoint = open_checkpoint(base)
    check_apart(out, checkpoint.path)
    found = plan(checkpoint, config)
    start = start_name(config.init_lora_weights)
    left = out / BASE if start in RESIDUAL else None
    word = str(config.init_lora_weights).lower()
    nbytes = _expected(checkpoint, config, found, left is not None)
    outcome = Started(out, left, word, len(found.sites), found.trainable, found.total, nbytes, dry=dry_run)
    if dry_run:
        return outcome
    with new_directory(out, ()) as part, ExitStack() as stack:
        weights = _Read(checkpoint, stack)
        places = started(weights, config, torch_generator(seed), inputs=inputs, gradients=gradients)
        rest = (
            None
            if left is None
            else _Rest(checkpoint, part / BASE, {s.weight for s in found.sites.values()}, start)
        )
        adapters: dict[str, AnyAdapter] = {}
        done, total = 0, sum(prod(checkpoint.shape(site.weight)) for site in found.sites.values())
        with rest or ExitStack():
            for name, site, adapter, residual in places:
                adapters[name] = adapter
                if site is not None:
                    if rest is not None:
                        rest.put(site.weight, residual)
                    done += prod(checkpoint.shape(site.weight))
                    if progress is not None:
                        progress(done, total)
        if left is not None:  # a plain adapter of that base: PEFT would start anew, from what is left
            config = replace(
                config, init_lora_weights=True, base_model_name_or_path=str(left.resolve()), **UNREAD
            )
        elif config.base_model_name_or_path is None:
            config = replace(config, base_model_name_or_path=str(Path(base)))
        save_adapter(
            part,
            adapters,
            config,
            sites=found.sites,
            saved=saved_tensors(weights, found),
            metadata=None if left is None else {MARK: word},
            residual_base=left is not None,
        )
        nbytes = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    return replace(outcome, nbytes=nbytes, seconds=time.perf_counter() - begun)


def _expected(base: Checkpoint, config: LoraConfig, found: Plan, left: bool) -> int:
    """Bytes of the tensors to come: what trains, and all of the base where a start leaves a rest of it."""
    first = next((base.word(site.weight) for site in found.sites.values()), "F32")
    size = {None: 8 if first == "F64" else 4, "base": BITS[first] // 8, "float64": 8, "float32": 4}
    return found.trainable * size.get(config.adapter_dtype, 2) + (base.nbytes if left else 0)


class _Read(Mapping[str, Array]):
    """A checkpoint's tensors in memory of their own, which goes when they do; mapped pages would stay."""

    def __init__(self, base: Checkpoint, stack: ExitStack) -> None:
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


class _Rest(ExitStack):
    """What a start leaves of a checkpoint, written in the order in which sites are started."""

    def __init__(self, base: Checkpoint, folder: Path, weights: set[str], start: str) -> None:
        """Make the files that hold started weights, with all else in them, and copy the others."""
        super().__init__()
        self.base, self.folder, self.weights, self.start = base, folder, weights, start
        self._files = opened(self)
        self._writers: dict[str, SafetensorsWriter] = {}

    def __enter__(self) -> "_Rest":
        super().__enter__()
        self.folder.mkdir()
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
        writer = SafetensorsWriter(self.folder / file, entries, {**said, MARK: self.start})
        self.enter_context(writer)
        for name in entries:
            self._writers[name] = writer
            if name not in self.weights:
                self._copy(name)

    def put(self, name: str, residual: Array | None) -> None:
        """Write what is left of one weight: all of it, where its start took nothing."""
        if residual is None:
            self._copy(name)
        else:
            self._writers[name].write(name, np.asarray(residual))

    def _copy(self, name: str) -> None:
        if not self.base.shards:
            self._writers[name].write(name, np.asarray(self.base[name]))
            return
        shard = self.base.shard(name)
        offset, size = shard.place(name)
        self._writers[name].copy_part(name, 0, self._files(shard.path), offset, size)
