"""Faults of attention: scales, heads, what is seen, the softmax, and the bias by distance."""

from functools import partial
from math import log
from typing import Any

import numpy as np

from ..cases import HostArray
from ..layers.op_steps import buckets, grouped
from .ops import op_fault


def _spread(t: Any, factor: float) -> HostArray:
    """gq of the scores' gradient, times a factor."""
    return np.asarray((factor * (t.gS @ t.Kt.transpose(0, 2, 1))).transpose(1, 0, 2))


def _gathered(t: Any, factor: float) -> HostArray:
    """gk of the scores' gradient, times a factor."""
    return np.asarray(grouped(factor * (t.gS.transpose(0, 2, 1) @ t.Q), t))


def _squared(t: Any) -> HostArray:
    S = t.scale**2 * (t.Q @ t.Kt)
    return np.asarray(S if t.R is None else S + t.R[t.places].transpose(2, 0, 1))


def _of_one(x: HostArray, t: Any, place: int) -> HostArray:
    """Of each key head's query heads one alone."""
    heads = [np.flatnonzero(t.head == k)[place] for k in range(t.K)]
    return np.asarray(x[heads].transpose(1, 0, 2))


def _rows_apart(t: Any) -> HostArray:
    """Distances between rows, wherever their sequences begin."""
    return np.asarray(np.arange(len(t.case.k))[None, :] - np.arange(len(t.case.q))[:, None])


def _of_the_first(t: Any) -> HostArray:
    return np.broadcast_to(t.keys[0][None, :] == 0, (len(t.queries[0]), len(t.keys[0])))


def _from_the_first(t: Any) -> HostArray:
    """The first query beside the first key."""
    return np.asarray(t.keys[1][None, :] - t.queries[1][:, None])


def _not_itself(t: Any) -> HostArray:
    """Keys before a query, and for the first query itself."""
    if not t.causal:
        return np.full(t.r.shape, True)
    return np.asarray((t.r < 0) | ((t.r == 0) & (t.keys[1][None, :] == 0)))


def _soft_mask(t: Any) -> HostArray:
    hidden = np.where(t.same & t.near, -4.0, -np.inf)  # of keys to come
    return np.asarray(np.exp(np.where(t.seen, t.S - t.top, hidden)).astype(t.case.dtype))


def _scaled_bias(t: Any) -> HostArray:
    S = t.Q @ t.Kt
    return np.asarray(t.scale * (S if t.R is None else S + t.R[t.places].transpose(2, 0, 1)))


def _places(t: Any, r: HostArray) -> Any:
    return None if t.R is None else buckets(r, len(t.case.R), t.bidirectional, t.max_distance)


def _edges(t: Any) -> Any:
    """Buckets whose logarithms are rounded up."""
    if t.R is None:
        return None
    n = len(t.case.R) // 2 if t.bidirectional else len(t.case.R)
    side, d = (n * (t.r > 0), np.abs(t.r)) if t.bidirectional else (0 * t.r, np.maximum(-t.r, 0))
    half = n // 2
    share = np.log(np.maximum(d, 1) / half) / log(t.max_distance / half) * (n - half)
    far = half + np.ceil(share).astype(np.int64)
    return side + np.where(d < half, d, np.minimum(far, n - 1))


def _one_sided(t: Any) -> Any:
    return None if t.R is None else buckets(-np.abs(t.r), len(t.case.R), False, t.max_distance)


def _gR_written(t: Any) -> Any:
    """The last score of each bucket for all of them."""
    if t.R is None:
        return None
    found = np.zeros_like(t.R)
    found[t.places.reshape(-1)] = t.gS.transpose(1, 2, 0).reshape(-1, t.H)
    return found


def _gR_scaled(t: Any) -> Any:
    if t.R is None:
        return None
    hot = np.eye(len(t.case.R), dtype=t.case.dtype)[t.places.reshape(-1)].T
    return np.float64(0.5) * (hot @ t.gS.transpose(1, 2, 0).reshape(-1, t.H))


_fault = partial(op_fault, "attention")
FAULTS = (
    _fault(
        "A1",
        "attention: the scale applied twice",
        "attention.1",
        S=_squared,
        gq=lambda t: _spread(t, t.scale**2),
        gk=lambda t: _gathered(t, t.scale**2),
    ),
    _fault("A2", "attention: gk without the scale", "attention.13", gk=lambda t: _gathered(t, 1.0)),
    _fault("A3", "attention: gq with the scale twice", "attention.12", gq=lambda t: _spread(t, t.scale**2)),
    _fault(
        "A4",
        "attention: query head h reads key head h mod K",
        "attention.1",
        head=lambda t: np.arange(t.H) % t.K,
    ),
    _fault(
        "A5",
        "attention: gk of the last query head of each group",
        "attention.13",
        gk=lambda t: _of_one(t.scale * (t.gS.transpose(0, 2, 1) @ t.Q), t, -1),
    ),
    _fault(
        "A6",
        "attention: gv of the first query head of each group",
        "attention.9",
        gv=lambda t: _of_one(t.P.transpose(0, 2, 1) @ t.G, t, 0),
    ),
    _fault(
        "A7",
        "attention: a query sees one key to come",
        "attention.2",
        past=lambda t: t.r <= 1 if t.causal else t.r == t.r,
    ),
    _fault("A8", "attention: a query does not see itself", "attention.2", past=_not_itself),
    _fault(
        "A9",
        "attention: the window one key too wide",
        "attention.2",
        near=lambda t: t.window is None or -t.r <= t.window,
    ),
    _fault(
        "A10",
        "attention: the window one key too narrow",
        "attention.2",
        near=lambda t: t.window is None or -t.r < t.window - 1,
    ),
    _fault("A11", "attention: the window forgotten", "attention.2", near=lambda t: True),
    _fault(
        "A12", "attention: sequences see those before them", "attention.2", same=lambda t: True, r=_rows_apart
    ),
    _fault("A13", "attention: the first query beside the first of more keys", "attention.2", r=_from_the_first),
    _fault("A14", "attention: every sequence sees the first one's keys", "attention.2", same=_of_the_first),
    _fault("A15", "attention: gradients of scores without the row's sum", "attention.11", row=lambda t: 0),
    _fault(
        "A16",
        "attention: exponentials without the largest taken off",
        "attention.3",
        top=lambda t: 0 * t.S[..., :1],
    ),
    _fault("A17", "attention: keys to come weighed down, not out", "attention.2", E=_soft_mask),
    _fault(
        "A18",
        "attention: gv of scores, not of their softmax",
        "attention.9",
        gv=lambda t: grouped((t.S * t.seen).transpose(0, 2, 1) @ t.G, t),
    ),
    _fault(
        "A19",
        "attention: the row's sum of gy, not of gy∘o",
        "attention.11",
        row=lambda t: t.G.sum(axis=-1, keepdims=True),
    ),
    _fault("A20", "attention: the bias multiplied by the scale", "attention.18", S=_scaled_bias),
    _fault("A21", "attention: the bias of t − s", "attention.18", places=lambda t: _places(t, -t.r)),
    _fault("A22", "attention: edges of buckets rounded up", "attention.17", places=_edges),
    _fault(
        "A23",
        "attention: keys to the right in the buckets of those to the left",
        "attention.14",
        places=_one_sided,
    ),
    _fault("A24", "attention: gR written, not added", "attention.18", gR=_gR_written),
    _fault("A25", "attention: half of gR", "attention.18", gR=_gR_scaled),
)
