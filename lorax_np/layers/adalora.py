"""AdaLoRA beside a linear layer: the update as B diag(E) A, ranks pruned by a mask.  See specs/adalora.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import numpy as np

from ..backend import (
    Array,
    HostArray,
    cast,
    compute_dtype,
    copy,
    dtype_name,
    from_host,
    namespace_of,
    one_dtype,
    to_host,
)
from ..errors import ConfigError
from ..ops.adalora import SMALL, SvdSaved, gram_backward, gram_forward, svd_backward, svd_forward
from ..ops.dropout import dropout_backward, dropout_forward
from ..ops.linear import linear_backward_b, linear_backward_x, linear_forward
from ..params import Adapter, Linear
from ..shapes import axes, bind


@dataclass(frozen=True, eq=False, slots=True)
class AdaLoraAdapter:
    """What is trained at one linear layer under AdaLoRA, and equally the gradients by it.

    A : (r, d_in)    right singular vectors, near orthonormal rows
    B : (d_out, r)   left singular vectors, near orthonormal columns
    E : (r,)         singular values, 0 where a rank is pruned
    b : (d_out,)     the base bias once it trains, or None
    """

    A: Array
    B: Array
    E: Array
    b: Array | None = None

    def __post_init__(self) -> None:
        axes(A=(self.A, "r d_in"), B=(self.B, "d_out r"), E=(self.E, "r"), b=(self.b, "? d_out"))
        one_dtype(A=self.A, B=self.B, E=self.E)


class AdaLoraLinearSaved(NamedTuple):
    """Activations that adalora_linear_backward reads."""

    mask: Array | None  # (..., d_in)  as given
    svd: SvdSaved  # in the dtype the adapter computes in


def adalora_start(
    base: Linear, r: int, *, rng: np.random.Generator, dtype: str | None = None, train_bias: bool = False
) -> AdaLoraAdapter:
    """Return the adapter that starts beside a base: A, B ~ N(0, 0.02²), E = 0, so that nothing moves.

    dtype : the one the base computes in, unless said

    >>> adalora_start(Linear(np.ones((3, 2))), 4, rng=np.random.default_rng(0)).E.tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    d_out, d_in = base.W.shape
    name = compute_dtype(base.W) if dtype is None else dtype
    A, B = 0.02 * rng.standard_normal((r, d_in)), 0.02 * rng.standard_normal((d_out, r))  # (adalora.18)
    A, B, E = (cast(from_host(v, base.W), name) for v in (A, B, np.zeros(r)))
    return AdaLoraAdapter(A, B, E, copy(base.b) if train_bias and base.b is not None else None)


def adalora_linear_forward(
    x: Array, base: Linear, adapter: AdaLoraAdapter, *, alpha: float, rank: float, mask: Array | None = None
) -> tuple[Array, AdaLoraLinearSaved]:
    """Linear layer with its AdaLoRA update: y = xWᵀ + b + α/(rank + 1e-5)·B diag(E) A(x∘mask).

    x : (..., d_in)      input, in W's dtype; any leading axes, of zero tokens too
    base : Linear        frozen weight and bias; adapter.b, where present, stands in for base.b
    adapter : AdaLoraAdapter in the base's dtype or another
    alpha, rank : float  α, and the rank it is divided by: the one at the start (PEFT's init_r) for good
    mask : (..., d_in)   dropout mask of 0 and 1/(1 − p) for the adapter's branch; None means no dropout

    Returns y : (..., d_out) in x's dtype, and the saved activations. No argument is written to.
    Raises ShapeError, DtypeError, ConfigError, and TypeError where array libraries mix.
    Source: specs/adalora.md; rounding schedule: specs/linear.md.

    >>> adapter = AdaLoraAdapter(np.ones((1, 2)), np.array([[1.0], [2.0]]), np.array([3.0]))
    >>> adalora_linear_forward(np.ones(2), Linear(np.eye(2)), adapter, alpha=0.500005, rank=1)[0].tolist()
    [4.0, 7.0]
    """
    _check(base, adapter, alpha, rank)
    bind(x=(x, "... d_in"), W=(base.W, "d_out d_in"))
    axes(x=(x, "... d_in"), mask=(mask, "? ... d_in"))
    narrow, wide, low = dtype_name(x), compute_dtype(x), compute_dtype(adapter.A)
    y0 = linear_forward(
        cast(x, wide), cast(base.W, wide), cast(base.b if adapter.b is None else adapter.b, wide)
    )
    y0 = cast(y0, narrow)  # (linear.6)
    xd = dropout_forward(cast(x, low), cast(mask, low))
    A, B, E = cast(adapter.A, low), cast(adapter.B, low), cast(adapter.E, low)
    t, saved = svd_forward(xd, A, B, E, alpha=alpha, rank=rank)
    both = "float64" if "float64" in (wide, low) else wide
    return cast(cast(y0, both) + cast(t, both), narrow), AdaLoraLinearSaved(mask, saved)  # (linear.7)


def adalora_linear_backward(
    gy: Array, saved: AdaLoraLinearSaved, base: Linear, adapter: AdaLoraAdapter, *, alpha: float, rank: float
) -> tuple[Array, AdaLoraAdapter]:
    """Adjoint of adalora_linear_forward in x and the adapter: gy : (..., d_out) -> gx : (..., d_in), gradients.

    The gradients are an AdaLoraAdapter. Each comes in the dtype of what it differentiates. A pruned rank, whose
    E is 0, still has a gradient by E, through which it may come back.
    Source: specs/adalora.md (adalora.6) to (adalora.12).
    """
    _check(base, adapter, alpha, rank)
    bind(gy=(gy, "... d_out"), W=(base.W, "d_out d_in"))
    narrow, wide, low = dtype_name(gy), compute_dtype(gy), compute_dtype(adapter.A)
    gx = linear_backward_x(cast(gy, wide), cast(base.W, wide))
    A, B, E = cast(adapter.A, low), cast(adapter.B, low), cast(adapter.E, low)
    gxd, gA, gB, gE = svd_backward(cast(gy, low), saved.svd, A, B, E, alpha=alpha, rank=rank)
    both = "float64" if "float64" in (wide, low) else wide
    gxa = dropout_backward(gxd, cast(saved.mask, low))
    gx = cast(cast(gx, both) + cast(gxa, both), narrow)  # (linear.8)
    gb = None if adapter.b is None else cast(linear_backward_b(cast(gy, wide)), dtype_name(adapter.b))
    own = dtype_name(adapter.A)
    return gx, AdaLoraAdapter(cast(gA, own), cast(gB, own), cast(gE, own), gb)


def adalora_penalty(
    adapters: Mapping[str, AdaLoraAdapter], *, weight: float
) -> tuple[float, dict[str, tuple[Array, Array]]]:
    """Return λ·mean‖PᵀP − I‖_F over all 2·len(adapters) factors P, and its gradients (gA, gB) by name.

    P is Aᵀ and B of every adapter; the norms are not squared. The gradients are to be added to those of the
    loss. Raises ConfigError for a weight below 0 and for no adapters.
    Source: specs/adalora.md (adalora.14) to (adalora.19).

    >>> adapter = AdaLoraAdapter(2 * np.eye(1), np.eye(1), np.ones(1))
    >>> penalty, gradients = adalora_penalty({"q": adapter}, weight=0.5)
    >>> penalty, [g.tolist() for g in gradients["q"]]
    (0.75, [[[1.0]], [[0.0]]])
    """
    if not (isfinite(weight) and weight >= 0):
        raise ConfigError(f"weight: expected a finite float of at least 0, got {weight!r}")
    if not adapters:
        raise ConfigError("adapters: expected at least one, got none")
    share = weight / (2 * len(adapters))  # (adalora.19)
    penalty, gradients = 0.0, {}
    for name, adapter in adapters.items():
        own, low = dtype_name(adapter.A), compute_dtype(adapter.A)
        identity = cast(from_host(np.eye(adapter.A.shape[0]), adapter.A), low)
        gs = []
        for P in (cast(adapter.A, low).T, cast(adapter.B, low)):
            f, R = gram_forward(P, identity)
            penalty += share * to_host(f).item()
            gs.append(cast(gram_backward(share, f, R, P), own))
        gradients[name] = (gs[0].T, gs[1])
    return penalty, gradients


def adalora_prune(adapter: AdaLoraAdapter, keep: Array) -> AdaLoraAdapter:
    """Return the adapter with E set to 0 where keep : (r,), of booleans, is false: PEFT's mask of a rank.

    >>> adapter = AdaLoraAdapter(np.ones((2, 3)), np.ones((4, 2)), np.array([5.0, 6.0]))
    >>> adalora_prune(adapter, np.array([True, False])).E.tolist()
    [5.0, 0.0]
    """
    xp = namespace_of(keep=keep, E=adapter.E)
    _kept(adapter, keep)
    return AdaLoraAdapter(adapter.A, adapter.B, xp.where(keep, adapter.E, xp.zeros_like(adapter.E)), adapter.b)


def adalora_without(adapter: AdaLoraAdapter, keep: Array) -> AdaLoraAdapter:
    """Return the adapter without the ranks that are not kept: the same update, if `rank` is left as it was.

    Raises ConfigError where nothing is kept.

    >>> adapter = AdaLoraAdapter(np.ones((2, 3)), np.ones((4, 2)), np.array([5.0, 6.0]))
    >>> adalora_without(adapter, np.array([True, False])).B.shape
    (4, 1)
    """
    which = np.flatnonzero(_kept(adapter, keep))
    if not len(which):
        raise ConfigError("keep: expected at least one rank to be kept, got none")
    xp, at = namespace_of(A=adapter.A), from_host(which, adapter.A)
    A, B = xp.take(adapter.A, at, axis=0), xp.take(adapter.B, at, axis=1)
    return AdaLoraAdapter(A, B, xp.take(adapter.E, at, axis=0), adapter.b)


def adalora_to_lora(adapter: AdaLoraAdapter, *, alpha: float, rank: float) -> tuple[Adapter, float]:
    """Return the same update as an Adapter in float64, A' = E[:, None]∘A, B' = B, and its scaling.

    merge(base, lora, scaling=s) of the two folds it into the weight, rounding once. Source: specs/adalora.md.

    >>> adapter = AdaLoraAdapter(np.ones((1, 2)), np.ones((3, 1)), np.array([4.0]))
    >>> lora, s = adalora_to_lora(adapter, alpha=8, rank=2)
    >>> lora.A.tolist(), round(s, 4)
    ([[4.0, 4.0]], 4.0)
    """
    A, B, E = (cast(v, "float64") for v in (adapter.A, adapter.B, adapter.E))
    return Adapter(E[:, None] * A, B, b=adapter.b), alpha / (rank + SMALL)  # (adalora.13)


def _kept(adapter: AdaLoraAdapter, keep: Array) -> HostArray:
    axes(E=(adapter.E, "r"), keep=(keep, "r"))
    host = to_host(keep)
    if host.dtype != bool:
        raise ConfigError(f"keep: expected booleans, got {host.dtype.name}")
    return host


def _check(base: Linear, adapter: AdaLoraAdapter, alpha: float, rank: float) -> None:
    for name, value, kind in (("base", base, Linear), ("adapter", adapter, AdaLoraAdapter)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    axes(W=(base.W, "d_out d_in"), A=(adapter.A, "r d_in"), B=(adapter.B, "d_out r"))
    for name, number, least in (("alpha", alpha, None), ("rank", rank, 0)):
        good = isinstance(number, (int, float)) and not isinstance(number, bool) and isfinite(number)
        if not good or (least is not None and number <= least):
            wanted = "a finite float" + ("" if least is None else f" above {least}")
            raise ConfigError(f"{name}: expected {wanted}, got {number!r}")
