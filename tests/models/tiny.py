"""Tiny llamas with random weights, all kinds of what trains in them, and batches, for the tests of models."""

from dataclasses import fields, replace
from typing import Any

import numpy as np

import lorax_np as lx
from lorax_np.inject import plan, saved_tensors
from lorax_np.models.llama_config import llama_settings, llama_shapes
from lorax_np.models.load import model_of
from lorax_np.models.records import Batch, Dropout, Model, Trained

CONFIG = {
    "model_type": "llama",
    "hidden_size": 10,
    "intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 13,
    "rms_norm_eps": 1e-5,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DROPOUT = Dropout(seed=7, step=3)
LENGTHS = 5, 1, 8, 3


def weights(seed: int = 0, dtype: str = "float64", head: bool = True, **changed: Any) -> dict[str, np.ndarray]:
    """A checkpoint's tensors: generic, norms and biases too."""
    rng, config = np.random.default_rng(seed), CONFIG | changed
    shapes = llama_shapes(llama_settings(config, ""))
    if head and not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    made = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        made[name] = (1 + 0.2 * values if "norm" in name else 0.4 * values).astype(dtype)
    return made


def model(seed: int = 0, dtype: str = "float64", xp: Any = np, **changed: Any) -> Model:
    return model_of(weights(seed, dtype, **changed), CONFIG | changed, xp=xp)


def start(of: Model, seed: int = 1, **options: Any) -> tuple[dict[str, lx.Site], Trained, dict[str, Any]]:
    """Sites, what trains, moved off its start, and the rows of embeddings that train: of PEFT's options."""
    config = lx.LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": ALL} | options)
    rng = np.random.default_rng(seed)
    _, adapters, sites = lx.inject(of.weights, config, rng)
    like = next(iter(of.weights.values())).dtype

    def moved(value: Any) -> Any:
        if value is None:
            return None
        found = (np.asarray(value) + 0.3 * rng.standard_normal(value.shape)).astype(like)
        found.flags.writeable = False
        return found

    adapters = {
        name: replace(a, **{field.name: moved(getattr(a, field.name)) for field in fields(a)})
        for name, a in adapters.items()
    }
    found = plan(of.weights, config)
    saved = {name: moved(value) for name, value in saved_tensors(of.weights, found).items()}
    return sites, Trained(adapters, saved), found.tokens


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 2, first: int = 0) -> Batch:
    """Sequences of some lengths; some labels are ignored, as the last of each is."""
    rng = np.random.default_rng(seed)
    starts = tuple(int(n) for n in np.cumsum((0, *lengths)))
    ids = rng.integers(0, CONFIG["vocab_size"], starts[-1])
    labels = np.where(rng.random(len(ids)) < 0.2, -100, np.roll(ids, -1))
    for length, stop in zip(lengths, starts[1:], strict=True):
        if length:
            labels[stop - 1] = -100
    for array in (ids, labels):
        array.flags.writeable = False
    return Batch(ids, starts, labels, tuple(range(first, first + len(lengths))))


def split(b: Batch, parts: int) -> list[Batch]:
    """The same sequences in so many micro-batches, in order."""
    S = len(b.index)
    found = []
    for some in np.array_split(np.arange(S), parts):
        i, j = int(some[0]), int(some[-1]) + 1
        begin, stop = b.starts[i], b.starts[j]
        starts = tuple(s - begin for s in b.starts[i : j + 1])
        found.append(Batch(b.ids[begin:stop], starts, b.labels[begin:stop], b.index[i:j]))
    return found


def tensors(trained: Trained) -> dict[tuple[str, str], Any]:
    """All arrays that train, by name and part."""
    found = {
        (name, field.name): getattr(adapter, field.name)
        for name, adapter in trained.adapters.items()
        for field in fields(adapter)
    }
    found |= {(name, ""): value for name, value in trained.saved.items()}
    return {key: value for key, value in found.items() if value is not None}


def changed(trained: Trained, key: tuple[str, str], value: Any) -> Trained:
    """The same with one array replaced."""
    name, part = key
    if not part:
        return Trained(trained.adapters, {**trained.saved, name: value})
    return Trained({**trained.adapters, name: replace(trained.adapters[name], **{part: value})}, trained.saved)
