"""Dropout by a given mask of 0 and 1/(1 − p), and its adjoint.  Derivation: specs/dropout.md."""

from ..backend import Array
from ..shapes import bind


def dropout_forward(x: Array, mask: Array | None) -> Array:
    """Inverted dropout x∘mask; without a mask, x itself.

    x    : (..., d_in)  any array
    mask : (..., d_in)  0 where an element is dropped, 1/(1 − p) where it is kept

    Returns an array of x's shape and dtype. Raises ShapeError and DtypeError where the two differ.
    Source: Srivastava et al. 2014, JMLR 15:1929; specs/dropout.md.

    >>> import numpy as np
    >>> dropout_forward(np.array([3.0, 5.0]), np.array([0.0, 2.0])).tolist()
    [0.0, 10.0]
    """
    bind(x=(x, "... d_in"), mask=(mask, "? ... d_in"))
    return x if mask is None else x * mask  # (..., d_in)    (dropout.1)


def dropout_backward(gy: Array, mask: Array | None) -> Array:
    """Adjoint of dropout_forward: the same product, gy : (..., d_in) -> gx : (..., d_in)."""
    bind(gy=(gy, "... d_in"), mask=(mask, "? ... d_in"))
    return gy if mask is None else gy * mask  # (..., d_in)  (dropout.2), undoes (dropout.1)
