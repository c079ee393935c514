"""Examples as steps of micro-batches, over ranks and epochs: which sequences when, and in what batch.

Every rank plans the whole step from the same order, so that all agree without a word.  Rules: specs/data.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from ..models.records import Batch
from .examples import Example, ints
from .order import order
from .rows import task_name


class Position(NamedTuple):
    """Where training stands: examples of the epoch that were used. It is all a resumed run needs."""

    epoch: int = 0
    used: int = 0


START = Position()
ROW_BY_ROW = "CAUSAL_LM", "TOKEN_CLS", "SEQ_2_SEQ_LM"  # tasks with a label at each row


class Step(NamedTuple):
    """What one rank computes in one step.

    batches : as many micro-batches on every rank, some perhaps of no sequence
    n       : labels that count in the whole step, over all micro-batches and ranks: the loss's divisor
    examples : numbers of the whole step's examples, in order
    tokens  : rows that the whole step computes, the decoder's apart
    next    : the position after the step
    """

    batches: tuple[Batch, ...]
    n: int
    examples: tuple[int, ...]
    tokens: int
    next: Position


@lru_cache(maxsize=4)
def _order(count: int, seed: int | None, epoch: int) -> HostArray:
    found = np.arange(count) if seed is None else order(count, seed=seed, epoch=epoch)
    found.flags.writeable = False
    return found


@dataclass(frozen=True, eq=False)
class Feed:
    """Steps over examples; a step's work depends on its arguments alone.

    batch_size  : sequences of a micro-batch; where max_tokens is given, micro-batches are filled by it instead
    accumulation : micro-batches of a rank in one step
    ranks, rank : how many take part, and which this is: of a step's examples it takes rank, rank + ranks, ...
    max_tokens  : tokens of a micro-batch at most, the decoder's among them; None for batch_size examples
    shuffle     : in a new order each epoch, or as they stand
    """

    examples: Sequence[Example]
    task: str
    batch_size: int = 4
    accumulation: int = 1
    ranks: int = 1
    rank: int = 0
    seed: int = 0
    shuffle: bool = True
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers out of range, and for an example that no micro-batch has room for."""
        object.__setattr__(self, "task", task_name(self.task))
        for name in ("batch_size", "accumulation", "ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.ranks:
            raise ConfigError(f"rank: expected 0 <= rank < ranks={self.ranks}, got {self.rank}")
        if not self.examples:
            raise ConfigError("examples: expected at least one, got none")
        if self.max_tokens is not None:
            longest = max(self.examples, key=size)
            if size(longest) > self.max_tokens:
                came = f"{size(longest)} tokens at {longest.where}"
                raise ConfigError(
                    f"max_tokens: expected room for the longest example, got {self.max_tokens} for {came}"
                )

    def order(self, epoch: int) -> HostArray:
        """Numbers of the examples in the order of an epoch."""
        return _order(len(self.examples), self.seed if self.shuffle else None, epoch)

    def step(self, position: Position = START) -> Step:
        """The step at a position. The last of an epoch may be shorter; none reaches into the next epoch."""
        epoch, used = position
        if not 0 <= used < len(self.examples):
            raise ConfigError(f"position: expected fewer than {len(self.examples)} examples used, got {used}")
        chosen = self.order(epoch)[used:]
        taken, shares = self._shares(chosen)
        step = [self.examples[int(i)] for i in chosen[:taken]]
        return Step(
            tuple(
                batch_of([(place, step[place]) for place in places], self.task, step[0]) for places in shares
            ),
            sum(example.kept for example in step),
            tuple(int(i) for i in chosen[:taken]),
            sum(example.tokens for example in step),
            Position(epoch + 1, 0) if taken == len(chosen) else Position(epoch, used + taken),
        )

    def epoch(self, epoch: int = 0) -> Iterator[Step]:
        """The steps of an epoch, one after another."""
        position = Position(epoch)
        while position.epoch == epoch:
            step = self.step(position)
            position = step.next
            yield step

    def steps(self, epoch: int = 0) -> int:
        """How many steps an epoch has."""
        chosen, used, count = self.order(epoch), 0, 0
        while used < len(chosen):
            used, count = used + self._shares(chosen[used:])[0], count + 1
        return count

    def _shares(self, chosen: HostArray) -> tuple[int, list[list[int]]]:
        """How many examples the step takes, and of each of this rank's micro-batches, their places in the step.

        Places go round the ranks, and fill each rank's micro-batches in order; the step ends before the first
        example that finds its rank's last one full.
        """
        most = self.max_tokens or self.batch_size
        filled: list[list[list[int]]] = [[[]] for _ in range(self.ranks)]
        room, place = [most] * self.ranks, 0
        for place, i in enumerate(chosen):
            mine, need = place % self.ranks, size(self.examples[int(i)]) if self.max_tokens else 1
            if need > room[mine]:
                if len(filled[mine]) == self.accumulation:
                    break
                filled[mine].append([])
                room[mine] = most
            filled[mine][-1].append(place)
            room[mine] -= need
        else:
            place += 1
        own = filled[self.rank]
        return place, own + [[] for _ in range(self.accumulation - len(own))]


def size(example: Example) -> int:
    """Tokens that count towards a micro-batch's limit: all that are computed, the decoder's among them."""
    return example.tokens + (0 if example.decoder is None else len(example.decoder))


def batch_of(chosen: Sequence[tuple[int, Example]], task: str, like: Example) -> Batch:
    """One micro-batch of examples, each with its place in the whole step.

    Sequence j of the example at a place has the number place·m + j, where each example has m sequences; the
    first sequences of all examples stand first, then the second ones. `like` is any example of the task, whose
    shapes a batch of no sequence has.
    """
    m = len(like.sequences)
    laid = [(place * m + j, example.sequences[j]) for j in range(m) for place, example in chosen]
    typed = like.sequences[0].types is not None
    decoders = [example.decoder for _, example in chosen if example.decoder is not None]
    written = like.decoder is not None
    return Batch(
        ids=_joined([sequence.ids for _, sequence in laid]),
        starts=_bounds([sequence.ids for _, sequence in laid]),
        labels=_labels([example.labels for _, example in chosen], task, like.labels),
        index=tuple(number for number, _ in laid),
        types=_joined([sequence.types for _, sequence in laid if sequence.types is not None])
        if typed
        else None,
        decoder_ids=_joined(decoders) if written else None,
        decoder_starts=_bounds(decoders) if written else None,
    )


def _joined(parts: Sequence[HostArray]) -> HostArray:
    return np.concatenate(parts) if parts else ints([])


def _bounds(parts: Sequence[HostArray]) -> tuple[int, ...]:
    return tuple(accumulate((len(part) for part in parts), initial=0))


def _labels(labels: list[Any], task: str, like: Any) -> Any:
    """Labels of a micro-batch: joined where each row has one, else one entry a sequence; None for none."""
    if like is None:
        return None
    if task in ROW_BY_ROW:
        return _joined(labels)
    kind = np.asarray(like)
    return np.asarray(labels, dtype=kind.dtype).reshape(len(labels), *kind.shape)
