"""The config.json of a llama with experts, and its tensors, which files may hold expert by expert.

Source: transformers 5.24.0, the configurations of mixtral and qwen3_moe, and their experts' names in files.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..backend import Array, to_host
from ..errors import FormatError
from ..shapes import shape_in
from .llama_config import llama_settings, llama_shapes
from .settings import Settings

DENSE = {"mixtral": "mistral", "qwen3_moe": "qwen3"}  # the llama that each has attention and norms of
MODEL_TYPES = tuple(DENSE)
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
PARTS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
ONE = re.compile(rf"(.*)\.(block_sparse_moe|mlp)\.experts\.(\d+)\.({'|'.join(PARTS)})\.weight")


def moe_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config.json with defaults filled in, as llama_settings does, and its router's and experts'.

    Raises ConfigError, which names the file and the value, for what the passes do not compute.
    """
    read = Settings(config, where)
    kind = read.word("model_type", MODEL_TYPES)
    read.only("output_router_logits", False, ", since no balance of experts is part of the loss")
    read.only("router_jitter_noise", 0.0, ", since a router adds no noise here")
    dense = dict(config) | {"model_type": DENSE[kind]}
    if kind == "mixtral":
        read.only("attention_bias", False)
        dense |= {"sliding_window": config.get("sliding_window")}
        dense = {"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5} | dense
    else:
        read.only("use_sliding_window", False, ", since all layers see all before them")
        read.only("decoder_sparse_step", 1, ", since every layer has experts")
        if config.get("mlp_only_layers"):
            read.refuse("mlp_only_layers", "none, since every layer has experts", config["mlp_only_layers"])
        dense["intermediate_size"] = read.integer("moe_intermediate_size", 768)
        if config.get("head_dim") is None:
            dense["head_dim"] = read.integer("hidden_size") // read.integer("num_attention_heads")
    read.only("mlp_bias", False)
    counts = ("num_local_experts", "num_experts")
    count = next((name for name in counts if config.get(name) is not None), counts[kind != "mixtral"])
    experts = read.integer(count, 8 if kind == "mixtral" else 128)
    k = read.integer("num_experts_per_tok", 2 if kind == "mixtral" else 8)
    if k > experts:
        read.refuse("num_experts_per_tok", f"at most {count}={experts}", k)
    return llama_settings(dense, where) | {
        "model_type": kind,
        "num_local_experts": experts,
        "num_experts_per_tok": k,
        "norm_topk_prob": kind == "mixtral" or read.flag("norm_topk_prob", False),
    }


def moe_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the passes read, in the order of a checkpoint.

    >>> sizes = dict(hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3, head_dim=2)
    >>> config = dict(model_type="mixtral", vocab_size=9, num_key_value_heads=1, num_local_experts=4, **sizes)
    >>> found = moe_shapes(moe_settings(config, ""))
    >>> {name: shape for name, shape in found.items() if "mlp.experts" in name}
    {'model.layers.0.mlp.experts.gate_up_proj': (4, 16, 6), 'model.layers.0.mlp.experts.down_proj': (4, 6, 8)}
    """
    d, ff, E = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    own = {"gate.weight": (E, d), GATE_UP: (E, 2 * ff, d), DOWN: (E, d, ff)}
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in llama_shapes({**config, "model_type": DENSE[config["model_type"]]}).items():
        layer, mlp, _ = name.partition(".mlp.")
        found |= {f"{layer}.mlp.{part}": size for part, size in own.items()} if mlp else {name: shape}
    return found


# ---- experts that files hold one by one --------------------------------------------------------------------


class Stacked(Mapping[str, Array]):
    """A checkpoint's tensors, those of experts stacked when they are asked for."""

    def __init__(
        self,
        under: Mapping[str, Any],
        names: Mapping[str, str],
        stacks: Mapping[str, list[list[str]]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Read under's tensors.

        names : ours -> under's; stacks : ours -> for each expert the tensors that lie one below another in it;
        shapes : of stacks
        """
        self.under, self.names, self.stacks, self.shapes = under, names, stacks, shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it where its mapping can tell. Raises KeyError."""
        return self.shapes[name] if name in self.stacks else shape_in(self.under, self.names[name])

    def __getitem__(self, name: str) -> Array:
        if name not in self.stacks:
            found: Array = self.under[self.names[name]]
            return found
        whole: Any = None
        for e, parts in enumerate(self.stacks[name]):
            begin = 0
            for part in parts:
                value = to_host(self.under[part])
                if whole is None:
                    whole = np.empty(self.shapes[name], value.dtype)
                whole[e, begin : begin + len(value)] = value
                begin += len(value)
        return whole  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from self.stacks

    def __len__(self) -> int:
        return len(self.names) + len(self.stacks)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__


def stacked(weights: Mapping[str, Any], config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The tensors of a file that may hold each expert's apart, w1, w3 and w2 of mixtral's for instance.

    Raises FormatError where an expert, or a part of one, is missing, one too many, or of another shape.
    """
    d, ff, E = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}
    names: dict[str, str] = {}
    layers: dict[str, dict[tuple[int, str], str]] = {}
    for name in weights:
        one = ONE.fullmatch(name)
        if one is None:
            names[name.replace(".block_sparse_moe.", ".mlp.")] = name
            continue
        e, part = int(one[3]), PARTS[one[4]]
        if (there := shape_in(weights, name)) != shapes[part] or e >= E:
            wanted = f"{shapes[part]}, of one of {E} experts set by the config"
            raise FormatError(f"{path}: {name}: expected {wanted}, got {there}")
        layers.setdefault(f"{one[1]}.mlp", {})[e, part] = name
    stacks: dict[str, list[list[str]]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for layer, found in layers.items():
        for e in range(E):
            for part in shapes:
                if (e, part) not in found:
                    raise FormatError(f"{path}: {layer}: expected {part} of expert {e}, got none")
        stacks[f"{layer}.{GATE_UP}"] = [[found[e, "gate"], found[e, "up"]] for e in range(E)]
        stacks[f"{layer}.{DOWN}"] = [[found[e, "down"]] for e in range(E)]
        sizes |= {f"{layer}.{GATE_UP}": (E, 2 * ff, d), f"{layer}.{DOWN}": (E, d, ff)}
    return Stacked(weights, names, stacks, sizes)
