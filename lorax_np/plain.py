"""An adapter of a residual base as a plain one for the original weight.  Derivation: specs/plain.md."""

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any, TypeVar

from .backend import Array, namespace_of, one_dtype
from .config import LoraConfig
from .config.fields import RESIDUAL, start_name
from .errors import ConfigError, ShapeError
from .params import Adapter, ConvAdapter

Kept = TypeVar("Kept", Adapter, ConvAdapter)


def plain(adapter: Kept, initial: Kept, *, experts: int = 1) -> Kept:
    """Return the adapter of twice the rank that does to the original W what `adapter` does to W − s·B₀A₀.

    A' = [A; A₀] and B' = [B | −B₀], so that s·B'A' = s·(BA − B₀A₀), exactly; of scaling s still, which
    plain_config sees to. For linear layers, embeddings and convolutions; b and bB pass through, and so does m,
    whose V is the same matrix, (plain.4).

    adapter : what it is now
    initial : what it was at the start, A₀ and B₀; its other parts are not read
    experts : how many the factors are stacked of, for a fused parameter

    Raises ConfigError where a part is missing; ShapeError, DtypeError and TypeError where the two do not fit.
    Source: specs/plain.md.

    >>> import numpy as np
    >>> one = np.ones((1, 1))
    >>> found = plain(Adapter(one, 2 * one), Adapter(3 * one, 4 * one))
    >>> found.A.tolist(), found.B.tolist()
    ([[1.0], [3.0]], [[2.0, -4.0]])
    """
    A, B, A0, B0 = *_factors("adapter", adapter), *_factors("initial", initial)
    if type(adapter) is not type(initial):
        raise TypeError(f"initial: expected {type(adapter).__name__}, got {type(initial).__name__}")
    one_dtype(A=A, A0=A0, B0=B0)
    for name, now, start in (("A", A, A0), ("B", B, B0)):
        if tuple(now.shape) != tuple(start.shape):
            raise ShapeError(f"initial.{name}: expected {tuple(now.shape)}, set by adapter, got {start.shape}")
    groups = A.shape[0] // B.shape[1] if isinstance(adapter, ConvAdapter) else experts
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or A.shape[0] % groups:
        raise ConfigError(f"experts: expected a divisor of {A.shape[0]}, the rows of A, got {experts!r}")
    return replace(adapter, A=_beside(A, A0, groups, 0), B=_beside(B, -B0, 1, 1))  # (plain.1), (plain.2)


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the config of the converted adapters: twice the rank at the same scaling, and an ordinary start.

    r, lora_alpha and the values of rank_pattern and alpha_pattern are doubled; under rsLoRA the two of α are
    multiplied by √2. Raises ConfigError for a start that leaves W as it was or quantises it, and for DoRA with
    dropout, which is another layer beside W than beside W − s·B₀A₀ while it trains.

    >>> found = plain_config(LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa"))
    >>> found.r, found.lora_alpha, found.scaling, found.init_lora_weights
    (8, 12, 1.5, True)
    """
    if config.use_dora and config.lora_dropout:
        raise ConfigError(
            "lora_dropout: expected 0.0 with use_dora, since the layer that drops inputs is another one beside "
            f"the original weight, got {config.lora_dropout}; set it to 0.0 where no training follows"
        )
    if start_name(config.init_lora_weights) not in RESIDUAL:
        raise ConfigError(
            f"init_lora_weights: expected one of {', '.join(RESIDUAL)}, which change the base by s·BA, "
            f"got {config.init_lora_weights!r}"
        )
    more = sqrt(2.0) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,  # (plain.3)
        rank_pattern=_times(2, config.rank_pattern),
        alpha_pattern=_times(more, config.alpha_pattern),
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
    )


def _times(factor: float, pattern: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if pattern is None else {key: factor * value for key, value in pattern.items()}


def _factors(name: str, adapter: Any) -> tuple[Array, Array]:
    if not isinstance(adapter, (Adapter, ConvAdapter)):
        raise TypeError(f"{name}: expected Adapter or ConvAdapter, got {type(adapter).__name__}")
    if adapter.A is None or adapter.B is None:
        raise ConfigError(f"{name}: expected A and B, got a bias alone")
    return adapter.A, adapter.B


def _beside(one: Array, other: Array, groups: int, axis: int) -> Array:
    """Lay two arrays of one shape beside each other along an axis, group by group of it."""
    xp, shape = namespace_of(one=one, other=other), tuple(one.shape)
    parts = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
    both = xp.stack([xp.reshape(one, parts), xp.reshape(other, parts)], axis=axis + 1)
    found: Array = xp.reshape(both, (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]))
    return found
