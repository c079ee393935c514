"""Heads of encoders: a class of each sequence or token, a span, a vector of each sequence.

Derivation: specs/heads.md.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, cast, dtype_name, from_host, namespace_of, to_host
from ..errors import ShapeError
from ..ops.pooling import (
    contrastive_backward,
    contrastive_forward,
    cosine_mse_backward,
    cosine_mse_forward,
    mean_pool_backward,
    mean_pool_forward,
    unit_backward,
    unit_forward,
)
from ..ops.span import span_backward, span_forward
from .bert import one_row_each, pooler_backward, pooler_forward
from .family import Head, Shapes
from .heads import class_loss, finite_labels
from .passes import Pass
from .records import Batch, Gradients, Rows


class Top(NamedTuple):
    """What a task has on top of hidden states.

    task : str     SEQ_CLS, TOKEN_CLS, QUESTION_ANS or FEATURE_EXTRACTION
    out : str      the linear layer whose outputs are the task's; "" for FEATURE_EXTRACTION
    pooler : str   the linear layer with tanh through which a sequence's first row goes before; "" for none
    """

    task: str
    out: str = ""
    pooler: str = ""


class TopSaved(NamedTuple):
    """What top_backward reads."""

    rows: Rows
    pooler: Any = None
    out: Any = None
    unit: Any = None


def top_forward(at: Pass, h: Array, rows: Rows, top: Top) -> tuple[Array, TopSaved]:
    """A task's outputs from the last hidden states h : (N, d).

    Returns z and the saved activations; z is (S, C) for SEQ_CLS, (N, C) for TOKEN_CLS, (N, 2) for QUESTION_ANS,
    and for FEATURE_EXTRACTION (S, d): rows of length 1, the mean of each sequence's.
    """
    if top.task == "FEATURE_EXTRACTION":
        m = mean_pool_forward(h, _host(rows))  # (S, d)  (heads.1)
        y, unit = unit_forward(m)  # (S, d)  (heads.2)
        return y, TopSaved(rows, unit=unit)
    if top.pooler:
        p, pooler = pooler_forward(at, h, rows, top.pooler)  # (S, d)
        z, out = at.linear(top.out, p, one_row_each(rows))  # (S, C)  (heads.3)
        return z, TopSaved(rows, pooler=pooler, out=out)
    z, out = at.linear(top.out, h, rows)  # (N, C)  (heads.4)
    return z, TopSaved(rows, out=out)


def top_backward(gz: Array, saved: TopSaved, at: Pass, gradients: Gradients, top: Top) -> Array:
    """Adjoint of top_forward: gz, as z -> gh : (N, d); adds the gradients of all that trains in the top."""
    if top.task == "FEATURE_EXTRACTION":
        return mean_pool_backward(unit_backward(gz, saved.unit), _host(saved.rows))  # (heads.5)
    g = at.linear_back(top.out, gz, saved.out, gradients)  # (heads.6)
    if top.pooler:
        return pooler_backward(g, saved.pooler, at, gradients, top.pooler)
    return g


def _host(rows: Rows) -> Any:
    return np.array(rows.starts, "int64")


# ---- as the tasks take them --------------------------------------------------------------------------------


def head(top: Top) -> Head:
    """The head of a family, as the tasks take it, from what it has on top."""

    def outputs(at: Pass, h: Array, batch: Batch) -> Array:
        return top_forward(at, h, batch.rows, top)[0]

    def loss(at: Pass, h: Array, batch: Batch, n: int) -> Array:
        return task_loss(top.task, outputs(at, h, batch), batch.rows, batch.labels, n=n)[0]

    def gradient(at: Pass, h: Array, batch: Batch, n: int, gradients: Gradients) -> tuple[Array, Array]:
        z, saved = top_forward(at, h, batch.rows, top)
        value, gz = task_loss(top.task, z, batch.rows, batch.labels, n=n)
        return value, top_backward(gz, saved, at, gradients, top)

    def shapes(config: Mapping[str, Any], labels: int) -> Shapes:
        return top_shapes(top, config["hidden_size"], labels)

    return Head(outputs, loss, gradient, shapes)


def top_shapes(top: Top, d: int, labels: int) -> Shapes:
    """The tensors that a head reads, on hidden states of d, for so many outputs.

    >>> list(top_shapes(Top("SEQ_CLS", "classifier", pooler="bert.pooler.dense"), 4, 3).values())
    [(4, 4), (4,), (3, 4), (3,)]
    """
    found: Shapes = {}
    if top.pooler:
        found |= {f"{top.pooler}.weight": (d, d), f"{top.pooler}.bias": (d,)}
    if top.task == "QUESTION_ANS":
        labels = 2  # the first row and the last
    if top.out:
        found |= {f"{top.out}.weight": (labels, d), f"{top.out}.bias": (labels,)}
    return found


TOKENS, VECTORS = head(Top("TOKEN_CLS", "classifier")), head(Top("FEATURE_EXTRACTION"))
SCORED = head(Top("TOKEN_CLS", "score"))  # as a llama calls it
SPANS = head(Top("QUESTION_ANS", "qa_outputs"))
SHARED: Mapping[str, Head] = {"TOKEN_CLS": TOKENS, "QUESTION_ANS": SPANS, "FEATURE_EXTRACTION": VECTORS}
BERT_HEADS = {"SEQ_CLS": head(Top("SEQ_CLS", "classifier", pooler="bert.pooler.dense")), **SHARED}
ROBERTA_HEADS = {"SEQ_CLS": head(Top("SEQ_CLS", "classifier.out_proj", pooler="classifier.dense")), **SHARED}


# ---- losses ------------------------------------------------------------------------------------------------


def task_loss(task: str, z: Array, rows: Rows, labels: Any, *, n: int) -> tuple[Array, Array]:
    """A task's loss by its outputs, and its gradient by them.

    z : as top_forward gives it
    labels : SEQ_CLS: (S,) integers, classes; (S, C) floats from 0 to 1, labels that may hold together; or (S,)
        floats beside one output, numbers. TOKEN_CLS: (N,) integers. QUESTION_ANS: (S, 2) integers, the
        answer's first and last row within its sequence. FEATURE_EXTRACTION: (S/2,) floats, the cosine of each
        text of the first half with its pair in the second; or None, where all texts but its own are wrong
    n : int  count of the whole step

    Returns ℓ : () and gz, as z. −100 among integers counts for nothing.
    Raises ShapeError, DtypeError and ConfigError for labels that do not fit.
    """
    if task == "QUESTION_ANS":
        loss, saved = span_forward(z, _host(rows), labels, n=n)  # (heads.8)
        return loss, span_backward(saved)
    if task == "FEATURE_EXTRACTION":
        return _pairs(z, labels, n)
    return class_loss(z, labels, n)  # (heads.7)


def _pairs(y: Array, scores: Any, n: int) -> tuple[Array, Array]:
    """Of unit rows y : (S, d), the first S/2 against the others."""
    half, odd = divmod(y.shape[0], 2)
    if odd:
        raise ShapeError(f"batch: expected as many pairs as texts, got {y.shape[0]} sequences")
    one, other = y[:half, :], y[half:, :]
    if scores is None:
        loss, kept = contrastive_forward(one, other, n=n)  # (heads.9)
        g = contrastive_backward(kept)
    else:
        scores = cast(from_host(finite_labels(to_host(scores)), y), dtype_name(y))
        loss, also = cosine_mse_forward(one, other, scores, n=n)  # (heads.10)
        g = cosine_mse_backward(also)
    both: Array = namespace_of(y=y).concat(list(g), axis=0)
    return loss, both
