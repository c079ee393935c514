"""Adapter directories for the auditor: sound ones, and the same with one fault each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import lorax_np as lx

Tensors = dict[str, np.ndarray]
Config = dict[str, Any]

LAYERS, D, WIDE = 2, 24, 36
SITES = {
    f"model.layers.{i}.{name}": (WIDE, D) for i in range(LAYERS) for name in ("self_attn.q_proj", "mlp.up_proj")
}


def linear(seed: int, r: int = 4, **fields: Any) -> tuple[Config, Tensors]:
    """A sound adapter over four linear sites, trained: every tensor random, no update large."""
    rng = np.random.default_rng(seed)
    names = sorted({site.rpartition(".")[2] for site in SITES})
    config = lx.LoraConfig(**({"r": r, "lora_alpha": 6, "target_modules": names} | fields))
    tensors = {}
    for site, (d_out, d_in) in SITES.items():
        rank = (config.rank_pattern or {}).get(site.rpartition(".")[2], r)
        key = f"base_model.model.{site}"
        tensors[f"{key}.lora_A.weight"] = normal(rng, rank, d_in)
        tensors[f"{key}.lora_B.weight"] = normal(rng, d_out, rank)
        if config.use_dora:
            tensors[f"{key}.lora_magnitude_vector"] = row_norms(site) * rng.uniform(0.9, 1.1, d_out).astype(
                np.float32
            )
        if config.lora_bias:
            tensors[f"{key}.lora_B.bias"] = normal(rng, d_out)
        if config.bias != "none":
            tensors[f"{key}.base_layer.bias"] = normal(rng, d_out)
    return config.to_dict(), tensors


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * 0.05).astype(np.float32)


def base() -> Tensors:
    """The weights under the linear sites, in float32 with numbers that bfloat16 has."""
    rng = np.random.default_rng(99)
    weights = {f"{site}.weight": rng.standard_normal(shape) for site, shape in SITES.items()}
    return {name: np.round(W * 16).astype(np.float32) / 16 for name, W in weights.items()}


def row_norms(site: str) -> np.ndarray:
    return np.linalg.norm(base()[f"{site}.weight"], axis=1).astype(np.float32)


def experts(seed: int, count: int = 6, r: int = 4) -> tuple[Config, Tensors]:
    """A sound adapter over the fused parameter of a mixture, whose experts saw unequal numbers of tokens."""
    rng = np.random.default_rng(seed)
    config = lx.LoraConfig(r=r, lora_alpha=6, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    tensors = {}
    for i in range(LAYERS):
        key = f"base_model.model.model.layers.{i}.mlp.experts"
        busy = np.exp(rng.normal(0, 1.0, count))[:, None, None]
        A = (busy * rng.standard_normal((count, r, D))).reshape(count * r, D)
        B = (busy * rng.standard_normal((count, r, WIDE))).transpose(2, 1, 0).reshape(WIDE, r * count)
        tensors[f"{key}.lora_A.weight"] = (A * 0.05).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = (B * 0.05).astype(np.float32)
    return config.to_dict(), tensors


def embedding(seed: int) -> tuple[Config, Tensors]:
    rng = np.random.default_rng(seed)
    key = "base_model.model.model.embed_tokens"
    tensors = {f"{key}.lora_embedding_A": normal(rng, 4, 50), f"{key}.lora_embedding_B": normal(rng, D, 4)}
    return lx.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens"]).to_dict(), tensors


def conv(seed: int, groups: int = 1) -> tuple[Config, Tensors]:
    rng = np.random.default_rng(seed)
    key = "base_model.model.features.conv1"
    tensors = {
        f"{key}.lora_A.weight": normal(rng, 4, 6, 3, 3),
        f"{key}.lora_B.weight": normal(rng, 8, 4 // groups, 1, 1),
    }
    return lx.LoraConfig(r=4, lora_alpha=6, target_modules=["conv1"]).to_dict(), tensors


def attention(seed: int, r: int = 4, **fields: Any) -> tuple[Config, Tensors]:
    """A sound adapter of an attention module with q, k and v in one parameter, beside a linear site."""
    rng = np.random.default_rng(seed)
    config = lx.LoraConfig(**({"r": r, "lora_alpha": 6, "target_modules": ["attn", "up_proj"]} | fields))
    key, rank = "base_model.model.attn", (config.rank_pattern or {}).get("attn", r)
    return config.to_dict(), {
        f"{key}.lora_A.weight": normal(rng, rank, D),
        f"{key}.lora_B.weight": normal(rng, 3 * D, rank),
        f"{key}.base_layer.out_proj.lora_A.weight": normal(rng, rank, D),
        f"{key}.base_layer.out_proj.lora_B.weight": normal(rng, D, rank),
        "base_model.model.up_proj.lora_A.weight": normal(rng, r, D),
        "base_model.model.up_proj.lora_B.weight": normal(rng, WIDE, r),
    }


def write(folder: Path, config: Config | str, tensors: Tensors | bytes | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    path = folder / "adapter_model.safetensors"
    if isinstance(tensors, bytes):
        path.write_bytes(tensors)
    elif tensors is not None:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, {"format": "pt"}
        )
    return folder


# ---- sound ones --------------------------------------------------------------------------------------------

FIELDS: list[dict[str, Any]] = [
    {},
    {"r": 1},
    {"r": 7, "lora_alpha": 3.5},
    {"lora_alpha": -2},
    {"use_rslora": True},
    {"use_rslora": True, "r": 9},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"lora_bias": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"lora_dropout": 0.1},
    {"rank_pattern": {"up_proj": 2}},
    {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 12}},
    {"target_modules": r".*\.(q_proj|up_proj)"},
    {"target_modules": "all-linear"},
    {"target_modules": None},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": False},
    {"init_lora_weights": "orthogonal"},
    {"task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": "0.21.2"},
    {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
    {"base_model_name_or_path": "nobody/nothing", "revision": "main"},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
]


def sound() -> dict[str, tuple[Config, Tensors]]:
    """Adapters without a fault, by a name."""
    found = {f"linear {i}: {fields}": linear(i, **fields) for i, fields in enumerate(FIELDS)}
    for dtype in ("float16", "float64", "bfloat16"):
        config, tensors = linear(50)
        if dtype == "bfloat16":
            import ml_dtypes

            found[dtype] = config, {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
        else:
            found[dtype] = config, {name: value.astype(dtype) for name, value in tensors.items()}
    found |= {f"experts {i}": experts(i) for i in range(6)} | {"few experts": experts(9, count=2, r=8)}
    found |= {"one expert": experts(10, count=1)}
    found |= {f"embedding {i}": embedding(i) for i in range(2)}
    found |= {"attention": attention(1), "attention's rank": attention(2, rank_pattern={"attn": 2})}
    found |= {"conv": conv(1), "grouped conv": conv(2, groups=2)}
    config, tensors = linear(60, modules_to_save=["lm_head"])
    found["a saved head"] = config, tensors | {"base_model.model.lm_head.weight": np.ones((50, D), np.float32)}
    config, tensors = linear(61)
    config["a_newer_field"] = None
    found["a newer field that says nothing"] = config, tensors
    config, tensors = linear(62, use_rslora=True)
    alphas = {f"{site}.alpha": np.float32(6 / np.sqrt(4) * 4) for site in SITES}
    found["alphas that agree"] = config, tensors | {k: np.array(v) for k, v in alphas.items()}
    return found
