"""Linear map y = xWᵀ + b, and its adjoints.  Derivation: specs/linear.md."""

from ..backend import Array, namespace_of
from ..shapes import bind, rows


def linear_forward(x: Array, W: Array, b: Array | None = None) -> Array:
    """Linear map y = xWᵀ + b.

    x : (..., d_in)    input; any leading axes
    W : (d_out, d_in)  weight
    b : (d_out,)       bias, or None

    Returns y : (..., d_out), in the one dtype that the arguments share.
    Raises ShapeError where one axis gets two sizes, DtypeError where two dtypes meet.
    Source: specs/linear.md.

    >>> import numpy as np
    >>> linear_forward(np.array([1.0, 2.0]), np.array([[3.0, 4.0]]), np.array([5.0])).tolist()
    [16.0]
    """
    bind(x=(x, "... d_in"), W=(W, "d_out d_in"), b=(b, "? d_out"))
    y = x @ W.T                       # (..., d_out)    (linear.1)
    return y if b is None else y + b  # (..., d_out)    (linear.2)


def linear_backward_x(gy: Array, W: Array) -> Array:
    """Adjoint in x: gy : (..., d_out), W : (d_out, d_in) -> gx : (..., d_in)."""
    bind(gy=(gy, "... d_out"), W=(W, "d_out d_in"))
    return gy @ W                     # (..., d_in)     (linear.3), undoes (linear.1)


def linear_backward_W(gy: Array, x: Array) -> Array:
    """Adjoint in W: gy : (..., d_out), x : (..., d_in) -> gW : (d_out, d_in)."""
    bind(gy=(gy, "... d_out"), x=(x, "... d_in"))
    return rows(gy).T @ rows(x)       # (d_out, d_in)   (linear.4), undoes (linear.1)


def linear_backward_b(gy: Array) -> Array:
    """Adjoint in b: gy : (..., d_out) -> gb : (d_out,)."""
    bind(gy=(gy, "... d_out"))
    xp = namespace_of(gy=gy)
    gb: Array = xp.sum(rows(gy), axis=0)  # (d_out,)    (linear.5), undoes (linear.2)
    return gb
