"""A model under an adapter of a directory, for whoever only computes.  See specs/models.md."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..backend import cast, compute_dtype, from_host
from ..config import LoraConfig, Site, start_name
from ..config.fields import RESIDUAL
from ..errors import ConfigError
from ..inject import Overlay, plan
from ..io.peft import AdapterFiles, load_adapter
from ..tree import tree_map
from .new_head import with_head
from .quantised import quantised
from .records import Model, Trained
from .tasks import family_of, head_of, trained_of


class Adapted(NamedTuple):
    """A model and what lies over it, as the tasks take them.

    tokens : which rows of embeddings the adapter brings, by the embedding's name
    config : the adapter's; None where there is none
    """

    model: Model
    sites: Mapping[str, Site]
    trained: Trained
    tokens: Mapping[str, Sequence[int]]
    config: LoraConfig | None


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
    files = load_adapter(path)
    if files.config.task_type not in (None, task):
        raise ConfigError(f"{path}: task_type: expected {task}, got {files.config.task_type}")
    if start_name(files.config.init_lora_weights) in RESIDUAL:
        wanted = "an adapter for the original base: convert it to a plain one first"
        came = f"init_lora_weights={files.config.init_lora_weights!r}"
        raise ConfigError(f"{path}: expected {wanted}, got {came}")
    model = _headed(model, files, task, str(path))
    files = load_adapter(path, weights=model.weights)
    model = on_rest(model, files)
    like = model.weights[next(iter(model.weights))]
    trained = tree_map(lambda value: from_host(cast(value, compute_dtype(like)), like), trained_of(files))
    return Adapted(model, files.sites, trained, plan(model.weights, files.config).tokens, files.config)


def on_rest(model: Model, files: AdapterFiles) -> Model:
    """The model on the weights that LoftQ left, which lie beside its adapter; as it is for other starts."""
    if start_name(files.config.init_lora_weights) != "loftq":
        return model
    like = model.weights[next(iter(model.weights))]
    rests = {
        site.weight: from_host(cast(files.saved[site.weight], compute_dtype(like)), like)
        for site in files.sites.values()
        if site.weight in files.saved
    }
    return replace(model, weights=Overlay(model.weights, rests))


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
    rows = next((files.saved[brought[n]].shape[0] for n in lacking if needed[n][0] == 1), 1)
    return with_head(model, task, int(rows), np.random.default_rng(0))
