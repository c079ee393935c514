"""What a llama's config.json means: sizes, windows, positions, and the tensors there have to be.

Source: transformers 5.24.0, the configurations of llama, mistral, qwen2 and qwen3, and modeling_rope_utils.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..ops.rope import rope_frequencies
from .settings import Settings

MODEL_TYPES = "llama", "mistral", "qwen2", "qwen3"


def llama_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config.json with defaults filled in, and positions, windows and biases as the pass reads them.

    Raises ConfigError, which names the file and the value, for what the pass does not compute.
    """
    read = Settings(config, where)
    read.plain()
    kind = read.word("model_type", MODEL_TYPES)
    for name, value, why in (
        ("hidden_act", "silu", ""),
        ("attention_dropout", 0.0, ", since attention drops nothing here"),
        ("pretraining_tp", 1, ", since no product is cut in slices"),
        ("partial_rotary_factor", 1.0, ", since whole heads turn"),
    ):
        read.only(name, value, why)
    d, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv, D = read.integer("num_key_value_heads", heads), read.integer("head_dim", _head_dim(kind, d, heads))
    if heads % kv:
        read.refuse("num_key_value_heads", f"a divisor of num_attention_heads={heads}", kv)
    if D % 2:
        read.refuse("head_dim", "an even number, since halves of a head turn together", D)
    layers = read.integer("num_hidden_layers")
    return dict(config) | {
        "model_type": kind,
        "hidden_size": d,
        "intermediate_size": read.integer("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": D,
        "vocab_size": read.integer("vocab_size"),
        "rms_norm_eps": read.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": read.flag("tie_word_embeddings", False),
        "attention_bias": read.flag("attention_bias", False) or kind == "qwen2",
        "mlp_bias": read.flag("mlp_bias", False),
        "rope_parameters": _rope(read),
        "windows": _windows(read, kind, layers),
        "padding_row": _padding_row(read),
    }


def _padding_row(read: Settings) -> int | None:
    """The row of the table that no id trains, that of pad_token_id; below 0 it counts from the end."""
    found, rows = read.config.get("pad_token_id"), read.integer("vocab_size")
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        read.refuse("pad_token_id", "an id", found)
    return found % rows if found is not None and -rows <= found < rows else None


def _head_dim(kind: str, d: int, heads: int) -> int:
    return 128 if kind == "qwen3" else d // heads


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the passes read, in the order of a checkpoint.

    >>> sizes = dict(hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3, head_dim=2)
    >>> config = dict(model_type="llama", vocab_size=9, num_key_value_heads=1, **sizes)
    >>> llama_shapes(llama_settings(config, ""))["model.layers.0.self_attn.k_proj.weight"]
    (2, 6)
    """
    d, ff, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    d_q, d_kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    linear = {
        "self_attn.q_proj": (d_q, d),
        "self_attn.k_proj": (d_kv, d),
        "self_attn.v_proj": (d_kv, d),
        "self_attn.o_proj": (d, d_q),
        "mlp.gate_proj": (ff, d),
        "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff),
    }
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if config["model_type"] == "qwen3":
        norms |= {"self_attn.q_norm": D, "self_attn.k_norm": D}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        for module, shape in linear.items():
            found[f"model.layers.{i}.{module}.weight"] = shape
            if _biased(config, module):
                found[f"model.layers.{i}.{module}.bias"] = shape[:1]
        found |= {f"model.layers.{i}.{module}.weight": (n,) for module, n in norms.items()}
    return found | {"model.norm.weight": (d,)}


def _biased(config: Mapping[str, Any], module: str) -> bool:
    """Whether a linear module has a bias: qwen2's o_proj has none beside those of q, k and v."""
    if module.startswith("mlp."):
        return bool(config["mlp_bias"])
    return bool(config["attention_bias"]) and (config["model_type"] != "qwen2" or "o_proj" not in module)


def _windows(read: Settings, kind: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, None where it sees all before it."""
    if kind == "mistral":
        unlimited = read.config.get("sliding_window", 4096) is None
        return (None if unlimited else read.integer("sliding_window", 4096),) * layers
    if kind == "llama" or not read.flag("use_sliding_window", False):
        return (None,) * layers
    if read.config.get("sliding_window", 4096) is None:
        return (None,) * layers
    window, kinds = read.integer("sliding_window", 4096), read.config.get("layer_types")
    if kinds is None:
        first = 0 if read.config.get("max_window_layers") == 0 else read.integer("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in list(known) for kind in kinds):
        read.refuse("layer_types", f"{layers} of {', '.join(known)}", kinds)
    return tuple(known[kind] for kind in kinds)


# ---- rotary positions --------------------------------------------------------------------------------------


def _rope(read: Settings) -> dict[str, Any]:
    """How positions turn: rope_parameters of transformers 5, or rope_theta and rope_scaling before it."""
    said = read.config.get("rope_parameters") or read.config.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        read.refuse("rope_parameters", "an object", said)
    rope = Settings({"rope_theta": read.config.get("rope_theta"), **said}, f"{read.where}: rope_parameters")
    rope.only("partial_rotary_factor", 1.0, ", since whole heads turn")
    kind = said.get("rope_type", said.get("type", "default"))
    found = {**said, "rope_type": kind, "rope_theta": rope.number("rope_theta", 10000.0)}
    if kind in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        found[name] = rope.integer(name, read.config.get("max_position_embeddings"))
    try:
        rope_frequencies(2, theta=found["rope_theta"], scaling=found)
    except ConfigError as refused:
        raise ConfigError(f"{read.where}: {refused}") from None
    return found
