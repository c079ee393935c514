"""Heads of decoders: the next token, and a class of each sequence.  Derivation: specs/models.md."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..backend import FLOATS, Array, all_finite, beside, cast, dtype_name, from_host, namespace_of, to_host
from ..errors import ConfigError, DtypeError, ShapeError
from ..layers.tokens import TokenRows
from ..ops.linear import linear_backward_x
from ..ops.loss import (
    bce_backward,
    bce_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    head_cross_entropy,
    mse_backward,
    mse_forward,
)
from ..ops.pooling import pick_backward, pick_forward
from ..ops.targets import IGNORED
from .family import Head, Shapes
from .passes import DELTA, Pass
from .records import Batch, Gradients, Rows

LM = "lm_head"
CHUNK = 256  # rows of logits held at once


# ---- the next token ----------------------------------------------------------------------------------------


def causal_outputs(at: Pass, h: Array, batch: Batch) -> Array:
    """Logits z : (N, V) of the next token.  (models.20)"""
    z, _ = _logits(at, h, at.mask(LM, h, batch.rows))
    return z


def causal_loss(at: Pass, h: Array, batch: Batch, n: int) -> Array:
    """Cross entropy of the rows that carry a label, by chunks of them.  (models.21)"""
    total = _zero(h)
    for part in _chunks(at, h, batch):
        z, _ = _logits(at, part.h, part.mask)
        total = total + cross_entropy_forward(z, part.labels, n=n)[0]
    return total


def causal_gradient(at: Pass, h: Array, batch: Batch, n: int, gradients: Gradients) -> tuple[Array, Array]:
    """The loss and gh : (N, d); logits and their gradient are never held whole."""
    if (at.trains(LM) and not at.whole(f"{LM}.weight")) or _tied_rows(at) is not None:
        return _adapted_gradient(at, h, batch, n, gradients)
    E, whole = at.weight(f"{LM}.weight"), at.whole(f"{LM}.weight")
    loss, gh, gE = head_cross_entropy(h, E, batch.labels, n=n, rows=CHUNK, need_gE=whole)
    if gE is not None:
        at.add_saved(f"{LM}.weight", gE, gradients)
    return loss, gh


def _adapted_gradient(at: Pass, h: Array, batch: Batch, n: int, gradients: Gradients) -> tuple[Array, Array]:
    """The same where an adapter, or rows of a tied table, train in the head: chunk after chunk through both."""
    xp, total = namespace_of(h=h), _zero(h)
    gh = xp.zeros_like(h)
    for part in _chunks(at, h, batch, empty=True):
        z, saved = _logits(at, part.h, part.mask)
        loss, kept = cross_entropy_forward(z, part.labels, n=n)
        total = total + loss
        g = _logits_back(at, cross_entropy_backward(kept), part.h, saved, gradients)
        gh = gh + pick_backward(g, part.index, h.shape[0])
    return total, gh


class Chunk(NamedTuple):
    """Some of the rows that carry a label."""

    index: Any  # (C,)  which rows they are, on the host
    h: Array  # (C, d)
    labels: Any  # (C,)  on the host
    mask: Array | None  # (C, d)


def _chunks(at: Pass, h: Array, batch: Batch, *, empty: bool = False) -> Iterator[Chunk]:
    """The rows that carry a label, some at a time; where none does, one chunk of none if that is asked for."""
    labels, mask = to_host(batch.labels), at.mask(LM, h, batch.rows)
    if labels.shape != (h.shape[0],):
        raise ShapeError(f"labels: expected (N,) with N={h.shape[0]} set by the rows, got {labels.shape}")
    kept = (labels != IGNORED).nonzero()[0]
    for start in range(0, max(len(kept), int(empty)), CHUNK):
        index = kept[start : start + CHUNK]
        some = None if mask is None else pick_forward(mask, index)
        yield Chunk(index, pick_forward(h, index), labels[index], some)


def _zero(h: Array) -> Array:
    """0 as an array of h's library and dtype."""
    xp = namespace_of(h=h)
    found: Array = xp.sum(xp.zeros_like(h))
    return found


def _logits(at: Pass, h: Array, mask: Array | None) -> tuple[Array, Any]:
    """z = h Eᵀ with the head's adapter, or with the trained rows of a table tied to it.  (models.20)"""
    z, saved = at.linear(LM, h, None, mask=mask)
    tokens = _tied_rows(at)
    if tokens is None:
        return z, saved
    xp = namespace_of(z=z)
    both = xp.concat([z, h @ cast(tokens.rows, at.dtype).T], axis=1)  # (C, V + n)
    place = np.arange(z.shape[1])
    place[to_host(tokens.index)] = z.shape[1] + np.arange(tokens.rows.shape[0])
    return xp.take(both, from_host(place, z), axis=1), saved  # (models.22)


def _logits_back(at: Pass, gz: Array, h: Array, saved: Any, gradients: Gradients) -> Array:
    """Adjoint of _logits: gz : (C, V) -> gh : (C, d)."""
    tokens = _tied_rows(at)
    if tokens is None:
        return at.linear_back(LM, gz, saved, gradients)
    xp, R = namespace_of(gz=gz), cast(tokens.rows, at.dtype)
    gt = xp.take(gz, beside(tokens.index, gz), axis=1)  # (C, n)
    at.add_saved(f"{at.config['tied']}.{DELTA}", gt.T @ h, gradients)  # (n, d)    (models.23)
    place = np.ones(gz.shape[1], dtype="bool")
    place[to_host(tokens.index)] = False
    own = xp.where(from_host(place, gz)[None, :], gz, xp.zeros_like(gz))
    return at.linear_back(LM, own, saved, gradients) + linear_backward_x(gt, R)  # (models.24)


def _tied_rows(at: Pass) -> TokenRows | None:
    """The trained rows of the table that the head is tied to, which stand in the head too, as in PEFT."""
    table = at.config.get("tied")
    tokens = None if table is None else at.tokens(table)
    if tokens is not None and at.trains(LM):
        raise ConfigError(
            f"{table}.{DELTA}: expected nothing else to train in {LM}, which is tied to {table}, got both"
        )
    return tokens


def causal_shapes(config: Mapping[str, Any], labels: int) -> Shapes:
    """The output embedding: (V, d). How many labels makes no difference."""
    return {f"{LM}.weight": (config["vocab_size"], config["hidden_size"])}


CAUSAL_LM = Head(causal_outputs, causal_loss, causal_gradient, causal_shapes)


# ---- a class of each sequence ------------------------------------------------------------------------------


class LastRow(NamedTuple):
    """`score` at the last token of each sequence, of decoders."""

    index: Any  # (S,)  on the host
    saved: Any


def score_outputs(at: Pass, h: Array, batch: Batch) -> Array:
    """Logits z : (S, C) of each sequence, from its last row.  (models.25)"""
    return _score(at, h, batch)[0]


def score_loss(at: Pass, h: Array, batch: Batch, n: int) -> Array:
    """The loss of classes: see class_loss."""
    return class_loss(score_outputs(at, h, batch), batch.labels, n)[0]


def score_gradient(at: Pass, h: Array, batch: Batch, n: int, gradients: Gradients) -> tuple[Array, Array]:
    """The loss of classes and gh : (N, d), 0 but in last rows."""
    z, kept = _score(at, h, batch)
    loss, gz = class_loss(z, batch.labels, n)
    gm = at.linear_back("score", gz, kept.saved, gradients)
    return loss, pick_backward(gm, kept.index, h.shape[0])


def _score(at: Pass, h: Array, batch: Batch) -> tuple[Array, LastRow]:
    index = np.array(batch.starts[1:], dtype="int64") - 1
    m = pick_forward(h, index)  # (S, d)
    one_each = Rows(tuple(range(len(index) + 1)), batch.index)
    z, saved = at.linear("score", m, one_each)
    return z, LastRow(index, saved)


def class_loss(z: Array, labels: Any, n: int) -> tuple[Array, Array]:
    """The loss of logits z : (S, C), and gz : (S, C), by what labels are.

    integers (S,): cross entropy.  numbers (S, C): binary cross entropy of each.  numbers (S,), C = 1: squares
    Raises ConfigError for integers beside one output, whose loss is 0 whatever it puts out; and for numbers
    that are not finite, or of (S, C) not from 0 to 1.
    """
    host = to_host(labels)
    if host.dtype.kind in "iu":
        if z.shape[1] == 1:
            wanted = "at least two outputs for integers, which are classes"
            raise ConfigError(f"labels: expected {wanted}, got one output; numbers to come near are floats")
        loss, saved = cross_entropy_forward(z, host, n=n)
        return loss, cross_entropy_backward(saved)
    y = cast(finite_labels(host), dtype_name(z))
    if host.ndim == 2:
        loss, those = bce_forward(z, y, n=n)
        return loss, bce_backward(those)
    if z.shape[1] != 1:
        raise ConfigError(f"labels: expected integers, or one row of numbers for each of {z.shape[1]} outputs")
    loss, those = mse_forward(z[:, 0], y, n=n)
    return loss, mse_backward(those)[:, None]


def finite_labels(host: Any) -> Any:
    """Labels that are numbers, on the host: DtypeError for others, ConfigError where one is not finite."""
    name = dtype_name(host)
    if name not in (*FLOATS, "bool") or name.startswith("complex"):
        raise DtypeError(f"labels: expected integers or real numbers, got {name}")
    if not all_finite(host):
        raise ConfigError("labels: expected finite numbers, got NaN or infinity")
    return host


def score_shapes(config: Mapping[str, Any], labels: int) -> Shapes:
    """The head of LlamaForSequenceClassification and its like: (C, d), without a bias."""
    return {"score.weight": (labels, config["hidden_size"])}


LAST_TOKEN = Head(score_outputs, score_loss, score_gradient, score_shapes)
