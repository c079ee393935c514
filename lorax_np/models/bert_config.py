"""What the config.json of a BERT or a RoBERTa means, and the tensors there have to be.

Source: transformers 5.24.0, the configurations of bert, roberta and xlm-roberta.
"""

from collections.abc import Mapping
from typing import Any

from .parts import ACTIVATIONS
from .settings import Settings

MODEL_TYPES = "bert", "roberta", "xlm-roberta"


def bert_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config.json with defaults filled in, and the position of a sequence's first token.

    Raises ConfigError, which names the file and the value, for what the pass does not compute: a decoder, cross
    attention, relative positions, an activation that is not known. Dropout is no such value: it is not applied.
    """
    read = Settings(config, where)
    read.plain()
    kind = read.word("model_type", MODEL_TYPES)
    read.only("is_decoder", False, ", since tokens look both ways")
    read.only("add_cross_attention", False)
    read.only("position_embedding_type", "absolute")
    d, heads = read.integer("hidden_size", 768), read.integer("num_attention_heads", 12)
    if d % heads:
        read.refuse("hidden_size", f"a multiple of num_attention_heads={heads}", d)
    roberta, padding = kind != "bert", config.get("pad_token_id", 0 if kind == "bert" else 1)
    if isinstance(padding, bool) or not isinstance(padding, int | None) or (padding is None and roberta):
        read.refuse("pad_token_id", "an id", padding)
    return dict(config) | {
        "model_type": kind,
        "hidden_size": d,
        "num_attention_heads": heads,
        "num_hidden_layers": read.integer("num_hidden_layers", 12),
        "intermediate_size": read.integer("intermediate_size", 3072),
        "vocab_size": read.integer("vocab_size", 30522 if kind == "bert" else 50265),
        "max_position_embeddings": read.integer("max_position_embeddings", 512),
        "type_vocab_size": read.integer("type_vocab_size", 2),
        "hidden_act": read.word("hidden_act", tuple(ACTIVATIONS), "gelu"),
        "layer_norm_eps": read.number("layer_norm_eps", 1e-12),
        "pad_token_id": padding,
        "first_position": padding + 1 if roberta and padding is not None else 0,
    }


def bert_prefix(config: Mapping[str, Any]) -> str:
    """What stands before the names of the encoder in a model with a head."""
    return "bert." if config["model_type"] == "bert" else "roberta."


def modern_name(name: str) -> str:
    """A tensor's name of today, of that in the first checkpoints.

    >>> modern_name("bert.embeddings.LayerNorm.gamma"), modern_name("bert.embeddings.LayerNorm.beta")
    ('bert.embeddings.LayerNorm.weight', 'bert.embeddings.LayerNorm.bias')
    """
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        if name.endswith(f"LayerNorm.{old}"):
            return name.removesuffix(old) + new
    return name


def bert_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the encoder's passes read, in the order of a checkpoint.

    >>> sizes = dict(hidden_size=6, num_attention_heads=3, num_hidden_layers=1, intermediate_size=8)
    >>> found = bert_shapes(bert_settings(dict(model_type="bert", **sizes), ""))
    >>> len(found), found["bert.encoder.layer.0.intermediate.dense.weight"]
    (21, (8, 6))
    """
    d, ff, prefix = config["hidden_size"], config["intermediate_size"], bert_prefix(config)
    found: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.word_embeddings.weight": (config["vocab_size"], d),
        f"{prefix}embeddings.position_embeddings.weight": (config["max_position_embeddings"], d),
        f"{prefix}embeddings.token_type_embeddings.weight": (config["type_vocab_size"], d),
    }
    modules: dict[str, tuple[int, ...]] = {"embeddings.LayerNorm": (d,)}
    for i in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{i}"
        modules |= {f"{block}.attention.self.{part}": (d, d) for part in ("query", "key", "value")}
        modules |= {f"{block}.attention.output.dense": (d, d), f"{block}.attention.output.LayerNorm": (d,)}
        modules |= {f"{block}.intermediate.dense": (ff, d), f"{block}.output.dense": (d, ff)}
        modules |= {f"{block}.output.LayerNorm": (d,)}
    for module, shape in modules.items():
        found |= {f"{prefix}{module}.weight": shape, f"{prefix}{module}.bias": shape[:1]}
    return found
