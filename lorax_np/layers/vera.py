"""VeRA beside a linear layer: factors shared and frozen, two vectors trained.  See specs/vera.md."""

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import NamedTuple

import numpy as np

from ..backend import Array, Namespace, cast, compute_dtype, copy, dtype_name, from_host, namespace, one_dtype
from ..errors import ConfigError, ShapeError
from ..ops.dropout import dropout_backward, dropout_forward
from ..ops.linear import linear_backward_b, linear_backward_x, linear_forward
from ..ops.vera import VeraSaved, vera_backward, vera_forward
from ..params import Adapter, Linear
from ..random import uniform
from ..shapes import axes, bind


@dataclass(frozen=True, eq=False, slots=True)
class VeraShared:
    """The frozen factors of all VeRA layers of a model; each layer uses their first columns and rows.

    A : (r, at least d_in)   B : (at least d_out, r)
    """

    A: Array
    B: Array

    def __post_init__(self) -> None:
        bind(A=(self.A, "r d_in"), B=(self.B, "d_out r"))

    def cut(self, d_out: int, d_in: int) -> tuple[Array, Array]:
        """Return A : (r, d_in) and B : (d_out, r) of one layer; ShapeError where it is wider than they are."""
        for name, part, axis, want in (("A", self.A, 1, d_in), ("B", self.B, 0, d_out)):
            if part.shape[axis] < want:
                wanted = f"at least {want}, set by W, along axis {axis}"
                raise ShapeError(f"{name}: expected {wanted}, got {tuple(part.shape)}")
        return self.A[:, :d_in], self.B[:d_out, :]


@dataclass(frozen=True, eq=False, slots=True)
class VeraAdapter:
    """What is trained at one linear layer under VeRA, and equally the gradients by it.

    lambda_d : (r,)       scales the rows of A
    lambda_b : (d_out,)   scales the rows of B
    b : (d_out,)          the base bias once it trains, or None
    """

    lambda_d: Array
    lambda_b: Array
    b: Array | None = None

    def __post_init__(self) -> None:
        axes(lambda_d=(self.lambda_d, "r"), lambda_b=(self.lambda_b, "d_out"), b=(self.b, "? d_out"))
        one_dtype(lambda_d=self.lambda_d, lambda_b=self.lambda_b)


class VeraLinearSaved(NamedTuple):
    """Activations that vera_linear_backward reads."""

    mask: Array | None  # (..., d_in)  as given
    vera: VeraSaved  # in the dtype the adapter computes in


def vera_shared(
    d_in: int,
    d_out: int,
    r: int,
    *,
    rng: np.random.Generator,
    dtype: str = "float32",
    xp: Namespace | str | None = None,
) -> VeraShared:
    """Return the frozen factors for layers of at most d_in × d_out: A ~ U(±√(6/d_in)), B ~ U(±√(6/r)).

    A is drawn first. With torch_generator(projection_prng_key) both are bit-identical to PEFT's in float32.
    Source: specs/vera.md.

    >>> vera_shared(5, 7, 2, rng=np.random.default_rng(0)).B.shape
    (7, 2)
    """
    A = uniform(rng, (r, d_in), sqrt(3.0) * (sqrt(2.0) / sqrt(d_in)))  # (vera.12)
    B = uniform(rng, (d_out, r), sqrt(3.0) * (sqrt(2.0) / sqrt(r)))  # (vera.13)
    A, B = (cast(from_host(v, namespace(xp)), dtype) for v in (A, B))
    return VeraShared(A, B)


def vera_start(
    base: Linear, shared: VeraShared, *, d_initial: float = 0.1, train_bias: bool = False
) -> VeraAdapter:
    """Return the adapter that starts beside a base: λ_d = d_initial, λ_b = 0, so that the output is the base's.

    >>> adapter = vera_start(Linear(np.ones((3, 2))), VeraShared(np.ones((4, 5)), np.ones((6, 4))))
    >>> adapter.lambda_d.tolist(), adapter.lambda_b.tolist()
    ([0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0])
    """
    if isinstance(d_initial, bool) or not isfinite(d_initial):
        raise ConfigError(f"d_initial: expected a finite float, got {d_initial!r}")
    A, B = shared.cut(*base.W.shape)
    lambda_d, lambda_b = A[:, 0] * 0.0 + d_initial, B[:, 0] * 0.0  # (vera.14)
    return VeraAdapter(lambda_d, lambda_b, copy(base.b) if train_bias and base.b is not None else None)


def vera_linear_forward(
    x: Array, base: Linear, shared: VeraShared, adapter: VeraAdapter, *, mask: Array | None = None
) -> tuple[Array, VeraLinearSaved]:
    """Linear layer with its VeRA update: y = xWᵀ + b + λ_b∘(B(λ_d∘(A(x∘mask)))).

    x : (..., d_in)     input, in W's dtype; any leading axes, of zero tokens too
    base : Linear       frozen weight and bias; adapter.b, where present, stands in for base.b
    shared, adapter     in one dtype, the base's or another
    mask : (..., d_in)  dropout mask of 0 and 1/(1 − p) for the adapter's branch; None means no dropout

    Returns y : (..., d_out) in x's dtype, and the saved activations. No argument is written to.
    Raises ShapeError, DtypeError, and TypeError where array libraries mix.
    Source: specs/vera.md; rounding schedule: specs/linear.md.

    >>> shared = VeraShared(np.ones((1, 2)), np.array([[1.0], [2.0]]))
    >>> adapter = VeraAdapter(np.array([0.5]), np.array([1.0, -1.0]))
    >>> vera_linear_forward(np.array([3.0, 4.0]), Linear(np.eye(2)), shared, adapter)[0].tolist()
    [6.5, -3.0]
    """
    A, B = _fitting(base, shared, adapter)
    bind(x=(x, "... d_in"), W=(base.W, "d_out d_in"))
    axes(x=(x, "... d_in"), mask=(mask, "? ... d_in"))
    narrow, wide, low = dtype_name(x), compute_dtype(x), compute_dtype(A)
    y0 = linear_forward(
        cast(x, wide), cast(base.W, wide), cast(base.b if adapter.b is None else adapter.b, wide)
    )
    y0 = cast(y0, narrow)  # (linear.6)
    xd = dropout_forward(cast(x, low), cast(mask, low))
    t, saved = vera_forward(
        xd,
        cast(A, low),
        cast(B, low),
        lambda_d=cast(adapter.lambda_d, low),
        lambda_b=cast(adapter.lambda_b, low),
    )
    both = "float64" if "float64" in (wide, low) else wide
    return cast(cast(y0, both) + cast(t, both), narrow), VeraLinearSaved(mask, saved)  # (linear.7)


def vera_linear_backward(
    gy: Array, saved: VeraLinearSaved, base: Linear, shared: VeraShared, adapter: VeraAdapter
) -> tuple[Array, VeraAdapter]:
    """Adjoint of vera_linear_forward in x and in the adapter: gy : (..., d_out) -> gx : (..., d_in), gradients.

    The gradients are a VeraAdapter; each comes in the dtype of what it differentiates.
    Source: specs/vera.md (vera.5) to (vera.10).
    """
    A, B = _fitting(base, shared, adapter)
    bind(gy=(gy, "... d_out"), W=(base.W, "d_out d_in"))
    narrow, wide, low = dtype_name(gy), compute_dtype(gy), compute_dtype(A)
    gx = linear_backward_x(cast(gy, wide), cast(base.W, wide))
    gxd, gd, gb_ = vera_backward(
        cast(gy, low),
        saved.vera,
        cast(A, low),
        cast(B, low),
        lambda_d=cast(adapter.lambda_d, low),
        lambda_b=cast(adapter.lambda_b, low),
    )
    both = "float64" if "float64" in (wide, low) else wide
    gxa = dropout_backward(gxd, cast(saved.mask, low))
    gx = cast(cast(gx, both) + cast(gxa, both), narrow)  # (linear.8)
    gb = None if adapter.b is None else cast(linear_backward_b(cast(gy, wide)), dtype_name(adapter.b))
    own = dtype_name(adapter.lambda_d)
    return gx, VeraAdapter(cast(gd, own), cast(gb_, own), gb)


def vera_to_lora(base: Linear, shared: VeraShared, adapter: VeraAdapter) -> Adapter:
    """Return the same update as an Adapter of scaling 1 in float64: A' = λ_d[:, None]∘A, B' = λ_b[:, None]∘B.

    merge(base, vera_to_lora(base, shared, adapter), scaling=1.0) folds it into the weight, rounding once.
    Source: specs/vera.md (vera.11).

    >>> shared, adapter = VeraShared(np.ones((1, 2)), np.ones((3, 1))), VeraAdapter(np.ones(1), np.arange(2.0))
    >>> vera_to_lora(Linear(np.ones((2, 2))), shared, adapter).B.tolist()
    [[0.0], [1.0]]
    """
    A, B = (cast(v, "float64") for v in _fitting(base, shared, adapter))
    d, b = cast(adapter.lambda_d, "float64"), cast(adapter.lambda_b, "float64")
    return Adapter(d[:, None] * A, b[:, None] * B, b=adapter.b)


def _fitting(base: Linear, shared: VeraShared, adapter: VeraAdapter) -> tuple[Array, Array]:
    """A and B of this layer, after a check that all three records fit one another."""
    for name, value, kind in (
        ("base", base, Linear),
        ("shared", shared, VeraShared),
        ("adapter", adapter, VeraAdapter),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    A, B = shared.cut(*base.W.shape)
    bind(
        A=(A, "r d_in"),
        B=(B, "d_out r"),
        lambda_d=(adapter.lambda_d, "r"),
        lambda_b=(adapter.lambda_b, "d_out"),
    )
    return A, B
