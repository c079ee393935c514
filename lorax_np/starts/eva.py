"""EVA: the directions in which a layer's inputs vary most, and ranks where they do.  Spec: specs/starts.md."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..backend import Array, HostArray
from ..config import LoraConfig, settings_of, site_at
from ..errors import ConfigError
from ..singular import largest
from .moments import Moments, input_moments
from .parts import Given, Start, check_rank, signed


class Components(NamedTuple):
    """The principal components of some inputs, by falling variance."""

    V: HostArray  # (k, d_in)  orthonormal rows, the largest entry of each above 0
    S: HostArray  # (k,)       singular values of the centred inputs


def eva(given: Given) -> Start:
    """A = the first r principal components of the inputs, B = 0."""
    if given.inputs is None:
        raise ConfigError("inputs: expected a layer's inputs for init_lora_weights='eva', got None")
    found = components(given.inputs, given.r)
    A = found.V / np.sqrt(found.S)[:, None] if given.settings["whiten"] else found.V  # (starts.22)
    return Start(A, np.zeros((given.W.shape[0], given.r)))


def components(inputs: Moments, k: int) -> Components:
    """The k principal components of the inputs; ConfigError where they do not vary in so many directions."""
    count, d_in = inputs.rows, inputs.mean.size
    most = min(count - 1, d_in)
    check_rank(k, most, f"min(rows - 1, d_in)={most} set by inputs", "eva")
    _, squares, V = largest(inputs.scatter, k)  # (starts.21)
    if not squares[-1] > _nothing(inputs):
        raise ConfigError(f"inputs: expected variance in {k} directions, got it in fewer")
    return Components(V * signed(V), np.sqrt(squares))


def eva_ranks(inputs: Mapping[str, Array | Iterable[Array] | Moments], config: LoraConfig) -> LoraConfig:
    """Return the config with a rank for each site, so that the budget goes where the inputs vary most.

    inputs : site name to what its layer is given, as in input_moments; iterators are used up by this
    config : its ranks, with rank_pattern, make the budget Σ r; eva_config says rho, the most that a site gets
             over its own r, and whether α keeps pace: adjust_scaling_factors

    The components of all sites stand in one line by the share that each has of its site's variance, and the
    first Σ r get a rank. Where two are equal the earlier site comes first. A site that gets none is no longer
    among target_modules; rank_pattern and alpha_pattern name every other. Raises ConfigError, ShapeError.
    Source: Paischer et al. 2024, arXiv:2410.07170; specs/starts.md.

    >>> rng = np.random.default_rng(0)
    >>> wide, narrow = rng.standard_normal((99, 8)), rng.standard_normal((99, 8)) * [9, 1, 0, 0, 0, 0, 0, 0]
    >>> found = eva_ranks({"a": wide, "b": narrow}, LoraConfig(r=3, init_lora_weights="eva"))
    >>> dict(found.rank_pattern)
    {'^a': 5, '^b': 1}
    """
    settings = settings_of("eva_config", config.eva_config)
    sites = {name: site_at(config, name) for name in inputs}
    shares = {name: _shares(inputs[name], round(site.r * settings["rho"])) for name, site in sites.items()}
    owner = np.repeat(np.arange(len(sites)), [len(share) for share in shares.values()])
    budget = sum(site.r for site in sites.values())
    order = np.argsort(-np.concatenate([*shares.values(), np.zeros(0)]), kind="stable")[:budget]  # (starts.23)
    ranks = dict(zip(sites, np.bincount(owner[order], minlength=len(sites)).tolist(), strict=True))
    kept = {name: r for name, r in ranks.items() if r}
    if not kept:
        raise ConfigError("inputs: expected some that vary, got none")
    keep_pace = settings["adjust_scaling_factors"]
    alphas = {  # (starts.24)
        name: site.alpha * ranks[name] / site.r if keep_pace else site.alpha for name, site in sites.items()
    }
    return replace(
        config,
        target_modules=list(kept),
        rank_pattern={f"^{re.escape(name)}": r for name, r in kept.items()},
        alpha_pattern={f"^{re.escape(name)}": alphas[name] for name in kept},
    )


def _shares(inputs: Array | Iterable[Array] | Moments, most: int) -> HostArray:
    """Of all variance, that of each of the first components, as many as there are: (k,), falling."""
    found = input_moments(inputs)
    k = min(most, found.mean.size, found.rows - 1)
    squares = largest(found.scatter, k).S if k else np.zeros(0)
    return squares[squares > _nothing(found)] / float(np.trace(found.scatter))


def _nothing(inputs: Moments) -> float:
    """What roundings make of a variance of 0."""
    return inputs.mean.size * 2.0**-52 * float(np.trace(inputs.scatter))
