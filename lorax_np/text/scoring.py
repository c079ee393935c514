"""A model's outputs on examples, as the scores of the task.  specs/data.md."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from ..models.records import Batch
from .examples import Example
from .labels import IGNORED, Labels
from .metrics import (
    accuracy,
    answer_score,
    entity_score,
    likelihood,
    macro_f1,
    micro_f1,
    recall_at_1,
    spearman,
)
from .questions import answers
from .rows import task_name


def outputs_by_example(task: str, batch: Batch, z: HostArray) -> Iterator[HostArray]:
    """Outputs of a micro-batch, cut into those of its examples, in their order.

    z : (S, C) for SEQ_CLS; (N, C) for TOKEN_CLS; (N, 2) for QUESTION_ANS; (S, d) for FEATURE_EXTRACTION
    Yields (C,), (T, C), (T, 2), and (2, d) of the two texts.
    """
    task, z = task_name(task), np.asarray(z)
    if task == "FEATURE_EXTRACTION":
        half = len(z) // 2
        yield from (np.stack([z[i], z[half + i]]) for i in range(half))
    elif task == "SEQ_CLS":
        yield from z
    else:
        yield from (z[start:stop] for start, stop in zip(batch.starts, batch.starts[1:], strict=False))


def scores(
    task: str, examples: Sequence[Example], outputs: Sequence[HostArray], labels: Labels | None = None
) -> dict[str, float]:
    """The scores of a task whose outputs are no distribution over words; those have likelihood_of.

    outputs : one of each example, as outputs_by_example gives them
    Raises ConfigError for another task, for no example, or for another number of outputs.
    """
    task = task_name(task)
    if len(outputs) != len(examples) or not examples:
        raise ConfigError(f"outputs: expected one of each example, at least one, got {len(outputs)}")
    if task == "QUESTION_ANS":
        found = answers(examples, outputs).values()
        exact, words = answer_score([answer for answer, _ in found], [right for _, right in found])
        return {"exact match": exact, "token F1": words}
    if task == "FEATURE_EXTRACTION":
        return _pair_scores(examples, np.stack(outputs))
    if task == "SEQ_CLS" and labels is not None:
        return _class_scores(np.stack(outputs), [example.labels for example in examples], labels)
    if task == "TOKEN_CLS" and labels is not None:
        return _tag_scores(examples, outputs, labels)
    raise ConfigError(f"task: expected one with a head, and its labels, got {task}")


def likelihood_of(examples: Sequence[Example], total: float) -> dict[str, float]:
    """Figures of the summed negative log-likelihood, in nats, of all labels of the examples.  (data.4)"""
    found = likelihood(total, sum(one.kept for one in examples), sum(one.nbytes for one in examples))
    figures = {"nll per token": found.nll, "perplexity": found.perplexity}
    return figures if found.bits_per_byte is None else {**figures, "bits per byte": found.bits_per_byte}


def _class_scores(z: HostArray, right: Sequence[Any], labels: Labels) -> dict[str, float]:
    """z : (S, C)"""
    if labels.kind == "regression":
        return {
            "mean squared error": float(((z[:, 0] - right) ** 2).mean()),
            "Spearman": spearman(z[:, 0].tolist(), right),
        }
    if labels.kind == "multi":
        chosen, wanted = (z > 0).astype(int), np.stack(right)
        return {
            "exact match": float((chosen == wanted).all(axis=1).mean()),
            "micro F1": micro_f1(chosen, wanted),
        }
    chosen = z.argmax(axis=1).tolist()
    return {"accuracy": accuracy(chosen, right), "macro F1": macro_f1(chosen, right)}


def _tag_scores(examples: Sequence[Example], outputs: Sequence[HostArray], labels: Labels) -> dict[str, float]:
    """Of words that have a tag; entities where the tags are BIO's."""
    predicted, right = [], []
    for example, z in zip(examples, outputs, strict=True):
        at = example.labels != IGNORED
        predicted.append([labels.names[i] for i in z.argmax(axis=1)[at]])
        right.append([labels.names[i] for i in example.labels[at]])
    flat, wanted = list(chain.from_iterable(predicted)), list(chain.from_iterable(right))
    words = accuracy(flat, wanted)
    if not all(name == "O" or name[:2] in ("B-", "I-") for name in labels.names):
        return {"accuracy": words, "macro F1": macro_f1(flat, wanted)}
    score = entity_score(predicted, right)
    return {
        "accuracy": words,
        "entity precision": score.precision,
        "entity recall": score.recall,
        "entity F1": score.f1,
    }


def _pair_scores(examples: Sequence[Example], y: HostArray) -> dict[str, float]:
    """y : (S, 2, d), unit rows"""
    near = recall_at_1(y[:, 0], y[:, 1])
    if examples[0].labels is None:
        return {"recall@1": near}
    cosines = (y[:, 0] * y[:, 1]).sum(axis=1)
    return {"recall@1": near, "Spearman": spearman(cosines, [example.labels for example in examples])}
