"""Starts: what an adapter holds before its first step, and what that leaves of the base.  See specs/init.md.

Factors are drawn and computed on the host, then cast and moved to where the base lives. Starts of more
than a draw or an SVD of W stand in starts/.
"""

from collections.abc import Iterable
from math import sqrt
from typing import Any

import numpy as np

from .backend import (
    Array,
    all_finite,
    cast,
    compute_dtype,
    copy,
    dtype_name,
    from_host,
    one_dtype,
    quiet,
    to_host,
)
from .config import LoraConfig, check_usable, settings_of
from .errors import ConfigError, DtypeError, ShapeError
from .ops.dora import row_norm_forward
from .ops.lora import delta_forward
from .params import Adapter, Linear, check_direction
from .random import skip, uniform
from .shapes import axes
from .singular import Triples, largest, sketched
from .starts import BUILT, Given, Moments, Start, check_rank, generator, input_moments

ENTRIES = 1 << 16  # of the rows whose residual is formed at a time


FROM_INPUTS, FROM_GRADIENT, FROM_W = ("corda", "eva"), ("lora_ga",), ("corda", "loftq", "lora_ga", "olora")


def init_adapter(
    base: Linear,
    config: LoraConfig,
    *,
    rng: np.random.Generator | None = None,
    inputs: Array | Iterable[Array] | Moments | None = None,
    gradient: Array | None = None,
) -> tuple[Linear, Adapter]:
    """Return a base and the adapter that starts beside it; their forward is the given base's.

    base : Linear       never written to; the same record comes back, except where the start takes s·BA out of
                        it, marked −: then it is a new one with W − s·BA, rounded once to W's dtype
    config : LoraConfig init_lora_weights chooses the start:
        True             A ~ U(±1/√d_in), B = 0; with torch_generator(seed), bit-identical to PEFT's
        False            A ~ U(±1/√d_in), B ~ U(±1/√r): not an identity, for debugging
        "gaussian"       A ~ N(0, 1/r²), B = 0
        "pissa"        − A, B from the r largest singular triples of W, exact
        "pissa_niter_k"− the same from a randomised range with k power iterations
        "olora"        − B, A from the first r columns and rows of W's QR factors, not divided by s
        "orthogonal"     A, B of normals in orthogonal halves of an even rank, so that BA = 0
        "loftq"          A, B from what W loses in 4 or 8 bits; the base is what the bits stand for
        "eva"            A from the principal components of the inputs, B = 0
        "corda"        − A, B from W's directions as the inputs use them: the most, or the least
        "lora_ga"      − A, B from the singular vectors of the loss's gradient by W
    rng : the source of random values, for True, False, "gaussian", "pissa_niter_k", "orthogonal" and for
        "lora_ga" with direction "random"
    inputs : for "eva" and "corda": what the layer is given, (..., d_in), or batches of it, each read once, or
        the input_moments of them
    gradient : for "lora_ga": (d_out, d_in), of the loss by W

    The adapter's dtype is config.adapter_dtype: unless said, the base's, or float32 where that only stores.
    With use_dora, m is the row norms of W + s·BA. With bias other than "none", b is a copy of base.b.
    Raises ConfigError for a config without meaning here, for a rank that the start has no directions for, for a
    weight that is not finite or has a row of zeros where that matters, and for rng, inputs or gradient that are
    missing, or given to a start that takes none; ShapeError where they do not fit W.
    Source: specs/init.md, specs/starts.md.

    >>> base, adapter = init_adapter(Linear(np.eye(3)), LoraConfig(r=2), rng=np.random.default_rng(0))
    >>> adapter.A.shape, adapter.B.tolist()
    ((2, 3), [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    """
    _check(base, config, rng, inputs, gradient)
    d_out, d_in = base.W.shape
    r, s = config.r, config.scaling
    A: Any
    B: Any
    bB: Any = np.zeros(d_out) if config.lora_bias else None

    start = config.init_lora_weights
    begun = None
    if start in BUILT:
        begun = BUILT[str(start)](_given(base.W, config, rng, inputs, gradient))
        A, B = begun.A, begun.B
    elif isinstance(start, str) and start.startswith("pissa"):
        U, S, Vh = _triples(base.W, r, start, rng)
        root = np.sqrt(S / s)
        A, B = root[:, None] * Vh, U * root  # (init.4), (init.5)
        begun = Start(A, B, residual=True)
    elif start == "gaussian":
        A = np.float32(generator(rng).standard_normal((r, d_in)) / r)  # (init.3)
        B = np.zeros((d_out, r))
    elif start is True:
        skip(generator(rng), r * d_in + d_out * r + (d_out if config.lora_bias else 0))
        A = uniform(generator(rng), (r, d_in), _kaiming(d_in))  # (init.1)
        B = np.zeros((d_out, r))
    else:
        A = uniform(generator(rng), (r, d_in), _kaiming(d_in))  # (init.1)
        B = uniform(generator(rng), (d_out, r), _kaiming(r))  # (init.2)
        bB = None if bB is None else uniform(generator(rng), (d_out,), 1.0 / sqrt(r))

    dtype = config.adapter_dtype or compute_dtype(base.W)
    if dtype == "base":
        dtype = dtype_name(base.W)
    A, B, bB = (None if v is None else cast(from_host(v, base.W), dtype) for v in (A, B, bB))
    if begun is not None:
        base = _left(base, begun, A, B, s)
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
    return sketched(host, r, int(start.removeprefix("pissa_niter_")), generator(rng))


def _given(
    W: Array,
    config: LoraConfig,
    rng: np.random.Generator | None,
    inputs: Array | Iterable[Array] | Moments | None,
    gradient: Array | None,
) -> Given:
    """What a start of starts/ is made from, on the host and in the dtype that W computes in."""
    start, dtype = str(config.init_lora_weights), compute_dtype(W)
    field = f"{start}_config"
    settings = settings_of(field, getattr(config, field)) if hasattr(config, field) else {}
    moments = None if inputs is None else input_moments(inputs)
    if moments is not None and moments.mean.size != W.shape[1]:
        raise ShapeError(
            f"inputs: expected (..., d_in) with d_in={W.shape[1]} set by W, got {moments.mean.size}"
        )
    with quiet():
        G = None if gradient is None else to_host(cast(gradient, dtype))
    if G is not None and not all_finite(G):
        raise ConfigError(f"gradient: expected finite numbers within {dtype}, got NaN or infinity")
    return Given(to_host(cast(W, dtype)), config.r, config.scaling, settings, rng, moments, G)


def _left(base: Linear, begun: Start, A: Array, B: Array, s: float) -> Linear:
    """The base beside what a start made, A and B as they were rounded."""
    if begun.residual:
        W = _residual(base.W, A, B, s)
    elif begun.W is not None:
        with quiet():
            W = cast(from_host(begun.W, base.W), dtype_name(base.W))
    else:
        return base
    if not all_finite(W):
        raise ConfigError(
            f"W: expected a base within {dtype_name(W)} once the update is out of it, got infinity"
        )
    return Linear(W, base.b)


def _residual(W: Array, A: Array, B: Array, s: float) -> Array:
    """W − s·BA of the factors as they were rounded, in float64, rounded once to W's dtype.

    On the host, some rows at a time, which stay in a core's cache: float64 of all of W is twice its memory.
    """
    host, A, B = to_host(W), cast(to_host(A), "float64"), cast(to_host(B), "float64")
    rest, step = np.array(host), max(1, ENTRIES // W.shape[1])
    for start in range(0, len(host), step):
        rows = slice(start, start + step)
        delta = delta_forward(A, B[rows], scaling=s)
        with quiet():
            rest[rows] = cast(cast(host[rows], "float64") - delta, dtype_name(W))  # (init.9)
    found: Array = from_host(rest, W)
    return found


def _magnitude(W: Array, A: Array, B: Array, s: float) -> Array:
    """The row norms of W + s·BA, by the steps that the forward takes, so that k is 1 to the bit."""
    low = compute_dtype(A)
    V = cast(W, low) + delta_forward(cast(A, low), cast(B, low), scaling=s)
    check_direction(V)
    return row_norm_forward(V)  # (init.10)


def _check(base: Linear, config: LoraConfig, rng: Any, inputs: Any, gradient: Any) -> None:
    for name, value, kind in (("base", base, Linear), ("config", config, LoraConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    check_usable(config)
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            raise ConfigError(f"{name}: expected none for a layer without a name, got {getattr(config, name)}")
    if dtype_name(base.W) == "complex128":
        raise DtypeError("W: expected real numbers to start an adapter from, got complex128")
    start = config.init_lora_weights
    for name, value, takers in (("inputs", inputs, FROM_INPUTS), ("gradient", gradient, FROM_GRADIENT)):
        if value is not None and start not in takers:
            raise ConfigError(
                f"{name}: expected None with init_lora_weights={start!r}, which takes none, got some"
            )
    pissa = str(start).startswith("pissa")
    if pissa:
        check_rank(config.r, min(base.W.shape), f"min(d_out, d_in)={min(base.W.shape)} set by W", start)
    if (pissa or start in FROM_W or config.use_dora) and not all_finite(base.W):
        raise ConfigError("W: expected finite numbers, got NaN or infinity")
    if gradient is not None:
        axes(W=(base.W, "d_out d_in"), gradient=(gradient, "d_out d_in"))
        if one_dtype(gradient=gradient) == "complex128":
            raise DtypeError("gradient: expected real numbers, got complex128")
    if rng is not None:
        generator(rng)
