"""The general pass shared among threads: whole sequences each.  See specs/models.md.

Sequences meet in no product and in no norm, and a step's loss is a sum over them with one n.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from ..backend import Array, to_host
from ..fast.llama.threads import in_threads, shares, worker_count
from .records import Batch, Gradients, Trained

Found = TypeVar("Found")

LABELS = {  # which labels a sequence has: those of its rows, of its decoder's rows, or its own entry
    "CAUSAL_LM": "rows",
    "TOKEN_CLS": "rows",
    "SEQ_2_SEQ_LM": "decoder",
    "SEQ_CLS": "own",
    "QUESTION_ANS": "own",
}  # not FEATURE_EXTRACTION, where each sequence is compared with all others


def sharers(task: str, workers: int | str, sequences: int) -> int:
    """How many threads share so many sequences: one for a task whose loss is no sum over sequences."""
    return worker_count(workers, sequences) if task in LABELS else 1


def in_shares(compute: Callable[[Batch], Found], batch: Batch, *, task: str, workers: int | str) -> list[Found]:
    """What compute gives of each worker's sequences, in the workers' order: to be added up.

    workers : how many threads, or "auto" for as many as cores; fewer where there are fewer sequences, and one
        for a task whose loss is no sum over sequences

    Which sequences go to whom depends on their lengths alone, so that the same number of workers gives the same
    bits. Raises ConfigError for another number. Source: specs/models.md, (models.28).
    """
    mine = dealt(batch, task=task, workers=workers)
    parts = [batch] if len(mine) == 1 else [chosen(batch, places, task) for places in mine]
    return in_threads(lambda _, part: compute(part), parts)


def dealt(batch: Batch, *, task: str, workers: int | str) -> list[list[int]]:
    """Which sequences of a batch each worker has, by their places.

    >>> dealt(Batch(np.arange(6), (0, 1, 5, 6), None, (0, 1, 2)), task="SEQ_CLS", workers=2)
    [[1], [0, 2]]
    """
    count = sharers(task, workers, len(batch.index))
    if count == 1:
        return [list(range(len(batch.index)))]
    lengths = [max(n, 1) for n in batch.rows.lengths]
    return [runs[0] for runs in shares(lengths, count, sum(lengths))]


def chosen(batch: Batch, places: Sequence[int], task: str) -> Batch:
    """Some sequences of a batch as a batch; each keeps its number in the step, and so its masks.

    >>> b = Batch(np.array([3, 5, 4]), (0, 2, 3), np.array([1, 0]), (6, 7))
    >>> chosen(b, [1], "SEQ_CLS")
    Batch(ids=array([4]), starts=(0, 1), labels=array([0]), index=(7,), types=None, decoder_ids=None, \
decoder_starts=None)
    """
    rows = _rows(batch.starts, places)
    own = np.array(places, "int64")
    decoder = None if batch.decoder_starts is None else _rows(batch.decoder_starts, places)
    by = {"rows": rows, "decoder": decoder, "own": own}[LABELS[task]]
    return replace(
        batch,
        ids=to_host(batch.ids)[rows],
        starts=_starts(batch.starts, places),
        labels=to_host(batch.labels)[by],
        index=tuple(batch.index[place] for place in places),
        types=None if batch.types is None else to_host(batch.types)[rows],
        decoder_ids=None if batch.decoder_ids is None else to_host(batch.decoder_ids)[decoder],
        decoder_starts=None if batch.decoder_starts is None else _starts(batch.decoder_starts, places),
    )


def _rows(starts: Sequence[int], places: Sequence[int]) -> Any:
    """The numbers of the rows of some sequences, one sequence after another."""
    return np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])


def _starts(starts: Sequence[int], places: Sequence[int]) -> tuple[int, ...]:
    """Their bounds once they stand alone."""
    return tuple(int(n) for n in np.cumsum([0, *(starts[place + 1] - starts[place] for place in places)]))


def added_up(parts: Sequence[tuple[Array, Trained]]) -> tuple[Array, Trained]:
    """The sum of losses, and of gradients, in the order given.  (models.28)"""
    loss, trained = parts[0]
    if len(parts) == 1:
        return loss, trained
    total = Gradients()
    for _, found in parts:
        for site, g in found.adapters.items():
            total.add(site, g)
        for name, each in found.saved.items():
            total.add_saved(name, each)
    for value, _ in parts[1:]:
        loss = loss + value
    return loss, total.found(trained)
