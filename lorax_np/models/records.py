"""What a model's passes are given and give: arrays by name, and rows of tokens.  See specs/models.md."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..backend import Array
from ..errors import ConfigError
from ..params import Adapter, AnyAdapter, ConvAdapter


@dataclass(frozen=True, eq=False, slots=True)
class Model:
    """A model as its files describe it. Nothing in it is ever written to.

    path : str       where it was loaded from
    family : str     which pass computes it: llama, bert, gpt2, t5, moe
    config : mapping what its config.json says, with the family's defaults filled in
    weights : mapping arrays by their names in a checkpoint, read when they are asked for
    """

    path: str
    family: str
    config: Mapping[str, Any]
    weights: Mapping[str, Array]


class Trained(NamedTuple):
    """All that trains, and equally the gradients by it.

    adapters : by the names of modules, as inject gives them
    saved    : by names in a checkpoint, whole weights and biases that train beside the adapters, and rows of
               embeddings that do, as saved_tensors gives them
    """

    adapters: Mapping[str, AnyAdapter]
    saved: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where each sequence's tokens lie among the rows of x : (N, d).

    starts : S + 1 row numbers, from 0 to N; sequence i has the rows from starts[i] to starts[i + 1]
    index  : S integers, the number of each sequence in its whole step, which its dropout masks depend on
    """

    starts: tuple[int, ...]
    index: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many rows there are, N."""
        return self.starts[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each sequence has."""
        return tuple(stop - start for start, stop in zip(self.starts, self.starts[1:], strict=False))


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """One micro-batch: sequences laid one after another, without padding.

    ids    : (N,)     token ids
    starts : S + 1    row bounds of the sequences
    labels :          what their outputs should be, by the task; −100 counts for nothing (specs/models.md)
    index  : S        the number of each sequence in the whole step, over micro-batches and ranks
    types  : (N,)     token types, for models that have them alone; None means 0
    decoder_ids, decoder_starts : (Nd,), S + 1   the decoder's sequences, for a model that has one
    """

    ids: Any
    starts: tuple[int, ...]
    labels: Any
    index: tuple[int, ...]
    types: Any = None
    decoder_ids: Any = None
    decoder_starts: tuple[int, ...] | None = None

    @property
    def rows(self) -> Rows:
        """Where the sequences lie."""
        return Rows(self.starts, self.index)

    @property
    def decoder_rows(self) -> Rows:
        """Where the decoder's sequences lie."""
        if self.decoder_starts is None:
            raise ConfigError("batch: expected the decoder's sequences, got none")
        return Rows(self.decoder_starts, self.index)


class Dropout(NamedTuple):
    """What makes the masks of one step; without it nothing is dropped. The probability is each site's own."""

    seed: int
    step: int


class Gradients:
    """Gradients as a backward pass finds them: what is found twice, in a tied weight, is added."""

    def __init__(self) -> None:
        """Start with none."""
        self.adapters: dict[str, AnyAdapter] = {}
        self.saved: dict[str, Array] = {}

    def add(self, site: str, g: AnyAdapter) -> None:
        """Add the gradients by one adapter."""
        self.adapters[site] = added(self.adapters[site], g) if site in self.adapters else g

    def add_saved(self, name: str, g: Array) -> None:
        """Add the gradient by a tensor that trains whole."""
        self.saved[name] = self.saved[name] + g if name in self.saved else g

    def found(self, trained: Trained) -> Trained:
        """What was found, in the order of what trains.

        Raises ConfigError for what trains somewhere that the pass never read, and so would never be trained.
        """
        for name in (*trained.adapters, *trained.saved):
            if name not in (self.adapters if name in trained.adapters else self.saved):
                raise ConfigError(f"{name}: expected a place that this model and task compute, got another")
        return Trained(
            {name: self.adapters[name] for name in trained.adapters},
            {name: self.saved[name] for name in trained.saved},
        )


def added(one: AnyAdapter, other: AnyAdapter) -> AnyAdapter:
    """The sum of two adapters' gradients, part by part; a part that one of them lacks is the other's.

    >>> import numpy as np
    >>> added(Adapter(np.ones((1, 2)), np.ones((2, 1))), Adapter(None, None, b=np.ones(2))).b.tolist()
    [1.0, 1.0]
    """
    parts: dict[str, Any] = {}
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        parts[field.name] = b if a is None else a if b is None else a + b
    return ConvAdapter(**parts) if isinstance(one, ConvAdapter) else Adapter(**parts)
