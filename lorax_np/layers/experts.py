"""Fused experts: one parameter of three axes, a weight for each expert, and each token by its expert's.

Each expert is the linear layer of layer.py on its own rows, casts included.  Derivation: specs/experts.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, cast, compute_dtype, dtype_name, from_host, namespace_of
from ..config import LoraConfig, check_usable
from ..errors import ConfigError, ShapeError
from ..layer import (
    LoraLinearSaved,
    lora_linear_backward,
    lora_linear_backward_base,
    lora_linear_forward,
)
from ..merge import merge
from ..ops.experts import join_experts, split_experts
from ..params import Adapter, Linear
from ..random import skip, uniform
from ..shapes import axes, bind, rows
from .routing import Routing, gather, host_ids, route, scatter


@dataclass(frozen=True, eq=False, slots=True)
class Experts:
    """The weights of E experts in one parameter. Never written to.

    W : (E, d_out, d_in), or (E, d_in, d_out) where transposed; a weight (d_out, d_in) is one expert
    transposed : bool  whether the axis of the input comes before that of the output, as in GPT-OSS

    Raises ShapeError, DtypeError, ConfigError or TypeError when made of what does not fit.
    """

    W: Array
    transposed: bool = False

    def __post_init__(self) -> None:
        if getattr(self.W, "ndim", 3) == 2:
            bind(W=(self.W, "d_out d_in"))
            if self.transposed:
                raise ConfigError("transposed: expected False for a weight of two axes, which is (d_out, d_in)")
        else:
            bind(W=(self.W, "E d_in d_out" if self.transposed else "E d_out d_in"))

    @property
    def count(self) -> int:
        """How many experts there are, E."""
        return 1 if self.W.ndim == 2 else self.W.shape[0]

    def weights(self) -> list[Array]:
        """The weight of each expert, (d_out, d_in), as views."""
        if self.W.ndim == 2:
            return [self.W]
        each = [self.W[e, :, :] for e in range(self.count)]
        return [W.T for W in each] if self.transposed else each

    def of(self, weights: Sequence[Array]) -> "Experts":
        """Matrices (d_out, d_in), one an expert, laid out as this record's are."""
        if self.W.ndim == 2:
            return Experts(weights[0])
        each = [W.T for W in weights] if self.transposed else list(weights)
        return Experts(namespace_of(W=self.W).stack(each), self.transposed)


class ExpertsSaved(NamedTuple):
    """What the backward passes read: the rows of each expert, and what its layer saved."""

    lead: tuple[int, ...]  # the leading axes of x
    routing: Routing
    layers: tuple[LoraLinearSaved, ...]


def lora_experts_forward(
    x: Array,
    base: Experts,
    adapter: Adapter,
    *,
    scaling: float,
    ids: Any = None,
    counts: Sequence[int] | None = None,
) -> tuple[Array, ExpertsSaved]:
    """Routed tokens through their experts: y = x W_eᵀ + s·(x A_eᵀ) B_eᵀ, e the expert of each row.

    x : (..., d_in)     one row for each pair of a token and an expert that it is sent to
    base : Experts      W : (E, d_out, d_in), or as its record says
    adapter : Adapter   A : (r·E, d_in), expert-slowest, and B : (d_out, r·E), expert-fastest, as stored
    scaling : float     s = α/r, or α/√r, with r the rank of one expert
    ids : (...,)        the expert of each row, integers from 0; read on the host
    counts : E integers instead of ids: how many rows each expert has, where the rows are in experts' order

    Returns y : (..., d_out) in x's dtype, and the saved activations. Mixing a token's experts by the router's
    weights is the caller's. Raises ShapeError, DtypeError, TypeError; ConfigError for an adapter with m, b or
    bB, which experts have not, for ids that are no expert's, and for neither or both of ids and counts.
    Source: specs/experts.md.

    >>> import numpy as np
    >>> base = Experts(np.zeros((2, 1, 1)))
    >>> adapter = Adapter(np.array([[1.0], [10.0]]), np.array([[2.0, 3.0]]))
    >>> lora_experts_forward(np.ones((3, 1)), base, adapter, scaling=1.0, ids=[1, 0, 1])[0].tolist()
    [[30.0], [2.0], [30.0]]
    """
    _check(base, adapter)
    axes(x=(x, "... d_in"), A=(adapter.A, "r·E d_in"))
    routing = _routed(prod(x.shape[:-1]), base.count, ids, counts)
    found = [
        lora_linear_forward(x_e, base_e, adapter_e, scaling=scaling)  # (experts.6)
        for x_e, base_e, adapter_e in zip(gather(rows(x), routing), *_each(base, adapter), strict=True)
    ]
    y = scatter([y_e for y_e, _ in found], routing)
    y = namespace_of(y=y).reshape(y, (*x.shape[:-1], y.shape[-1]))
    return y, ExpertsSaved(tuple(x.shape[:-1]), routing, tuple(saved for _, saved in found))


def lora_experts_backward(
    gy: Array, saved: ExpertsSaved, base: Experts, adapter: Adapter, *, scaling: float
) -> tuple[Array, Adapter]:
    """Adjoint of lora_experts_forward in x and in the adapter.

    gy : (..., d_out)  gradient by y, in y's dtype

    Returns gx : (..., d_in), and an Adapter of gradients as A and B are stored; those of an expert without rows
    are 0. Raises as the forward does. Source: specs/experts.md.
    """
    parts = _gy_parts(gy, saved, base, adapter)
    found = [
        lora_linear_backward(gy_e, saved_e, base_e, adapter_e, scaling=scaling)  # (experts.7)
        for gy_e, saved_e, base_e, adapter_e in zip(parts, saved.layers, *_each(base, adapter), strict=True)
    ]
    gx = scatter([gx_e for gx_e, _ in found], saved.routing)
    gx = namespace_of(gx=gx).reshape(gx, (*saved.lead, gx.shape[-1]))
    As: Any = [g.A for _, g in found]
    Bs: Any = [g.B for _, g in found]
    return gx, Adapter(*join_experts(As, Bs))  # (experts.8)


def lora_experts_backward_base(
    gy: Array, saved: ExpertsSaved, base: Experts, adapter: Adapter, *, scaling: float
) -> Experts:
    """Adjoint of lora_experts_forward in the base: gW_e = gy_eᵀ x_e, laid out as W.  (experts.9)"""
    parts = _gy_parts(gy, saved, base, adapter)
    found = [
        lora_linear_backward_base(gy_e, saved_e, base_e, adapter_e, scaling=scaling).W  # (experts.9)
        for gy_e, saved_e, base_e, adapter_e in zip(parts, saved.layers, *_each(base, adapter), strict=True)
    ]
    return base.of(found)


def merge_experts(base: Experts, adapter: Adapter, *, scaling: float) -> Experts:
    """Return the Experts whose weights are W_e + s·B_e A_e, computed in float64 and rounded once to W's dtype.

    Raises ShapeError, DtypeError, TypeError; ConfigError where the result is not finite.
    Source: specs/experts.md.

    >>> import numpy as np
    >>> adapter = Adapter(np.array([[1.0], [10.0]]), np.array([[2.0, 3.0]]))
    >>> merge_experts(Experts(np.zeros((2, 1, 1))), adapter, scaling=1.0).W.ravel().tolist()
    [2.0, 30.0]
    """
    _check(base, adapter)
    pairs = zip(*_each(base, adapter), strict=True)
    return base.of([merge(base_e, adapter_e, scaling=scaling).W for base_e, adapter_e in pairs])  # (experts.10)


def init_experts_adapter(
    base: Experts, config: LoraConfig, *, rng: np.random.Generator | None = None
) -> tuple[Experts, Adapter]:
    """Return the base itself and the adapter that starts beside it.

    config : init_lora_weights chooses the start:
        True        A ~ U(±1/√d_in), B = 0; with torch_generator(seed), bit-identical to PEFT's
        False       A ~ U(±1/√d_in), B ~ U(±1/√(r·E)), as PEFT's: the fan-in of the stored B; not an identity
        "gaussian"  A ~ N(0, 1/r²), B = 0
    rng : the source of random values

    The adapter's dtype is chosen as init_adapter does. Raises ConfigError for a config without meaning here:
    other starts, lora_dropout, use_dora, lora_bias, fan_in_fan_out, and patterns, which need a name.
    Source: specs/experts.md.

    >>> rng = np.random.default_rng(0)
    >>> _, adapter = init_experts_adapter(Experts(np.ones((4, 3, 5))), LoraConfig(r=2), rng=rng)
    >>> adapter.A.shape, adapter.B.shape
    ((8, 5), (3, 8))
    """
    _check_start(base, config, rng)
    d_out, d_in = base.weights()[0].shape
    rank, start = config.r * base.count, config.init_lora_weights
    drawn: Any = rng
    B: Any = np.zeros((d_out, rank))
    if start == "gaussian":
        A: Any = np.float32(drawn.standard_normal((rank, d_in)) / config.r)
    else:
        if start is True:
            skip(drawn, rank * d_in + d_out * rank)  # (experts.11), what torch's own linears spend
        A = uniform(drawn, (rank, d_in), _kaiming(d_in))
        B = B if start is True else uniform(drawn, (d_out, rank), _kaiming(rank))
    dtype = config.adapter_dtype or compute_dtype(base.W)
    dtype = dtype_name(base.W) if dtype == "base" else dtype
    A, B = (cast(from_host(value, base.W), dtype) for value in (A, B))
    return base, Adapter(A, B)


def _kaiming(fan_in: int) -> float:
    """1/√fan_in in the steps of torch's kaiming_uniform_(a=√5), whose roundings count."""
    return sqrt(3.0) * (sqrt(2.0 / (1.0 + 5.0)) / sqrt(fan_in))


# ---- checks ------------------------------------------------------------------------------------------------


def _check(base: Experts, adapter: Adapter) -> None:
    """Check that an adapter fits the experts, before anything is computed."""
    for name, value, kind in (("base", base, Experts), ("adapter", adapter, Adapter)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    if adapter.A is None or adapter.B is None:
        raise ConfigError("adapter: expected A and B for experts, got a bias alone")
    for field in ("m", "b", "bB"):
        if getattr(adapter, field) is not None:
            raise ConfigError(
                f"{field}: expected None, since an experts' adapter has A and B alone, got an array"
            )
    W, E = base.weights()[0], base.count
    axes(W=(W, "d_out d_in"), A=(adapter.A, "r·E d_in"), B=(adapter.B, "d_out r·E"))
    if adapter.A.shape[0] % E:
        raise ShapeError(f"A: expected (r·E, d_in) with E={E} set by W, got {tuple(adapter.A.shape)}")


def _each(base: Experts, adapter: Adapter) -> tuple[list[Linear], list[Adapter]]:
    """The linear layer and the adapter of each expert."""
    A: Any = adapter.A
    B: Any = adapter.B
    As, Bs = split_experts(A, B, experts=base.count)
    return [Linear(W) for W in base.weights()], [Adapter(*pair) for pair in zip(As, Bs, strict=True)]


def _routed(n: int, experts: int, ids: Any, counts: Sequence[int] | None) -> Routing:
    """The rows of each expert, by ids or by counts."""
    if (ids is None) == (counts is None):
        raise ConfigError(f"ids: expected ids or counts, got {'neither' if ids is None else 'both'}")
    if counts is not None:
        each = host_ids("counts", counts, experts, low=0, high=n + 1, what="expert")
        if each.sum() != n:
            raise ShapeError(f"counts: expected a sum of {n}, the rows of x, got {each.sum()}")
        ids = np.repeat(np.arange(experts), each)
    return route(host_ids("ids", ids, n, low=0, high=experts, what="row of x"), experts)


def _gy_parts(gy: Array, saved: ExpertsSaved, base: Experts, adapter: Adapter) -> list[Array]:
    """The rows of gy by expert, checked against what the forward saved."""
    _check(base, adapter)
    axes(gy=(gy, "... d_out"), B=(adapter.B, "d_out r·E"))
    if tuple(gy.shape[:-1]) != saved.lead or len(saved.layers) != base.count:
        wanted = (*saved.lead, base.weights()[0].shape[0])
        raise ShapeError(f"gy: expected {wanted}, set by the forward, got {tuple(gy.shape)}")
    return gather(rows(gy), saved.routing)


def _check_start(base: Experts, config: LoraConfig, rng: np.random.Generator | None) -> None:
    for name, value, kind in (("base", base, Experts), ("config", config, LoraConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    check_usable(config)
    if not isinstance(rng, np.random.Generator):
        raise ConfigError(
            "rng: expected a numpy.random.Generator, such as lorax_np.torch_generator(seed), "
            f"got {type(rng).__name__}"
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ConfigError(
            "init_lora_weights: expected True, False or 'gaussian' for fused experts, "
            f"got {config.init_lora_weights!r}"
        )
    for name in ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if value := getattr(config, name):
            raise ConfigError(f"{name}: expected none for fused experts, got {value!r}")
