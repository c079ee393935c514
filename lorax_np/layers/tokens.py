"""An embedding some of whose rows are trained (trainable_token_indices).  See specs/tokens.md."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..backend import (
    Array,
    beside,
    cast,
    compute_dtype,
    copy,
    dtype_name,
    from_host,
    namespace_of,
    one_dtype,
    quiet,
    to_host,
)
from ..errors import ConfigError, DtypeError, ShapeError
from ..ops.tokens import tokens_backward, tokens_forward
from ..shapes import axes, rows
from .embedding import Embedding


@dataclass(frozen=True, eq=False, slots=True)
class TokenRows:
    """The trained rows of an embedding, and equally the gradients by them.

    index : (n,)     which rows of the table, integers, each once, in any order; read on the host, where they
                     may be
    rows : (n, dim)  what stands there in place of the table's own: values, not differences
    """

    index: Array
    rows: Array

    def __post_init__(self) -> None:
        n = axes(index=(self.index, "n"))["n"]
        axes(rows=(self.rows, "n dim"))
        if self.rows.shape[0] != n:
            raise ShapeError(f"rows: expected (n, dim) with n={n} set by index, got {tuple(self.rows.shape)}")
        one_dtype(rows=self.rows)
        host = to_host(self.index)
        if host.dtype.kind not in "iu":
            raise DtypeError(f"index: expected integers, got {host.dtype.name}")
        values, counts = np.unique(host, return_counts=True)
        if (counts > 1).any():
            raise ConfigError(f"index: expected each row once, got {values[counts > 1][0]} twice or more")
        if values[0] < 0:
            raise ConfigError(f"index: expected numbers from 0, got {values[0]}")


class TokenSaved(NamedTuple):
    """What token_rows_backward reads."""

    H: Array  # (..., n)  1 where the id of a position is that row's


def token_rows_start(base: Embedding, index: Array) -> TokenRows:
    """Return the rows `index` of the base's table, in the dtype it computes in, so that nothing moves.

    >>> token_rows_start(Embedding(np.arange(6.0).reshape(3, 2)), np.array([2])).rows.tolist()
    [[4.0, 5.0]]
    """
    _inside("index", index, base.W)
    found = namespace_of(W=base.W).take(base.W, beside(index, base.W), axis=0)
    return TokenRows(copy(index), cast(found, compute_dtype(base.W)))


def token_rows_forward(ids: Array, base: Embedding, tokens: TokenRows) -> tuple[Array, TokenSaved]:
    """Look ids up with the trained rows in place: y = e·W'[ids], e the base's scale.

    ids : (...)         integers from 0 to vocab − 1; any shape, of zero tokens too. They are read on the host,
                        where they may be
    base : Embedding    frozen table (vocab, dim); it is not copied
    tokens : TokenRows  rounded to the table's dtype where theirs is wider, as a merge would

    Returns y : (..., dim) in the table's dtype, and what the backward reads.
    Raises ShapeError, DtypeError, ConfigError for ids or an index outside the table, TypeError.
    Source: specs/tokens.md.

    >>> base, tokens = Embedding(np.arange(6.0).reshape(3, 2)), TokenRows(np.array([1]), np.array([[7.0, 8.0]]))
    >>> token_rows_forward(np.array([0, 1]), base, tokens)[0].tolist()
    [[0.0, 1.0], [7.0, 8.0]]
    """
    _check(base, tokens)
    if to_host(ids).dtype.kind not in "iu":
        raise DtypeError(f"ids: expected integers, got {to_host(ids).dtype.name}")
    _inside("ids", ids, base.W)
    narrow, wide = dtype_name(base.W), compute_dtype(base.W)
    y, H = tokens_forward(ids, cast(base.W, wide), cast(cast(tokens.rows, narrow), wide), tokens.index)
    if base.scale is not None:
        y = base.scale * y  # (tokens.5)
    return cast(y, narrow), TokenSaved(H)


def token_rows_backward(gy: Array, saved: TokenSaved, base: Embedding, tokens: TokenRows) -> TokenRows:
    """Adjoint of token_rows_forward in the rows: gy : (..., dim) -> TokenRows of gradients, in the rows' dtype.

    The base's padding_idx is never trained: its gradient is 0 even where it is listed. With scale_grad_by_freq
    each row's gradient is divided by how often its id occurs.
    Source: specs/tokens.md (tokens.4) to (tokens.9).
    """
    _check(base, tokens)
    axes(gy=(gy, "... dim"), H=(saved.H, "... n"), rows=(tokens.rows, "n dim"))
    low = compute_dtype(gy)
    gv, H = cast(gy, low), cast(saved.H, low)
    if base.scale is not None:
        gv = base.scale * gv  # (tokens.6), undoes (tokens.5)
    gT, xp = tokens_backward(gv, H), namespace_of(H=H)
    if base.padding_idx is not None:
        index = beside(tokens.index, gT)
        gT = xp.where((index == base.padding_idx)[:, None], xp.zeros_like(gT), gT)  # (tokens.7)
    if base.scale_grad_by_freq:
        often: Any = xp.sum(rows(H), axis=0)
        gT = gT / xp.where(often > 1, often, xp.full_like(often, 1.0))[:, None]  # (tokens.9)
    return TokenRows(tokens.index, cast(gT, dtype_name(tokens.rows)))


def token_rows_merge(base: Embedding, tokens: TokenRows) -> Embedding:
    """Return a new Embedding, the base with the trained rows written in, each rounded once to its dtype.

    Raises ConfigError where a row is not finite once rounded.

    >>> token_rows_merge(Embedding(np.zeros((3, 1))), TokenRows(np.array([1]), np.array([[7.0]]))).W.tolist()
    [[0.0], [7.0], [0.0]]
    """
    _check(base, tokens)
    with quiet():
        rounded = to_host(cast(tokens.rows, dtype_name(base.W)))
    table = np.array(to_host(base.W))
    table[to_host(tokens.index)] = rounded  # (tokens.8)
    bad = ~np.isfinite(rounded.astype("float64")).all(axis=1)
    if bad.any():
        which = to_host(tokens.index)[bad][0]
        raise ConfigError(f"rows: expected finite numbers once merged, got NaN or infinity at token {which}")
    return replace(base, W=from_host(table, base.W), max_norm=None)


def _check(base: Embedding, tokens: TokenRows) -> None:
    for name, value, kind in (("base", base, Embedding), ("tokens", tokens, TokenRows)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    axes(W=(base.W, "vocab dim"), rows=(tokens.rows, "n dim"))
    _inside("index", tokens.index, base.W)


def _inside(name: str, ids: Array, W: Array) -> None:
    """Raise where a number is no row of W. Reads the ids on the host."""
    host = to_host(ids)
    bad = host[(host < 0) | (host >= W.shape[0])]
    if bad.size:
        raise ConfigError(f"{name}: expected numbers from 0 to {W.shape[0] - 1}, set by W, got {bad.flat[0]}")
