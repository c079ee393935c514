"""A small llama with generic weights, rows to train it on, and a run: what the tests of training share."""

import numpy as np

import lorax_np as lx
from lorax_np.models.load import model_of
from lorax_np.text.examples import Example, Tokens
from lorax_np.train import TrainConfig

CONFIG = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
}
TARGETS = "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"


def weights(seed=0, dtype="float32"):
    """Every tensor of the model, of order one where it is used."""
    rng, c = np.random.default_rng(seed), CONFIG
    d, ff, D = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    dq, dk = D * c["num_attention_heads"], D * c["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        own = {"q": (dq, d), "k": (dk, d), "v": (dk, d), "o": (d, dq)}
        found |= {f"{at}.self_attn.{n}_proj.weight": shape for n, shape in own.items()}
        own = {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}
        found |= {f"{at}.mlp.{n}_proj.weight": shape for n, shape in own.items()}
        found |= {f"{at}.{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
    return {
        n: (rng.standard_normal(s) / np.sqrt(s[-1]) + (len(s) == 1)).astype(dtype) for n, s in found.items()
    }


def model(seed=0, dtype="float32"):
    return model_of(weights(seed, dtype), CONFIG, path="tiny")


def lora(**more):
    given = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": list(TARGETS),
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
    }
    return lx.LoraConfig(**{**given, **more})


def examples(count=24, seed=1, longest=9):
    """Sequences of unequal lengths that can be learned: each token is the one before and 3, or 5."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        T = int(rng.integers(2, longest + 1))
        ids = (rng.integers(23) + int(rng.choice([3, 5])) * np.arange(T)) % 23
        labels = np.append(ids[1:], -100)
        labels[: int(rng.integers(0, T - 1))] = -100
        kept = int((labels != -100).sum())
        found.append(
            Example(f"rows.jsonl:{i + 1}", (Tokens(ids.astype(np.int64)),), labels, kept=kept, nbytes=2 * kept)
        )
    return tuple(found)


def started(seed=0, dtype="float32", **more):
    """A model, its adapters with B of order one, its sites, and the config they were made by."""
    base, config = model(0, dtype), lora(**more)
    _, adapters, sites = lx.inject(base.weights, config, lx.torch_generator(seed))
    rng = np.random.default_rng(seed + 100)
    draw = {n: 0.3 * rng.standard_normal(a.B.shape).astype(a.B.dtype) for n, a in adapters.items()}
    from dataclasses import replace

    return base, {n: replace(a, B=draw[n]) for n, a in adapters.items()}, sites, config


def settings(**more):
    given = {"iters": 6, "batch_size": 2, "grad_accumulation_steps": 2, "learning_rate": 0.01, "seed": 3}
    given |= {"steps_per_report": 2, "save_every": 2, "eval_rows": 5, "engine": "reference"}
    return TrainConfig(**{**given, **more})
