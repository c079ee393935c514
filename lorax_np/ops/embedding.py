"""Rows of a table looked up by number, their low-rank update, and adjoints.  Derivation: specs/embedding.md."""

from math import prod
from typing import Any, NamedTuple

from ..backend import Array, beside, cast, dtype_name, from_host, namespace_of, to_host
from ..errors import ShapeError
from ..shapes import bind, rows


def lookup_forward(T: Array, ids: Array) -> Array:
    """Rows of a table, y = T[ids]: the product of one-hot rows with T, without the zeros.

    T   : (vocab, d)  any table
    ids : (...)       integers from 0 to vocab − 1, which the caller has checked; they may be on the host

    Returns y : (..., d) in T's dtype, 16-bit ones included.
    Source: specs/embedding.md.

    >>> import numpy as np
    >>> lookup_forward(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 1])).tolist()
    [[3.0, 4.0], [3.0, 4.0]]
    """
    bind(T=(T, "vocab d"))
    xp = namespace_of(T=T)
    flat = xp.reshape(beside(ids, T), (prod(ids.shape),))  # (N,)
    y = xp.take(T, flat, axis=0)                         # (N, d)        (embedding.1)
    found: Array = xp.reshape(y, (*ids.shape, T.shape[1]))
    return found


def lookup_backward(
    gy: Array, ids: Array, T: Array, *, padding: int | None = None, by_frequency: bool = False
) -> Array:
    """Adjoint of lookup_forward in T: gy : (..., d) -> gT : (vocab, d), a sum of rows for each id.

    padding      : an id whose row is not trained, so that its gradient is 0
    by_frequency : whether each row is divided by how often its id occurs

    Tokens are sorted by id, stably, and each id's are added as a balanced tree over the order in which they
    occur: the bits depend on the arguments alone, not on how a library schedules its additions. The order is
    found on the host, where ids may be. Ids that do not occur have the gradient 0 exactly.
    """
    vocab = bind(T=(T, "vocab d"), gy=(gy, "... d"))["vocab"]
    if tuple(gy.shape[:-1]) != tuple(ids.shape):
        raise ShapeError(f"gy: expected (..., d) with ...={tuple(ids.shape)} set by ids, got {tuple(gy.shape)}")
    xp = namespace_of(gy=gy, T=T)
    zero = xp.zeros_like(T)
    if prod(ids.shape) == 0:
        return zero  # type: ignore[no-any-return]
    runs = _runs(ids, vocab, padding)
    S = xp.take(rows(gy), from_host(runs.order, gy), axis=0)  # (N, d)   (embedding.2), sorted by id
    nothing, h = xp.zeros_like(S), 1
    while h < runs.longest:
        partner, inside = (from_host(part, gy) for part in runs.apart(h))
        S = S + xp.where(inside[:, None], xp.take(S, partner, axis=0), nothing)  # (embedding.3)
        h = 2 * h
    gT = xp.take(S, from_host(runs.first, gy), axis=0)   # (vocab, d)    (embedding.4), undoes (embedding.1)
    gT = xp.where(from_host(runs.live, gy)[:, None], gT, zero)
    if by_frequency:
        gT = gT / cast(from_host(runs.share, gy), dtype_name(gT))[:, None]  # (embedding.5)
    return gT  # type: ignore[no-any-return]


class Runs(NamedTuple):
    """Where the tokens of each id lie once they are sorted by id. All on the host."""

    order: Any  # (N,)      the tokens, sorted
    here: Any   # (N,)      0, 1, 2, ...
    end: Any    # (N,)      one past the last token of the same id
    first: Any  # (vocab,)  the first token of an id, or any where it has none
    live: Any   # (vocab,)  whether the id has tokens, and is not padding
    share: Any  # (vocab,)  how many tokens it has, at least 1
    longest: int  # the most that any has

    def apart(self, h: int) -> tuple[Any, Any]:
        """For each sorted token the one h places on, and whether that one is of the same id."""
        return (self.here + h).clip(max=len(self.here) - 1), self.here + h < self.end


def _runs(ids: Array, vocab: int, padding: int | None) -> Runs:
    host = to_host(ids).reshape(-1)
    xp = namespace_of(ids=host)
    order = host.argsort(kind="stable")
    run, here, numbers = host[order], xp.arange(len(host)), xp.arange(vocab)
    first, last = run.searchsorted(numbers), run.searchsorted(numbers, side="right")
    count = last - first
    live = (count > 0) & (numbers != (-1 if padding is None else padding))
    place = first.clip(max=len(host) - 1)
    return Runs(order, here, last[run], place, live, count.clip(min=1), int(count.max()))


# ---- the low-rank update -----------------------------------------------------------------------------------


def lora_lookup_forward(ids: Array, A: Array, B: Array, *, scaling: float) -> tuple[Array, Array]:
    """Low-rank update of looked-up rows, y = s·A[:, ids]ᵀBᵀ: (lora.1) to (lora.4) on one-hot rows.

    ids : (...)     integers from 0 to vocab − 1, which the caller has checked
    A : (r, vocab)  its columns are looked up
    B : (dim, r)    up-projection

    Returns y : (..., dim), and z : (..., r) for the backward pass.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; specs/embedding.md.

    >>> import numpy as np
    >>> y, z = lora_lookup_forward(np.array(1), np.array([[1.0, 3.0]]), np.array([[2.0], [4.0]]), scaling=0.5)
    >>> y.tolist(), z.tolist()
    ([3.0, 6.0], [3.0])
    """
    bind(A=(A, "r vocab"), B=(B, "dim r"))
    z = lookup_forward(A.T, ids)      # (..., r)        (embedding.6), is (lora.1)
    u = z @ B.T                       # (..., dim)      (lora.2)
    y = scaling * u                   # (..., dim)      (lora.4)
    return y, z


def lora_lookup_backward(
    gy: Array,
    ids: Array,
    z: Array,
    A: Array,
    B: Array,
    *,
    scaling: float,
    padding: int | None = None,
    by_frequency: bool = False,
) -> tuple[Array, Array]:
    """Adjoint of lora_lookup_forward in A and B: gy : (..., dim) -> gA : (r, vocab), gB : (dim, r).

    padding, by_frequency : as in lookup_backward, for the columns of A; B is trained by every token
    """
    bind(z=(z, "... r"), gy=(gy, "... dim"), A=(A, "r vocab"), B=(B, "dim r"))
    gu = scaling * gy                 # (..., dim)      (lora.5), undoes (lora.4)
    gB = rows(gu).T @ rows(z)         # (dim, r)        (lora.6), undoes (lora.2)
    gz = gu @ B                       # (..., r)        (lora.7)
    gA = lookup_backward(gz, ids, A.T, padding=padding, by_frequency=by_frequency).T  # (embedding.7)
    return gA, gB
