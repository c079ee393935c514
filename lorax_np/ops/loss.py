"""What training lowers: cross entropy, whole and by chunks of the head; squares.  See specs/loss.md.

Every loss is a sum over this call's labels divided by n, the number of labels of the whole step, so that the
losses and gradients of micro-batches and ranks add up.
"""

from typing import Any, NamedTuple

from ..backend import Array, beside, from_host, namespace, namespace_of, real
from ..errors import ConfigError
from ..shapes import bind
from .targets import check_n, check_shares, targets, two_axes


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


# ---- numbers as labels -------------------------------------------------------------------------------------


class TargetSaved(NamedTuple):
    """Activations that mse_backward and bce_backward read."""

    z: Array  # (...)
    y: Array  # (...)
    n: int


def mse_forward(z: Array, y: Array, *, n: int) -> tuple[Array, TargetSaved]:
    """Squared error ℓ = Σ(z − y)²/n of z, y : (...), n being the numbers of the whole step.  See specs/loss.md.

    y may be on the host.

    >>> import numpy as np
    >>> loss, saved = mse_forward(np.array([1.0, 2.0]), np.array([0.0, 4.0]), n=2)
    >>> float(loss), mse_backward(saved).tolist()
    (2.5, [1.0, -2.0])
    """
    y = _beside(y, z)
    n = check_n(n)
    xp = namespace_of(z=z)
    loss = xp.sum((z - y) * (z - y)) / n                 # ()            (loss.14)
    return loss, TargetSaved(z, y, n)


def mse_backward(saved: TargetSaved) -> Array:
    """Gradient of the squared error by z: (...)."""
    return (saved.z - saved.y) * (2 / saved.n)           # (...)         (loss.15)


def bce_forward(z: Array, y: Array, *, n: int) -> tuple[Array, TargetSaved]:
    """Cross entropy of one sigmoid for each entry, ℓ = Σ[log(1 + e^z) − zy]/n, of z, y : (...), 0 ≤ y ≤ 1.

    For labels that may hold together; y is read on the host, where it may be. n is the number of entries of the
    whole step. Raises ConfigError for n < 1, and for a y that is none, with its place. Source: specs/loss.md.

    >>> import numpy as np
    >>> loss, saved = bce_forward(np.array([0.0, 1000.0]), np.array([1.0, 1.0]), n=2)
    >>> np.exp(-2 * loss).round(12).tolist(), bce_backward(saved).tolist()
    (0.5, [-0.25, 0.0])
    """
    check_shares(y)
    y = _beside(y, z)
    n = check_n(n)
    xp = namespace_of(z=z)
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


def _beside(y: Array, z: Array) -> Array:
    """The labels where z lives, and of its shape and dtype."""
    y = beside(y, z)
    bind(z=(z, "..."), y=(y, "..."))
    return y
