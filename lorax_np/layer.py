"""A LoRA or DoRA linear layer, composed from ops/: the reference.  Derivation: specs/.

Every change of dtype is a line here. Arrays are computed in their own dtype, or in float32 where theirs is
for storage only (float16, bfloat16). Forward, the base product is rounded to the base's dtype, the adapter's
branch is computed in the adapter's, the two are added in the wider one, and the sum is rounded once; backward,
each gradient is rounded once, at the end.
"""

from typing import NamedTuple, TypeVar

from .backend import Array, cast, compute_dtype, dtype_name, namespace_of
from .ops.dora import (
    MagnitudeSaved,
    magnitude_backward,
    magnitude_forward,
    row_norm_backward,
    row_norm_forward,
)
from .ops.dropout import dropout_backward, dropout_forward
from .ops.linear import linear_backward_b, linear_backward_W, linear_backward_x, linear_forward
from .ops.lora import LoraSaved, delta_backward, delta_forward, lora_backward, lora_backward_bB, lora_forward
from .params import Adapter, Linear, Parts, check_backward, check_forward

Value = TypeVar("Value")


class LoraLinearSaved(NamedTuple):
    """Activations that the backward passes read; x and the mask are the caller's own arrays."""

    x: Array  # (..., d_in)  in the base's dtype
    mask: Array | None  # (..., d_in)  as given
    lora: LoraSaved | None  # in the dtype the adapter computes in, where it has A and B
    dora: MagnitudeSaved | None  # likewise, where it has m


def lora_linear_forward(
    x: Array, base: Linear, adapter: Adapter, *, scaling: float, mask: Array | None = None
) -> tuple[Array, LoraLinearSaved]:
    """Linear layer with its low-rank update, and DoRA's magnitude where the adapter has one.

    Without m:  y = xWᵀ + b + s·((x∘mask)AᵀBᵀ + bB).
    With m:     y = xWᵀ + b + (k − 1)∘((x∘mask)Wᵀ) + k∘(s·(x∘mask)AᵀBᵀ),  k = m/‖W + s·BA‖ by rows.

    x : (..., d_in)     input, in W's dtype; any leading axes, of zero tokens too
    base : Linear       frozen weight and bias; adapter.b, where present, stands in for base.b
    adapter : Adapter   in the base's dtype or another
    scaling : float     s, as LoraConfig.scaling gives it
    mask : (..., d_in)  dropout mask of 0 and 1/(1 − p) for the adapter's branch; None means no dropout

    Returns y : (..., d_out) in x's dtype, and the saved activations. No argument is written to.
    Raises ShapeError, DtypeError, ConfigError, and TypeError where array libraries mix.
    Source: specs/lora.md and specs/dora.md; rounding schedule: specs/linear.md.

    >>> import numpy as np
    >>> base, adapter = Linear(np.eye(2)), Adapter(np.ones((1, 2)), np.array([[1.0], [2.0]]))
    >>> lora_linear_forward(np.array([3.0, 4.0]), base, adapter, scaling=0.5)[0].tolist()
    [6.5, 11.0]
    """
    s = check_forward(x, base, adapter, scaling, mask)
    narrow, wide = dtype_name(x), compute_dtype(x)
    y0 = base_forward(x, base, adapter.b)
    if adapter.A is None:
        return y0, LoraLinearSaved(x, mask, None, None)
    t, lora, dora = branch_forward(x, base, adapter, scaling=s, mask=mask)
    both = wider(wide, dtype_name(t))
    y = cast(cast(y0, both) + cast(t, both), narrow)  # (linear.7)
    return y, LoraLinearSaved(x, mask, lora, dora)


def base_forward(x: Array, base: Linear, b: Array | None = None) -> Array:
    """The layer without adapter, in x's dtype; b stands in for the base's. Nothing is checked.  (linear.6)"""
    narrow, wide = dtype_name(x), compute_dtype(x)
    y0 = linear_forward(cast(x, wide), cast(base.W, wide), cast(base.b if b is None else b, wide))
    return cast(y0, narrow)  # (linear.6), the base's own output, as the layer without adapter gives it


def branch_forward(
    x: Array, base: Linear, adapter: Adapter, *, scaling: float, mask: Array | None
) -> tuple[Array, LoraSaved, MagnitudeSaved | None]:
    """What one adapter adds to the base's output, in the dtype it computes in. Nothing is checked.

    Without m that is s·((x∘mask)AᵀBᵀ + bB), and with m the two terms of k.  specs/lora.md, specs/dora.md.
    """
    low = compute_dtype(_present(adapter.A))
    A, B = cast(_present(adapter.A), low), cast(_present(adapter.B), low)
    bB, m = cast(adapter.bB, low), cast(adapter.m, low)
    xd = dropout_forward(cast(x, low), cast(mask, low))
    t, lora = lora_forward(xd, A, B, bB, scaling=scaling)
    if m is None:
        return t, lora, None
    W = cast(base.W, low)
    P = linear_forward(xd, W)
    n = row_norm_forward(W + delta_forward(A, B, scaling=scaling))
    t, dora = magnitude_forward(P, t, m=m, n=n)
    return t, lora, dora


def lora_linear_backward(
    gy: Array,
    saved: LoraLinearSaved,
    base: Linear,
    adapter: Adapter,
    *,
    scaling: float,
    norm_gradient: bool = False,
) -> tuple[Array, Adapter]:
    """Adjoint of lora_linear_forward in x and in the adapter.

    gy : (..., d_out)     gradient by y, in y's dtype
    saved, base, adapter, scaling : what the forward returned, and was given
    norm_gradient : bool  for DoRA. False: the norm is a constant, as in the paper (section 4.3) and in PEFT.
                          True: the gradient runs through it. Without m it has no effect.

    Returns gx : (..., d_in) and an Adapter of gradients, each in the dtype of what it differentiates; a field
    is None exactly where the adapter's is. Raises as the forward does, and DtypeError for complex arrays.
    Source: specs/lora.md (lora.5) to (lora.14), specs/dora.md (dora.4) to (dora.12).
    """
    s = _check_backward(gy, saved, base, adapter, scaling)
    narrow, wide = dtype_name(gy), compute_dtype(gy)

    gx = linear_backward_x(cast(gy, wide), cast(base.W, wide))
    if adapter.A is None:
        return cast(gx, narrow), Adapter(None, None, b=trained_bias(gy, adapter))
    gxa, g = branch_backward(gy, saved, base, adapter, scaling=s, norm_gradient=norm_gradient)
    both = wider(wide, dtype_name(gxa))
    gx = cast(cast(gx, both) + cast(gxa, both), narrow)  # (linear.8)
    return gx, g


def branch_backward(
    gy: Array, saved: LoraLinearSaved, base: Linear, adapter: Adapter, *, scaling: float, norm_gradient: bool
) -> tuple[Array, Adapter]:
    """Adjoint of branch_forward: gx of the branch, in the dtype it computes in, and the adapter's gradients.

    b, where the adapter has it, is among them. Nothing is checked.  specs/lora.md, specs/dora.md.
    """
    low, lora = compute_dtype(_present(adapter.A)), _present(saved.lora)
    A, B = cast(_present(adapter.A), low), cast(_present(adapter.B), low)
    m, gt = cast(adapter.m, low), cast(gy, low)
    gm = None
    if m is None or saved.dora is None:
        gxd, gA, gB = lora_backward(gt, lora, A, B, scaling=scaling)
    else:
        W = cast(base.W, low)
        V = W + delta_forward(A, B, scaling=scaling)
        n = row_norm_forward(V)
        gP, gQ, gm, gn = magnitude_backward(gt, saved.dora, m=m, n=n)
        gxd, gA, gB = lora_backward(gQ, lora, A, B, scaling=scaling)
        gxd = gxd + linear_backward_x(gP, W)  # (dora.14)
        if norm_gradient:
            gA_n, gB_n = delta_backward(row_norm_backward(gn, V, n=n), A, B, scaling=scaling)
            gA, gB = gA + gA_n, gB + gB_n
    gbB = None if adapter.bB is None else lora_backward_bB(gt, scaling=scaling)
    g = Adapter(  # (linear.9)
        A=_cast_like(gA, adapter.A),
        B=_cast_like(gB, adapter.B),
        m=_cast_like(gm, adapter.m),
        b=trained_bias(gy, adapter),
        bB=_cast_like(gbB, adapter.bB),
    )
    return dropout_backward(gxd, cast(saved.mask, low)), g


def lora_linear_backward_base(
    gy: Array,
    saved: LoraLinearSaved,
    base: Linear,
    adapter: Adapter,
    *,
    scaling: float,
    norm_gradient: bool = False,
) -> Linear:
    """Adjoint of lora_linear_forward in the base, for whoever trains it: arguments as lora_linear_backward.

    Returns a Linear of gradients in the base's dtype: W : (d_out, d_in), and b : (d_out,) where the base has
    one, which is zero where adapter.b stands in for it.
    Source: specs/linear.md (linear.4) and (linear.5), specs/dora.md (dora.13).
    """
    s = _check_backward(gy, saved, base, adapter, scaling)
    narrow, wide = dtype_name(gy), compute_dtype(gy)

    gW = linear_backward_W(cast(gy, wide), cast(saved.x, wide))
    gb = None if base.b is None else linear_backward_b(cast(gy, wide))
    if gb is not None and adapter.b is not None:
        gb = namespace_of(gb=gb).zeros_like(gb)
    if adapter.A is not None and adapter.B is not None and adapter.m is not None and saved.dora and saved.lora:
        low = compute_dtype(adapter.A)
        A, B, m = cast(adapter.A, low), cast(adapter.B, low), cast(adapter.m, low)
        V = cast(base.W, low) + delta_forward(A, B, scaling=s)
        n = row_norm_forward(V)
        gP, _, _, gn = magnitude_backward(cast(gy, low), saved.dora, m=m, n=n)
        gW_dora = linear_backward_W(gP, saved.lora.x)
        if norm_gradient:
            gW_dora = gW_dora + row_norm_backward(gn, V, n=n)
        both = wider(wide, low)
        gW = cast(gW, both) + cast(gW_dora, both)  # (dora.13)
    return Linear(cast(gW, narrow), cast(gb, narrow))


# ---- dtypes and checks -------------------------------------------------------------------------------------


def _cast_like(x: Array | None, other: Array | None) -> Array | None:
    return None if x is None or other is None else cast(x, dtype_name(other))


def wider(one: str, other: str) -> str:
    """The wider of two dtypes that arrays are computed in.  (linear.7)"""
    return "float64" if "float64" in (one, other) else one


def trained_bias(gy: Array, adapter: Adapter) -> Array | None:
    """The gradient by adapter.b, where the adapter has it.  (linear.5), (linear.9)"""
    gb = None if adapter.b is None else linear_backward_b(cast(gy, compute_dtype(gy)))
    return _cast_like(gb, adapter.b)


def _present(value: Value | None) -> Value:
    """What the checks of a layer with an adapter have seen to be there."""
    if value is None:
        raise TypeError("adapter: expected A and B, got None")
    return value


def _check_backward(gy: Array, saved: LoraLinearSaved, base: Linear, adapter: Adapter, scaling: float) -> float:
    """Check the backward's arguments against each other and against what the forward saved."""
    if not isinstance(saved, LoraLinearSaved):
        raise TypeError(f"saved: expected what lora_linear_forward returned, got {type(saved).__name__}")
    z = None if saved.lora is None else saved.lora.z
    there = Parts(saved.x, saved.mask, z, saved.dora is not None)
    return check_backward(gy, there, base, adapter, scaling)
