"""One vector for each sequence: mean, one of its rows, length 1; losses of pairs.  See specs/pooling.md."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..backend import Array, dtype_name, from_host, namespace, namespace_of
from ..errors import ShapeError
from ..shapes import bind
from .dora import row_norm_forward
from .loss import (
    CrossEntropySaved,
    TargetSaved,
    cross_entropy_backward,
    cross_entropy_forward,
    mse_backward,
    mse_forward,
)
from .targets import bounds_of, integers, two_axes


def mean_pool_forward(h: Array, starts: Sequence[int] | Array) -> Array:
    """Mean of the rows of each sequence -> m : (S, d).

    h      : (N, d)  rows, one sequence after the other
    starts : S + 1 integers, a sequence or an array: rows where sequences begin, and N

    Source: specs/pooling.md.

    >>> import numpy as np
    >>> mean_pool_forward(np.array([[1.0], [3.0], [5.0]]), np.array([0, 2, 3])).tolist()
    [[2.0], [5.0]]
    """
    bind(h=(h, "... d"))
    two_axes(h=h)
    bounds = bounds_of(starts, h.shape[0])
    xp = namespace_of(h=h)
    means = [xp.sum(h[a:b, :], axis=0) / (b - a) for a, b in bounds]
    m: Array = xp.stack(means) if means else h[:0, :]    # (S, d)        (pooling.1)
    return m


def mean_pool_backward(gm: Array, starts: Sequence[int] | Array) -> Array:
    """Adjoint of mean_pool_forward: gm : (S, d) -> gh : (N, d), each row its sequence's gm/T."""
    bind(gm=(gm, "... d"))
    two_axes(gm=gm)
    ends = integers("starts", starts)
    bounds = bounds_of(ends, ends[-1] if ends else 0)
    if gm.shape[0] != len(bounds):
        raise ShapeError(f"gm: expected (S, d) with S={len(bounds)} set by starts, got {tuple(gm.shape)}")
    xp, library = namespace_of(gm=gm), namespace("numpy")
    T = library.asarray([b - a for a, b in bounds], dtype="int64")  # (S,)
    which = library.arange(len(bounds)).repeat(T)        # (N,)  the sequence of each row
    share = from_host((1.0 / T).astype(dtype_name(gm)), gm)
    gh: Array = xp.take(gm * share[:, None], from_host(which, gm), axis=0)  # (N, d)  (pooling.2)
    return gh


def pick_forward(h: Array, index: Sequence[int] | Array) -> Array:
    """Rows of h : (N, d) by index : (S,) -> (S, d): first or last rows of sequences.  (pooling.3).

    >>> import numpy as np
    >>> pick_forward(np.array([[1.0], [3.0], [5.0]]), np.array([0, 2])).tolist()
    [[1.0], [5.0]]
    """
    bind(h=(h, "... d"))
    two_axes(h=h)
    host = _distinct(index, h.shape[0])
    picked: Array = namespace_of(h=h).take(h, from_host(host, h), axis=0)  # (S, d)  (pooling.3)
    return picked


def pick_backward(g: Array, index: Sequence[int] | Array, N: int) -> Array:
    """Adjoint of pick_forward: g : (S, d) -> gh : (N, d), 0 in every row that was not picked.

    >>> import numpy as np
    >>> pick_backward(np.array([[2.0], [7.0]]), np.array([2, 0]), 3).tolist()
    [[7.0], [0.0], [2.0]]
    """
    bind(g=(g, "... d"))
    two_axes(g=g)
    host = _distinct(index, N)
    if len(host) != g.shape[0]:
        raise ShapeError(f"index: expected (S,) with S={g.shape[0]} set by g, got {tuple(host.shape)}")
    xp, library = namespace_of(g=g), namespace("numpy")
    place = library.full_like(library.arange(N), len(host))
    place[host] = library.arange(len(host))
    zero = from_host(library.zeros((1, g.shape[1]), dtype=dtype_name(g)), g)
    gh: Array = xp.take(xp.concat([g, zero]), from_host(place, g), axis=0)  # (N, d)  (pooling.4)
    return gh


def _distinct(index: Sequence[int] | Array, N: int) -> Any:
    numbers = integers("index", index)
    if any(not 0 <= i < N for i in numbers) or len(set(numbers)) != len(numbers):
        raise ShapeError(f"index: expected distinct rows from 0 to {N - 1}, got {numbers[:8]}")
    return namespace("numpy").asarray(numbers, dtype="int64")


class UnitSaved(NamedTuple):
    """Activations that unit_backward reads."""

    y: Array  # (S, d)  rows of length 1
    n: Array  # (S,)    the lengths they had


def unit_forward(m: Array) -> tuple[Array, UnitSaved]:
    """Rows at length 1, y = m/‖m‖: m : (S, d) -> y : (S, d). A row of zeros has no direction: NaN.

    Source: specs/pooling.md.

    >>> import numpy as np
    >>> unit_forward(np.array([[3.0, 4.0]]))[0].tolist()
    [[0.6, 0.8]]
    """
    bind(m=(m, "... d"))
    two_axes(m=m)
    n = row_norm_forward(m) if m.shape[0] else m[:, 0]   # (S,)          (pooling.5)
    y = m / n[:, None]                                   # (S, d)        (pooling.6)
    return y, UnitSaved(y, n)


def unit_backward(gy: Array, saved: UnitSaved) -> Array:
    """Adjoint of unit_forward: gy : (S, d) -> gm : (S, d), the part of gy across y, over the length."""
    bind(gy=(gy, "... d"), y=(saved.y, "... d"), n=(saved.n, "..."))
    xp = namespace_of(gy=gy)
    along = xp.sum(saved.y * gy, axis=1)                 # (S,)
    gm: Array = (gy - saved.y * along[:, None]) / saved.n[:, None]  # (S, d)  (pooling.7)
    return gm


# ---- losses of pairs ---------------------------------------------------------------------------------------


class ContrastiveSaved(NamedTuple):
    """Activations that contrastive_backward reads."""

    y1: Array  # (S, d)
    y2: Array  # (S, d)
    loss: CrossEntropySaved
    scale: float


def contrastive_forward(
    y1: Array, y2: Array, *, n: int, scale: float = 20.0
) -> tuple[Array, ContrastiveSaved]:
    """Which y2 belongs to which y1: cross entropy over the rows of scale·y1 y2ᵀ, whose diagonal is right.

    y1, y2 : (S, d)  pairs of rows, of length 1 where the cosine is meant
    n      : int     pairs of the whole step

    Returns ℓ : () and the saved activations. The other pairs of this call are the wrong answers.
    Source: Henderson et al. 2017, arXiv:1705.00652; specs/pooling.md.

    >>> import numpy as np
    >>> float(contrastive_forward(np.eye(3), np.eye(3), n=3, scale=0.0)[0]) == float(np.log(3))
    True
    """
    bind(y1=(y1, "... d"), y2=(y2, "... d"))
    two_axes(y1=y1)
    scale = float(scale)
    z = scale * (y1 @ y2.T) if y1.shape[0] else y1       # (S, S)        (pooling.8), nothing of nothing
    labels = namespace("numpy").arange(y1.shape[0])
    loss, saved = cross_entropy_forward(z, labels, n=n)
    return loss, ContrastiveSaved(y1, y2, saved, scale)


def contrastive_backward(saved: ContrastiveSaved) -> tuple[Array, Array]:
    """Gradients of the contrastive loss: gy1, gy2 : (S, d)."""
    if not saved.y1.shape[0]:
        return saved.y1, saved.y2
    gz = saved.scale * cross_entropy_backward(saved.loss)  # (S, S)
    return gz @ saved.y2, gz.T @ saved.y1                # (S, d)        (pooling.9)


class CosineSaved(NamedTuple):
    """Activations that cosine_mse_backward reads."""

    y1: Array  # (S, d)
    y2: Array  # (S, d)
    loss: TargetSaved


def cosine_mse_forward(y1: Array, y2: Array, scores: Array, *, n: int) -> tuple[Array, CosineSaved]:
    """Squared error of the cosine of pairs of rows of length 1: y1, y2 : (S, d), scores : (S,).

    n is the number of pairs of the whole step. Returns ℓ : () and the saved activations.
    Source: specs/pooling.md.

    >>> import numpy as np
    >>> y = np.array([[0.6, 0.8]])
    >>> loss, _ = cosine_mse_forward(y, y, np.array([0.5]), n=1)
    >>> float(loss)
    0.25
    """
    bind(y1=(y1, "... d"), y2=(y2, "... d"), scores=(scores, "..."))
    two_axes(y1=y1)
    c = namespace_of(y1=y1).sum(y1 * y2, axis=1)         # (S,)          (pooling.10)
    loss, saved = mse_forward(c, scores, n=n)
    return loss, CosineSaved(y1, y2, saved)


def cosine_mse_backward(saved: CosineSaved) -> tuple[Array, Array]:
    """Gradients of the squared error of the cosine: gy1, gy2 : (S, d)."""
    gc = mse_backward(saved.loss)                        # (S,)
    return gc[:, None] * saved.y2, gc[:, None] * saved.y1  # (S, d)      (pooling.11)
