"""LoRA-FA: A frozen, its input not kept, and the gradient by B corrected.  Derivation: specs/lorafa.md."""

from typing import NamedTuple

import numpy as np

from ..backend import Array, cast, compute_dtype, dtype_name, from_host, to_host
from ..errors import ConfigError
from ..layer import lora_linear_forward
from ..ops.dropout import dropout_backward
from ..ops.linear import linear_backward_b, linear_backward_x
from ..ops.lora import lora_backward_bB
from ..ops.lora_fa import lora_fa_backward
from ..params import Adapter, Linear, check_pair
from ..shapes import axes, bind

SMALL = 1e-8  # on the diagonal of AAᵀ


class LoraFaSaved(NamedTuple):
    """All that the backward of a layer with frozen A reads: neither x nor what became of it but z."""

    mask: Array | None  # (..., d_in)  as given
    z: Array  # (..., r)  in the dtype the adapter computes in


class LoraFaGradients(NamedTuple):
    """The gradients of a layer with frozen A, None where the adapter has no such part."""

    B: Array  # (d_out, r)
    b: Array | None  # (d_out,)
    bB: Array | None  # (d_out,)


def lora_fa_linear_forward(
    x: Array, base: Linear, adapter: Adapter, *, scaling: float, mask: Array | None = None
) -> tuple[Array, LoraFaSaved]:
    """As lora_linear_forward, to the bit, and save z : (..., r) in place of x : (..., d_in).

    Raises as lora_linear_forward, and ConfigError for an adapter with m or without A and B.
    Source: specs/lorafa.md.

    >>> base, adapter = Linear(np.eye(2)), Adapter(np.ones((1, 2)), np.array([[1.0], [2.0]]))
    >>> y, saved = lora_fa_linear_forward(np.array([3.0, 4.0]), base, adapter, scaling=0.5)
    >>> y.tolist(), saved.z.tolist()
    ([6.5, 11.0], [7.0])
    """
    y, saved = lora_linear_forward(x, base, adapter, scaling=scaling, mask=mask)
    if saved.lora is None or adapter.m is not None:
        raise ConfigError("adapter: expected A and B and no m for LoRA-FA, got others")
    return y, LoraFaSaved(mask, saved.lora.z)


def lora_fa_linear_backward(
    gy: Array, saved: LoraFaSaved, base: Linear, adapter: Adapter, *, scaling: float
) -> tuple[Array, LoraFaGradients]:
    """Adjoint of the forward in x, B, b and bB: gy : (..., d_out) -> gx : (..., d_in), and the gradients.

    Each gradient comes in the dtype of what it differentiates. Source: specs/lorafa.md.
    """
    s = check_pair(base, adapter, scaling)
    if adapter.A is None or adapter.B is None or adapter.m is not None:
        raise ConfigError("adapter: expected A and B and no m for LoRA-FA, got others")
    bind(gy=(gy, "... d_out"), W=(base.W, "d_out d_in"))
    axes(gy=(gy, "... d_out"), z=(saved.z, "... r"))
    narrow, wide, low = dtype_name(gy), compute_dtype(gy), compute_dtype(adapter.A)
    gx = linear_backward_x(cast(gy, wide), cast(base.W, wide))
    gxd, gB = lora_fa_backward(cast(gy, low), saved.z, cast(adapter.A, low), cast(adapter.B, low), scaling=s)
    both = "float64" if "float64" in (wide, low) else wide
    gx = cast(cast(gx, both) + cast(dropout_backward(gxd, cast(saved.mask, low)), both), narrow)  # (linear.8)
    gb = None if adapter.b is None else cast(linear_backward_b(cast(gy, wide)), dtype_name(adapter.b))
    own = dtype_name(adapter.B)
    gbB = None if adapter.bB is None else cast(lora_backward_bB(cast(gy, low), scaling=s), own)
    return gx, LoraFaGradients(cast(gB, own), gb, gbB)


def lora_fa_corrected(gB: Array, A: Array, *, scaling: float, inverse: Array | None = None) -> Array:
    """Return ĝB = s⁻²·gB(AAᵀ + 1e-8·I)⁺ : (d_out, r), the step in B whose update is nearest to W's.

    inverse : lora_fa_inverse's, where somebody has it already

    Returns gB's dtype. Raises ConfigError where s is 0. Source: specs/lorafa.md.

    >>> lora_fa_corrected(np.array([[3.0, 8.0]]), np.diag([1.0, 2.0]), scaling=0.5).round(6).tolist()
    [[12.0, 8.0]]
    """
    bind(gB=(gB, "d_out r"), A=(A, "r d_in"))
    M = lora_fa_inverse(A, scaling=scaling) if inverse is None else inverse
    found: Array = cast(gB, "float64") @ M  # (lorafa.5)
    return cast(cast(found, compute_dtype(gB)), dtype_name(gB))


def lora_fa_inverse(A: Array, *, scaling: float) -> Array:
    """Return s⁻²·(AAᵀ + 1e-8·I)⁺ : (r, r) in float64, beside A: as long as A is held, always the same.

    The pseudo-inverse is taken on the host; singular values below r·eps of the largest, eps that of A's dtype,
    count as 0. Raises ConfigError where s is 0.
    """
    if scaling == 0:
        raise ConfigError("scaling: expected a number other than 0, whose square divides, got 0")
    host = to_host(cast(A, "float64"))
    M = host @ host.T + SMALL * np.eye(len(host))  # (lorafa.4)
    eps = 2.0**-23 if compute_dtype(A) == "float32" else 2.0**-52
    inverse = np.linalg.pinv(M, rcond=len(host) * eps, hermitian=True)
    found: Array = from_host(inverse / scaling**2, A)
    return found
