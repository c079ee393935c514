"""An embedding some of whose rows are trained, and its adjoint.  Derivation: specs/tokens.md."""

from ..backend import Array, beside, namespace_of
from ..errors import ShapeError
from ..shapes import bind, rows


def tokens_forward(ids: Array, W: Array, T: Array, index: Array) -> tuple[Array, Array]:
    """Look ids up in W with the rows `index` replaced by T, without copying W.

    ids : (...,)       token numbers, integers from 0 to vocab − 1
    W : (vocab, dim)   frozen table
    T : (n, dim)       trained rows, which stand in for W[index]
    index : (n,)       which rows they are: integers, each once; these and ids may be on the host

    Returns y : (..., dim), and H : (..., n), 1 where the id of a position is that row's, in T's dtype.
    Raises ShapeError where one axis gets two sizes, DtypeError where the two tables' dtypes differ.
    Source: specs/tokens.md.

    >>> import numpy as np
    >>> W, T = np.array([[0.0], [1.0], [2.0]]), np.array([[9.0]])
    >>> tokens_forward(np.array([[2, 0], [1, 2]]), W, T, np.array([2]))[0][..., 0].tolist()
    [[9.0, 0.0], [1.0, 9.0]]
    """
    bind(W=(W, "vocab dim"), T=(T, "n dim"))
    xp, ids = namespace_of(W=W, T=T), beside(ids, W)
    if tuple(index.shape) != (T.shape[0],):
        raise ShapeError(f"index: expected (n,) with n={T.shape[0]} set by T, got {tuple(index.shape)}")
    hit = ids[..., None] == beside(index, W)                           # (..., n)
    H = xp.asarray(hit, dtype=T.dtype)                                 # (..., n)     (tokens.1)
    base = xp.take(W, xp.reshape(ids, (-1,)), axis=0)                  # (N, dim)
    base = xp.reshape(base, (*ids.shape, W.shape[1]))                  # (..., dim)   (tokens.2)
    y: Array = xp.where(xp.any(hit, axis=-1)[..., None], H @ T, base)  # (..., dim)   (tokens.3)
    return y, H


def tokens_backward(gy: Array, H: Array) -> Array:
    """Adjoint of tokens_forward in T: gy : (..., dim), H : (..., n) -> gT : (n, dim)."""
    bind(gy=(gy, "... dim"), H=(H, "... n"))
    return rows(H).T @ rows(gy)                                        # (n, dim)     (tokens.4)
