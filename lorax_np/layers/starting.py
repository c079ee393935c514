"""Starts of the adapters of embeddings and convolutions.  See specs/embedding.md and specs/conv.md."""

from math import prod, sqrt
from typing import Any

import numpy as np

from ..backend import Array, all_finite, cast, compute_dtype, copy, dtype_name, from_host
from ..config import LoraConfig, check_usable
from ..errors import ConfigError, DtypeError
from ..ops.dora import row_norm_forward
from ..ops.lora import delta_forward
from ..params import Adapter, ConvAdapter, check_direction
from ..random import skip, uniform
from .conv import Conv, linear_adapter
from .embedding import Embedding
from .normals import torch_normals


def init_embedding_adapter(
    base: Embedding, config: LoraConfig, *, rng: np.random.Generator | None = None
) -> tuple[Embedding, Adapter]:
    """Return an embedding and the adapter that starts beside it; their forward is the given base's.

    base : Embedding    never written to, and returned as it came
    config : LoraConfig init_lora_weights chooses the start:
        True, "gaussian"  A = 0, B ~ N(0, 1): other roles than in a linear layer, as PEFT and loralib have it
        False             A, B ~ N(0, 1): not an identity, for debugging
    rng : the source of random values. torch_generator(seed) stands afterwards where torch's would after PEFT's
          start, and A and B have the bits that PEFT gives them on a processor with AVX2

    The adapter's dtype is config.adapter_dtype: unless said, the base's, or float32 where that only stores.
    With use_dora, m : (dim,) is the row norms of Wᵀ + s·BA. Raises ConfigError for another start, for
    lora_bias, for a missing rng, and for a weight not finite or with a column of zeros where that matters.
    Source: specs/embedding.md.

    >>> base = Embedding(np.eye(3))
    >>> _, adapter = init_embedding_adapter(base, LoraConfig(r=2), rng=np.random.default_rng(0))
    >>> adapter.A.tolist(), adapter.B.shape
    ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], (3, 2))
    """
    rng = _check(base, Embedding, config, rng)
    if config.lora_bias:
        raise ConfigError("lora_bias: expected False at an embedding, which has no bias of B, got True")
    (vocab, dim), r = base.W.shape, config.r
    sizes = (r * vocab, dim * r)
    if config.init_lora_weights is False:
        A, B = torch_normals(rng, sizes)
    else:
        *_, B = torch_normals(rng, (*sizes, dim * r))  # (embedding.15): both are drawn, and B again
        A = np.zeros(sizes[0], np.float32)
    A, B = _placed(A.reshape(r, vocab), base.W, config), _placed(B.reshape(dim, r), base.W, config)
    m = _magnitude(base.linear.W, A, B, config) if config.use_dora else None
    return base, Adapter(A, B, m=m)


def init_conv_adapter(
    base: Conv, config: LoraConfig, *, rng: np.random.Generator | None = None
) -> tuple[Conv, ConvAdapter]:
    """Return a convolution and the adapter that starts beside it; their forward is the given base's.

    base : Conv         never written to, and returned as it came
    config : LoraConfig init_lora_weights chooses the start, with fan_in = d_in·∏κ:
        True        A ~ U(±1/√fan_in), B = 0; with torch_generator(seed), bit-identical to PEFT's
        False       A ~ U(±1/√fan_in), B ~ U(±1/√(r / groups)): not an identity, for debugging
        "gaussian"  A ~ N(0, 1/r²), B = 0
    rng : the source of random values

    The adapter's dtype is config.adapter_dtype: unless said, the base's, or float32 where that only stores.
    With use_dora, m : (d_out,) is the norms of W + s·BA over channels and kernel. With bias other than "none",
    b is a copy of base.b. Raises ConfigError for another start, for a rank that groups do not divide, for a
    weight that is not finite or has a row of zeros where that matters, and for a missing rng.
    Source: specs/conv.md (conv.18), specs/init.md.

    >>> base = Conv(np.ones((3, 2, 5)))
    >>> _, adapter = init_conv_adapter(base, LoraConfig(r=2), rng=np.random.default_rng(0))
    >>> adapter.A.shape, adapter.B.shape, bool((abs(adapter.A) <= 10**-0.5).all())
    ((2, 2, 5), (3, 2, 1), True)
    """
    rng = _check(base, Conv, config, rng)
    r, groups, (d_out, d_group, *kernel) = config.r, base.groups, base.W.shape
    if r % groups:
        raise ConfigError(f"r: expected a multiple of groups={groups} set by base, got {r}")
    A_shape, B_shape = (r, d_group * groups, *kernel), (d_out, r // groups, *(1 for _ in kernel))
    fan_in = prod(A_shape[1:])  # (conv.18)
    A: Any
    B: Any = np.zeros(B_shape)
    bB: Any = np.zeros(d_out) if config.lora_bias else None
    if config.init_lora_weights == "gaussian":
        A = np.float32(rng.standard_normal(A_shape) / r)  # (init.3)
    elif config.init_lora_weights is True:
        skip(rng, prod(A_shape) + prod(B_shape) + (d_out if config.lora_bias else 0))  # (conv.19)
        A = uniform(rng, A_shape, _kaiming(fan_in))
    else:
        A = uniform(rng, A_shape, _kaiming(fan_in))
        B = uniform(rng, B_shape, _kaiming(r // groups))
        bB = None if bB is None else uniform(rng, (d_out,), 1.0 / sqrt(r // groups))
    A, B, bB = _placed(A, base.W, config), _placed(B, base.W, config), _placed(bB, base.W, config)
    m = None
    if config.use_dora:
        linear = linear_adapter(ConvAdapter(A, B), base)
        m = _magnitude(base.linear.W, linear.A, linear.B, config)
    b = None if config.bias == "none" or base.b is None else copy(base.b)
    return base, ConvAdapter(A, B, m=m, b=b, bB=bB)


def _kaiming(fan_in: int) -> float:
    """1/√fan_in, in the steps that torch's kaiming_uniform_(a=√5) takes, since their roundings count."""
    return sqrt(3.0) * (sqrt(2.0 / (1.0 + 5.0)) / sqrt(fan_in))


def _placed(values: Any, W: Array, config: LoraConfig) -> Any:
    """Host values in the adapter's dtype, where W lives."""
    if values is None:
        return None
    dtype = config.adapter_dtype or compute_dtype(W)
    return cast(from_host(values, W), dtype_name(W) if dtype == "base" else dtype)


def _magnitude(W: Array, A: Any, B: Any, config: LoraConfig) -> Array:
    """The row norms of W + s·BA, by the steps that the forward takes, so that k is 1 to the bit.  (init.10)"""
    low = compute_dtype(A)
    V = cast(W, low) + delta_forward(cast(A, low), cast(B, low), scaling=config.scaling)
    check_direction(V)
    return cast(row_norm_forward(V), dtype_name(A))


def _check(base: Any, kind: type, config: LoraConfig, rng: np.random.Generator | None) -> np.random.Generator:
    for name, value, wanted in (("base", base, kind), ("config", config, LoraConfig)):
        if not isinstance(value, wanted):
            raise TypeError(f"{name}: expected {wanted.__name__}, got {type(value).__name__}")
    check_usable(config)
    start = config.init_lora_weights
    if start not in (True, False, "gaussian"):
        what = "an embedding" if kind is Embedding else "a convolution"
        raise ConfigError(f"init_lora_weights: expected True, False or 'gaussian' at {what}, got {start!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            raise ConfigError(f"{name}: expected none for a layer without a name, got {getattr(config, name)}")
    if dtype_name(base.W) == "complex128":
        raise DtypeError("W: expected real numbers to start an adapter from, got complex128")
    if config.use_dora and not all_finite(base.W):
        raise ConfigError("W: expected finite numbers, got NaN or infinity")
    if not isinstance(rng, np.random.Generator):
        raise ConfigError(
            "rng: expected a numpy.random.Generator, such as lorax_np.torch_generator(seed), "
            f"got {type(rng).__name__}"
        )
    return rng
