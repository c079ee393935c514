"""A model with a new head for a task that its checkpoint has none for.  See specs/models.md."""

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..backend import Array, compute_dtype, from_host
from ..errors import ConfigError
from ..shapes import shape_in
from .families import FAMILIES
from .family import other_heads
from .records import Model


class Beside(Mapping[str, Array]):
    """Tensors of a model but for some, and others beside them."""

    def __init__(
        self,
        under: Mapping[str, Array],
        more: Mapping[str, Array],
        config: Mapping[str, Any],
        *,
        without: Container[str] = (),
    ) -> None:
        """Put more beside under, none of whose names it has, and leave out of under what without says."""
        self.under, self.more, self.config = under, more, config
        self.names = dict.fromkeys(name for name in under if name not in without)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it where its mapping can tell. Raises KeyError."""
        return shape_in(self.under if name in self.names else self.more, name)

    def __getitem__(self, name: str) -> Array:
        return self.under[name] if name in self.names else self.more[name]

    def __contains__(self, name: object) -> bool:
        return name in self.more or name in self.names

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from self.more

    def __len__(self) -> int:
        return len(self.names) + len(self.more)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__


def with_head(model: Model, task: str, labels: int, rng: np.random.Generator) -> Model:
    """Return the model with a new head for so many classes; its own tensors are neither read nor copied.

    Weights are drawn from N(0, σ²), σ being the config's initializer_range, or 0.02; biases are 0. A head does
    nothing useful before it has been trained: modules_to_save, which the task sets, trains it whole. Of a head
    of several layers only those are drawn that the model lacks; a BERT's pooler, where that is one of them, has
    to be named in modules_to_save. Other tasks' heads are left out, as load_model does it.

    Raises ConfigError where the family has no such head, where the model has one already, for labels < 1, and
    where what the model has of the head, of another task's perhaps, is for another number of classes.

    >>> from lorax_np.models.load import model_of
    >>> from lorax_np.models.llama_config import llama_settings, llama_shapes
    >>> sizes = dict(hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3, head_dim=2)
    >>> config = dict(model_type="llama", vocab_size=9, num_key_value_heads=1, **sizes)
    >>> body = {name: np.ones(shape) for name, shape in llama_shapes(llama_settings(config, "")).items()}
    >>> with_head(model_of(body, config), "SEQ_CLS", 4, np.random.default_rng(0)).weights["score.weight"].shape
    (4, 6)
    """
    heads = FAMILIES[model.family].heads
    if task not in heads:
        raise ConfigError(f"task: expected one of {', '.join(heads)} for {model.family}, got {task!r}")
    if isinstance(labels, bool) or not isinstance(labels, int) or labels < 1:
        raise ConfigError(f"labels: expected how many classes there are, at least 1, got {labels!r}")
    shapes = heads[task].shapes(model.config, labels)
    missing = {name: shape for name, shape in shapes.items() if name not in model.weights}
    if shapes and not missing:
        taken = next(reversed(shapes))
        raise ConfigError(
            f"task: expected one that the model has no head for, since it has {taken}, got {task}"
        )
    for name, shape in shapes.items():
        if name not in missing and (there := tuple(model.weights[name].shape)) != shape:
            raise ConfigError(f"labels: expected {there[0]}, the rows of {name} in the model, got {labels}")
    like = model.weights[next(iter(model.weights))]
    sigma, dtype = float(model.config.get("initializer_range") or 0.02), compute_dtype(like)
    made = {}
    for name, shape in missing.items():
        drawn = np.zeros(shape) if name.endswith(".bias") else sigma * rng.standard_normal(shape)
        made[name] = from_host(drawn.astype(dtype), like)
    config = {**model.config, "num_labels": labels}
    without = other_heads(FAMILIES[model.family], config, task)
    return replace(model, config=config, weights=Beside(model.weights, made, config, without=without))
