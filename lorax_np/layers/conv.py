"""A LoRA or DoRA convolution of 1 to 3 axes: the linear layer on windows.  Derivation: specs/conv.md.

Windows become rows, the groups' weights blocks of one matrix, and layer.py does the rest: its equations, its
casts, its two ways to treat DoRA's norm. What stands here is the way in and the way out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from ..backend import Array, cast, compute_dtype, dtype_name, namespace_of
from ..errors import ConfigError, DtypeError, ShapeError
from ..layer import LoraLinearSaved, lora_linear_backward, lora_linear_backward_base, lora_linear_forward
from ..merge import merge
from ..ops.conv import Window, blocks_backward, blocks_forward, cols_backward, cols_forward
from ..params import Adapter, AnyAdapter, ConvAdapter, Linear
from ..shapes import axes, bind

MODES = ("zeros", "reflect", "replicate", "circular")
Steps = int | Sequence[int]  # one number for all axes, or one an axis


@dataclass(frozen=True, eq=False, slots=True)
class Conv:
    """A convolution of 1, 2 or 3 axes, the kernel not turned round, as networks have it. Never written to.

    W : (d_out, d_in // groups, *κ)  weight
    b : (d_out,)                     bias, or None; in W's dtype
    stride, dilation : int, or one an axis
    padding : int, or one an axis, or "valid" (none), or "same": as much as keeps the length, at stride 1; where
              that is odd, the longer part stands behind
    groups : int       output o sees the channels of its group alone
    padding_mode : str zeros, reflect, replicate or circular

    Raises ShapeError, DtypeError, TypeError or ConfigError when made of parts that do not fit.
    """

    W: Array
    b: Array | None = None
    stride: Steps = 1
    padding: Steps | str = 0
    dilation: Steps = 1
    groups: int = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        k = len(self.W.shape) - 2
        if k not in (1, 2, 3):
            raise ShapeError(f"W: expected (d_out, d_in // groups, *kernel) of 3 to 5 axes, got {self.W.shape}")
        d_out = bind(W=(self.W, f"d_out d_in_group {_words('k', k)}"), b=(self.b, "? d_out"))["d_out"]
        if type(self.groups) is not int or self.groups < 1 or d_out % self.groups:
            raise ConfigError(f"groups: expected a divisor of d_out={d_out} set by W, got {self.groups!r}")
        if self.padding_mode not in MODES:
            raise ConfigError(f"padding_mode: expected one of {', '.join(MODES)}, got {self.padding_mode!r}")
        _ = self.window

    @property
    def window(self) -> Window:
        """How the kernel moves, by axis."""
        kernel = tuple(int(size) for size in self.W.shape[2:])
        k = len(kernel)
        stride, dilation = _each("stride", self.stride, k, 1), _each("dilation", self.dilation, k, 1)
        if self.padding == "same":
            if set(stride) != {1}:
                raise ConfigError(f"padding: expected numbers with stride={self.stride}, got 'same'")
            total = tuple(d * (size - 1) for d, size in zip(dilation, kernel, strict=True))
            before = tuple(t // 2 for t in total)  # (conv.10)
            after = tuple(t - t // 2 for t in total)
        else:
            before = after = (0,) * k if self.padding == "valid" else _each("padding", self.padding, k, 0)
        return Window(kernel, stride, dilation, before, after, self.padding_mode)

    @property
    def linear(self) -> Linear:
        """The linear layer that this is on windows: W as (d_out, d_in·∏κ), in blocks where there are groups."""
        return Linear(blocks_forward(_flat(self.W), self.groups), self.b)  # (conv.11)


class LoraConvSaved(NamedTuple):
    """Activations that the backward passes read."""

    linear: LoraLinearSaved  # of the windows: x (..., *P, d_in·∏κ)
    L: tuple[int, ...]  # lengths of x's spatial axes


def lora_conv_forward(
    x: Array, base: Conv, adapter: AnyAdapter, *, scaling: float, mask: Array | None = None
) -> tuple[Array, LoraConvSaved]:
    """Convolution with its low-rank update, and DoRA's magnitude where the adapter has one.

    Without m:  y = W∗x + b + s·(B∗(A∗(x∘mask)) + bB), where ∗ is the base's convolution, and B's kernel is 1.
    With m:     as the linear layer has it, with k = m/‖W + s·BA‖, a norm over channels and kernel.

    x : (..., d_in, *L)     input, in W's dtype; any leading axes, of zero items too
    base : Conv             frozen weight and bias; adapter.b, where present, stands in for base.b
    adapter : ConvAdapter   A (r, d_in, *κ) sees all channels, B (d_out, r // groups, *1) those of its group; in
                            the base's dtype or another. Or an Adapter that holds b alone
    scaling : float         s, as LoraConfig.scaling gives it
    mask : (..., d_in, *L)  dropout mask of 0 and 1/(1 − p) for the adapter's branch; None means no dropout

    Returns y : (..., d_out, *P) in x's dtype, and the saved activations. No argument is written to.
    Raises ShapeError, DtypeError, ConfigError, and TypeError where array libraries mix.
    Source: specs/conv.md; rounding schedule: specs/linear.md.

    >>> import numpy as np
    >>> base = Conv(np.array([[[1.0, -1.0]]]))
    >>> adapter = ConvAdapter(np.array([[[1.0, 1.0]]]), np.array([[[2.0]]]))
    >>> lora_conv_forward(np.array([[1.0, 2.0, 4.0]]), base, adapter, scaling=0.5)[0].tolist()
    [[2.0, 4.0]]
    """
    k = _check(x, base, adapter, mask)
    cols = cols_forward(x, base.window)
    drops = None if mask is None else cols_forward(mask, base.window)
    y, saved = lora_linear_forward(
        cols, base.linear, linear_adapter(adapter, base), scaling=scaling, mask=drops
    )
    L = tuple(x.shape[x.ndim - k :])
    return _moved(y, -1, y.ndim - 1 - k), LoraConvSaved(saved, L)  # (..., d_out, *P)  (conv.12)


def lora_conv_backward(
    gy: Array,
    saved: LoraConvSaved,
    base: Conv,
    adapter: AnyAdapter,
    *,
    scaling: float,
    norm_gradient: bool = False,
) -> tuple[Array, AnyAdapter]:
    """Adjoint of lora_conv_forward in x and in the adapter.

    gy : (..., d_out, *P)  gradient by y, in y's dtype
    saved, base, adapter, scaling : what the forward returned, and was given
    norm_gradient : bool   for DoRA, as of lora_linear_backward

    Returns gx : (..., d_in, *L) and an adapter of gradients, each in the dtype of what it differentiates; a
    field is None exactly where the adapter's is. gx is summed over windows before it is rounded, once.
    Raises as the forward does, and DtypeError for complex arrays.
    Source: specs/conv.md (conv.13) to (conv.16).
    """
    rows, linear, kept = _check_backward(gy, saved, base, adapter)
    how: Any = {"scaling": scaling, "norm_gradient": norm_gradient}
    gcols, g = lora_linear_backward(rows, kept, linear, linear_adapter(adapter, base), **how)
    gx = cast(cols_backward(gcols, base.window, saved.L), dtype_name(gy))  # (conv.13)
    if adapter.A is None or adapter.B is None or g.A is None or g.B is None:
        return gx, g
    xp = namespace_of(gA=g.A)
    gA = xp.reshape(g.A, adapter.A.shape)  # (conv.14)
    gB = xp.reshape(blocks_backward(g.B, base.groups), adapter.B.shape)  # (conv.15)
    return gx, ConvAdapter(gA, gB, m=g.m, b=g.b, bB=g.bB)


def lora_conv_backward_base(
    gy: Array,
    saved: LoraConvSaved,
    base: Conv,
    adapter: AnyAdapter,
    *,
    scaling: float,
    norm_gradient: bool = False,
) -> Conv:
    """Adjoint of lora_conv_forward in the base, for whoever trains it: arguments as lora_conv_backward.

    Returns a Conv of gradients in the base's dtype: W as the base's, and b : (d_out,) where the base has one,
    which is zero where adapter.b stands in for it.
    Source: specs/conv.md (conv.16).
    """
    rows, linear, kept = _check_backward(gy, saved, base, adapter)
    how: Any = {"scaling": scaling, "norm_gradient": norm_gradient}
    g = lora_linear_backward_base(rows, kept, linear, linear_adapter(adapter, base), **how)
    narrow = dtype_name(base.W)
    return replace(base, W=_kernels(cast(g.W, narrow), base), b=cast(g.b, narrow))  # (conv.16)


def merge_conv(base: Conv, adapter: AnyAdapter, *, scaling: float) -> Conv:
    """Return the one Conv that computes what base and adapter compute together without dropout.

    W' = W + s·BA over channels and kernel, with DoRA k∘(W + s·BA);  b' = b + s·bB: merge of the linear
    layers on windows, in float64, rounded once. Raises as merge does, and ConfigError for groups > 1: the
    update mixes channels that the base's weight keeps apart.
    Source: specs/conv.md (conv.17), specs/merge.md.

    >>> import numpy as np
    >>> adapter = ConvAdapter(np.array([[[1.0, 3.0]]]), np.array([[[2.0]]]))
    >>> merge_conv(Conv(np.array([[[1.0, -1.0]]])), adapter, scaling=0.5).W.tolist()
    [[[2.0, 2.0]]]
    """
    _check_pair(base, adapter)
    if base.groups > 1 and adapter.A is not None:
        raise ConfigError(
            f"groups: expected 1 to merge, since the update reaches channels of all groups, got {base.groups}"
        )
    merged = merge(base.linear, linear_adapter(adapter, base), scaling=scaling)
    return replace(base, W=_kernels(merged.W, base), b=merged.b)  # (conv.17)


# ---- between convolution and linear layer ------------------------------------------------------------------


def _flat(W: Array) -> Array:
    """(a, b, *κ) as (a, b·∏κ)."""
    flat: Array = namespace_of(W=W).reshape(W, (W.shape[0], prod(W.shape[1:])))
    return flat


def _kernels(W: Array, base: Conv) -> Array:
    """(d_out, d_in·∏κ) in the shape of the base's weight."""
    own: Array = namespace_of(W=W).reshape(blocks_backward(W, base.groups), base.W.shape)
    return own


def linear_adapter(adapter: AnyAdapter, base: Conv) -> Adapter:
    """The adapter of the linear layer on windows: A : (r, d_in·∏κ), B : (d_out, r) in blocks.  (conv.11)"""
    if adapter.A is None or adapter.B is None:
        return Adapter(None, None, b=adapter.b)
    B = blocks_forward(_flat(adapter.B), base.groups)
    return Adapter(_flat(adapter.A), B, m=adapter.m, b=adapter.b, bB=adapter.bB)


def _moved(y: Array, place: int, to: int) -> Array:
    """y with one of its axes in another place, the others in their order."""
    order = list(range(y.ndim))
    order.insert(to, order.pop(place))
    moved: Array = namespace_of(y=y).permute_dims(y, tuple(order))
    return moved


# ---- checks ------------------------------------------------------------------------------------------------


def _words(letter: str, k: int) -> str:
    return " ".join(f"{letter}{axis}" for axis in range(k))


def _each(name: str, value: Any, k: int, least: int) -> tuple[int, ...]:
    """One integer an axis, of one for all or a sequence."""
    given = (value,) * k if type(value) is int else value
    good = isinstance(given, (tuple, list)) and len(given) == k
    if not good or any(type(one) is not int or one < least for one in given):
        wanted = f"an integer of at least {least}, or {k} of them"
        raise ConfigError(f"{name}: expected {wanted}, got {value!r}")
    return tuple(given)


def _check_pair(base: Conv, adapter: AnyAdapter) -> int:
    """Check that an adapter fits its base, and return the number of spatial axes."""
    if not isinstance(base, Conv):
        raise TypeError(f"base: expected Conv, got {type(base).__name__}")
    if not isinstance(adapter, ConvAdapter) and (not isinstance(adapter, Adapter) or adapter.A is not None):
        raise TypeError(f"adapter: expected ConvAdapter, or Adapter with b alone, got {type(adapter).__name__}")
    k, groups = len(base.W.shape) - 2, base.groups
    words = _words("k", k)
    found = axes(W=(base.W, f"d_out d_in_group {words}"), b=(adapter.b, "? d_out"))
    if adapter.A is None or adapter.B is None:
        return k
    d_in, r = found["d_in_group"] * groups, adapter.A.shape[0]
    kernel = tuple(base.W.shape[2:])
    if tuple(adapter.A.shape[1:]) != (d_in, *kernel):
        raise ShapeError(
            f"A: expected (r, {d_in}, *{kernel}), set by W and groups, got {tuple(adapter.A.shape)}"
        )
    if tuple(adapter.B.shape[:2]) != (found["d_out"], r // groups) or r % groups:
        wanted = f"(d_out, r // groups, ...) with d_out={found['d_out']}, r={r}, groups={groups}"
        raise ShapeError(f"B: expected {wanted}, set by W, A and the base, got {tuple(adapter.B.shape)}")
    return k


def _check(x: Array, base: Conv, adapter: AnyAdapter, mask: Array | None) -> int:
    k = _check_pair(base, adapter)
    d_in, L = base.W.shape[1] * base.groups, _words("l", k)
    found = axes(x=(x, f"... d_in {L}"), mask=(mask, f"? ... d_in {L}"))
    if found["d_in"] != d_in:
        raise ShapeError(f"x: expected (..., d_in, {L}) with d_in={d_in} set by W, got {tuple(x.shape)}")
    return k


def _check_backward(
    gy: Array, saved: LoraConvSaved, base: Conv, adapter: AnyAdapter
) -> tuple[Array, Linear, LoraLinearSaved]:
    """gy as rows, base and saved of the linear layer, in the dtype that gradients are summed in."""
    if not isinstance(saved, LoraConvSaved):
        raise TypeError(f"saved: expected what lora_conv_forward returned, got {type(saved).__name__}")
    k = _check_pair(base, adapter)
    lead = tuple(saved.linear.x.shape[: len(saved.linear.x.shape) - k - 1])
    P = tuple(base.window.stops(axis, saved.L[axis]) for axis in range(k))
    want = (*lead, base.W.shape[0], *P)
    if tuple(gy.shape) != want:
        raise ShapeError(f"gy: expected {want}, set by x and W, got {tuple(gy.shape)}")
    if dtype_name(gy) not in (dtype_name(saved.linear.x), "complex128"):
        raise DtypeError(f"gy: expected {dtype_name(saved.linear.x)}, set by x, got {dtype_name(gy)}")
    wide = compute_dtype(gy)
    if adapter.A is not None and compute_dtype(adapter.A) == "float64":
        wide = "float64"
    linear = base.linear
    kept = saved.linear._replace(x=cast(saved.linear.x, wide))
    rows = cast(_moved(gy, -1 - k, gy.ndim - 1), wide)  # (..., *P, d_out)
    return rows, Linear(cast(linear.W, wide), cast(linear.b, wide)), kept
