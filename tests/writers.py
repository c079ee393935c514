"""Tiny models that write, in memory and as directories with a tokenizer: what the tests of writing share."""

import json
from dataclasses import fields, replace

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers

import lorax_np as lx
from lorax_np.inject import inject
from lorax_np.models.families import FAMILIES, MODEL_TYPES
from lorax_np.models.load import model_of
from lorax_np.models.records import Trained

ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = len(ENDS) + len(LETTERS) + 1  # one row more than the tokenizer has ids
ROPE = {"rope_theta": 100.0, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 96}
SIZES = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
LLAMA = {"model_type": "llama", "head_dim": 4, **SIZES, **ROPE}
CONFIGS = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama, yarn": LLAMA
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {"model_type": "mistral", "head_dim": 4, "sliding_window": 3, **SIZES, **ROPE},
    "qwen2": {"model_type": "qwen2", **SIZES, **ROPE},
    "qwen3": {"model_type": "qwen3", "head_dim": 6, **SIZES, **ROPE},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 12,
        "n_head": 3,
        "n_layer": 2,
        "n_inner": 20,
        "n_positions": 96,
        "vocab_size": VOCAB,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
}
BERT = {
    "model_type": "bert",
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 1,
    "intermediate_size": 20,
    "vocab_size": VOCAB,
    "max_position_embeddings": 96,
    "type_vocab_size": 2,
}


def weights(config, seed=0, dtype="float64", task="CAUSAL_LM"):
    """Tensors of order one where they are used; norms and biases are generic too."""
    family, rng, found = FAMILIES[MODEL_TYPES[config["model_type"]]], np.random.default_rng(seed), {}
    settings = family.settings(config, "config.json")
    shapes = family.shapes(settings)
    if not settings.get("tie_word_embeddings") or task != "CAUSAL_LM":
        shapes = shapes | family.heads[task].shapes(settings, 3)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = 0.3 * values + name.endswith(".weight")
        found[name] = (values / np.sqrt(shape[-1] if len(shape) == 2 else 1)).astype(dtype)
        found[name].flags.writeable = False
    return found


def model(kind="llama", seed=0, dtype="float64"):
    return model_of(weights(CONFIGS[kind], seed, dtype), CONFIGS[kind], path="tiny")


def adapted(base, seed=1, targets="all-linear", **options):
    """Adapters at every linear layer, all their parts generic; sites; and the config."""
    config = lx.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    kind, rng = base.config["model_type"], np.random.default_rng(seed)
    _, adapters, sites = inject(base.weights, config, rng, model_type=kind)
    moved = {}
    for name, adapter in adapters.items():
        parts = {field.name: getattr(adapter, field.name) for field in fields(adapter)}
        new = {
            part: (value + 0.3 * rng.standard_normal(value.shape)).astype(value.dtype)
            for part, value in parts.items()
            if value is not None
        }
        moved[name] = replace(adapter, **new)
    return Trained(moved, {}), sites, config


def tokenizer(folder, template=None):
    """Byte-level ids without a merge, so that every id is a letter and characters past ASCII take several."""
    vocabulary = {token: i for i, token in enumerate([*ENDS, *LETTERS])}
    made = hf.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(ENDS))
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def directory(folder, config=LLAMA, *, seed=0, template=None, task="CAUSAL_LM", **more):
    """A model's directory: config.json, weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    lx.write_safetensors(folder / "model.safetensors", weights(config, seed, "float32", task))
    (folder / "config.json").write_text(json.dumps({**config, **more}), encoding="utf-8")
    tokenizer(folder, template)
    return folder


def adapter_directory(folder, base, seed=1, **options):
    """An adapter of a model's directory, as PEFT lays it out."""
    found, _, config = adapted(base, seed, **options)
    lx.save_adapter(folder, found.adapters, config)
    return folder
