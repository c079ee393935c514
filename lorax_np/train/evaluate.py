"""How good a model is on examples: the loss, and the scores by which people compare a task."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite

from ..backend import HostArray, quiet
from ..config import Site
from ..models.records import Batch, Model, Trained
from ..models.tasks import count
from ..text.batches import Feed, Position
from ..text.examples import Example
from ..text.labels import Labels
from ..text.metrics import written_match
from ..text.scoring import likelihood_of, scores
from .passes import Passes

Metrics = dict[str, float]
WRITTEN = "CAUSAL_LM", "SEQ_2_SEQ_LM"  # tasks whose outputs are a distribution over words


def evaluate(
    model: Model,
    sites: Mapping[str, Site],
    trained: Trained,
    data: Sequence[Example],
    task: str,
    *,
    labels: Labels | None = None,
    batch_size: int = 4,
    passes: Passes | None = None,
) -> Metrics:
    """Return a model's figures on examples, without dropout.

    data   : examples of load_data, at least one
    labels : the classes by name, for tasks that have classes
    passes : what computes the model; chosen anew where none is given

    Always loss, the mean over the labels that count, rows, and labels, how many; where the loss is finite, what
    text/scoring.py gives for the task. Source: specs/training.md.
    """
    passes = passes or Passes(model, sites, trained, task=task)
    total, kept, outputs, written = 0.0, 0, list[HostArray](), list[HostArray]()
    with quiet():
        for batch in batches_of(data, task, batch_size):
            n, value = count(task, batch.labels, batch.starts), 0.0
            if task not in WRITTEN:
                value, found = passes.judged(trained, batch, n=max(n, 1))
                outputs += found
            elif n:
                value = passes.loss(trained, batch, n=n)
            if task == "SEQ_2_SEQ_LM":
                written += passes.likeliest(trained, batch)
            total, kept = total + (n * value if n else 0.0), kept + n  # (training.7)
    figures: Metrics = {"loss": total / max(kept, 1), "rows": len(data), "labels": kept}
    if not isfinite(total) or not kept:
        return figures
    if task not in WRITTEN:
        return figures | scores(task, data, outputs, labels)
    figures |= likelihood_of(data, total)
    return figures | ({"exact match": written_match(written, [one.labels for one in data])} if written else {})


def batches_of(data: Sequence[Example], task: str, size: int) -> Iterator[Batch]:
    """Examples as they stand, so many at a time."""
    feed, used = Feed(data, task, batch_size=size, shuffle=False), 0
    while used < len(data):
        step = feed.step(Position(0, used))
        yield step.batches[0]
        used += len(step.examples)
