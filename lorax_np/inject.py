"""A config laid over a model's weights: which places it means, and an adapter started at each.

Nothing is put into a model: the result is dictionaries by name.  See specs/inject.md.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .backend import Array, copy, from_host, namespace_of
from .config import LoraConfig, Plan, Site
from .config.plan import counted, planned
from .config.site import is_fused, output_of
from .config.tree import Shape, named
from .errors import ConfigError, DtypeError, ShapeError
from .init import init_adapter
from .kinds import nearest
from .layers.conv import Conv
from .layers.embedding import Embedding
from .layers.experts import Experts, init_experts_adapter
from .layers.starting import init_conv_adapter, init_embedding_adapter
from .params import Adapter, AnyAdapter, linear_from_stored, linear_to_stored
from .shapes import shape_in

DRAWN = True, False, "gaussian"  # starts that only draw
Weights = Mapping[str, Array]
Started = tuple[Array | None, AnyAdapter]  # the new weight as it is stored, where the start leaves a residual


class Overlay(Mapping[str, Array]):
    """Weights with some of them replaced; the others stay where they are, and are read when asked for."""

    def __init__(self, under: Weights, over: Weights) -> None:
        """Lay over : arrays by name, each a name of under's, over under."""
        self.under, self.over = under, over

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json, as far as it came with the weights."""
        return _model(self.under)

    def shape(self, name: str) -> Shape:
        """Shape of one tensor, which is never another than before."""
        return shape_in(self.under, name)

    def __getitem__(self, name: str) -> Array:
        return self.over[name] if name in self.over else self.under[name]

    def __contains__(self, name: object) -> bool:
        return name in self.under

    def __iter__(self) -> Iterator[str]:
        return iter(self.under)

    def __len__(self) -> int:
        return len(self.under)


def plan(
    weights: Mapping[str, Any],
    config: LoraConfig,
    *,
    kinds: Mapping[str, str] | None = None,
    groups: Mapping[str, int] | None = None,
    model_type: str | None = None,
) -> Plan:
    """Return what inject would make of the same arguments, without an array being read.

    weights : arrays, or their shapes, by their names in a checkpoint

    Raises as inject does, as far as shapes tell.

    >>> shapes = {"up.weight": (5, 3), "up.bias": (5,), "down.weight": (3, 5)}
    >>> found = plan(shapes, LoraConfig(2, target_modules=["up"]))
    >>> list(found.sites), str(found)
    (['up'], 'trainable params: 16 || all params: 51 || trainable%: 31.3725')
    """
    model = _model(weights, model_type)
    tree, found = planned(weights, partial(shape_in, weights), config, model=model, kinds=kinds, groups=groups)
    return counted(found, tree, weights, config, model)


def inject(
    weights: Weights,
    config: LoraConfig,
    rng: np.random.Generator | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    groups: Mapping[str, int] | None = None,
    model_type: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Array] | None = None,
) -> tuple[Weights, dict[str, AnyAdapter], dict[str, Site]]:
    """Start the adapters that a config means on a model's weights.

    weights : arrays by their names in a checkpoint, such as "model.layers.0.self_attn.q_proj.weight"; read one
        at a time, those that are adapted and no others, and never written to
    config : LoraConfig  target_modules, exclude_modules, layers_to_transform, target_parameters, rank_pattern,
        alpha_pattern, modules_to_save, bias and task_type say where; init_lora_weights says how
    rng : the source of random values, such as torch_generator(seed), which gives PEFT's A bit for bit
    kinds : what modules are, by names or their ends, where weights' shapes and names do not tell: linear,
        embedding or conv
    groups : groups of convolutions in the same way; 1 where nothing is said
    model_type : as in config.json, which is read where the weights bring it as `.config`
    inputs, gradients : what init_adapter takes under these names for eva, corda and lora_ga, by site

    Returns the weights, the same mapping unless a start leaves a residual, whose new weights then lie over it;
    the adapters by name, those without A and B where only a bias trains; and the sites by name, in injection
    order. What modules_to_save and trainable_token_indices mean is in plan(), and saved_tensors() starts it.
    Raises ConfigError where a name, pattern, layer or key fits nothing, where a module cannot be adapted, and,
    with the site in front, whatever a start refuses.
    Source: specs/inject.md.

    >>> weights = {"up.weight": np.eye(3), "down.weight": np.eye(3)}
    >>> _, adapters, sites = inject(weights, LoraConfig(r=2, target_modules=["up"]), np.random.default_rng(0))
    >>> adapters["up"].A.shape, sites["up"].scaling
    ((2, 3), 4.0)
    """
    new: dict[str, Array] = {}
    adapters: dict[str, AnyAdapter] = {}
    sites: dict[str, Site] = {}
    for name, site, adapter, residual in started(
        weights,
        config,
        rng,
        kinds=kinds,
        groups=groups,
        model_type=model_type,
        inputs=inputs,
        gradients=gradients,
    ):
        adapters[name] = adapter
        if site is not None:
            sites[name] = site
        if site is not None and residual is not None:
            new[site.weight] = residual
    return Overlay(weights, new) if new else weights, adapters, sites


class Start(NamedTuple):
    """What is started at one place: the site, None where only its bias trains; and the new weight, if any."""

    name: str
    site: Site | None
    adapter: AnyAdapter
    residual: Array | None  # as the weight is stored


def started(
    weights: Weights,
    config: LoraConfig,
    rng: np.random.Generator | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    groups: Mapping[str, int] | None = None,
    model_type: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Array] | None = None,
    skip: Collection[str] = (),
) -> Iterator[Start]:
    """As inject, one place after another, for who cannot keep all new weights; arguments and errors are its.

    skip : places that are left out, whose weights are not read and for which nothing is drawn

    >>> weights = {"up.weight": np.eye(3)}
    >>> config = LoraConfig(r=1, target_modules=["up"], init_lora_weights="pissa")
    >>> [(start.name, start.residual.shape) for start in started(weights, config)]
    [('up', (3, 3))]
    """
    tree, found = planned(
        weights,
        partial(shape_in, weights),
        config,
        model=_model(weights, model_type),
        kinds=kinds,
        groups=groups,
    )
    for argument, values in (("inputs", inputs or {}), ("gradients", gradients or {})):
        if strangers := [name for name in values if name not in found.sites]:
            hint = nearest(strangers[0], found.sites)
            raise ConfigError(f"{argument}: expected names of sites, got {strangers[0]!r}{hint}")

    def begin(name: str, site: Site) -> Started:
        given = Given(
            W=weights[site.weight],
            b=weights[str(tree.bias(name))] if name in found.biases else None,
            site=site,
            config=replace(
                config, r=site.r, lora_alpha=site.alpha, rank_pattern={}, alpha_pattern={}, lora_dropout=site.p
            ),
            rng=rng,
            groups=named(tree.groups, name) or 1,
            inputs=(inputs or {}).get(name),
            gradient=(gradients or {}).get(name),
        )
        try:
            return STARTS[site.kind](given)
        except (ConfigError, DtypeError, ShapeError) as refused:
            raise type(refused)(f"{name}: {refused}") from None

    for name, site in found.sites.items():
        if name in skip:
            continue
        if is_fused(site) and config.init_lora_weights in DRAWN:
            begin(name, output_of(site))  # PEFT draws for the output twice, before these and behind
        residual, adapter = begin(name, site)
        yield Start(name, site, adapter, residual)
    for name in found.biases:
        if name not in found.sites and name not in skip:
            yield Start(name, None, Adapter(None, None, b=copy(weights[str(tree.bias(name))])), None)


def saved_tensors(weights: Weights, found: Plan) -> dict[str, Array]:
    """Return what trains beside the adapters, as it starts: copies, by the names of adapters' files.

    found : the plan of these weights: its saved tensors are copied under their own names, and the rows of each
        embedding in tokens under "NAME.token_adapter.trainable_tokens_delta" : (rows, dim)

    >>> weights = {"up.weight": np.eye(3), "head.weight": np.eye(3)}
    >>> found = plan(weights, LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]))
    >>> list(saved_tensors(weights, found))
    ['head.weight']
    """
    made = {name: copy(weights[name]) for name in found.saved}
    for name, rows in found.tokens.items():
        W = weights[f"{name}.weight"]
        xp = namespace_of(W=W)
        made[f"{name}.token_adapter.trainable_tokens_delta"] = xp.take(W, from_host(np.array(rows), W), axis=0)
    return made


def _model(weights: Mapping[str, Any], model_type: str | None = None) -> dict[str, Any]:
    """What config.json says, where the weights bring it, under the model_type that was given."""
    found = dict(getattr(weights, "config", None) or {})
    return found | {"model_type": model_type} if model_type else found


# ---- starts, by kind ---------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What a start at one site is made from."""

    W: Array  # as it is stored
    b: Array | None  # where it is to train
    site: Site
    config: LoraConfig  # with this site's r and α, and no patterns
    rng: np.random.Generator | None
    groups: int
    inputs: Any
    gradient: Array | None


def _linear(given: Given) -> Started:
    base = linear_from_stored(given.W, given.b, fan_in_fan_out=given.site.transposed)
    new, adapter = init_adapter(base, given.config, rng=given.rng, inputs=given.inputs, gradient=given.gradient)
    if new is base:
        return None, adapter
    return linear_to_stored(new, fan_in_fan_out=given.site.transposed)[0], adapter


def _embedding(given: Given) -> Started:
    return None, init_embedding_adapter(Embedding(given.W), given.config, rng=given.rng)[1]


def _conv(given: Given) -> Started:
    base = Conv(given.W, given.b, groups=given.groups)
    return None, init_conv_adapter(base, given.config, rng=given.rng)[1]


def _experts(given: Given) -> Started:
    base = Experts(given.W, given.site.transposed)
    return None, init_experts_adapter(base, given.config, rng=given.rng)[1]


STARTS: Mapping[str, Callable[[Given], Started]] = {
    "linear": _linear,
    "embedding": _embedding,
    "conv": _conv,
    "experts": _experts,
}
