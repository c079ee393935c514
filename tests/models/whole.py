"""Tiny models with random weights, and every gradient of theirs against a complex step."""

from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

import lorax_np as lx
from lorax_np.inject import inject
from lorax_np.models.families import FAMILIES, MODEL_TYPES
from lorax_np.models.passes import Pass
from lorax_np.models.records import Batch, Dropout, Model, Trained
from lorax_np.models.tasks import count, loss_and_gradients

TINY = 1e-30  # the complex step: its square is lost beside anything
AGREES = 1e-12  # float64: a few hundred roundings of 1e-16 between a weight and the loss
LENGTHS = 3, 1, 5  # of sequences, one of a single token
STARTS = 0, 3, 4, 9
Leaf = tuple[str, str, str]  # adapters or saved, a name, a field of an adapter


def model_of(config: dict[str, Any], task: str, labels: int = 3, dtype: str = "float64") -> Model:
    """A model of a config.json with the head of a task, its weights of order one where they can be."""
    name = MODEL_TYPES[config["model_type"]]
    family, rng = FAMILIES[name], np.random.default_rng(0)
    found = family.settings(config, "config.json") | {"tied": None}
    shapes = family.shapes(found) | family.heads[task].shapes(found, 2 if task == "QUESTION_ANS" else labels)
    weights = {}
    for tensor, shape in shapes.items():
        size = 0.3 + 1.0 / max(shape[-1], 1) ** 0.5 if len(shape) == 2 else 0.3
        values = rng.standard_normal(shape) * size
        norm = len(shape) == 1 and tensor.endswith(".weight")
        weights[tensor] = _held((1.0 + values if norm else values).astype(dtype))
    return Model("", name, found, weights)


def _held(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


def batch_of(
    vocab: int, labels: Any, *, types: int = 0, starts: tuple[int, ...] = STARTS, seed: int = 0
) -> Batch:
    """Sequences of unequal lengths, numbered out of order, without the ids 0 and 1, of which one is padding."""
    rng = np.random.default_rng(seed)
    N, S = starts[-1], len(starts) - 1
    ids = rng.integers(2, vocab, N)
    of = rng.integers(0, types, N) if types else None
    return Batch(ids, starts, labels, tuple(7 * i + 2 for i in reversed(range(S))), types=of)


def adapted(model: Model, *, targets: Any, seed: int = 1, **options: Any) -> tuple[Trained, Any]:
    """Adapters where targets say, every part of them of order 0.3; and their sites."""
    config = lx.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    kind = model.config["model_type"]
    _, adapters, sites = inject(model.weights, config, np.random.default_rng(seed), model_type=kind)
    rng = np.random.default_rng(seed)
    moved = {}
    for name, adapter in adapters.items():
        parts = {f.name: getattr(adapter, f.name) for f in fields(adapter)}
        moved[name] = replace(
            adapter,
            **{
                field: _held(part + 0.3 * rng.standard_normal(part.shape))
                for field, part in parts.items()
                if part is not None
            },
        )
    return Trained(moved, {}), sites


def all_whole(model: Model) -> Trained:
    """Every tensor trains, from other values than the base's."""
    rng = np.random.default_rng(3)
    return Trained({}, {n: _held(w + 0.1 * rng.standard_normal(w.shape)) for n, w in model.weights.items()})


def leaves(trained: Trained) -> dict[Leaf, np.ndarray]:
    """All that trains, or its gradients, one array after another."""
    found: dict[Leaf, np.ndarray] = {("saved", name, ""): value for name, value in trained.saved.items()}
    for name, adapter in trained.adapters.items():
        for field in fields(adapter):
            if (part := getattr(adapter, field.name)) is not None:
                found["adapters", name, field.name] = part
    return found


def replaced(trained: Trained, leaf: Leaf, value: np.ndarray) -> Trained:
    """The same with one array in place of another."""
    where, name, field = leaf
    if where == "saved":
        return trained._replace(saved={**trained.saved, name: value})
    return trained._replace(
        adapters={**trained.adapters, name: replace(trained.adapters[name], **{field: value})}
    )


class Step(NamedTuple):
    """One micro-batch of a model on a task, and what trains."""

    model: Model
    sites: Any
    trained: Trained
    batch: Batch
    task: str
    dropout: Dropout | None = None

    @property
    def n(self) -> int:
        return count(self.task, self.batch.labels, np.array(self.batch.starts))

    def loss(self, trained: Trained) -> Any:
        family = FAMILIES[self.model.family]
        at = Stepped(self, trained)
        h, _ = family.forward(at, self.batch, "nothing")
        return family.heads[self.task].loss(at, h, self.batch, self.n)

    def gradients(self, **options: Any) -> tuple[Any, Trained]:
        return loss_and_gradients(
            self.model,
            self.sites,
            self.trained,
            self.batch,
            task=self.task,
            n=self.n,
            dropout=self.dropout,
            **{"engine": "reference", **options},
        )


class Stepped(Pass):
    """A pass over complex arrays, under the masks of the real ones."""

    def __init__(self, step: Step, trained: Trained) -> None:
        super().__init__(step.model, step.sites, trained)
        self.mask = Pass(step.model, step.sites, step.trained, dropout=step.dropout).mask


def worst(step: Step, seed: int = 5) -> tuple[float, str]:
    """The gradient that is farthest off along a random direction, in parts of its own size: how far, and whose.

    A gradient may be 0, as that by the bias of keys is, since a softmax does not change where all of a row
    moves alike: so each is measured by a hundredth of the largest at least.
    """
    rng, (value, found) = np.random.default_rng(seed), step.gradients()
    assert np.isclose(float(value), float(step.loss(step.trained)), rtol=1e-14)
    got = leaves(found)
    assert got.keys() == leaves(step.trained).keys()
    least = max(np.linalg.norm(g) for g in got.values()) / 100
    off = {}
    for leaf, at in leaves(step.trained).items():
        v = rng.standard_normal(at.shape)
        assert got[leaf].shape == at.shape
        assert got[leaf].dtype == at.dtype
        want = float(np.imag(step.loss(replaced(step.trained, leaf, at + TINY * 1j * v)))) / TINY
        size = max(np.linalg.norm(got[leaf]), least) * np.linalg.norm(v)
        off[leaf] = abs(float(np.sum(got[leaf] * v)) - want) / size
    leaf = max(off, key=lambda name: off[name])
    return off[leaf], " ".join(leaf)


def held(saved: Any, found: dict[int, int] | None = None) -> int:
    """How many floating numbers records hold, each array once however often it is named."""
    found = {} if found is None else found
    if isinstance(saved, np.ndarray):
        while isinstance(saved.base, np.ndarray):
            saved = saved.base
        if saved.dtype.kind == "f":
            found[saved.__array_interface__["data"][0]] = saved.size
    elif isinstance(saved, tuple):
        for part in saved:
            held(part, found)
    return sum(found.values())
