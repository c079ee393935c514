"""Attention within sequences, by blocks of queries, and its adjoint.  Derivation: specs/attention.md."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..backend import Array, from_host, namespace, namespace_of, one_dtype, real
from ..errors import ShapeError
from ..shapes import bind
from .relative import Relative, relative_backward, relative_forward


class AttentionSaved(NamedTuple):
    """Activations that attention_backward reads: no scores, only the logarithm of each row's sum."""

    q: Array  # (N, H, D)
    k: Array  # (M, K, D)
    v: Array  # (M, K, D)
    o: Array  # (N, H, D)
    L: Array  # (N, H)     logsumexp of the row of scores


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    starts: Sequence[int],
    key_starts: Sequence[int] | None = None,
    scale: float,
    causal: bool,
    window: int | None = None,
    relative: Relative | None = None,
    block: int = 128,
) -> tuple[Array, AttentionSaved]:
    """o = softmax(a·q kᵀ + bias) v, each sequence for itself and each head for itself.

    q : (N, H, D)        queries of all sequences, one below the other
    k, v : (M, K, D)     keys and values; query head h reads key head h // (H/K), and v may have another width
    starts : (S + 1,)    integers on the host: queries starts[i] to starts[i + 1] − 1 are sequence i's
    key_starts : (S + 1,)  the same for keys; None: as starts
    scale : float        a
    causal : bool        whether query t sees keys s ≤ t alone; where a sequence has more keys than queries,
                         its last query stands beside its last key
    window : int         keys with t − s < window alone
    relative             a bias by s − t, of ops/relative.py, the same in all sequences
    block : int          how many queries are worked on at a time; no table of scores outlives its block

    Returns o : (N, H, D) and the saved activations. Sequences may hold nothing.
    Raises ShapeError where sizes do not fit and where a query sees no key, DtypeError where two dtypes meet.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; specs/attention.md.

    >>> import numpy as np
    >>> q = k = np.zeros((3, 1, 1))
    >>> v = np.array([[[1.0]], [[3.0]], [[8.0]]])
    >>> o, saved = attention_forward(q, k, v, starts=[0, 2, 3], scale=1.0, causal=True)
    >>> o[:, 0, 0].tolist(), np.exp(saved.L[:, 0]).round(12).tolist()
    ([1.0, 2.0, 8.0], [1.0, 2.0, 1.0])
    """
    rule = Rule(scale, causal, window, relative)
    check(q, k, v, rule)
    xp = namespace_of(q=q)
    outs, logs = [], []
    for part in parts(q, k, starts, key_starts, rule, block):
        S = _scores(q, k, part, rule)                      # (K, g, n, m)
        top = xp.max(real(S), axis=-1, keepdims=True)      # (K, g, n, 1)  (attention.3)
        E = xp.exp(S - top)                                # (K, g, n, m)  (attention.4)
        Z = xp.sum(E, axis=-1, keepdims=True)              # (K, g, n, 1)  (attention.5)
        outs.append(_tokens((E @ _keys(v, part)) / Z))     # (n, H, D)     (attention.6)
        logs.append(_tokens(top + xp.log(Z))[:, :, 0])     # (n, H)        (attention.7)
    o = xp.concat(outs, axis=0) if outs else xp.reshape(v[:0, ...], (0, q.shape[1], v.shape[2]))
    L = xp.concat(logs, axis=0) if logs else xp.zeros_like(q)[:, :, 0]
    return o, AttentionSaved(q, k, v, o, L)


def attention_backward(
    go: Array,
    saved: AttentionSaved,
    *,
    starts: Sequence[int],
    key_starts: Sequence[int] | None = None,
    scale: float,
    causal: bool,
    window: int | None = None,
    relative: Relative | None = None,
    block: int = 128,
) -> tuple[Array, Array, Array, Array | None]:
    """Adjoint of attention_forward: go : (N, H, D) -> gq, gk, gv, shaped as q, k, v, and gR or None.

    The options are the forward's. Probabilities are computed again, from the scores and L.
    gR : (buckets, H) is the gradient by the table of `relative`, None without it.
    """
    q, k, v, o, L = saved
    rule = Rule(scale, causal, window, relative)
    check(q, k, v, rule)
    bind(o=(o, "... H D"), go=(go, "... H D"))
    xp, K = namespace_of(go=go), k.shape[1]
    gqs, gk, gv = [], xp.zeros_like(k), xp.zeros_like(v)
    gR: Any = None if relative is None else xp.zeros_like(relative.R)
    for part in parts(q, k, starts, key_starts, rule, block):
        rows, seen = slice(part.t0, part.t1), slice(part.s0, part.s1)
        Q, G, O = (_heads(x[rows, ...], K) for x in (q, go, o))          # (K, g, n, D)
        P = xp.exp(_scores(q, k, part, rule) - _heads(L[rows, :, None], K))  # (K, g, n, m)  (attention.8)
        gv[seen, ...] += _summed(P, G)                                   # (m, K, D)     (attention.9)
        gP = G @ _turned(_keys(v, part))                                 # (K, g, n, m)  (attention.10)
        gS = P * (gP - xp.sum(G * O, axis=-1, keepdims=True))            # (K, g, n, m)  (attention.11)
        gqs.append(_tokens(scale * (gS @ _keys(k, part))))               # (n, H, D)     (attention.12)
        gk[seen, ...] += scale * _summed(gS, Q)                          # (m, K, D)     (attention.13)
        if relative is not None:
            each = xp.reshape(gS, (q.shape[1], *gS.shape[2:]))           # (H, n, m)
            gR = gR + relative_backward(each, relative, shift=part.shift)
    gq = xp.concat(gqs, axis=0) if gqs else xp.zeros_like(q)
    return gq, gk, gv, gR


# ---- blocks ------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """How keys are weighed, and which are seen."""

    scale: float
    causal: bool
    window: int | None
    relative: Relative | None


class Part(NamedTuple):
    """A block of queries of one sequence, and the keys that any of them sees."""

    t0: int  # rows of q
    t1: int
    s0: int  # rows of k
    s1: int
    shift: int  # position of the first query less that of the first key


def parts(
    q: Array, k: Array, starts: Sequence[int], key_starts: Sequence[int] | None, rule: Rule, block: int
) -> Iterator[Part]:
    """The blocks of all sequences, in order. Source: specs/attention.md."""
    if block < 1:
        raise ShapeError(f"block: expected 1 query at least, got {block}")
    rows = bounds("starts", starts, q.shape[0])
    keys = bounds("key_starts", starts if key_starts is None else key_starts, k.shape[0])
    if len(rows) != len(keys):
        raise ShapeError(f"key_starts: expected {len(rows)} bounds, as many as starts has, got {len(keys)}")
    for i, ((a, b), (c, d)) in enumerate(zip(pairwise(rows), pairwise(keys), strict=True)):
        far = max(1, 1 if rule.window is None else b - a - rule.window + 1)
        least = b - a if rule.causal else far
        if d - c < least and b > a:
            raise ShapeError(f"key_starts: expected {least} keys at least for sequence {i}, got {d - c}")
        ahead = d - c - (b - a) if rule.causal else 0
        for t0 in range(a, b, block):
            t1, first = min(t0 + block, b), ahead + t0 - a
            low = 0 if rule.window is None else max(first - rule.window + 1, 0)
            high = ahead + t1 - a if rule.causal else d - c
            yield Part(t0, t1, c + low, c + high, first - low)


def bounds(name: str, starts: Sequence[int], N: int) -> list[int]:
    """Bounds of sequences among N rows, as integers of the host. ShapeError where they are none.

    Source: specs/attention.md.
    """
    found = [int(s) for s in starts]
    if not found or found[0] != 0 or found[-1] != N or any(a > b for a, b in pairwise(found)):
        raise ShapeError(f"{name}: expected bounds that rise from 0 to the number of rows, {N}, got {found}")
    return found


def _scores(q: Array, k: Array, part: Part, rule: Rule) -> Any:
    """a·q kᵀ + bias of a block, −∞ where a key is not seen: (K, g, n, m)."""
    xp, K = namespace_of(q=q), k.shape[1]
    S = rule.scale * (_heads(q[part.t0 : part.t1, ...], K) @ _turned(_keys(k, part)))  # (attention.1)
    n, m = S.shape[2:]
    if rule.relative is not None:
        bias = relative_forward(rule.relative, queries=n, keys=m, shift=part.shift)    # (H, n, m)
        S = S + xp.reshape(bias, (K, q.shape[1] // K, n, m))
    hidden = hidden_keys(n, m, part.shift, rule)
    if hidden is None:
        return S
    return xp.where(from_host(hidden, q), xp.full_like(S, -float("inf")), S)       # (attention.2)


def hidden_keys(n: int, m: int, shift: int, rule: Rule) -> Any:
    """Which keys of a block a query does not see, on the host, or None where each sees all: (n, m).

    Source: specs/attention.md, (attention.2).
    """
    host = namespace("numpy")
    r = host.arange(m) - host.arange(n)[:, None] - shift  # s − t
    hidden = (r > 0) & rule.causal
    if rule.window is not None:
        hidden = hidden | (r <= -rule.window)
    return hidden if hidden.any() else None


# ---- heads before tokens, and back -------------------------------------------------------------------------


def _heads(x: Array, K: int) -> Any:
    """(n, H, D) -> (K, g, n, D)."""
    n, H, D = x.shape
    xp = namespace_of(x=x)
    return xp.permute_dims(xp.reshape(x, (n, K, H // K, D)), (1, 2, 0, 3))


def _tokens(x: Any) -> Any:
    """(K, g, n, D) -> (n, H, D)."""
    K, g, n, D = x.shape
    xp = namespace_of(x=x)
    return xp.reshape(xp.permute_dims(x, (2, 0, 1, 3)), (n, K * g, D))


def _keys(x: Array, part: Part) -> Any:
    """The block's rows of (M, K, D) as (K, 1, m, D)."""
    return namespace_of(x=x).permute_dims(x[part.s0 : part.s1, ...], (1, 0, 2))[:, None, :, :]


def _turned(x: Any) -> Any:
    """(K, 1, m, D) -> (K, 1, D, m)."""
    return namespace_of(x=x).permute_dims(x, (0, 1, 3, 2))


def _summed(P: Any, G: Any) -> Any:
    """Σ over a key head's queries of Pᵀ G: (K, g, n, m), (K, g, n, D) -> (m, K, D)."""
    K, g, n, m = P.shape
    xp = namespace_of(P=P)
    across = xp.permute_dims(xp.reshape(P, (K, g * n, m)), (0, 2, 1))
    return xp.permute_dims(across @ xp.reshape(G, (K, g * n, G.shape[3])), (1, 0, 2))


def check(q: Array, k: Array, v: Array, rule: Rule) -> None:
    """ShapeError and DtypeError where arguments do not fit one another. Source: specs/attention.md."""
    H, D = (bind(q=(q, "... H D"))[name] for name in ("H", "D"))
    K = bind(k=(k, "... K D"), v=(v, "... K E"))["K"]
    table = None if rule.relative is None else rule.relative.R
    one_dtype(q=q, k=k, v=v, R=table)
    if q.ndim != 3 or k.ndim != 3:
        raise ShapeError(f"q, k: expected (N, H, D), (M, K, D), got {tuple(q.shape)}, {tuple(k.shape)}")
    if k.shape[2] != D or H % K:
        raise ShapeError(f"k: expected (M, K, {D}) with K that divides {H}, set by q, got {tuple(k.shape)}")
    if table is not None and tuple(table.shape[1:]) != (H,):
        raise ShapeError(f"R: expected (buckets, {H}), a column for each head of q, got {tuple(table.shape)}")
    if rule.window is not None and rule.window < 1:
        raise ShapeError(f"window: expected 1 key at least, got {rule.window}")
