"""A model under an adapter of a directory, for whoever only computes.  See specs/models.md."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..backend import cast, compute_dtype, from_host
from ..config import LoraConfig, Site, start_name
from ..config.fields import MARK, RESIDUAL
from ..errors import ConfigError
from ..inject import Overlay, plan
from ..io.peft import AdapterFiles, load_adapter
from ..tree import tree_map
from .new_head import with_head
from .quantised import quantised
from .records import Model, Trained
from .tasks import family_of, head_of, trained_of
from .vectors import note_of_base

LEAVING = "loftq", *RESIDUAL  # starts that leave other weights


class Adapted(NamedTuple):
    """A model and what lies over it, as the tasks take them.

    tokens : which rows of embeddings the adapter brings, by the embedding's name
    config : the adapter's; None where there is none
    note : what is to be said of it, where it was trained beside another base
    """

    model: Model
    sites: Mapping[str, Site]
    trained: Trained
    tokens: Mapping[str, Sequence[int]]
    config: LoraConfig | None
    note: str = ""


def with_adapter(model: Model, path: str | os.PathLike[str] | None, task: str) -> Adapted:
    """Lay an adapter of a directory over a model, for a task; None is the model alone.

    A head that the model lacks is the one that the adapter brings. All of it is in the model's library and in
    the dtype that the model is computed in.
    Raises FormatError where the adapter does not fit the model, ConfigError where it is another task's or the
    task's head is nowhere, or where it fits only the base that its start left; as load_adapter does.
    """
    if path is None:
        head_of(model, task)
        return Adapted(model, {}, Trained({}, {}), {}, None)
    files = load_adapter(path, residual_base=True)  # which is looked at here
    if files.config.task_type not in (None, task):
        raise ConfigError(f"{path}: task_type: expected {task}, got {files.config.task_type}")
    if not brings_rest(files):
        refuse_rest(str(path), path, files)
    note = note_of_base(model, files.metadata, path)
    model = _headed(model, files, task, str(path))
    files = load_adapter(path, weights=model.weights)
    model = on_rest(model, files)
    like = model.weights[next(iter(model.weights))]
    trained = tree_map(lambda value: from_host(cast(value, compute_dtype(like)), like), trained_of(files))
    return Adapted(model, files.sites, trained, plan(model.weights, files.config).tokens, files.config, note)


def on_rest(model: Model, files: AdapterFiles) -> Model:
    """The model on the weights that the adapter's start left, where they lie beside it; else as it is."""
    if start_name(_start(files)) not in LEAVING:
        return model
    like = model.weights[next(iter(model.weights))]
    rests = {
        site.weight: from_host(cast(files.saved[site.weight], compute_dtype(like)), like)
        for site in files.sites.values()
        if site.weight in files.saved
    }
    return replace(model, weights=Overlay(model.weights, rests))


def brings_rest(files: AdapterFiles) -> bool:
    """Whether the weights that the adapter's start left of the base lie beside it, all of them."""
    return bool(files.sites) and all(site.weight in files.saved for site in files.sites.values())


def refuse_rest(name: str, path: str | os.PathLike[str], files: AdapterFiles) -> None:
    """Raise ConfigError for an adapter that is right beside what its start left of the base alone, not here."""
    if start_name(_start(files)) in RESIDUAL:
        came = f"one for REST, what init_lora_weights={_start(files)!r} left of it"
        hint = f"lorax-np merge --residual-base REST {shlex.quote(str(path))} NEW makes a model of the two"
        raise ConfigError(f"{name}: expected an adapter for the original base, got {came}; {hint}")


def _start(files: AdapterFiles) -> bool | str:
    """How an adapter was started: as its weights' file says, since a config may have been set to go on."""
    return files.metadata.get(MARK) or files.config.init_lora_weights


def held(beside: Adapted, way: str) -> Adapted:
    """The same with the base in few bits, as training held it; what the adapter brings whole is not touched."""
    skip = () if beside.config is None else plan(beside.model.weights, beside.config).saved
    return beside._replace(model=quantised(beside.model, way, skip=(*skip, *beside.trained.saved)))


def _headed(model: Model, files: AdapterFiles, task: str, path: str) -> Model:
    """The model with places for the head that the adapter brings, where it has none itself."""
    heads = family_of(model).heads
    if task not in heads:
        head_of(model, task)
    needed = heads[task].shapes(model.config, 1)
    lacking = [name for name in needed if name not in model.weights]
    if not lacking:
        return model
    brought = {name: own for name in lacking for own in files.saved if own.endswith(name)}
    if len(brought) < len(lacking):
        wanted = f"a model or an adapter with {next(n for n in lacking if n not in brought)}"
        raise ConfigError(f"{path}: expected {wanted}, the head of {task}, got neither")
    there = (files.saved[brought[n]] if n in brought else model.weights[n] for n in needed if needed[n][0] == 1)
    rows = next((value.shape[0] for value in there), 1)  # one for each output
    return with_head(model, task, int(rows), np.random.default_rng(0))
