"""Adapter directories for the tests of reading: made with NumPy alone, of every kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lorax_np.io.writer import write_safetensors

PREFIX = "base_model.model."


def normals(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def linear(site: str, r: int = 2, d_in: int = 5, d_out: int = 4, **also: Any) -> dict[str, np.ndarray]:
    parts = {"lora_A.weight": normals(r, d_in), "lora_B.weight": normals(d_out, r, seed=1), **also}
    return {f"{PREFIX}{site}.{part}": array for part, array in parts.items()}


def embedding(site: str, r: int = 2, vocab: int = 7, dim: int = 5) -> dict[str, np.ndarray]:
    parts = {"lora_embedding_A": normals(r, vocab), "lora_embedding_B": normals(dim, r, seed=1)}
    return {f"{PREFIX}{site}.{part}": array for part, array in parts.items()}


def conv(site: str, r: int = 2, d_in: int = 3, d_out: int = 4, kernel: tuple[int, ...] = (3, 2)):
    return linear(site) | {
        f"{PREFIX}{site}.lora_A.weight": normals(r, d_in, *kernel),
        f"{PREFIX}{site}.lora_B.weight": normals(d_out, r, *[1] * len(kernel)),
    }


def experts(module: str, r: int = 2, E: int = 3, dim: int = 5, hidden: int = 4) -> dict[str, np.ndarray]:
    """gate_up_proj (E, 2·hidden, dim) deepest, down_proj (E, dim, hidden) around it."""
    return {
        f"{PREFIX}{module}.base_layer.lora_A.weight": normals(E * r, dim),
        f"{PREFIX}{module}.base_layer.lora_B.weight": normals(2 * hidden, r * E),
        f"{PREFIX}{module}.lora_A.weight": normals(E * r, hidden),
        f"{PREFIX}{module}.lora_B.weight": normals(dim, r * E),
    }


# name -> (what differs in the config, the tensors)
SAMPLES: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "linear": (
        {"target_modules": ["q", "v"]},
        linear("layers.0.q") | linear("layers.0.v", d_out=3) | linear("layers.1.q"),
    ),
    "dora": (
        {"target_modules": ["q"], "use_dora": True},
        linear("q", lora_magnitude_vector=np.arange(1, 5, dtype="float32")),
    ),
    "embedding": (
        {"target_modules": ["embed", "q"]},
        embedding("embed") | linear("q") | {f"{PREFIX}embed.base_layer.weight": normals(7, 5)},
    ),
    "conv": ({"target_modules": ["c"]}, conv("c")),
    "dora of a convolution": (
        {"target_modules": ["c"], "use_dora": True},
        conv("c") | {f"{PREFIX}c.lora_magnitude_vector": normals(1, 4, 1, 1)},
    ),
    "biases": (
        {"target_modules": ["q"], "bias": "all", "lora_bias": True},
        linear("q", **{"lora_B.bias": normals(4)})
        | {f"{PREFIX}q.base_layer.bias": normals(4, seed=2), f"{PREFIX}norm.bias": normals(6)},
    ),
    "experts": (
        {"target_modules": [], "target_parameters": ["e.gate_up_proj", "e.down_proj"]},
        experts("layers.0.e"),
    ),
    "attention": (
        {"target_modules": ["a"]},
        linear("a", d_in=4, d_out=12) | linear("a.base_layer.out_proj", d_in=4, d_out=4),
    ),
    "saved": (
        {
            "target_modules": r".*\.(q|v)",
            "modules_to_save": ["head"],
            "trainable_token_indices": {"embed": [1, 4]},
            "rank_pattern": {"0.q": 3},
            "alpha_pattern": {r"layers\.\d+\.v": 5.0},
        },
        linear("layers.0.q", r=3)
        | linear("layers.0.v")
        | {
            f"{PREFIX}head.weight": normals(3, 5),
            f"{PREFIX}embed.token_adapter.trainable_tokens_delta": normals(2, 5),
        },
    ),
    "half": (
        {"target_modules": ["q"], "use_rslora": True},
        {name: array.astype("float16") for name, array in linear("q").items()},
    ),
}


def config_of(said: dict[str, Any]) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 8, **said}


def write(folder: Path, said: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Write a directory with the library's own writer, and without its reader."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config_of(said), indent=2, sort_keys=True))
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def sample(folder: Path, name: str) -> Path:
    return write(folder, *SAMPLES[name])
