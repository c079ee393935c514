"""The update as a singular value decomposition, its adjoint, and the orthogonality penalty.

Derivation: specs/adalora.md.
"""

from typing import NamedTuple

from ..backend import Array, namespace_of
from ..shapes import bind, rows

SMALL = 1e-5  # beside the rank in the divisor: an update of rank 0 is 0, not NaN


class SvdSaved(NamedTuple):
    """Activations that svd_backward reads. Parameters are passed again, never kept here."""

    x: Array  # (..., d_in)
    h: Array  # (..., r)
    z: Array  # (..., r)


def svd_forward(
    x: Array, A: Array, B: Array, E: Array, *, alpha: float, rank: float
) -> tuple[Array, SvdSaved]:
    """Update y = c·B diag(E) A x with c = α/(rank + 1e-5).

    x : (..., d_in)   input after dropout; any leading axes
    A : (r, d_in)     right singular vectors, held near orthonormal rows by a penalty
    B : (d_out, r)    left singular vectors, near orthonormal columns
    E : (r,)          singular values; 0 where a rank is pruned
    alpha, rank : float   α, and the rank that it is divided by: the one at the start, pruned or not

    Returns y : (..., d_out), in the one dtype that the arrays share, and the saved activations.
    Raises ShapeError where one axis gets two sizes, DtypeError where two dtypes meet.
    Source: Zhang et al. 2023, arXiv:2303.10512, eq. 3; specs/adalora.md.

    >>> import numpy as np
    >>> A, B, E = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 2.0]]), np.array([3.0, 0.0])
    >>> svd_forward(np.ones(2), A, B, E, alpha=2.00001, rank=2)[0].tolist()
    [3.0]
    """
    bind(x=(x, "... d_in"), A=(A, "r d_in"), B=(B, "d_out r"), E=(E, "r"))
    h = x @ A.T                       # (..., r)        (adalora.1)
    z = E * h                         # (..., r)        (adalora.2)
    u = z @ B.T                       # (..., d_out)    (adalora.3)
    y = _factor(alpha, rank) * u      # (..., d_out)    (adalora.5)
    return y, SvdSaved(x, h, z)


def svd_backward(
    gy: Array, saved: SvdSaved, A: Array, B: Array, E: Array, *, alpha: float, rank: float
) -> tuple[Array, Array, Array, Array]:
    """Adjoint of svd_forward: gy : (..., d_out) -> gx, gA, gB, gE, shaped as x, A, B, E."""
    bind(h=(saved.h, "... r"), gy=(gy, "... d_out"), A=(A, "r d_in"), B=(B, "d_out r"), E=(E, "r"))
    xp = namespace_of(gy=gy)
    gu = _factor(alpha, rank) * gy    # (..., d_out)    (adalora.6), undoes (adalora.5)
    gB = rows(gu).T @ rows(saved.z)   # (d_out, r)      (adalora.7), undoes (adalora.3)
    gz = gu @ B                       # (..., r)        (adalora.8)
    gE = xp.sum(rows(gz * saved.h), axis=0)  # (r,)     (adalora.9), undoes (adalora.2)
    gh = E * gz                       # (..., r)        (adalora.10)
    gA = rows(gh).T @ rows(saved.x)   # (r, d_in)       (adalora.11), undoes (adalora.1)
    gx = gh @ A                       # (..., d_in)     (adalora.12)
    return gx, gA, gB, gE


def svd_delta(A: Array, B: Array, E: Array, *, alpha: float, rank: float) -> Array:
    """The update as one matrix, delta = c·B diag(E) A : (d_out, d_in), for merging."""
    bind(A=(A, "r d_in"), B=(B, "d_out r"), E=(E, "r"))
    return _factor(alpha, rank) * (B @ (E[:, None] * A))  # (d_out, d_in)  (adalora.13)


def _factor(alpha: float, rank: float) -> float:
    return alpha / (rank + SMALL)     # c               (adalora.4)


def gram_forward(P: Array, identity: Array) -> tuple[Array, Array]:
    """How far the columns of P : (d, r) are from orthonormal, f = ‖PᵀP − I‖_F, not squared.

    P : (d, r)            for right singular vectors it is Aᵀ
    identity : (r, r)     I

    Returns f : (1, 1), and R = PᵀP − I : (r, r), which gram_backward reads.
    Source: Zhang et al. 2023, arXiv:2303.10512, eq. 4; specs/adalora.md.

    >>> import numpy as np
    >>> gram_forward(np.array([[2.0, 0.0], [0.0, 1.0]]), np.eye(2))[0].tolist()
    [[3.0]]
    """
    bind(P=(P, "d r"), identity=(identity, "r r"))
    xp = namespace_of(P=P)
    R = P.T @ P - identity            # (r, r)          (adalora.14)
    f: Array = xp.sqrt(xp.sum(R * R, axis=(0, 1), keepdims=True))  # (1, 1)  (adalora.15)
    return f, R


def gram_backward(gf: float, f: Array, R: Array, P: Array) -> Array:
    """Adjoint of gram_forward: gf -> gP : (d, r); zero where f is 0, the least that f can be."""
    bind(P=(P, "d r"), R=(R, "r r"))
    xp = namespace_of(P=P)
    safe = xp.where(xp.abs(f) > 0, f, xp.full_like(f, 1.0))
    gR = gf * (R / safe)              # (r, r)          (adalora.16), undoes (adalora.15)
    gP: Array = 2.0 * (P @ gR)        # (d, r)          (adalora.17), undoes (adalora.14)
    return gP
