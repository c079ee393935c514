"""What a config comes to on a model, by the names and shapes of its weights: sites, biases, counts."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..kinds import nearest
from .families import BUFFERS, HEADS, INPUT_EMBEDDINGS, TWINS
from .fields import ROOTS, start_name
from .lora import LoraConfig, check_usable
from .site import FUSED, Site, is_fused, is_output, output_of, site_at
from .targeting import parameters, saved_modules, targeted, token_rows, within
from .tree import Shape, Tree, fits, grown, named


class Plan(NamedTuple):
    """What a config comes to on a model, before an array is read.

    sites : the places of adapters, by the name of the module, or of the parameter where target_parameters means
        it, in the order in which their adapters are started
    biases : the modules whose bias trains, adapted or not, in the model's order
    saved : the tensors that are trained whole
    tokens : the rows to train of each embedding, by the name of the module
    trainable, total : numbers that train, and all numbers: adapters, and copies of what is saved, included
    """

    sites: dict[str, Site]
    biases: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: dict[str, tuple[int, ...]]
    trainable: int
    total: int

    def __str__(self) -> str:
        """The line that PEFT prints, as in trainable params: 8 || all params: 32 || trainable%: 25.0000."""
        share = 100 * self.trainable / max(self.total, 1)
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def planned(
    names: Iterable[str],
    shape: Callable[[str], Shape],
    config: LoraConfig,
    *,
    model: Mapping[str, Any],
    kinds: Mapping[str, str] | None = None,
    groups: Mapping[str, int] | None = None,
) -> tuple[Tree, Plan]:
    """Return the tree of a model and a plan without counts, which would ask for every shape.

    model : config.json, of which model_type is read

    Raises ConfigError where the config cannot act on this model as it says.
    """
    check_usable(config)
    names = list(names)
    tree = grown(names, shape, model_type=model.get("model_type"), kinds=kinds, groups=groups)
    whole = saved_modules(config, tree)
    sites = {site.name: site for name in targeted(config, tree) for site in _module_sites(config, tree, name)}
    for tensor in parameters(config, tree):
        sites[tensor] = _parameter_site(config, tree, tensor, taken=(*sites, *whole))
    _check_patterns(config, sites)
    _check_sites(config, tree, sites)
    saved = tuple(tensor for tensor in names if within(tensor, whole))
    tokens = _tokens(config, tree, sites, whole)
    return tree, Plan(sites, tuple(_biases(config, tree, sites, whole)), saved, tokens, 0, 0)


def counted(plan: Plan, tree: Tree, names: Iterable[str], config: LoraConfig, model: Mapping[str, Any]) -> Plan:
    """Return the plan with its counts, for which every tensor's shape is asked.

    Embeddings that config.json calls tied count once, and so do biases under two names. A bias trains in place
    of the base's, so it adds nothing to all.
    """
    size = {name: prod(tree.shape(name)) for name in names if name.rpartition(".")[2] not in BUFFERS}
    ends = [f"{name}.weight" for name in (*INPUT_EMBEDDINGS, *HEADS)]
    tied = [name for name in size if any(fits(end, name) for end in ends)]
    again = [f"{name}.bias" for name in tree.modules if _twin(tree, name)]
    for name in (tied[1:] if model.get("tie_word_embeddings") else []) + again:
        del size[name]
    added = sum(adapter_size(tree, site, config) for site in plan.sites.values())
    added += sum(prod(tree.shape(name)) for name in plan.saved if name.rpartition(".")[2] not in BUFFERS)
    added += sum(len(rows) * tree.shape(str(tree.weight(name)))[1] for name, rows in plan.tokens.items())
    biases = sum(tree.shape(str(tree.bias(name)))[0] for name in plan.biases)
    return plan._replace(trainable=added + biases, total=sum(size.values()) + added)  # (inject.5), (inject.6)


def adapter_size(tree: Tree, site: Site, config: LoraConfig) -> int:
    """Return how many numbers an adapter at a site trains, the base's bias apart.

    A rank-r pair costs r·(d_in + d_out); experts pay it each, a convolution d_in·∏κ and d_out over its groups.
    """
    shape = tree.shape(site.weight)
    d_out, d_in = shape[1::-1] if site.transposed else shape[:2]
    if site.kind == "experts":
        *experts, a, b = shape
        return prod(experts) * site.r * (a + b)  # (inject.4)
    if site.kind == "embedding":  # (vocab, dim), whose magnitude has one entry a dim
        return site.r * (d_in + d_out) + d_in * config.use_dora  # (inject.2)
    groups = named(tree.groups, site.name) or 1
    down, up = site.r * d_in * groups * prod(shape[2:]), d_out * (site.r // groups)
    return down + up + d_out * (config.use_dora + config.lora_bias)  # (inject.1), (inject.3)


# ---- sites -------------------------------------------------------------------------------------------------


def _module_sites(config: LoraConfig, tree: Tree, name: str) -> list[Site]:
    """The site of a module; of an attention module two, with the same numbers."""
    if tree.attention(name):
        fused = site_at(config, name, weight=f"{name}.{FUSED}", transposed=False)
        return [fused, output_of(fused)]
    return [_module_site(config, tree, name)]


def _module_site(config: LoraConfig, tree: Tree, name: str) -> Site:
    kind = tree.kind(name) or "linear"
    transposed = kind == "linear" and tree.transposed(name, declared=config.fan_in_fan_out)
    return site_at(config, name, kind=kind, weight=tree.weight(name), transposed=transposed)


def _parameter_site(config: LoraConfig, tree: Tree, tensor: str, taken: Collection[str]) -> Site:
    """The site of a parameter, which is named as the parameter is."""
    if within(tensor, taken):
        raise ConfigError(
            f"target_parameters: expected none of a module in target_modules or modules_to_save, got {tensor}"
        )
    transposed = tree.experts_transposed() and len(tree.shape(tensor)) == 3
    return site_at(config, tensor, kind="experts", weight=tensor, transposed=transposed)


def _check_patterns(config: LoraConfig, sites: Mapping[str, Site]) -> None:
    """Refuse keys of patterns that fit no site."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field) or {}:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in sites if not is_output(name, sites)):
                ends = {name.rpartition(".")[2] for name in sites}
                raise ConfigError(
                    f"{field}: expected keys that fit sites, got {key!r}, which fits none of {len(sites)}"
                    f"{nearest(key, [*ends, *sites])}"
                )


def _check_sites(config: LoraConfig, tree: Tree, sites: Mapping[str, Site]) -> None:
    """Refuse what a site's kind, its shape, or all kinds together leave without meaning."""
    kinds = {site.kind for site in sites.values()}
    if config.lora_dropout and kinds == {"embedding"}:
        raise ConfigError(
            f"lora_dropout: expected 0.0 where all sites are embeddings, whose ids are not dropped, "
            f"got {config.lora_dropout}"
        )
    linear = [site for site in sites.values() if site.kind == "linear"]
    if config.fan_in_fan_out and linear and not any(site.transposed for site in linear):
        raise ConfigError(
            f"fan_in_fan_out: expected False for model_type {tree.model_type!r}, whose linear weights lie "
            "(d_out, d_in), got True"
        )
    for site in sites.values():
        _check_site(config, tree, site)


def _check_site(config: LoraConfig, tree: Tree, site: Site) -> None:
    shape, start = tree.shape(site.weight), start_name(config.init_lora_weights)
    if is_fused(site):
        for field in ("use_dora", "lora_bias"):
            if getattr(config, field):
                raise ConfigError(f"{field}: expected False at {site.name}, an attention module, got True")
    axes = {"conv": (3, 4, 5), "experts": (2, 3)}.get(site.kind, (2,))
    if len(shape) not in axes:
        wanted = f"a weight of {' or '.join(map(str, axes))} axes for one of kind {site.kind}"
        raise ConfigError(f"kinds: expected {wanted}, got {site.weight} of {shape}")
    if config.lora_bias and site.kind in ("embedding", "experts"):
        raise ConfigError(f"lora_bias: expected False at {site.name}, of kind {site.kind}, got True")
    if start in (*ROOTS, "olora") and site.kind == "linear" and site.r > min(shape):
        raise ConfigError(
            f"r: expected at most {min(shape)}, the smaller axis of {site.weight}, for init_lora_weights="
            f"{config.init_lora_weights!r}, got {site.r}"
        )
    groups = named(tree.groups, site.name)
    if site.kind == "conv" and groups is None and shape[1] == 1 < shape[0]:
        raise ConfigError(
            f"groups: expected {{{site.name!r}: n}}, since a weight of {shape} may be of one channel or of as "
            "many groups, got nothing"
        )
    if site.kind == "conv" and groups and (site.r % groups or shape[0] % groups):
        raise ConfigError(f"r: expected a multiple of groups={groups} at {site.name}, got {site.r}")
    if site.kind != "linear" or (bias := tree.bias(site.name)) is None:
        return
    d_out, length = shape[1 if site.transposed else 0], tree.shape(bias)[0]
    if length != d_out:
        raise ConfigError(
            f"fan_in_fan_out: expected {not site.transposed} or another model_type, since {site.weight} is "
            f"{shape} and its bias has {length}, got {site.transposed}"
        )


def _biases(config: LoraConfig, tree: Tree, sites: Mapping[str, Site], whole: Collection[str]) -> list[str]:
    """The modules whose bias trains: none, those adapted, or all that are not trained whole."""
    if config.bias == "none":
        return []
    names = sites if config.bias == "lora_only" else tree.modules
    found = [name for name in names if name in tree.modules and tree.bias(name)]
    return [name for name in found if not within(name, whole) and not _twin(tree, name)]


def _twin(tree: Tree, name: str) -> bool:
    """Whether a module's bias is its parent's under a second name."""
    twin = any(fits(key, name) for key in TWINS) and tree.bias(name) is not None
    return twin and tree.bias(name.rpartition(".")[0]) is not None


def _tokens(
    config: LoraConfig, tree: Tree, sites: Mapping[str, Site], whole: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """The rows to train of embeddings, checked against their length and against what else trains there."""
    found = token_rows(config, tree)
    for name, rows in found.items():
        if name in sites or within(name, whole):
            other = "target_modules" if name in sites else "modules_to_save"
            raise ConfigError(f"trainable_token_indices: expected no embedding of {other}, got {name}")
        vocab = tree.shape(str(tree.weight(name)))[0]
        if beyond := [row for row in rows if row >= vocab]:
            raise ConfigError(
                f"trainable_token_indices: expected rows below {vocab} of {name}, got {beyond[0]}"
            )
    return found
