"""Attention of whole sequences, alike ones together, with the keys of a block as its rows.

S = K Qᵀ : (keys, queries), so that maxima, sums and what is subtracted run along queries, which lie side by
side. Equations: specs/attention.md; why: specs/training_speed.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...backend import HostArray, to_host
from ...ops.attention import AttentionSaved, Part, Rule, check, hidden_keys, parts
from ...ops.relative import Relative, relative_backward, relative_forward
from ...shapes import bind
from ..buffers import empty
from ..gemm import gemms

MOST = 1 << 18  # scores of a block: 1 MB in float32, which a core's own cache holds


def attention_forward(
    q: HostArray,
    k: HostArray,
    v: HostArray,
    *,
    starts: Sequence[int],
    key_starts: Sequence[int] | None = None,
    scale: float,
    causal: bool,
    window: int | None = None,
    relative: Relative | None = None,
    block: int = 128,
) -> tuple[HostArray, AttentionSaved]:
    """o and what is saved, as ops.attention_forward, to rounding.  (attention.1) to (attention.7)

    >>> q = k = np.zeros((3, 1, 1), "float32")
    >>> v = np.array([[[1.0]], [[3.0]], [[8.0]]], "float32")
    >>> o, _ = attention_forward(q, k, v, starts=[0, 2, 3], scale=1.0, causal=True)
    >>> o[:, 0, 0].tolist()
    [1.0, 2.0, 8.0]
    """
    rule = Rule(scale, causal, window, relative)
    check(q, k, v, rule)
    (N, H, _), K, name = q.shape, k.shape[1], q.dtype.name
    o, L, scaled = empty((N, H, v.shape[2]), name), empty((N, H), name), _scaled(q, scale)
    for stack in _stacks(parts(q, k, starts, key_starts, rule, block), K):
        Q, O = _queries(scaled, stack, K), _queries(o, stack, K)  # (g, S, K, n, D)
        keys, values = _keys(k, stack), _keys(v, stack)  # (S, K, m, D)
        S, bias, Ls = _scores(stack, K, name), _bias(stack, rule, q, K), _rows(L, stack, K)
        for j in range(H // K):
            gemms(keys, Q[j].swapaxes(-1, -2), S)
            if bias is not None:
                S += bias[j]
            top = np.maximum.reduce(S, axis=-2, keepdims=True)  # (S, K, 1, n)
            S -= top
            np.exp(S, out=S)
            Z = np.add.reduce(S, axis=-2, keepdims=True)
            gemms(S.swapaxes(-1, -2), values, O[j])
            O[j] /= Z.swapaxes(-1, -2)
            np.log(Z, out=Z)
            np.add(Z, top, out=Ls[j])
    return o, AttentionSaved(q, k, v, o, L)


def attention_backward(
    go: HostArray,
    saved: AttentionSaved,
    *,
    starts: Sequence[int],
    key_starts: Sequence[int] | None = None,
    scale: float,
    causal: bool,
    window: int | None = None,
    relative: Relative | None = None,
    block: int = 128,
) -> tuple[HostArray, HostArray, HostArray, HostArray | None]:
    """gq, gk, gv, gR as ops.attention_backward, to rounding.  (attention.8) to (attention.13)"""
    rule = Rule(scale, causal, window, relative)
    q, k, v, o, L = (to_host(x) for x in saved)
    check(q, k, v, rule)
    bind(o=(o, "... H D"), go=(go, "... H D"))
    H, K, name = q.shape[1], k.shape[1], q.dtype.name
    gq, gk, gv = empty(q.shape, name), np.zeros_like(k), np.zeros_like(v)
    gR: Any = None if relative is None else np.zeros_like(relative.R)
    scaled, delta = _scaled(q, scale), np.einsum("nhd,nhd->nh", go, o)
    for stack in _stacks(parts(q, k, starts, key_starts, rule, block), K):
        Q, G, gQ = (_queries(x, stack, K) for x in (scaled, go, gq))  # (g, S, K, n, D)
        keys, values, gkeys, gvalues = (_keys(x, stack) for x in (k, v, gk, gv))  # (S, K, m, D)
        P, gP, bias = _scores(stack, K, name), _scores(stack, K, name), _bias(stack, rule, q, K)
        Ls, deltas = (np.ascontiguousarray(_rows(x, stack, K)) for x in (L, delta))  # (g, S, K, 1, n)
        gbias = None if relative is None else np.empty((H // K, *P.shape[1:]), name)
        for j in range(H // K):
            gemms(keys, Q[j].swapaxes(-1, -2), P)
            P -= Ls[j]
            if bias is not None:
                P += bias[j]
            np.exp(P, out=P)
            gemms(P, G[j], gvalues, 1.0)
            gemms(values, G[j].swapaxes(-1, -2), gP)
            gP -= deltas[j]
            gP *= P
            if gbias is not None:
                np.sum(gP, axis=0, out=gbias[j])
            gemms(gP.swapaxes(-1, -2), keys, gQ[j])
            gemms(gP, Q[j], gkeys, 1.0)
        if gbias is not None and relative is not None:  # (g, K, m, n) -> (H, n, m)
            each = gbias.transpose(1, 0, 3, 2).reshape(H, stack.n, stack.m)
            gR += relative_backward(each, relative, shift=stack.part.shift)
    gq *= gq.dtype.type(scale)
    return gq, gk, gv, gR


# ---- blocks ------------------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """Blocks of n queries and m keys each, of sequences that follow one another."""

    part: Part  # the first
    copies: int

    @property
    def n(self) -> int:
        """Queries of each."""
        return self.part.t1 - self.part.t0

    @property
    def m(self) -> int:
        """Keys of each."""
        return self.part.s1 - self.part.s0

    def next(self) -> Part:
        """The block that may be added."""
        (t0, t1, s0, s1, shift), n, m = self.part, self.copies * self.n, self.copies * self.m
        return Part(t0 + n, t1 + n, s0 + m, s1 + m, shift)


def _stacks(blocks: Iterable[Part], K: int) -> Iterator[Stack]:
    """Blocks that follow one another and are alike, together while their scores are few."""
    now: Stack | None = None
    for part in blocks:
        if now is not None and part == now.next() and (now.copies + 1) * K * now.n * now.m <= MOST:
            now = Stack(now.part, now.copies + 1)
            continue
        if now is not None:
            yield now
        now = Stack(part, 1)
    if now is not None:
        yield now


def _scaled(q: HostArray, scale: float) -> HostArray:
    """a·q, of which scores are products: fewer entries than they have."""
    scaled = empty(q.shape, q.dtype.name)
    np.multiply(q, q.dtype.type(scale), out=scaled)
    return scaled


def _queries(x: HostArray, stack: Stack, K: int) -> HostArray:
    """Rows (N, H, D) of a stack's queries, a view: (g, S, K, n, D)."""
    (t0, *_), count, n = stack.part, stack.copies, stack.n
    rows: HostArray = x[t0 : t0 + count * n].reshape(count, n, K, x.shape[1] // K, x.shape[2])
    turned: HostArray = rows.transpose(3, 0, 2, 1, 4)
    return turned


def _keys(x: HostArray, stack: Stack) -> HostArray:
    """Rows (M, K, D) of a stack's keys, a view: (S, K, m, D)."""
    s0, count, m = stack.part.s0, stack.copies, stack.m
    rows: HostArray = x[s0 : s0 + count * m]
    return rows.reshape(count, m, *x.shape[1:]).swapaxes(1, 2)


def _rows(x: HostArray, stack: Stack, K: int) -> HostArray:
    """A number for each query and head, (N, H), as it stands beside scores, a view: (g, S, K, 1, n)."""
    return _queries(x[:, :, None], stack, K).swapaxes(-1, -2)


def _scores(stack: Stack, K: int, dtype: str) -> HostArray:
    """Room for scores: (S, K, m, n)."""
    return empty((stack.copies, K, stack.m, stack.n), dtype)


def _bias(stack: Stack, rule: Rule, q: HostArray, K: int) -> Sequence[HostArray] | None:
    """What is added to scores, −∞ where a key is not seen: (K or 1, m, n) for each of a key head's queries."""
    g, n, m, shift = q.shape[1] // K, stack.n, stack.m, stack.part.shift
    hidden = hidden_keys(n, m, shift, rule) if rule.causal or rule.window else None
    table: Any = None
    if rule.relative is not None:
        bias: Any = relative_forward(rule.relative, queries=n, keys=m, shift=shift)  # (H, n, m)
        table = bias.reshape(K, g, n, m).transpose(1, 0, 3, 2)
    if hidden is None:
        found: Sequence[HostArray] | None = table
        return found
    unseen = np.where(hidden.T, -np.inf, 0.0).astype(q.dtype)[None]  # (1, m, n)
    return [unseen] * g if table is None else [each + unseen for each in table]
