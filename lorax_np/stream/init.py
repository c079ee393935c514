"""A start for a whole checkpoint: the adapter's directory, and, where a start takes s·BA out of W, the rest.

Site by site: beside the adapters there is one weight in memory, and what its start makes of it.
specs/checkpoints.md.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np

from ..backend import Array
from ..config import LoraConfig, Plan, start_name
from ..config.fields import MARK
from ..inject import plan, saved_tensors, started
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..io.peft import save_adapter
from ..io.peft.check import RESIDUAL
from ..io.safetensors import BITS, SafetensorsFile
from ..random import torch_generator
from ..starts import Moments
from .place import Workplace, check_apart
from .rest import BASE, Rest, Weights
from .sites import Sites

PathLike = str | os.PathLike[str]
UNREAD: Any = {"loftq_config": {}, "corda_config": None, "lora_ga_config": None}  # settings of those starts


@dataclass(frozen=True, slots=True)
class Started:
    """What was started, or would be.

    out : the adapter's directory;  base : the residual checkpoint, None where the start leaves the base alone
    nbytes : of all files that were written; in a dry run, of the tensors that they would hold
    resumed : how many sites, and biases of their own, were there from a run before
    """

    out: Path
    base: Path | None
    start: str
    sites: int
    trainable: int
    total: int
    nbytes: int
    seconds: float = 0.0
    resumed: int = 0
    dry: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        names = "start", "sites", "trainable", "total", "nbytes", "seconds", "resumed", "dry"
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
    resume: bool = True,
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
    resume : after an interrupt, go on after the sites that the same work had started and recorded
    inputs, gradients : by site, for the starts that take them, as inject does; work is known again by arrays
        and by an open file, and not by what can be read only once

    Raises as inject and save_adapter do; ConfigError for a place that is not free; the system's OSError. After
    an error nothing is left; after an interrupt what is recorded waits beside out in `.NAME.part`.
    Source: specs/init.md, specs/starts.md, specs/checkpoints.md.
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
    place = Path(os.path.realpath(out))  # of a link, what it points to
    place.parent.mkdir(parents=True, exist_ok=True)
    digest = _digest(checkpoint, config, seed, inputs, gradients)
    with Workplace(place, digest, resume=resume) as work, ExitStack() as stack:
        weights, rng = Weights(checkpoint, stack), torch_generator(seed)
        rest = None if left is None else Rest(checkpoint, work, found, start)
        sizes = {name: prod(checkpoint.shape(site.weight)) for name, site in found.sites.items()}
        with rest or ExitStack(), Sites(work, found, rng, rest) as sites:
            resumed = tuple(sites.adapters)
            done = sum(sizes.get(name, 0) for name in resumed)
            places = started(weights, config, rng, inputs=inputs, gradients=gradients, skip=resumed)
            for name, site, adapter, residual in places:
                if rest is not None and site is not None:
                    rest.put(site.weight, residual)
                sites.put(name, adapter)
                done += sizes.get(name, 0)
                if progress is not None and site is not None:
                    progress(done, sum(sizes.values()))
        if left is not None:  # a plain adapter of that base: PEFT would start anew, from what is left
            config = replace(
                config, init_lora_weights=True, base_model_name_or_path=str(left.resolve()), **UNREAD
            )
        elif config.base_model_name_or_path is None:
            config = replace(config, base_model_name_or_path=str(Path(base)))
        save_adapter(
            work.folder,
            sites.adapters,
            config,
            sites=found.sites,
            saved=saved_tensors(weights, found),
            metadata=None if left is None else {MARK: word},
            residual_base=left is not None,
        )
        nbytes = sum(path.stat().st_size for path in work.folder.rglob("*") if path.is_file())
    return replace(outcome, nbytes=nbytes, resumed=len(resumed), seconds=time.perf_counter() - begun)


def _expected(base: Checkpoint, config: LoraConfig, found: Plan, left: bool) -> int:
    """Bytes of the tensors to come: what trains, and all of the base where a start leaves a rest of it."""
    first = next((base.word(site.weight) for site in found.sites.values()), "F32")
    size = {None: 8 if first == "F64" else 4, "base": BITS[first] // 8, "float64": 8, "float32": 4}
    return found.trainable * size.get(config.adapter_dtype, 2) + (base.nbytes if left else 0)


def _digest(base: Checkpoint, config: LoraConfig, seed: int, *given: Mapping[str, Any] | None) -> str:
    """A word for all that a start is made of; of no other run, where something can be read only once."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in base.files]
    said = [str(base.path), config.to_dict(), seed, files, base.config, *map(_data, given)]
    return sha256(json.dumps(said, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def _data(given: Mapping[str, Any] | None) -> Any:
    """Arrays by site, known again: by their file, or by what is in them."""
    if isinstance(given, SafetensorsFile):
        seen = given.path.stat()
        return str(given.path.resolve()), seen.st_size, seen.st_mtime_ns
    found = {}
    for name, array in (given or {}).items():
        parts = (array.mean, array.scatter) if isinstance(array, Moments) else (array,)
        if not all(isinstance(part, np.ndarray) for part in parts):
            return token_hex(16)
        raws = [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]
        said = [sha256(raw.data).hexdigest() for raw in raws]
        found[name] = [str(part.dtype) for part in parts], [part.shape for part in parts], said
    return found
