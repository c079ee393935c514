"""A model as a task has it: with its head, drawn where the checkpoint lacks it, and no other's.

See specs/heads.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..backend import Array, cast, compute_dtype, from_host
from ..errors import ConfigError
from .families import FAMILIES
from .records import Model
from .tasks import head_of


class ForTask(Mapping[str, Array]):
    """Some of a model's tensors, and arrays beside them."""

    def __init__(self, under: Mapping[str, Array], names: tuple[str, ...], new: Mapping[str, Array]) -> None:
        """Take from under : arrays those of names; new : arrays by other names."""
        self.under, self.names, self.new = under, dict.fromkeys(names), new
        self.config = getattr(under, "config", {})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it where the model can tell. Raises KeyError."""
        if name in self.new:
            return tuple(self.new[name].shape)
        tell = getattr(self.under, "shape", None)
        return tuple(tell(name) if callable(tell) else self.under[name].shape)

    def __getitem__(self, name: str) -> Array:
        if name in self.new:
            return self.new[name]
        if name not in self.names:
            raise KeyError(name)
        return self.under[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.new

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from self.new

    def __len__(self) -> int:
        return len(self.names) + len(self.new)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__


def for_task(
    model: Model, task: str, labels: int | None = None, rng: np.random.Generator | None = None
) -> Model:
    """Return a model that has the head of a task and no other's, so that no config can mean what no pass reads.

    model : Model  as load_model gives it
    labels : int   how many outputs the head has; None is those of the checkpoint's, else 2
    rng            draws what the checkpoint lacks, as new_head does; None where it lacks nothing

    Raises ConfigError for a task that the family has no head for, for a head of other than `labels` outputs,
    and without an rng where one has to be drawn.
    """
    shapes = head_of(model, task).shapes(model.config, 1)
    heads = FAMILIES[model.family].heads.values()
    others = {name for head in heads for name in head.shapes(model.config, 1)} - shapes.keys()
    names = tuple(name for name in model.weights if name not in others)
    missing = [name for name in shapes if name not in model.weights]
    if missing and rng is None:
        raise ConfigError(
            f"{missing[0]}: expected a tensor of the checkpoint, or an rng to draw one, got neither"
        )
    new = new_head(model, task, labels, rng) if rng is not None else {}
    made = ForTask(model.weights, names, new)
    found = {made.shape(name)[0] for name, shape in shapes.items() if shape[0] == 1}
    if labels is not None and found - {labels}:
        raise ConfigError(f"labels: expected {found.pop()}, set by the checkpoint's head, got {labels}")
    return Model(model.path, model.family, model.config, made)


def new_head(model: Model, task: str, labels: int | None, rng: np.random.Generator) -> dict[str, Array]:
    """Return what a task's head has and the checkpoint lacks, by names: weights of normal(0, σ), biases of 0.

    labels : int  how many outputs; None is 2
    rng           draws in float64, in the order of the names; rounded to the dtype the model is computed in

    σ is initializer_range of config.json, or 0.02. Of BERT a pooler may be among them: like all of these it
    means nothing until it is trained, and modules_to_save has to name it.
    """
    C = 2 if labels is None else labels
    if isinstance(C, bool) or not isinstance(C, int) or C < 1:
        raise ConfigError(f"labels: expected a whole number of at least 1, got {labels!r}")
    std, like = model.config.get("initializer_range", 0.02), model.weights[next(iter(model.weights))]
    made: dict[str, Array] = {}
    for name, shape in head_of(model, task).shapes(model.config, C).items():
        if name not in model.weights:
            values: Any = std * rng.standard_normal(shape) if name.endswith(".weight") else np.zeros(shape)
            made[name] = from_host(cast(values, compute_dtype(like)), like)
    return made
