"""From settings to a run: the base, the rows as examples, the adapters, and how it goes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..backend import namespace
from ..config import LoraConfig, Plan, Site, start_name
from ..errors import ConfigError, FormatError
from ..inject import inject, plan, saved_tensors
from ..io.peft import load_adapter
from ..kinds import refuse
from ..models.adapted import brings_rest, on_rest, refuse_rest
from ..models.file_names import named_for_files
from ..models.load import load_model
from ..models.new_head import with_head
from ..models.quantised import quantised, quantised_start
from ..models.records import Model, Trained
from ..models.tasks import family_of, head_of, trained_of
from ..models.vectors import note_of_base
from ..random import torch_generator
from ..text.data import Data, encode_rows, load_data
from ..text.examples import SHORTEST
from ..text.examples import Settings as RowSettings
from ..text.labels import Labels, labels_of_config
from ..text.rows import read_rows, task_name
from ..text.tokenizer import Tokenizer, load_tokenizer
from .config import TrainConfig
from .settings import ALL, LORA, NONE, Settings, train_config
from .step import widened
from .work import sizes

TOLD = "eva", "corda", "lora_ga"  # starts that read inputs or gradients
DROPOUT = 0.05
OWN = "r", "lora_alpha", "lora_dropout", "init_lora_weights", "bias", "use_dora", "use_rslora"


class Prepared(NamedTuple):
    """Everything that a run is made of, nothing of it trained yet."""

    task: str
    model: Model
    tokenizer: Tokenizer
    data: Mapping[str, Data]
    labels: Labels | None
    lora: LoraConfig
    plan: Plan
    sites: Mapping[str, Site]
    trained: Trained
    config: TrainConfig
    notes: tuple[str, ...]


def prepared(settings: Settings) -> Prepared:
    """Read and check everything that settings name. Raises as what it calls does, one line each."""
    for name in ("model", "data"):
        if settings[name] is None:
            raise ConfigError(f"{name}: expected a path, got nothing")
    if start_name(settings["init_lora_weights"]) in TOLD:
        wanted = "a start that is made of the weights alone"
        hint = "; lorax-np init --data makes it, --resume-adapter-file goes on with it"
        came = repr(settings["init_lora_weights"]) + hint * (settings["init_lora_weights"] == TOLD[0])
        raise ConfigError(f"init_lora_weights: expected {wanted}, got {came}")
    config, task = train_config(settings), task_name(settings["task"])
    xp = namespace(settings["backend"], who="backend")
    model = load_model(settings["model"], dtype="float32", xp=xp)
    tokenizer = load_tokenizer(settings["model"], vocab_size=model.config.get("vocab_size"))
    data = rows(settings, config, model, tokenizer, task)
    labels = data["train"].labels
    if has_head(model, task):
        model = load_model(settings["model"], dtype="float32", task=task, xp=xp)
    there = set(model.weights)
    model, notes = headed(model, task, labels, config.seed)
    make = begun if settings["resume_adapter_file"] is None else continued
    beside = make(settings, model, task, config.seed)
    check_drawn(model, set(model.weights) - there - set(beside.trained.saved))
    return Prepared(
        task,
        beside.model,
        tokenizer,
        data,
        labels,
        beside.lora,
        beside.plan,
        beside.sites,
        widened(beside.trained),
        config,
        (*notes, *beside.notes),
    )


def rows(
    settings: Settings, config: TrainConfig, model: Model, tokenizer: Tokenizer, task: str
) -> dict[str, Data]:
    """The rows of each split as examples; those of --valid in place of a directory's own."""
    longest, valid = config.max_seq_length, settings["valid"]
    if longest < SHORTEST:
        raise ConfigError(f"max_seq_length: expected at least {SHORTEST} tokens, got {longest}")
    if valid is not None and Path(valid).is_dir():
        raise FormatError(f"valid: expected a .jsonl file, got the directory {valid}")
    how = RowSettings(
        longest,
        mask_prompt=settings["mask_prompt"],
        stride=min(128, longest // 2),
        typed=None if family_of(model).types else False,
        decoder_start=model.config.get("decoder_start_token_id"),
    )
    there = labels_of_config(model.config) if has_head(model, task) else None
    data = load_data(settings["data"], tokenizer, task=task, settings=how, labels=there)
    if (known := classes_of(model, task, data["train"].labels)) != data["train"].labels:
        data = load_data(settings["data"], tokenizer, task=task, settings=how, labels=known)
    if valid is not None:
        labels = data["train"].labels
        read = read_rows(valid, task)
        data["valid"] = encode_rows(read, tokenizer, task=task, settings=how, labels=labels)
    return data


def classes_of(model: Model, task: str, labels: Labels | None) -> Labels | None:
    """The classes that were found, or, where a head that is there has more, and they are numbers, all of its.

    Raises ConfigError where the head's outputs are not those of the classes.
    """
    if labels is None or not has_head(model, task):
        return labels
    shapes = head_of(model, task).shapes(model.config, 1)
    count = int(model.weights[next(name for name, shape in shapes.items() if shape[0] == 1)].shape[0])
    numbered = tuple(f"LABEL_{i}" for i in range(count))
    if labels.kind == "single" and labels.count < count and labels.names == numbered[: labels.count]:
        return Labels("single", numbered)
    if labels.count != count:
        names = ", ".join(labels.names[:8]) + ", ..." * (labels.count > 8)
        wanted = f"{count} classes, as many as the head in {model.path} has outputs"
        raise ConfigError(f"labels: expected {wanted}, got {labels.count}: {names}")
    return labels


def has_head(model: Model, task: str) -> bool:
    """Whether the checkpoint brings the tensors of the task's head."""
    heads = family_of(model).heads
    head = heads[task] if task in heads else head_of(model, task)  # which refuses it
    return all(name in model.weights for name in head.shapes(model.config, 1))


def headed(model: Model, task: str, labels: Labels | None, seed: int) -> tuple[Model, tuple[str, ...]]:
    """The model with a head for the task, a new one where it has none; and what is to be said of it."""
    if has_head(model, task):
        return model, ()
    count = 2 if labels is None else labels.count
    made = with_head(model, task, count, np.random.default_rng(seed))
    return made, (f"a new head for {task}, {count} outputs, drawn from the seed; it trains whole",)


def check_drawn(model: Model, lost: set[str]) -> None:
    """Raise ConfigError for tensors that were drawn and do not train whole, so that no file would have them."""
    for name in sorted(lost):
        module = name.removeprefix(family_of(model).prefix).partition(".")[0]
        why = f"since {model.path} lacks it, and what is drawn for it would be in no file"
        raise ConfigError(f"modules_to_save: expected {module} among them, {why}, got none")


class Beside(NamedTuple):
    """A base as it is held, and what is to train beside it."""

    model: Model
    lora: LoraConfig
    plan: Plan
    sites: Mapping[str, Site]
    trained: Trained
    notes: tuple[str, ...] = ()


def begun(settings: Settings, model: Model, task: str, seed: int) -> Beside:
    """Adapters started as the settings say, on the model whose weights such a start leaves."""
    lora, rng = lora_config(settings, model, task), torch_generator(seed)
    if settings["quantize"] != NONE:
        base, adapters, sites, found = quantised_start(model, lora, rng, way=settings["quantize"])
        note = f"linear layers of the base as {settings['quantize']}: {_bits(base)} bytes"
    else:
        found, note = plan(model.weights, lora), ""
        weights, adapters, sites = inject(model.weights, lora, rng)
        base = replace(model, weights=weights)
    saved = saved_tensors(model.weights, found)
    return Beside(base, lora, found, sites, Trained(adapters, saved), (note,) if note else ())


# Where PEFT's all-linear means a head or a pooler too: there each module is named.
NAMED = "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"


def _bits(model: Model) -> str:
    return f"{getattr(model.weights, 'nbytes', 0):,}"


def lora_config(settings: Settings, model: Model, task: str) -> LoraConfig:
    """The adapters' config: PEFT's names, and mlx-lm's num_layers as layers_to_transform."""
    last, named = settings["num_layers"], settings["layers_to_transform"]
    if last is not None and named is not None:
        raise ConfigError(f"num_layers: expected None beside layers_to_transform, got {last}")
    if last is not None:
        L = sizes(model)["L"]
        if (other := model.config.get("num_decoder_layers", L)) != L:
            wanted = f"layers_to_transform for stacks of {L} and {other} layers"
            raise ConfigError(f"num_layers: expected {wanted}, got {last}")
        if not 0 < last <= L:
            raise ConfigError(f"num_layers: expected 1 to {L}, the model's layers, got {last}")
        named = list(range(L - last, L))
    targets = settings["target_modules"]
    if targets == ALL and (named is not None or task in NAMED):  # PEFT takes layers beside names alone
        everywhere = plan(model.weights, LoraConfig(target_modules=ALL, task_type=task)).sites
        names = list(named_for_files(model, task, everywhere, Trained({}, {}))[0])
        targets = sorted(names if task in NAMED else {name.rpartition(".")[2] for name in names})
    alpha = 2 * (settings["r"] or 1) if settings["lora_alpha"] is None else settings["lora_alpha"]
    dropout = settings["lora_dropout"]
    if dropout is None:
        dropout = 0.0 if settings["target_parameters"] else DROPOUT
    same = (
        *("r", "target_parameters", "exclude_modules", "modules_to_save"),
        *("init_lora_weights", "bias", "use_dora", "use_rslora"),
    )
    return LoraConfig.from_dict(
        {name: settings[name] for name in same}
        | {"lora_alpha": int(alpha) if float(alpha).is_integer() else alpha, "lora_dropout": dropout}
        | {"loftq_config": _loftq(settings)}
        | {"target_modules": targets, "layers_to_transform": named, "task_type": task}
        | {"base_model_name_or_path": str(settings["model"])}
        | {"adapter_dtype": None if settings["lora_dtype"] == "float32" else settings["lora_dtype"]}
    )


def _loftq(settings: Settings) -> dict[str, int]:
    """LoftQ's settings, for the bits that the base is held in."""
    bits = 8 if settings["quantize"] == "int8" else 4
    return {"loftq_bits": bits, "loftq_iter": 1} if settings["init_lora_weights"] == "loftq" else {}


def continued(settings: Settings, model: Model, task: str, seed: int) -> Beside:
    """Adapters of a directory, to train on; its config stands in for the settings."""
    files = load_adapter(settings["resume_adapter_file"], weights=model.weights, residual_base=True)
    lora = files.config
    if not (
        lora.use_dora and brings_rest(files)
    ):  # a plain form, which such a run is saved in, is of its own start
        refuse_rest("resume_adapter_file", settings["resume_adapter_file"], files)
    if lora.task_type not in (None, task):
        raise ConfigError(f"task: expected {lora.task_type}, set by the adapter, got {task}")
    _check_told(settings, lora)
    lora = replace(lora, task_type=task, base_model_name_or_path=str(settings["model"]))
    found, way = plan(model.weights, lora), settings["quantize"]
    model = on_rest(model, files)
    base = model if way == NONE else quantised(model, way, skip=found.saved)
    other = note_of_base(model, files.metadata, settings["resume_adapter_file"])
    notes = ("r, α and targets are those of the adapter to train on", *([other] if other else []))
    return Beside(base, lora, found, files.sites, trained_of(files), notes)


def _check_told(settings: Settings, lora: LoraConfig) -> None:
    """Raise ConfigError for what settings say of an adapter that is there already, and is otherwise."""
    told = {name: settings[name] for name in LORA if settings[name] != LORA[name].default}
    known = {name: getattr(lora, name, None) for name in told}
    refuse(
        [
            f"{name}: expected {known[name]!r}, set by the adapter to train on, or nothing, got {value!r}"
            for name, value in told.items()
            if name in OWN and value != known[name]
        ]
    )
