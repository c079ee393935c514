"""Starts: what an adapter holds before its first step, and what that leaves of the base.  See specs/init.md.

Factors are drawn and computed on the host, then cast and moved to where the base lives.
"""

from math import sqrt
from typing import Any

import numpy as np

from .backend import Array, all_finite, cast, compute_dtype, copy, dtype_name, from_host, to_host
from .config import LoraConfig, check_usable
from .errors import ConfigError, DtypeError
from .ops.dora import row_norm_forward
from .ops.lora import delta_forward
from .params import Adapter, Linear, check_direction
from .random import skip, uniform
from .singular import Triples, largest, sketched

ENTRIES = 1 << 16  # of the rows whose residual is formed at a time


def init_adapter(
    base: Linear, config: LoraConfig, *, rng: np.random.Generator | None = None
) -> tuple[Linear, Adapter]:
    """Return a base and the adapter that starts beside it; their forward is the given base's.

    base : Linear       never written to; the same record comes back, except for the PiSSA starts, whose base
                        is a new one with the residual W − s·BA, rounded once to W's dtype
    config : LoraConfig init_lora_weights chooses the start:
        True             A ~ U(±1/√d_in), B = 0; with torch_generator(seed), bit-identical to PEFT's
        False            A ~ U(±1/√d_in), B ~ U(±1/√r): not an identity, for debugging
        "gaussian"       A ~ N(0, 1/r²), B = 0
        "pissa"          A, B from the r largest singular triples of W, exact
        "pissa_niter_k"  the same from a randomised range with k power iterations
    rng : the source of random values; "pissa" alone needs none

    The adapter's dtype is config.adapter_dtype: unless said, the base's, or float32 where that only stores.
    With use_dora, m is the row norms of W + s·BA. With bias other than "none", b is a copy of base.b.
    Raises ConfigError for a config without meaning here, for a rank above min(d_out, d_in) under PiSSA, for a
    weight that is not finite or has a row of zeros where that matters, and for a missing rng.
    Source: specs/init.md.

    >>> base, adapter = init_adapter(Linear(np.eye(3)), LoraConfig(r=2), rng=np.random.default_rng(0))
    >>> adapter.A.shape, adapter.B.tolist()
    ((2, 3), [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    """
    _check(base, config, rng)
    d_out, d_in = base.W.shape
    r, s = config.r, config.scaling
    A: Any
    B: Any
    bB: Any = np.zeros(d_out) if config.lora_bias else None

    start = config.init_lora_weights
    pissa = isinstance(start, str) and start.startswith("pissa")
    if pissa:
        U, S, Vh = _triples(base.W, r, str(start), rng)
        root = np.sqrt(S / s)
        A, B = root[:, None] * Vh, U * root  # (init.4), (init.5)
    elif start == "gaussian":
        A = np.float32(_drawn(rng).standard_normal((r, d_in)) / r)  # (init.3)
        B = np.zeros((d_out, r))
    elif start is True:
        skip(_drawn(rng), r * d_in + d_out * r + (d_out if config.lora_bias else 0))
        A = uniform(_drawn(rng), (r, d_in), _kaiming(d_in))  # (init.1)
        B = np.zeros((d_out, r))
    else:
        A = uniform(_drawn(rng), (r, d_in), _kaiming(d_in))  # (init.1)
        B = uniform(_drawn(rng), (d_out, r), _kaiming(r))  # (init.2)
        bB = None if bB is None else uniform(_drawn(rng), (d_out,), 1.0 / sqrt(r))

    dtype = config.adapter_dtype or compute_dtype(base.W)
    if dtype == "base":
        dtype = dtype_name(base.W)
    A, B, bB = (None if v is None else cast(from_host(v, base.W), dtype) for v in (A, B, bB))
    if pissa:
        base = Linear(_residual(base.W, A, B, s), base.b)
    m = cast(_magnitude(base.W, A, B, s), dtype) if config.use_dora else None
    b = None if config.bias == "none" or base.b is None else copy(base.b)
    return base, Adapter(A, B, m=m, b=b, bB=bB)


def _kaiming(fan_in: int) -> float:
    """1/√fan_in, in the steps that torch's kaiming_uniform_(a=√5) takes, since their roundings count."""
    return sqrt(3.0) * (sqrt(2.0 / (1.0 + 5.0)) / sqrt(fan_in))


def _triples(W: Array, r: int, start: str, rng: np.random.Generator | None) -> Triples:
    """The r largest singular triples of W, as the start's name wants them."""
    host = to_host(cast(W, compute_dtype(W)))
    if start == "pissa":
        return largest(host, r)
    return sketched(host, r, int(start.removeprefix("pissa_niter_")), _drawn(rng))


def _residual(W: Array, A: Array, B: Array, s: float) -> Array:
    """W − s·BA of the factors as they were rounded, in float64, rounded once to W's dtype.

    On the host, some rows at a time, which stay in a core's cache: float64 of all of W is twice its memory.
    """
    host, A, B = to_host(W), cast(to_host(A), "float64"), cast(to_host(B), "float64")
    rest, step = np.array(host), max(1, ENTRIES // W.shape[1])
    for start in range(0, len(host), step):
        rows = slice(start, start + step)
        delta = delta_forward(A, B[rows], scaling=s)
        rest[rows] = cast(cast(host[rows], "float64") - delta, dtype_name(W))  # (init.9)
    found: Array = from_host(rest, W)
    return found


def _magnitude(W: Array, A: Array, B: Array, s: float) -> Array:
    """The row norms of W + s·BA, by the steps that the forward takes, so that k is 1 to the bit."""
    low = compute_dtype(A)
    V = cast(W, low) + delta_forward(cast(A, low), cast(B, low), scaling=s)
    check_direction(V)
    return row_norm_forward(V)  # (init.10)


def _drawn(rng: np.random.Generator | None) -> np.random.Generator:
    if not isinstance(rng, np.random.Generator):
        raise ConfigError(
            "rng: expected a numpy.random.Generator, such as lorax_np.torch_generator(seed), "
            f"got {type(rng).__name__}"
        )
    return rng


def _check(base: Linear, config: LoraConfig, rng: np.random.Generator | None) -> None:
    for name, value, kind in (("base", base, Linear), ("config", config, LoraConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    check_usable(config)
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            raise ConfigError(f"{name}: expected none for a layer without a name, got {getattr(config, name)}")
    if dtype_name(base.W) == "complex128":
        raise DtypeError("W: expected real numbers to start an adapter from, got complex128")
    pissa = str(config.init_lora_weights).startswith("pissa")
    if pissa and config.r > min(base.W.shape):
        raise ConfigError(
            f"r: expected at most min(d_out, d_in)={min(base.W.shape)} set by W, for init_lora_weights="
            f"{config.init_lora_weights!r}, got {config.r}"
        )
    if (pissa or config.use_dora) and not all_finite(base.W):
        raise ConfigError("W: expected finite numbers, got NaN or infinity")
    if rng is not None:
        _drawn(rng)
