"""What a GPT-2's config.json means, and the tensors there have to be.

Source: transformers 5.24.0, the configuration of gpt2.
"""

from collections.abc import Mapping
from typing import Any

from .parts import ACTIVATIONS
from .settings import Settings

NAMES = {  # of transformers' other configurations, which this one answers to as well
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def gpt2_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config.json with defaults filled in.

    Raises ConfigError, which names the file and the value, for what the pass does not compute: cross attention,
    an activation that is not known. reorder_and_upcast_attn changes only how float16 rounds.
    """
    read = Settings({NAMES.get(name, name): value for name, value in config.items()}, where)
    read.plain()
    kind = read.word("model_type", ("gpt2",))
    read.only("add_cross_attention", False)
    d, heads = read.integer("n_embd", 768), read.integer("n_head", 12)
    if d % heads:
        read.refuse("n_embd", f"a multiple of n_head={heads}", d)
    return dict(read.config) | {
        "model_type": kind,
        "n_embd": d,
        "hidden_size": d,
        "n_head": heads,
        "n_layer": read.integer("n_layer", 12),
        "n_inner": read.integer("n_inner", 4 * d),
        "n_positions": read.integer("n_positions", 1024),
        "vocab_size": read.integer("vocab_size", 50257),
        "activation_function": read.word("activation_function", tuple(ACTIVATIONS), "gelu_new"),
        "layer_norm_epsilon": read.number("layer_norm_epsilon", 1e-5),
        "scale_attn_weights": read.flag("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx": read.flag("scale_attn_by_inverse_layer_idx", False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", True),
    }


def gpt2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the passes read, in the order of a checkpoint; linear weights lie (d_in, d_out).

    >>> found = gpt2_shapes(gpt2_settings(dict(model_type="gpt2", n_embd=6, n_head=2, n_layer=1), ""))
    >>> len(found), found["transformer.h.0.attn.c_attn.weight"]
    (16, (6, 18))
    """
    d, ff = config["n_embd"], config["n_inner"]
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], d),
        "transformer.wpe.weight": (config["n_positions"], d),
    }
    for i in range(config["n_layer"]):
        for module, shape in {
            "ln_1": (d,),
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "ln_2": (d,),
            "mlp.c_fc": (d, ff),
            "mlp.c_proj": (ff, d),
        }.items():
            name = f"transformer.h.{i}.{module}"
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return found | {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
