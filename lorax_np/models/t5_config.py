"""What a T5's config.json and file mean: sizes, the perceptron's form, and whose table the head reads.

Source: transformers 5.24.0, the configurations of t5 and mt5, and the names their models tie.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..backend import Array, to_host
from ..errors import FormatError
from ..shapes import shape_in
from .parts import ACTIVATIONS
from .settings import Settings

MODEL_TYPES = "t5", "mt5"
TABLE, HEAD = "shared", "lm_head"
COPIES = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"  # what else the table is called in files
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"  # of each stack, read by all its blocks


def t5_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config.json with defaults filled in, the form of the perceptron, and the scale of the head.

    scale_decoder_outputs : whether what the head reads is multiplied by d^-½; where nothing is said of it, it
        is what tie_word_embeddings says, since that once meant both. Whether the head is tied, files tell.
    Raises ConfigError, which names the file and the value, for what the passes do not compute.
    """
    read = Settings(config, where)
    read.plain()
    kind = read.word("model_type", MODEL_TYPES)
    read.only("is_encoder_decoder", True, ", since both stacks are computed")
    read.only("is_decoder", False)
    layers = read.integer("num_layers", 8 if kind == "mt5" else 6)
    padding = read.config.get("pad_token_id", 0)
    start = read.config.get("decoder_start_token_id")
    for name, value in (
        ("pad_token_id", padding),
        ("decoder_start_token_id", padding if start is None else start),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            read.refuse(name, "an id", value)
    tied = read.flag("tie_word_embeddings", True)
    d = read.integer("d_model", 512)
    buckets = read.integer("relative_attention_num_buckets", 32)
    if buckets < 4 or buckets % 2:
        read.refuse("relative_attention_num_buckets", "an even number of at least 4", buckets)
    farthest = read.integer("relative_attention_max_distance", 128)
    if farthest <= buckets // 2:
        read.refuse(
            "relative_attention_max_distance", f"more than {buckets // 2}, half of the buckets", farthest
        )
    gated, act = _perceptron(read, "gated-gelu" if kind == "mt5" else "relu")
    return dict(config) | {
        "model_type": kind,
        "hidden_size": d,
        "d_model": d,
        "d_kv": read.integer("d_kv", 64),
        "d_ff": read.integer("d_ff", 1024 if kind == "mt5" else 2048),
        "num_heads": read.integer("num_heads", 6 if kind == "mt5" else 8),
        "num_layers": layers,
        "num_decoder_layers": read.integer("num_decoder_layers", layers),
        "vocab_size": read.integer("vocab_size", 250112 if kind == "mt5" else 32128),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": farthest,
        "layer_norm_epsilon": read.number("layer_norm_epsilon", 1e-6),
        "is_gated_act": gated,
        "dense_act_fn": act,
        "pad_token_id": padding,
        "decoder_start_token_id": padding if start is None else start,
        "scale_decoder_outputs": kind == "t5" and read.flag("scale_decoder_outputs", tied),
    }


def _perceptron(read: Settings, default: str) -> tuple[bool, str]:
    """Whether the perceptron has a gate, and its activation: of "relu", "gated-gelu" and their like."""
    said = read.config.get("feed_forward_proj") or default
    first, _, last = said.rpartition("-") if isinstance(said, str) else ("", "", "")
    if first not in ("", "gated") or last not in ACTIVATIONS:
        wanted = f"one of {', '.join(ACTIVATIONS)}, or gated- before one of them"
        read.refuse("feed_forward_proj", wanted, said)
    return first == "gated", "gelu_new" if said == "gated-gelu" else last


def t5_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the passes read, the head's apart.

    >>> sizes = dict(d_model=6, d_kv=2, d_ff=8, num_layers=1, num_heads=4)
    >>> found = t5_shapes(t5_settings(dict(model_type="t5", **sizes), ""))
    >>> found["decoder.block.0.layer.1.EncDecAttention.k.weight"], len(found)
    ((8, 6), 26)
    """
    d, ff, H = config["d_model"], config["d_ff"], config["num_heads"]
    inner = H * config["d_kv"]
    found: dict[str, tuple[int, ...]] = {f"{TABLE}.weight": (config["vocab_size"], d)}
    for stack, layers in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        halves = ["SelfAttention"] + ["EncDecAttention"] * (stack == "decoder")
        for i in range(layers):
            block = f"{stack}.block.{i}"
            for j, half in enumerate(halves):
                name = f"{block}.layer.{j}"
                found |= {f"{name}.{half}.{part}.weight": (inner, d) for part in "qkv"}
                found |= {f"{name}.{half}.o.weight": (d, inner), f"{name}.layer_norm.weight": (d,)}
            name = f"{block}.layer.{len(halves)}"
            ups = ("wi_0", "wi_1") if config["is_gated_act"] else ("wi",)
            found |= {f"{name}.DenseReluDense.{up}.weight": (ff, d) for up in ups}
            found |= {f"{name}.DenseReluDense.wo.weight": (d, ff), f"{name}.layer_norm.weight": (d,)}
        found[f"{stack}.{BIAS}.weight"] = (config["relative_attention_num_buckets"], H)
        found[f"{stack}.final_layer_norm.weight"] = (d,)
    return found


# ---- one table under three names ---------------------------------------------------------------------------


class OneTable(Mapping[str, Array]):
    """A T5's tensors with the table of ids under one name, whatever names the file has it under."""

    def __init__(self, under: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Read under's tensors by names : ours -> under's."""
        self.under, self.names = under, names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it where its mapping can tell. Raises KeyError."""
        return shape_in(self.under, self.names[name])

    def __getitem__(self, name: str) -> Array:
        found: Array = self.under[self.names[name]]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__


def one_table(weights: Mapping[str, Any], config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The tensors of a file in which the stacks may have the table under names of their own.

    Raises FormatError where those are not all one table.
    """
    table = f"{TABLE}.weight"
    there = [name for name in (table, *COPIES) if name in weights]
    if there in ([], [table]):
        return weights
    for other in there[1:]:
        if not np.array_equal(to_host(weights[there[0]]), to_host(weights[other])):
            raise FormatError(f"{path}: {other}: expected the values of {there[0]}, got others")
    names = {table: there[0]} | {name: name for name in weights if name not in there}
    return OneTable(weights, names)
