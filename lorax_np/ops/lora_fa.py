"""Low-rank update whose A is frozen: the adjoint without gA.  Derivation: specs/lorafa.md."""

from ..backend import Array
from ..shapes import bind, rows


def lora_fa_backward(gy: Array, z: Array, A: Array, B: Array, *, scaling: float) -> tuple[Array, Array]:
    """Adjoint of lora_forward in x and B: gy : (..., d_out) -> gx, gB, shaped as x, B.

    Of the activations it reads z = xAᵀ : (..., r) alone, so that x : (..., d_in) need not be kept.
    Source: Zhang et al. 2023, arXiv:2308.03303; specs/lorafa.md.
    """
    bind(z=(z, "... r"), gy=(gy, "... d_out"), A=(A, "r d_in"), B=(B, "d_out r"))
    gu = scaling * gy                 # (..., d_out)    (lorafa.1)
    gB = rows(gu).T @ rows(z)         # (d_out, r)      (lorafa.2)
    gx = (gu @ B) @ A                 # (..., d_in)     (lorafa.3)
    return gx, gB
