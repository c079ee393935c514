"""Answers as spans: cross entropy of their first and last row over each sequence.  See specs/loss.md."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..backend import Array, dtype_name, from_host, namespace_of, real, to_host
from ..errors import ConfigError, DtypeError, ShapeError
from ..shapes import bind
from .targets import IGNORED, bounds_of, check_n, integers


class SpanSaved(NamedTuple):
    """Activations that span_backward reads."""

    z: Array     # (N, 2)
    L: Array     # (S, 2)  log Σ exp z over the rows of each sequence
    hit: Array   # (N, 2)  whether the row is the label of its sequence
    kept: Array  # (S, 2)
    rows: Array  # (N,)    the sequence of each row
    n: int


def span_forward(z: Array, starts: Sequence[int] | Array, spans: Array, *, n: int) -> tuple[Array, SpanSaved]:
    """Cross entropy of first and last row of an answer, over the rows of each sequence, ℓ = Σ_kept (L − z_y)/n.

    z      : (N, 2)   logits of being the first and the last row
    starts : S + 1 integers, rows where sequences begin, and N
    spans  : (S, 2)   first and last row within the sequence; −100, or past its end, for none
    n      : int      labels of the whole step, first and last each counted: count_spans's sum

    Returns ℓ : () and the saved activations. spans is read on the host. Source: specs/loss.md.

    >>> import numpy as np
    >>> z = np.log(np.array([[1.0, 1.0], [3.0, 1.0], [5.0, 5.0]]))
    >>> loss, saved = span_forward(z, np.array([0, 2, 3]), np.array([[1, 0], [0, -100]]), n=3)
    >>> np.exp(-3 * loss).round(12).tolist(), span_backward(saved)[1].round(12).tolist()
    (0.375, [-0.083333333333, 0.166666666667])
    """
    bind(z=(z, "... 2"))
    n = check_n(n)
    if z.ndim != 2 or z.shape[1] != 2:
        raise ShapeError(f"z: expected (N, 2), got {tuple(z.shape)}")
    bounds = bounds_of(starts, z.shape[0])
    kept, hit, rows = _spans(bounds, to_host(spans), z.shape[0])
    xp = namespace_of(z=z)
    L = _stacked([_logsumexp(z[a:b, :]) for a, b in bounds], z)  # (loss.11)
    hits, keep = from_host(hit, z), from_host(kept, z)
    zero = xp.zeros_like(z)
    picked = xp.sum(xp.where(hits, z, zero))             # ()  Σ z_y
    loss = (xp.sum(xp.where(keep, L, xp.zeros_like(L))) - picked) / n  # ()  (loss.12)
    return loss, SpanSaved(z, L, hits, keep, from_host(rows, z), n)


def span_backward(saved: SpanSaved) -> Array:
    """Gradient of the loss by the logits: gz : (N, 2), 0 where a sequence has no label."""
    z, xp = saved.z, namespace_of(z=saved.z)
    if not z.shape[0]:
        return xp.zeros_like(z)  # type: ignore[no-any-return]
    P = xp.exp(z - xp.take(saved.L, saved.rows, axis=0))  # (N, 2)
    gz = xp.where(saved.hit, P - 1.0, P) / saved.n        # (N, 2)       (loss.13)
    found: Array = xp.where(xp.take(saved.kept, saved.rows, axis=0), gz, xp.zeros_like(gz))
    return found


def _logsumexp(z: Array) -> Array:
    """log Σ exp of each column of z : (T, 2) -> (1, 2)."""
    xp = namespace_of(z=z)
    m = xp.max(real(z), axis=0)
    L: Array = (m + xp.log(xp.sum(xp.exp(z - m[None, :]), axis=0)))[None, :]
    return L


def _stacked(parts: list[Array], like: Array) -> Array:
    xp = namespace_of(like=like)
    found: Array = xp.concat(parts) if parts else like[:0, :]
    return found


def _spans(bounds: list[tuple[int, int]], spans: Any, N: int) -> tuple[Any, Any, Any]:
    """Which labels are kept : (S, 2), which rows they are : (N, 2), and each row's sequence : (N,)."""
    kept = _kept_spans(bounds, spans)
    xp = namespace_of(spans=spans)
    hit = xp.zeros((N, 2), dtype="bool")
    rows = xp.zeros((N,), dtype="int64")
    for s, (a, b) in enumerate(bounds):
        rows[a:b] = s
        for c in (0, 1):
            if kept[s, c]:
                hit[a + int(spans[s, c]), c] = True
    return kept, hit, rows


def _kept_spans(bounds: list[tuple[int, int]], spans: Any) -> Any:
    S, xp = len(bounds), namespace_of(spans=spans)
    if tuple(spans.shape) != (S, 2):
        raise ShapeError(f"spans: expected (S, 2) with S={S} set by starts, got {tuple(spans.shape)}")
    if spans.dtype.kind not in "iu":
        raise DtypeError(f"spans: expected integers, got {dtype_name(spans)}")
    bad = ((spans < 0) & (spans != IGNORED)).any(axis=1).nonzero()[0]
    if len(bad):
        got = f"{spans[bad[0]].tolist()} of sequence {bad[0]}"
        raise ConfigError(f"spans: expected rows from 0, or −100 for none, got {got}")
    T = xp.asarray([b - a for a, b in bounds], dtype="int64").reshape(S, 1)
    return (spans >= 0) & (spans < T)


def count_spans(spans: Array, starts: Sequence[int] | Array) -> int:
    """Return how many labels of spans : (S, 2) lie inside their sequences: what n is the sum of.

    Source: specs/loss.md.

    >>> import numpy as np
    >>> count_spans(np.array([[1, 0], [0, -100], [1, 2]]), np.array([0, 2, 3, 5]))
    4
    """
    ends = integers("starts", starts)
    return int(_kept_spans(bounds_of(ends, ends[-1] if ends else 0), to_host(spans)).sum())
