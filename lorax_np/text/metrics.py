"""Scores by which models are compared, each by its definition.  specs/data.md."""

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence, Sized
from math import exp, isfinite, log
from typing import NamedTuple

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from .labels import IGNORED

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


class Score(NamedTuple):
    """Precision, recall, and their harmonic mean; 0 where a share is of nothing."""

    precision: float
    recall: float
    f1: float


class Likelihood(NamedTuple):
    """Negative log-likelihood per label, e to it, and per UTF-8 byte in bits, which compares tokenizers."""

    nll: float
    perplexity: float
    bits_per_byte: float | None  # None where no byte was labelled


def _f1(hits: int, found: int, right: int) -> Score:
    """The score of `hits` among what was found and what is right."""
    precision, recall = hits / found if found else 0.0, hits / right if right else 0.0
    return Score(precision, recall, 2 * hits / (found + right) if hits else 0.0)  # (data.5)


def _same_length(predicted: Sized, right: Sized, *, least: int = 1) -> None:
    if len(predicted) != len(right) or len(right) < least:
        raise ConfigError(
            f"predicted: expected as many as right{', at least one' * least}, "
            f"got {len(predicted)} for {len(right)}"
        )


def accuracy(predicted: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """The share of equal pairs. Raises ConfigError for none, or unequal numbers.

    >>> accuracy([0, 1, 1], [0, 1, 2])
    0.6666666666666666
    """
    _same_length(predicted, right)
    return sum(p == r for p, r in zip(predicted, right, strict=True)) / len(right)


def macro_f1(predicted: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """The mean of each class's F1, over the classes that occur on either side.

    >>> macro_f1(["a", "a", "b"], ["a", "b", "b"])
    0.6666666666666666
    """
    _same_length(predicted, right)
    hits = Counter(r for p, r in zip(predicted, right, strict=True) if p == r)
    found, true = Counter(predicted), Counter(right)
    classes = found.keys() | true.keys()
    return sum(_f1(hits[c], found[c], true[c]).f1 for c in classes) / len(classes)


def micro_f1(predicted: HostArray, right: HostArray) -> float:
    """F1 of several classes at once over all entries of (S, C) arrays of 0 and 1."""
    p, r = np.asarray(predicted) > 0.5, np.asarray(right) > 0.5
    return _f1(int((p & r).sum()), int(p.sum()), int(r.sum())).f1


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities (type, first word, word after the last) of BIO tags.

    B- begins one; I- goes on with one of its type, and begins one where there is none.

    >>> sorted(entities(["B-LOC", "I-LOC", "O", "I-PER", "B-PER"]))
    [('LOC', 0, 2), ('PER', 3, 4), ('PER', 4, 5)]
    """
    found: set[tuple[str, int, int]] = set()
    kind, begin = None, 0  # of the entity that goes on
    for at, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind is not None and (mark != "I" or name != kind):
            found.add((kind, begin, at))
            kind = None
        if mark in ("B", "I") and kind is None:
            kind, begin = name, at
    return found


def entity_score(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Score:
    """Precision, recall and F1 of whole entities, equal in type and in both ends, over all sentences.

    >>> entity_score([["B-LOC", "O"]], [["B-LOC", "I-LOC"]]).f1
    0.0
    """
    _same_length(predicted, right)
    hits = found = true = 0
    for one, other in zip(predicted, right, strict=True):
        _same_length(one, other, least=0)
        p, r = entities(one), entities(other)
        hits, found, true = hits + len(p & r), found + len(p), true + len(r)
    return _f1(hits, found, true)


def plain_answer(text: str) -> str:
    """An answer in small letters, without punctuation, articles, and more than one space in a place.

    >>> plain_answer("The  Eiffel Tower!")
    'eiffel tower'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def answer_score(predicted: Sequence[str], right: Sequence[str]) -> tuple[float, float]:
    """The share of answers that are equal in plain form, and the mean F1 of their words.

    Two answers that are empty in plain form are equal.

    >>> answer_score(["the tower", "in Paris"], ["Tower", "Paris"])
    (0.5, 0.8333333333333333)
    """
    _same_length(predicted, right)
    exact, total = 0, 0.0
    for one, other in zip(map(plain_answer, predicted), map(plain_answer, right), strict=True):
        words, wanted = Counter(one.split()), Counter(other.split())
        exact += one == other
        total += 1.0 if one == other else _f1((words & wanted).total(), words.total(), wanted.total()).f1
    return exact / len(right), total / len(right)


def likelihood(total: float, labels: int, nbytes: int) -> Likelihood:
    """Figures of a summed negative log-likelihood in nats, its labels and their UTF-8 bytes.  (data.4)

    >>> likelihood(6 * log(2), 3, 2)
    Likelihood(nll=1.3862943611198906, perplexity=4.0, bits_per_byte=3.0)
    """
    if labels < 1 or not isfinite(total):
        raise ConfigError(
            f"likelihood: expected a finite sum over at least one label, got {total} over {labels}"
        )
    nll = total / labels
    return Likelihood(nll, exp(nll) if nll < 700 else float("inf"), total / log(2) / nbytes if nbytes else None)


def written_match(likeliest: Sequence[HostArray], right: Sequence[HostArray]) -> float:
    """The share of texts that would be written token for token as they should be, the likeliest at each step.

    likeliest : (T,) of each text, the likeliest token after the right ones before it
    right     : (T,) of each text, the token that should stand there, −100 where any may

    >>> written_match([np.array([5, 6, 1]), np.array([5, 7, 1])], [np.array([5, 6, 1])] * 2)
    0.5
    """
    _same_length(likeliest, right)
    pairs = zip(likeliest, right, strict=True)
    hits = [bool(((found == wanted) | (wanted == IGNORED)).all()) for found, wanted in pairs]  # (data.6)
    return sum(hits) / len(hits)


def recall_at_1(y1: HostArray, y2: HostArray) -> float:
    """The share of rows of y1 : (S, d) whose nearest row of y2 : (S, d), by product, is theirs; ties miss.

    >>> recall_at_1(np.eye(2), np.array([[1.0, 0.0], [1.0, 0.0]]))
    0.0
    """
    y1, y2 = np.asarray(y1), np.asarray(y2)
    _same_length(y1, y2)
    near = y1 @ y2.T  # (S, S)
    own = np.diagonal(near).copy()
    np.fill_diagonal(near, -np.inf)
    return float((own > near.max(axis=1)).mean())


def spearman(predicted: Sequence[float], right: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs; NaN where all of one side are equal.

    >>> spearman([1.0, 2.0, 9.0], [0.1, 0.2, 0.3])
    1.0
    """
    _same_length(predicted, right)
    a, b = (_ranks(np.asarray(side, dtype=np.float64)) for side in (predicted, right))
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else float("nan")


def _ranks(values: HostArray) -> HostArray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]
