"""Shared frozen factors scaled by two trained vectors, and the adjoint.  Derivation: specs/vera.md."""

from typing import NamedTuple

from ..backend import Array, namespace_of
from ..shapes import bind, rows


class VeraSaved(NamedTuple):
    """Activations that vera_backward reads. Parameters are passed again, never kept here."""

    h: Array  # (..., r)
    u: Array  # (..., d_out)


def vera_forward(
    x: Array, A: Array, B: Array, *, lambda_d: Array, lambda_b: Array
) -> tuple[Array, VeraSaved]:
    """Update y = λ_b∘(B(λ_d∘(Ax))): A and B are frozen and shared, the two vectors are trained.

    x : (..., d_in)     input after dropout; any leading axes
    A : (r, d_in)       shared down-projection, cut to this layer's width
    B : (d_out, r)      shared up-projection, cut to this layer's width
    lambda_d : (r,)     scales the rows of A
    lambda_b : (d_out,) scales the rows of B

    Returns y : (..., d_out), in the one dtype that the arrays share, and the saved activations. There is no α.
    Raises ShapeError where one axis gets two sizes, DtypeError where two dtypes meet.
    Source: Kopiczko et al. 2023, arXiv:2310.11454, eq. 2; specs/vera.md.

    >>> import numpy as np
    >>> A, B, d, b = np.ones((1, 3)), np.array([[2.0], [4.0]]), np.array([0.5]), np.array([1.0, -1.0])
    >>> vera_forward(np.ones(3), A, B, lambda_d=d, lambda_b=b)[0].tolist()
    [3.0, -6.0]
    """
    bind(
        x=(x, "... d_in"), A=(A, "r d_in"), B=(B, "d_out r"),
        lambda_d=(lambda_d, "r"), lambda_b=(lambda_b, "d_out"),
    )
    h = x @ A.T                       # (..., r)        (vera.1)
    z = lambda_d * h                  # (..., r)        (vera.2)
    u = z @ B.T                       # (..., d_out)    (vera.3)
    y = lambda_b * u                  # (..., d_out)    (vera.4)
    return y, VeraSaved(h, u)


def vera_backward(
    gy: Array, saved: VeraSaved, A: Array, B: Array, *, lambda_d: Array, lambda_b: Array
) -> tuple[Array, Array, Array]:
    """Adjoint of vera_forward in x and both vectors: gy : (..., d_out) -> gx, gλ_d : (r,), gλ_b : (d_out,)."""
    bind(
        h=(saved.h, "... r"), gy=(gy, "... d_out"), A=(A, "r d_in"), B=(B, "d_out r"),
        lambda_d=(lambda_d, "r"), lambda_b=(lambda_b, "d_out"),
    )
    xp = namespace_of(gy=gy)
    glambda_b = xp.sum(rows(gy * saved.u), axis=0)  # (d_out,)  (vera.5), undoes (vera.4)
    gu = lambda_b * gy                # (..., d_out)    (vera.6)
    gz = gu @ B                       # (..., r)        (vera.7), undoes (vera.3)
    glambda_d = xp.sum(rows(gz * saved.h), axis=0)  # (r,)      (vera.8), undoes (vera.2)
    gh = lambda_d * gz                # (..., r)        (vera.9)
    gx = gh @ A                       # (..., d_in)     (vera.10), undoes (vera.1)
    return gx, glambda_d, glambda_b


def vera_delta(A: Array, B: Array, *, lambda_d: Array, lambda_b: Array) -> Array:
    """The update as one matrix, delta = (λ_b[:, None]∘B)(λ_d[:, None]∘A) : (d_out, d_in), for merging."""
    bind(A=(A, "r d_in"), B=(B, "d_out r"), lambda_d=(lambda_d, "r"), lambda_b=(lambda_b, "d_out"))
    return (lambda_b[:, None] * B) @ (lambda_d[:, None] * A)  # (d_out, d_in)  (vera.11)
