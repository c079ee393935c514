"""What training lowers: cross entropy, whole and by chunks of the head; spans; squares.  See specs/loss.md.

Every loss is a sum over this call's labels divided by n, the number of labels of the whole step, so that the
losses and gradients of micro-batches and ranks add up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..backend import Array, dtype_name, from_host, namespace, namespace_of, real, to_host
from ..errors import ConfigError, DtypeError, ShapeError
from ..shapes import bind
from .targets import IGNORED, bounds_of, check_n, integers, targets, two_axes


class CrossEntropySaved(NamedTuple):
    """Activations that cross_entropy_backward reads."""

    z: Array     # (N, V)
    L: Array     # (N,)  log Σ exp z of each row
    y: Array     # (N,)  the label, 0 where ignored
    kept: Array  # (N,)  whether the row has a label
    n: int
    smoothing: float


def cross_entropy_forward(
    z: Array, labels: Array, *, n: int, smoothing: float = 0.0
) -> tuple[Array, CrossEntropySaved]:
    """Cross entropy of the softmax of each row, ℓ = Σ_kept [(1 − λ)(L − z_y) + λ(L − ⟨z⟩/V)]/n.

    z         : (N, V)  logits
    labels    : (N,)    integers from 0 to V − 1, or −100 for a row without a label; read on the host
    n         : int     labels of the whole step, over all micro-batches and ranks: count_kept's sum
    smoothing : float   λ, the share of the label that is spread over all V

    Returns ℓ : () in z's dtype, and the saved activations. Raises ConfigError for n < 1, λ outside 0 ≤ λ < 1,
    and for a label that is none, with its row. Source: specs/loss.md.

    >>> import numpy as np
    >>> z, labels = np.log(np.array([[1.0, 3.0], [1.0, 1.0]])), np.array([1, -100])
    >>> loss, saved = cross_entropy_forward(z, labels, n=1)
    >>> np.exp(-loss).round(12).tolist(), cross_entropy_backward(saved).round(12).tolist()
    (0.75, [[0.25, -0.25], [0.0, 0.0]])
    """
    V = bind(z=(z, "... V"))["V"]
    two_axes(z=z)
    n = check_n(n)
    smoothing = _share(smoothing)
    host, kept = targets(labels, V, len_=z.shape[0])
    y, keep = from_host(host, z), from_host(kept, z)
    nll, L = _nll(z, y, smoothing)                       # (N,), (N,)
    xp = namespace_of(z=z)
    loss = xp.sum(xp.where(keep, nll, xp.zeros_like(nll))) / n  # ()  (loss.4)
    return loss, CrossEntropySaved(z, L, y, keep, n, smoothing)


def cross_entropy_backward(saved: CrossEntropySaved) -> Array:
    """Gradient of the loss by the logits: gz : (N, V), 0 in rows without a label.  (loss.5), (loss.6)."""
    xp = namespace_of(z=saved.z)
    gz = _gz(saved.z, saved.L, saved.y, _columns(saved.z), n=saved.n, smoothing=saved.smoothing)
    found: Array = xp.where(saved.kept[:, None], gz, xp.zeros_like(gz))
    return found


def _nll(z: Array, y: Array, smoothing: float) -> tuple[Array, Array]:
    """What each row costs, and its log Σ exp z. The maximum is a constant: it cancels."""
    xp = namespace_of(z=z)
    m = xp.max(real(z), axis=1)                          # (N,)          (loss.1)
    L = m + xp.log(xp.sum(xp.exp(z - m[:, None]), axis=1))  # (N,)       (loss.2)
    zy = xp.take_along_axis(z, y[:, None], axis=1)[:, 0]    # (N,)
    nll = L - zy                                         # (N,)          (loss.3)
    if smoothing:
        nll = (1 - smoothing) * nll + smoothing * (L - xp.sum(z, axis=1) / z.shape[1])
    return nll, L


def _gz(z: Array, L: Array, y: Array, columns: Array, *, n: int, smoothing: float) -> Array:
    xp = namespace_of(z=z)
    P = xp.exp(z - L[:, None])                           # (N, V)        (loss.5)
    off, on = smoothing / z.shape[1], smoothing / z.shape[1] + (1 - smoothing)
    P = xp.where(columns == y[:, None], P - on, P - off if smoothing else P)
    gz: Array = P / n                                    # (N, V)        (loss.6)
    return gz


def _columns(z: Array) -> Array:
    """The number of each column of z : (N, V), as (1, V)."""
    found: Array = from_host(namespace("numpy").arange(z.shape[1]), z)[None, :]
    return found


def _share(smoothing: float) -> float:
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing: expected 0 ≤ smoothing < 1, got {smoothing!r}")
    return float(smoothing)


# ---- the output head and its loss, by chunks ---------------------------------------------------------------


def head_cross_entropy(
    h: Array,
    E: Array,
    labels: Array,
    *,
    n: int,
    rows: int = 256,
    block: int | None = None,
    smoothing: float = 0.0,
    need_gE: bool = False,
    scale: float = 1.0,
) -> tuple[Array, Array, Array | None]:
    """Cross entropy of z = scale·h Eᵀ with its gradients, never holding more than `rows` rows of z.

    h      : (N, d)   what enters the output head
    E      : (V, d)   the head, or the tied embedding
    labels : (N,)     as in cross_entropy_forward; rows without a label are not multiplied at all
    rows   : int      rows of z held at once: the one array of logits becomes that of their gradient
    block  : int      rows worked on at a time; None for 4 on the host, which stay in a cache, all on a device
    scale  : float    T5's d^-½ where its embedding is tied

    n and smoothing are cross_entropy_forward's. Returns ℓ : (), gh : (N, d), and gE : (V, d) or None.
    Source: specs/loss.md.

    >>> import numpy as np
    >>> h, E = np.array([[1.0, 0.0], [0.0, 1.0]]), np.log(np.array([[1.0, 1.0], [3.0, 1.0]]))
    >>> loss, gh, _ = head_cross_entropy(h, E, np.array([1, -100]), n=1)
    >>> np.exp(-loss).round(12).tolist(), np.allclose(gh, [[-0.25 * np.log(3), 0.0], [0.0, 0.0]])
    (0.75, True)
    """
    V = bind(h=(h, "... d"), E=(E, "V d"))["V"]
    two_axes(h=h)
    n, scale = check_n(n), float(scale)
    smoothing = _share(smoothing)
    host, kept = targets(labels, V, len_=h.shape[0])
    xp = namespace_of(h=h, E=E)
    block = block or (4 if xp.__name__ == "numpy" else rows)
    if rows < 1 or block < 1:
        raise ConfigError(f"rows, block: expected at least 1 each, got {rows} and {block}")
    which = kept.nonzero()[0]                            # (K,)  the rows that have a label
    gE = xp.zeros_like(E) if need_gE else None
    if not len(which):
        return xp.sum(xp.zeros_like(h)), xp.zeros_like(h), gE
    costs, grads, columns = [], [], None
    for start in range(0, len(which), rows):
        part = which[start : start + rows]
        hs = scale * xp.take(h, from_host(part, h), axis=0)  # (rows, d)  (loss.7)
        z: Any = hs @ E.T                                # (rows, V)     (loss.8)
        y = from_host(host[part], h)
        columns = _columns(z) if columns is None else columns
        costs += _into_gradient(z, y, columns, block=block, n=n, smoothing=smoothing)
        grads.append(scale * (z @ E))                    # (rows, d)     (loss.9), z now being gz
        if gE is not None:
            gE = gE + z.T @ hs                           # (V, d)        (loss.10)
    loss = xp.sum(xp.concat(costs)) / n                  # ()            (loss.4)
    place = from_host((kept.cumsum() - 1).clip(min=0), h)
    gh = xp.take(xp.concat(grads), place, axis=0)        # (N, d)
    return loss, xp.where(from_host(kept, h)[:, None], gh, xp.zeros_like(gh)), gE


def _into_gradient(z: Any, y: Array, columns: Array, *, block: int, n: int, smoothing: float) -> list[Array]:
    """Write over logits z : (rows, V) their gradient, some rows at a time, and return what the rows cost."""
    costs = []
    for i in range(0, z.shape[0], block):
        end = min(i + block, z.shape[0])
        some, its = z[i:end, :], y[i:end]
        nll, L = _nll(some, its, smoothing)
        z[i:end, :] = _gz(some, L, its, columns, n=n, smoothing=smoothing)
        costs.append(nll)
    return costs


# ---- answers as spans --------------------------------------------------------------------------------------


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


# ---- numbers as labels -------------------------------------------------------------------------------------


class TargetSaved(NamedTuple):
    """Activations that mse_backward and bce_backward read."""

    z: Array  # (...)
    y: Array  # (...)
    n: int


def mse_forward(z: Array, y: Array, *, n: int) -> tuple[Array, TargetSaved]:
    """Squared error ℓ = Σ(z − y)²/n of z, y : (...), n being the numbers of the whole step.  See specs/loss.md.

    >>> import numpy as np
    >>> loss, saved = mse_forward(np.array([1.0, 2.0]), np.array([0.0, 4.0]), n=2)
    >>> float(loss), mse_backward(saved).tolist()
    (2.5, [1.0, -2.0])
    """
    _same(z, y)
    n = check_n(n)
    xp = namespace_of(z=z, y=y)
    loss = xp.sum((z - y) * (z - y)) / n                 # ()            (loss.14)
    return loss, TargetSaved(z, y, n)


def mse_backward(saved: TargetSaved) -> Array:
    """Gradient of the squared error by z: (...)."""
    return (saved.z - saved.y) * (2 / saved.n)           # (...)         (loss.15)


def bce_forward(z: Array, y: Array, *, n: int) -> tuple[Array, TargetSaved]:
    """Cross entropy of one sigmoid for each entry, ℓ = Σ[log(1 + e^z) − zy]/n, of z, y : (...), 0 ≤ y ≤ 1.

    For labels that may hold together. n is the number of entries of the whole step. Source: specs/loss.md.

    >>> import numpy as np
    >>> loss, saved = bce_forward(np.array([0.0, 1000.0]), np.array([1.0, 1.0]), n=2)
    >>> np.exp(-2 * loss).round(12).tolist(), bce_backward(saved).tolist()
    (0.5, [-0.25, 0.0])
    """
    _same(z, y)
    n = check_n(n)
    xp = namespace_of(z=z, y=y)
    at: Any = real(z)
    positive, zero = at > 0, xp.zeros_like(z)
    small = xp.where(positive, -z, z)                    # (...)  −|z|
    terms = xp.where(positive, z, zero) + xp.log1p(xp.exp(small)) - z * y
    loss = xp.sum(terms) / n                             # ()            (loss.16)
    return loss, TargetSaved(z, y, n)


def bce_backward(saved: TargetSaved) -> Array:
    """Gradient of the binary cross entropy by z: (...)."""
    z: Any = saved.z
    xp = namespace_of(z=z)
    e = xp.exp(xp.where(z > 0, -z, z))                   # (...)  at most 1
    sigmoid = xp.where(z > 0, xp.ones_like(e), e) / (1.0 + e)
    gz: Array = (sigmoid - saved.y) / saved.n            # (...)         (loss.17)
    return gz


def _same(z: Array, y: Array) -> None:
    bind(z=(z, "..."), y=(y, "..."))
