"""Whole sets of sites as one set, with the config that reads it back."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..backend import Array, HostArray, from_host, to_host
from ..config import LoraConfig, Site
from ..config.fields import MARK, RESIDUAL, start_name
from ..errors import ConfigError, ShapeError
from ..params import Adapter, AnyAdapter
from .adapters import check_fit, combined
from .methods import Choice, check_numbers, choose


class AdapterSet(Protocol):
    """What combine_sets reads of each set: a directory of adapters, once loaded, is one."""

    @property
    def adapters(self) -> Mapping[str, AnyAdapter]: ...  # noqa: D102
    @property
    def sites(self) -> Mapping[str, Site]: ...  # noqa: D102
    @property
    def config(self) -> LoraConfig: ...  # noqa: D102
    @property
    def saved(self) -> Mapping[str, Array]: ...  # noqa: D102


class CombinedSet(NamedTuple):
    """One set for several. Every scaling is 1: lora_alpha is r, and rank-stabilisation is off."""

    adapters: dict[str, AnyAdapter]
    config: LoraConfig
    sites: dict[str, Site]
    saved: dict[str, Array]


def combine_sets(
    sets: Mapping[str, AdapterSet],
    weights: Mapping[str, float],
    *,
    method: str,
    density: float | None = None,
    majority_sign_method: str | None = None,
    rank: int | None = None,
    clamp: float | None = None,
    rng: np.random.Generator | None = None,
) -> CombinedSet:
    """Return one set of adapters for the weighted sum of several, site by site as combine does it.

    A site that only some of the sets have is combined of those. Each expert of a fused parameter is combined
    as a layer of its own. Parameters saved whole (modules_to_save) pass through where one set alone has them.
    The options are combine's. The config is the first set's, but for ranks, α, rank-stabilisation, start, and
    what names the sites: those fields stay if all sets agree in them, else the sites are named one by one.

    Raises ConfigError as combine does, with the site's name in front, and besides for sets whose adapters
    belong to a residual base (see plain), for one parameter saved by two sets, and for one site of two kinds.
    Source: specs/combine.md.

    >>> from lorax_np.config import site_at
    >>> config = LoraConfig(r=1, lora_alpha=3, use_rslora=True, target_modules=["q"])
    >>> adapter = Adapter(np.ones((1, 2)), np.ones((2, 1)))
    >>> one = CombinedSet({"q": adapter}, config, {"q": site_at(config, "q")}, {})
    >>> found = combine_sets({"a": one, "b": one}, {"a": 1.0, "b": -2.0}, method="cat")
    >>> found.config.r, found.config.scaling, found.adapters["q"].A.tolist()
    (2, 1.0, [[3.0, 3.0], [-6.0, -6.0]])
    """
    choice = choose(method, density, majority_sign_method, rank, clamp, rng)
    check_numbers(sets, weights=weights)
    for name, one in sets.items():
        start = getattr(one, "metadata", {}).get(MARK) or one.config.init_lora_weights
        if start_name(start) in RESIDUAL:
            raise ConfigError(
                f"{name}: expected adapters of the original weight, got those of the start {start!r}, whose "
                "base is a residual; convert them with plain first"
            )
    adapters: dict[str, AnyAdapter] = {}
    sites: dict[str, Site] = {}
    for site in dict.fromkeys(site for one in sets.values() for site in one.adapters):
        here = {name: one for name, one in sets.items() if site in one.adapters}
        found = {name: one.sites[site] for name, one in here.items()}
        kinds = {name: (v.kind, v.transposed) for name, v in found.items()}
        if len(set(kinds.values())) > 1:
            raise ConfigError(f"{site}: expected one kind of site in all sets, got {kinds}")
        numbers = {name: weights[name] for name in here}, {name: v.scaling for name, v in found.items()}
        first = next(iter(found.values()))
        parts: dict[str, Any] = {name: one.adapters[site] for name, one in here.items()}
        try:
            check_fit(parts)
            if first.kind == "experts":
                of = {name: _experts(part, found[name].r) for name, part in parts.items()}
                adapters[site], r = _by_expert(of, *numbers, choice, next(iter(parts.values())).A)
            else:
                done = combined(parts, *numbers, choice)
                adapters[site], r = done, first.r if done.A is None else done.A.shape[0]
        except (ConfigError, ShapeError, TypeError) as error:
            raise type(error)(f"{site}: {error}") from None
        sites[site] = replace(first, r=r, alpha=r, scaling=1.0)
    return CombinedSet(adapters, _config(sets, adapters, sites), sites, _saved(sets))


# ---- experts ------------------------------------------------------------------------------------------------


def _experts(adapter: Any, r: int) -> list[Adapter]:
    """The adapters of the experts of a fused parameter: A is stored expert-slowest, B expert-fastest."""
    A, B = to_host(adapter.A), to_host(adapter.B)
    if len(A) % r:
        raise ConfigError(f"A: expected experts of rank r={r} each, got {A.shape}")
    E = len(A) // r
    A, B = A.reshape(E, r, A.shape[1]), B.reshape(len(B), r, E)
    return [Adapter(A[e], B[:, :, e]) for e in range(E)]


def _by_expert(
    of: Mapping[str, list[Adapter]],
    weights: Mapping[str, float],
    scalings: Mapping[str, float],
    choice: Choice,
    like: Array,
) -> tuple[Adapter, int]:
    counts = {name: len(experts) for name, experts in of.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"A: expected one number of experts in all sets, got {counts}")
    found = [
        combined({name: experts[e] for name, experts in of.items()}, weights, scalings, choice)
        for e in range(min(counts.values()))
    ]
    A = np.concatenate([v.A for v in found])
    B: HostArray = np.stack([v.B for v in found], axis=-1)
    A, B = (from_host(v, like) for v in (A, B.reshape(len(B), -1)))
    return Adapter(A, B), len(A) // len(found)


# ---- what the set says of itself ----------------------------------------------------------------------------


def _saved(sets: Mapping[str, AdapterSet]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, one in sets.items():
        if twice := sorted(found.keys() & one.saved.keys()):
            raise ConfigError(
                f"{name}: expected parameters saved whole by one set alone, since they are no updates, got "
                f"{twice[0]} in two"
            )
        found |= one.saved
    return found


TARGETS = "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"


def _config(
    sets: Mapping[str, AdapterSet], adapters: Mapping[str, AnyAdapter], sites: Mapping[str, Site]
) -> LoraConfig:
    first, *others = (one.config for one in sets.values())
    ranks = {name: site.r for name, site in sites.items() if adapters[name].A is not None}
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else first.r
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    agreed = all(getattr(first, name) == getattr(other, name) for name in TARGETS for other in others)
    named: dict[str, Any] = {
        "target_modules": [name for name, site in sites.items() if site.kind != "experts"],
        "target_parameters": [site.weight for site in sites.values() if site.kind == "experts"] or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    saves = [set(one.config.modules_to_save or ()) for one in sets.values()]
    biases = [one.config.bias for one in sets.values() if one.config.bias != "none"]
    return replace(
        first,
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        use_rslora=False,
        init_lora_weights=True,
        loftq_config={},
        eva_config=None,
        lora_bias=any(adapter.bB is not None for adapter in adapters.values()),
        bias=biases[0] if biases else "none",
        modules_to_save=sorted(set().union(*saves)) or None,
        **({} if agreed else named),
    )
