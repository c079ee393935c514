"""Faults of losses, lookups and routers: which rows count, what they are divided by, who is kept."""

from functools import partial
from typing import Any

import numpy as np

from ..batteries.op_case import IGNORED
from ..cases import HostArray
from .ops import op_fault

# ---- losses ------------------------------------------------------------------------------------------------


def _shifted(t: Any) -> HostArray:
    """Labels moved on by one row, which the data had done."""
    return np.append(t.labels[1:], IGNORED).astype(np.int64) if len(t.labels) else t.labels


def _softmax(t: Any) -> HostArray:
    return np.asarray(np.exp(t.z - t.L))


def _others(t: Any) -> float:
    """λ spread over the V − 1 others."""
    return float(t.smoothing / (t.V - 1))


_loss = partial(op_fault, "cross_entropy")
LOSSES = (
    _loss("O34", "cross entropy: labels shifted a second time", "loss.3", target=_shifted),
    _loss(
        "O35",
        "cross entropy: rows without a label counted as label 0",
        "loss.4",
        target=lambda t: np.where(t.labels == IGNORED, 0, t.labels),
    ),
    _loss("O36", "cross entropy: the mean over all rows", "loss.4", divisor=lambda t: max(len(t.labels), 1)),
    _loss(
        "O37",
        "cross entropy: a mean of means, by this call's own labels",
        "loss.4",
        divisor=lambda t: max(int(t.counted.sum()), 1),
    ),
    _loss(
        "O38",
        "cross entropy: the share spread over the V − 1 others",
        "loss.5",
        off=_others,
        on=lambda t: 1 - t.smoothing - _others(t),
    ),
    _loss("O39", "cross entropy: the share spread beside a whole label", "loss.5", on=lambda t: 1.0),
    _loss(
        "O40",
        "cross entropy: smoothing left out of the gradient",
        "loss.5",
        gz=lambda t: t.gy * (_softmax(t) - t.hot) * t.counted[:, None] / t.divisor,
    ),
    _loss(
        "O41",
        "cross entropy: gz without the label",
        "loss.5",
        gz=lambda t: t.gy * _softmax(t) * t.counted[:, None] / t.divisor,
    ),
    _loss(
        "O42",
        "cross entropy: gz not divided by n",
        "loss.6",
        gz=lambda t: t.gy * (_softmax(t) - t.share) * t.counted[:, None],
    ),
    _loss(
        "O43",
        "cross entropy: a gradient in rows without a label",
        "loss.6",
        gz=lambda t: t.gy * (_softmax(t) - t.share) / t.divisor,
    ),
    _loss(
        "O44",
        "cross entropy: gy left out of gz",
        "loss.6",
        gz=lambda t: (_softmax(t) - t.share) * t.counted[:, None] / t.divisor,
    ),
    _loss(
        "O45",
        "cross entropy: exponentials without the largest taken off",
        "loss.1",
        top=lambda t: 0 * t.z[:, :1],
    ),
    _loss(
        "O46",
        "cross entropy: the gradient of a sum where the loss is a mean, and back",
        "loss.4",
        y=lambda t: _summed(t),
    ),
)


def _summed(t: Any) -> HostArray:
    """The loss as a sum."""
    return np.asarray(((t.L - t.z) * t.share).sum())


# ---- lookups and routers -----------------------------------------------------------------------------------


def _last_write(t: Any) -> HostArray:
    found = np.zeros_like(t.W)
    found[t.ids] = t.gy
    return np.asarray(found * t.live[:, None])


def _by_count(t: Any) -> HostArray:
    return np.asarray((t.hot.T @ t.gy) * t.live[:, None] / np.maximum(t.hot.sum(axis=0), 1)[:, None])


def _last_tied(t: Any) -> HostArray:
    """Of equal logits the last ones."""
    order = np.argsort(t.z, axis=1, kind="stable")[:, ::-1][:, : t.k]
    kept = np.zeros(t.z.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept


def _fewer(t: Any) -> HostArray:
    order = np.argsort(-t.z, axis=1, kind="stable")[:, : t.k - 1]
    kept = np.zeros(t.z.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept


def _one(t: Any) -> HostArray:
    return np.ones((), t.z.dtype)


def _zero(t: Any) -> HostArray:
    return np.zeros((), t.z.dtype)


def _of_the_kept(t: Any) -> HostArray:
    return np.asarray(t.P * (t.gP - (t.gP * t.P).sum(axis=-1, keepdims=True)) * t.kept)


def _through_all(t: Any) -> HostArray:
    """As if the kept ones had been taken from the softmax of all as they are."""
    g = t.gy * t.kept
    return np.asarray(t.P * (g - (g * t.P).sum(axis=-1, keepdims=True)))


_lookup, _router = partial(op_fault, "lookup"), partial(op_fault, "router")
ROWS = (
    _lookup("O47", "lookup: rows of gW written, not added", "embedding.3", gW=_last_write),
    _lookup("O48", "lookup: padding trained", "embedding.4", live=lambda t: np.full(len(t.W), True)),
    _lookup(
        "O49",
        "lookup: gradients in the order of sorted ids",
        "embedding.2",
        gW=lambda t: (t.hot[np.argsort(t.ids, kind="stable")].T @ t.gy) * t.live[:, None],
    ),
    _lookup("O50", "lookup: gW divided by how often an id comes", "embedding.4", gW=_by_count),
    _lookup("O51", "lookup: ids counted from 1", "embedding.1", y=lambda t: t.W[(t.ids + 1) % len(t.W)]),
    _router("O52", "router: the gradient without the softmax's own term", "router.3", gz=lambda t: t.y * t.gy),
    _router("O53", "router: weights of all, not shares of the kept", "router.2", whole=_one, along=_zero),
    _router("O54", "router: of equal logits the last", "router.1", kept=_last_tied),
    _router("O55", "router: one expert too few", "router.1", kept=_fewer),
    _router(
        "O56", "router: a gradient in the kept logits alone, where all have one", "router.10", gz=_of_the_kept
    ),
    _router("O57", "router: shares of the kept differentiated as weights of all", "router.3", gz=_through_all),
)
FAULTS = (*LOSSES, *ROWS)
