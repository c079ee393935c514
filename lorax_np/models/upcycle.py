"""A mixture of experts made of a dense model, each a copy of its perceptron.  Derivation: specs/moe.md."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..backend import Array, compute_dtype, from_host, namespace_of
from ..errors import ConfigError
from ..shapes import shape_in
from .moe_config import DOWN, moe_settings, moe_shapes
from .records import Model

MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


def upcycle(model: Model, experts: int = 4, top_k: int = 2, *, rng: np.random.Generator | None = None) -> Model:
    """Return a model with so many experts in each block, which at its start equals the dense one it is made of.

    model : Model   of the llama family; its tensors are not copied but for each perceptron's, once for all
                    experts together, when they are first asked for
    top_k : int     experts of each token, whose weights add up to 1
    rng             draws the routers from N(0, σ²), σ being the config's initializer_range, or 0.02, so that
                    tokens go to different experts; None is default_rng(0)

    Since all experts are alike, Σ_j w_j·expert(b) = expert(b), whatever the router says. (moe.15)
    Raises ConfigError for other families, for perceptrons with biases and windows of some layers alone, which
    no mixture here has, and unless 1 ≤ top_k ≤ experts.
    Source: Komatsuzaki et al. 2023, arXiv:2212.05055; specs/moe.md.

    >>> from lorax_np.models.llama_config import llama_settings, llama_shapes
    >>> from lorax_np.models.load import model_of
    >>> sizes = dict(hidden_size=6, intermediate_size=8, num_attention_heads=3, num_key_value_heads=1)
    >>> config = dict(model_type="llama", head_dim=2, num_hidden_layers=1, vocab_size=9, **sizes)
    >>> dense = {name: np.ones(shape) for name, shape in llama_shapes(llama_settings(config, "")).items()}
    >>> mixture = upcycle(model_of(dense, config), experts=5)
    >>> mixture.weights["model.layers.0.mlp.experts.gate_up_proj"].shape
    (5, 16, 6)
    """
    config = model.config
    if model.family != "llama" or config["model_type"] not in MIXTURES:
        raise ConfigError(f"model: expected one of {', '.join(MIXTURES)}, got {config['model_type']!r}")
    for name, value in (("experts", experts), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if top_k > experts:
        raise ConfigError(f"top_k: expected at most experts={experts}, got {top_k}")
    windows = set(config["windows"])
    if len(windows) > 1:
        raise ConfigError(f"model: expected one window for all layers, got {sorted(map(str, windows))}")
    found = moe_settings(mixed(config, experts, top_k, windows.pop()), model.path) | {"tied": config["tied"]}
    like = model.weights[next(iter(model.weights))]
    rng, sigma = rng or np.random.default_rng(0), float(config.get("initializer_range") or 0.02)
    gates = {
        name: from_host((sigma * rng.standard_normal(shape)).astype(compute_dtype(like)), like)
        for name, shape in moe_shapes(found).items()
        if name.endswith(".mlp.gate.weight")
    }
    return replace(model, family="moe", config=found, weights=Upcycled(model.weights, gates, found))


def mixed(config: Mapping[str, Any], experts: int, top_k: int, window: int | None) -> dict[str, Any]:
    """The config.json of the mixture, of that of the dense model."""
    kind = MIXTURES[config["model_type"]]
    return dict(config) | {
        "model_type": kind,
        "architectures": [{"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[kind]],
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": config["intermediate_size"],
        "sliding_window": window,
        "use_sliding_window": window is not None,
    }


class Upcycled(Mapping[str, Array]):
    """A dense model's tensors and routers; of experts one is held, and shown as many times as there are."""

    def __init__(self, dense: Mapping[str, Any], gates: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        """Read dense's tensors, and gates by their own names; config is the mixture's."""
        self.dense, self.gates, self.config = dense, gates, config
        shapes = moe_shapes(config)
        heads = [name for name in dense if name not in shapes and ".mlp." not in name]
        self.names = [*shapes, *heads]
        self.shapes, self._held = shapes, dict[str, Array]()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it where that can be told. Raises KeyError."""
        return self.shapes[name] if name in self.shapes else shape_in(self.dense, name)

    def __getitem__(self, name: str) -> Array:
        if name in self.gates:
            return self.gates[name]
        mlp, _, part = name.partition(".experts.")
        if not part:
            found: Array = self.dense[name]
            return found
        if name not in self._held:
            parts = ["down_proj"] if name.endswith(DOWN) else ["gate_proj", "up_proj"]
            each = [self.dense[f"{mlp}.{part}.weight"] for part in parts]
            xp = namespace_of(W=each[0])
            one = each[0] if len(each) == 1 else xp.concat(each, axis=0)
            self._held[name] = xp.broadcast_to(one, self.shapes[name])
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes or (name in self.dense and ".mlp." not in str(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__
