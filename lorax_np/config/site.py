"""Site: what a config comes to at one named place, once its patterns are resolved. Frozen, no arrays."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError
from .lora import LoraConfig

Kind = Literal["linear", "embedding", "conv", "experts"]


@dataclass(frozen=True, slots=True)
class Site:
    """One adapted place.

    name : str       dotted name of the module, "model.layers.0.self_attn.q_proj"
    weight : str     name of the weight it adapts in a checkpoint, "model.layers.0.self_attn.q_proj.weight"
    kind : str       linear, embedding, conv, or experts for a fused 3-D parameter
    r : int          rank, per expert where there are experts
    alpha : float    α
    scaling : float  s = α/r, or α/√r when rank-stabilised
    p : float        drop probability of the mask on A's input; 0 for embeddings and experts
    transposed : bool  whether the weight lies as (d_in, d_out), as in GPT-2's Conv1D
    """

    name: str
    weight: str
    kind: Kind
    r: int
    alpha: float
    scaling: float
    p: float = 0.0
    transposed: bool = False


# ---- attention modules, with q, k and v in one parameter ---------------------------------------------------

FUSED, OUT = "in_proj_weight", "out_proj"  # that parameter, and the output, a module below


def is_fused(site: Site) -> bool:
    """Whether a site is q, k and v of an attention module."""
    return site.weight == f"{site.name}.{FUSED}"


def output_of(fused: Site) -> Site:
    """The output of an attention module, adapted with it by the same numbers, whatever patterns say of it."""
    name = f"{fused.name}.{OUT}"
    return replace(fused, name=name, weight=f"{name}.weight")


def is_output(name: str, sites: Mapping[str, Site]) -> bool:
    """Whether a name is that of the output of an attention module among some sites."""
    parent, _, last = name.rpartition(".")
    return last == OUT and parent in sites and is_fused(sites[parent])


# ---- one place ---------------------------------------------------------------------------------------------


def site_at(
    config: LoraConfig,
    name: str,
    *,
    kind: Kind = "linear",
    weight: str | None = None,
    transposed: bool | None = None,
) -> Site:
    """Resolve rank_pattern and alpha_pattern at one name.

    A key K of a pattern fits where `(.*\\.)?(K)$` matches the whole name. Raises ConfigError where two keys
    give one name different values.

    >>> site_at(LoraConfig(r=8, lora_alpha=16, rank_pattern={"v_proj": 4}), "layers.0.v_proj").scaling
    4.0
    """
    r = pattern_value(config.rank_pattern, name, "rank_pattern", config.r)
    alpha = pattern_value(config.alpha_pattern, name, "alpha_pattern", config.lora_alpha)
    return Site(
        name=name,
        weight=f"{name}.weight" if weight is None else weight,
        kind=kind,
        r=r,
        alpha=alpha,
        scaling=alpha / (math.sqrt(r) if config.use_rslora else r),
        p=0.0 if kind in ("embedding", "experts") else config.lora_dropout,
        transposed=config.fan_in_fan_out if transposed is None else transposed,
    )


def pattern_value(pattern: Mapping[str, Any] | None, name: str, field: str, default: Any) -> Any:
    """Return the value that a pattern gives a name, or the default where no key fits."""
    found = {key: value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)}
    if len(set(found.values())) > 1:
        raise ConfigError(f"{field}: expected one value for {name}, got {found}")
    return next(iter(found.values()), default)
