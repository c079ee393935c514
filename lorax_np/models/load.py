"""A model loaded: its config checked, its tensors found, none of them read yet.  See specs/models.md."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from ..backend import Array, Namespace, cast, dtype_name, from_host, namespace, to_host
from ..errors import ConfigError, FormatError
from ..io.checkpoint import open_checkpoint
from ..kinds import nearest
from ..shapes import shape_in
from .families import FAMILIES, MODEL_TYPES, OTHERS
from .family import Family, Shapes, half_a_head, other_heads
from .records import Model

COMPUTED = "float32", "float64"
BUFFERS = (
    "inv_freq",
    "masked_bias",
    "position_ids",
    ".attn.bias",
)  # ends of what files hold besides weights


class Held(Mapping[str, Array]):
    """Tensors of a checkpoint by the names that passes use, read when they are first asked for, and then held.

    Those that are mapped from a file stay there; those that have to be made, of other dtypes or libraries than
    they are stored in, are made once.
    """

    def __init__(
        self,
        under: Mapping[str, Any],
        names: Mapping[str, str],
        config: Mapping[str, Any],
        *,
        dtype: str | None = None,
        xp: Namespace | None = None,
    ) -> None:
        """Hold under's tensors : arrays, by names : ours -> under's, as dtype where that is given, in xp."""
        self.under, self.names, self.config = under, names, config
        self.dtype, self.xp = dtype, namespace(xp)
        self._held: dict[str, Array] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it where its mapping can tell. Raises KeyError."""
        return shape_in(self.under, self.names[name])

    def __getitem__(self, name: str) -> Array:
        own = self.names[name]  # two names may be one tensor's
        if own not in self._held:
            self._held[own] = self._read(own)
        return self._held[own]

    def release(self) -> None:
        """Let go of what is held, for whoever has made copies of his own; what is asked for is read again."""
        self._held.clear()

    def _read(self, own: str) -> Array:
        found = self.under[own]
        if self.dtype is not None and dtype_name(found) != self.dtype:
            found = cast(found, self.dtype)
        if self.xp is not np:
            return from_host(to_host(found), self.xp)  # type: ignore[no-any-return]
        found = np.asarray(found).view()
        found.flags.writeable = False
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{len(self)} tensors, {len(self._held)} held>"


def load_model(
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    dtype: str | None = None,
    xp: Namespace | str | None = None,
) -> Model:
    """Open a model: its config is checked, and so are its tensors' names and shapes; no tensor is read.

    path : a directory as Hugging Face has it, config.json with .safetensors; or a .gguf file
    task : str    where given, the head of that task has to be there too, and no other's is kept: config fields
                  such as target_modules="all-linear" cannot mean it
    dtype : str   float32 or float64, what weights are held in; None is as they are stored, and float32 where
                  they were quantised
    xp : the library to hold them in; None stands for LORAX_NP_BACKEND, else NumPy

    Families, by config.json's model_type: llama, mistral, qwen2, qwen3; mixtral, qwen3_moe; bert, roberta,
    xlm-roberta; gpt2; t5, mt5.
    Raises ConfigError, which names the file and the value, for a model_type that no family here has, and for
    whatever a config.json asks for that its passes do not compute; FormatError, which names the tensor, where
    one is missing, of another shape, or of no known use; and as open_checkpoint does.
    Source: specs/models.md.

    >>> import json, pathlib, tempfile
    >>> from lorax_np.io.writer import write_safetensors
    >>> from lorax_np.models.llama_config import llama_settings, llama_shapes
    >>> sizes = dict(hidden_size=6, intermediate_size=8, num_attention_heads=3, num_key_value_heads=1)
    >>> sizes |= dict(head_dim=2, num_hidden_layers=1, vocab_size=9)
    >>> config = dict(model_type="llama", tie_word_embeddings=True, **sizes)
    >>> tensors = {name: np.ones(shape) for name, shape in llama_shapes(llama_settings(config, "")).items()}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "config.json").write_text(json.dumps(config))
    ...     write_safetensors(pathlib.Path(folder, "model.safetensors"), tensors)
    ...     model = load_model(folder, task="CAUSAL_LM")
    >>> model.family, model.weights["lm_head.weight"].shape
    ('llama', (9, 6))
    """
    weights = open_checkpoint(path)
    where = weights.folder / "config.json"
    file = str(where if where.is_file() else weights.path)
    if not weights.config:
        raise FormatError(f"{weights.folder}: expected a config.json beside the weights, got none")
    return model_of(weights, weights.config, path=str(path), file=file, task=task, dtype=dtype, xp=xp)


def model_of(
    weights: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    path: str = "",
    file: str = "config",
    task: str | None = None,
    dtype: str | None = None,
    xp: Namespace | str | None = None,
) -> Model:
    """Return a model of tensors by their names in a checkpoint, checked as load_model does. Arguments as there.

    config : what a config.json says
    path, file : what errors call the weights, and the config
    """
    if dtype is not None and dtype not in COMPUTED:
        raise ConfigError(f"dtype: expected one of {', '.join(COMPUTED)}, or None, got {dtype!r}")
    kind = str(config.get("model_type"))
    if kind not in MODEL_TYPES:
        hint = f", {OTHERS[kind]}" if kind in OTHERS else nearest(kind, MODEL_TYPES)
        raise ConfigError(f"{file}: model_type: expected one of {', '.join(MODEL_TYPES)}, got {kind!r}{hint}")
    family = FAMILIES[MODEL_TYPES[kind]]
    found = family.settings(config, file)
    if family.stored is not None:
        weights = family.stored(weights, found, path)
    if family.tied and family.own_head:
        found["tie_word_embeddings"] = f"{family.tied[0]}.weight" not in weights
    found["tied"] = family.tied[1] if family.tied and found.get("tie_word_embeddings") else None
    names = _names(weights, family, found, path)
    model = Model(path, MODEL_TYPES[kind], found, Held(weights, names, found, dtype=dtype, xp=namespace(xp)))
    if task is None:
        return model
    check_head(model, task)
    without = other_heads(family, found, task)
    names = {name: own for name, own in names.items() if name not in without}
    return replace(model, weights=Held(weights, names, found, dtype=dtype, xp=namespace(xp)))


def check_head(model: Model, task: str) -> None:
    """Raise ConfigError where a model has no head for a task, FormatError where its tensors do not fit."""
    family = FAMILIES[model.family]
    heads = family.heads
    if task not in heads:
        raise ConfigError(f"task: expected one of {', '.join(heads)} for {model.family}, got {task!r}")
    for name in heads[task].shapes(model.config, 1):
        if name not in model.weights:
            _refuse(model.path, f"the tensor {name} for {task}", "none; with_head makes one")
    if more := half_a_head(family, model.config, task, model.weights):
        _refuse(model.path, f"the head of {task}, which has no {more}", "that of another task, which has one")


# ---- names and shapes --------------------------------------------------------------------------------------


def _names(weights: Mapping[str, Any], family: Family, config: Mapping[str, Any], path: str) -> dict[str, str]:
    """The tensors that passes use, by their names: ours -> the checkpoint's, in the checkpoint's order."""
    body = family.shapes(config)
    heads = [head.shapes(config, 1) for head in family.heads.values()]
    bare = not any(name.startswith(family.prefix) for name in weights)
    prefix = family.prefix if bare else ""
    at_end = {name for shapes in heads for name in shapes}
    read = {family.modern(own): own for own in weights}
    names = {(name if name in at_end else prefix + name): own for name, own in read.items()}
    names = {name: own for name, own in names.items() if not name.startswith(family.unread)}
    unused = [n for n in names if n not in body and n not in at_end and not n.endswith(BUFFERS)]
    for name, shape in body.items():
        if name not in names:
            _refuse(path, f"the tensor {name} : {shape}", f"none{nearest(name, unused)}")
        _check_shape(weights, names[name], shape, path)
    for shapes in heads:
        _check_head_shapes(weights, names, shapes, path)
    if unused:
        _refuse(path, f"no tensor that a {config['model_type']} of this config.json does not have", unused[0])
    used = {name: own for name, own in names.items() if not name.endswith(BUFFERS)}
    return used | _tied(weights, family, config, used, path)


def _tied(
    weights: Mapping[str, Any], family: Family, config: Mapping[str, Any], names: Mapping[str, str], path: str
) -> dict[str, str]:
    """The name of a head that is tied to a table, for the table's own tensor."""
    if family.tied is None or config["tied"] is None:
        return {}
    head, table = (f"{module}.weight" for module in family.tied)
    if head in names and not np.array_equal(to_host(weights[names[head]]), to_host(weights[names[table]])):
        _refuse(path, f"{head} equal to {table}, since tie_word_embeddings is true", "another")
    return {head: names[table]}


def _check_head_shapes(weights: Mapping[str, Any], names: Mapping[str, str], shapes: Shapes, path: str) -> None:
    """Where a head is there its shape fits, whatever its number of classes, which `shapes` has as 1."""
    for name, shape in shapes.items():
        if name in names:
            there = shape_in(weights, names[name])
            free = tuple(there[i] if n == 1 and i < len(there) else n for i, n in enumerate(shape))
            _check_shape(weights, names[name], free, path)


def _check_shape(weights: Mapping[str, Any], name: str, shape: tuple[int, ...], path: str) -> None:
    if (there := shape_in(weights, name)) != shape:
        _refuse(f"{path}: {name}", f"{shape}, set by the config", there)


def _refuse(where: str, wanted: str, came: object) -> NoReturn:
    raise FormatError(f"{where}: expected {wanted}, got {came}")
