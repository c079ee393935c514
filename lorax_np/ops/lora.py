"""Low-rank update of a linear map, and its adjoint.  Derivation: specs/lora.md."""

from typing import NamedTuple

from ..backend import Array
from ..shapes import bind, rows
from .linear import linear_backward_b


class LoraSaved(NamedTuple):
    """Activations that lora_backward reads. Parameters are passed again, never kept here."""

    x: Array  # (..., d_in)
    z: Array  # (..., r)


def lora_forward(
    x: Array, A: Array, B: Array, bB: Array | None = None, *, scaling: float
) -> tuple[Array, LoraSaved]:
    """Low-rank update y = s·(BAx + bB), taken as s·(B(Ax) + bB): no d_out × d_in matrix is formed.

    x : (..., d_in)    input after dropout; any leading axes
    A : (r, d_in)      down-projection
    B : (d_out, r)     up-projection
    bB : (d_out,)      bias of the up-projection, or None
    scaling : float    s = α/r, or α/√r when rank-stabilised

    Returns y : (..., d_out), in the one dtype that the arrays share, and the saved activations.
    Raises ShapeError where one axis gets two sizes, DtypeError where two dtypes meet.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; specs/lora.md.

    >>> import numpy as np
    >>> y, _ = lora_forward(np.ones(3), np.ones((1, 3)), np.array([[2.0], [4.0]]), scaling=0.5)
    >>> y.tolist()
    [3.0, 6.0]
    """
    bind(x=(x, "... d_in"), A=(A, "r d_in"), B=(B, "d_out r"), bB=(bB, "? d_out"))
    z = x @ A.T                       # (..., r)        (lora.1)
    u = z @ B.T                       # (..., d_out)    (lora.2)
    u = u if bB is None else u + bB   # (..., d_out)    (lora.3)
    y = scaling * u                   # (..., d_out)    (lora.4)
    return y, LoraSaved(x, z)


def lora_backward(
    gy: Array, saved: LoraSaved, A: Array, B: Array, *, scaling: float
) -> tuple[Array, Array, Array]:
    """Adjoint of lora_forward in x, A and B: gy : (..., d_out) -> gx, gA, gB, shaped as x, A, B."""
    bind(z=(saved.z, "... r"), gy=(gy, "... d_out"), A=(A, "r d_in"), B=(B, "d_out r"))
    gu = scaling * gy                 # (..., d_out)    (lora.5), undoes (lora.4)
    gB = rows(gu).T @ rows(saved.z)   # (d_out, r)      (lora.6), undoes (lora.2)
    gz = gu @ B                       # (..., r)        (lora.7)
    gA = rows(gz).T @ rows(saved.x)   # (r, d_in)       (lora.8), undoes (lora.1)
    gx = gz @ A                       # (..., d_in)     (lora.9)
    return gx, gA, gB


def lora_backward_bB(gy: Array, *, scaling: float) -> Array:
    """Adjoint of lora_forward in bB: gy : (..., d_out) -> gbB : (d_out,)."""
    gu = scaling * gy                 # (..., d_out)    (lora.5)
    return linear_backward_b(gu)      # (d_out,)        (lora.10), undoes (lora.3)


def delta_forward(A: Array, B: Array, *, scaling: float) -> Array:
    """The update written out as one matrix, delta = s·BA : (d_out, d_in), for merging and for norms."""
    bind(A=(A, "r d_in"), B=(B, "d_out r"))
    return scaling * (B @ A)          # (d_out, d_in)   (lora.11)


def delta_backward(gdelta: Array, A: Array, B: Array, *, scaling: float) -> tuple[Array, Array]:
    """Adjoint of delta_forward: gdelta : (d_out, d_in) -> gA : (r, d_in), gB : (d_out, r)."""
    bind(gdelta=(gdelta, "d_out d_in"), A=(A, "r d_in"), B=(B, "d_out r"))
    gBA = scaling * gdelta            # (d_out, d_in)   (lora.12), undoes (lora.11)
    gA = B.T @ gBA                    # (r, d_in)       (lora.13)
    gB = gBA @ A.T                    # (d_out, r)      (lora.14)
    return gA, gB
