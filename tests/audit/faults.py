"""Faults planted into sound adapters, each with the id that the auditor has to give it."""

from typing import Any

import numpy as np
from adapters import SITES, Config, Tensors, conv, embedding, experts, linear

SITE = next(iter(SITES))
KEY = f"base_model.model.{SITE}"
A, B, M = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight", f"{KEY}.lora_magnitude_vector"

Planted = tuple[str, Any, Any]  # the id, the config, the tensors


def _config(id: str, seed: int, change: dict[str, Any], **fields: Any) -> Planted:
    config, tensors = linear(seed, **fields)
    return id, config | change, tensors


def _tensors(id: str, seed: int, change: dict[str, Any], **fields: Any) -> Planted:
    """change: key -> array, or None for a key that goes."""
    config, tensors = linear(seed, **fields)
    tensors = {**tensors, **change}
    return id, config, {name: value for name, value in tensors.items() if value is not None}


def _renamed(id: str, seed: int, rename: Any, **fields: Any) -> Planted:
    config, tensors = linear(seed, **fields)
    return id, config, {rename(name): value for name, value in tensors.items()}


def _zero(tensors: Tensors, part: str, sites: int | None = None) -> Tensors:
    names = [name for name in tensors if part in name][:sites]
    return {name: np.zeros_like(value) if name in names else value for name, value in tensors.items()}


def _swapped_experts(seed: int, factor: str, r: int = 4, count: int = 6) -> Planted:
    config, tensors = experts(seed, count, r)
    for name, value in tensors.items():
        if factor == "B" and "lora_B" in name:
            tensors[name] = value.reshape(len(value), r, count).transpose(0, 2, 1).reshape(len(value), -1)
        if factor == "A" and "lora_A" in name:
            tensors[name] = value.reshape(count, r, -1).transpose(1, 0, 2).reshape(count * r, -1)
    return "experts", config, tensors


def faults() -> dict[str, Planted]:
    """Every planted fault, by what was done."""
    config, tensors = linear(0)
    dora = linear(1, use_dora=True)[1]
    value, rng = tensors[A], np.random.default_rng(3)
    nan = value.copy()
    nan[0, 0] = np.nan
    zero_m = dora[M].copy()
    zero_m[3] = 0
    alphas = {f"{site}.alpha": np.array(6, np.float32) for site in SITES}
    found = {
        "B never trained": ("identity", config, _zero(tensors, "lora_B")),
        "A zeroed": ("identity", config, _zero(tensors, "lora_A")),
        "one site not trained": ("identity-site", config, _zero(tensors, "lora_B", 1)),
        "an embedding not trained": ("identity", embedding(0)[0], _zero(embedding(0)[1], "embedding_A")),
        "a conv not trained": ("identity", conv(0)[0], _zero(conv(0)[1], "lora_B")),
        "experts not trained": ("identity", experts(0)[0], _zero(experts(0)[1], "lora_B")),
        "rslora misspelt": _config("ignored-field", 2, {"use_rs_lora": True}),
        "dora misspelt": _config("ignored-field", 3, {"use_Dora": True}),
        "an unknown field": _config("unknown-field", 4, {"frobnicate": 3}),
        "a variant of PEFT's alone": _config("exotic", 5, {"use_qalora": True}),
        "a scale that ignores rslora": _config("rslora-ignored", 6, {"scale": 1.5}, use_rslora=True),
        "alphas that ignore rslora": _tensors("rslora-ignored", 7, alphas, use_rslora=True),
        "a scale of its own": _config("scale", 8, {"lora_scale": 20.0}),
        "alphas of their own": _tensors("scale", 9, {k: v * 3 for k, v in alphas.items()}),
        "r of another run": _config("rank", 10, {"r": 5}),
        "rank_pattern forgotten": _config("rank", 11, {"rank_pattern": {}}, rank_pattern={"up_proj": 2}),
        "rank_pattern of another model": _config("pattern", 12, {"rank_pattern": {"w1": 2}}),
        "alpha_pattern of another model": _config("pattern", 13, {"alpha_pattern": {"k_proj": 2}}),
        "r of 0": _config("config", 14, {"r": 0}),
        "r as text": _config("config", 15, {"r": "4"}),
        "alpha NaN": _config("config", 16, {"lora_alpha": float("nan")}),
        "bias misspelt": _config("config", 17, {"bias": "lora-only"}),
        "a target misspelt": _config("target", 18, {"target_modules": ["q_proj", "up_proj", "q_prof"]}),
        "a site that is not a target": _config("untargeted", 19, {"target_modules": ["q_proj"]}),
        "a regex that misses sites": _config("untargeted", 20, {"target_modules": r"model\.layers\.0\..*"}),
        "A transposed": _tensors("transposed", 21, {A: value.T, B: tensors[B].T}),
        "square and transposed": _tensors(
            "transposed",
            22,
            {A: rng.standard_normal((24, 4)).astype("f4"), B: rng.standard_normal((4, 24)).astype("f4")},
        ),
        "B without A": _tensors("incomplete", 23, {A: None}),
        "A without B": _tensors("incomplete", 24, {B: None}),
        "B of another rank": _tensors("shape", 25, {B: np.ones((36, 3), np.float32)}),
        "a vector for A": _tensors("shape", 26, {A: np.ones(24, np.float32)}),
        "NaN in A": _tensors("not-finite", 27, {A: nan}),
        "infinity in B": _tensors("not-finite", 28, {B: np.full_like(tensors[B], np.inf)}),
        "integers": _tensors("not-floating", 29, {A: np.ones((4, 24), np.int8)}),
        "A in float16 alone": _tensors("mixed-dtypes", 30, {A: value.astype(np.float16)}),
        "the adapter's name in keys": _renamed(
            "adapter-name", 31, lambda k: k.replace(".weight", ".default.weight")
        ),
        "no prefix": _renamed("prefix", 32, lambda k: k.removeprefix("base_model.model.")),
        "the old magnitude": _renamed(
            "old-magnitude", 33, lambda k: k.replace("_vector", "_vector.weight"), use_dora=True
        ),
        "no magnitude": _config("no-magnitude", 34, {"use_dora": True}),
        "a magnitude too many": _config("stray-magnitude", 35, {"use_dora": False}, use_dora=True),
        "a magnitude of zero": _tensors("zero-magnitude", 36, {M: zero_m}, use_dora=True),
        "a bias too many": _config("stray-bias", 37, {"lora_bias": False}, lora_bias=True),
        "a bias missing": _config("stray-bias", 38, {"lora_bias": True}),
        "base biases with none": _config("unexpected", 39, {"bias": "none"}, bias="all"),
        "no base biases with all": _config("no-bias", 40, {"bias": "all"}),
        "a stray tensor": _tensors("unexpected", 41, {"base_model.model.extra": np.ones(3, np.float32)}),
        "a head that is not there": _config("saved", 42, {"modules_to_save": ["lm_head"]}),
        "NaN in a saved head": _tensors(
            "not-finite",
            43,
            {"base_model.model.lm_head.weight": np.full((5, 24), np.nan, np.float32)},
            modules_to_save=["lm_head"],
        ),
        "pissa_niter reloaded": _config("start", 44, {"init_lora_weights": "pissa_niter_16"}),
        "corda": _config("start", 45, {"init_lora_weights": "corda"}),
        "lora_ga": _config("start", 46, {"init_lora_weights": "lora_ga"}),
        "pissa": _config("start-base", 47, {"init_lora_weights": "pissa"}),
        "olora": _config("start-base", 48, {"init_lora_weights": "olora"}),
        "no tensor at all": ("empty", config, {"something.else": np.ones(2, np.float32)}),
        "bytes cut off": ("unreadable", config, b"\x10\x00\x00\x00\x00\x00\x00\x00{}"),
    }
    found |= {
        f"experts of {name} in the other order, {i}": _swapped_experts(i, name)
        for name in "AB"
        for i in range(3)
    }
    return found


def with_base() -> dict[str, tuple[str, Config, Tensors, Tensors, Config]]:
    """Faults that only the base shows: the id, config, tensors, weights, and the base's own settings."""
    from adapters import base

    weights = base()
    name = f"{SITE}.weight"
    config, tensors = linear(70)
    dora, with_m = linear(71, use_dora=True)
    dead = {**weights, name: weights[name].copy()}
    dead[name][5] = 0
    silent = {**with_m, B: with_m[B].copy()}
    silent[B][5] = 0
    tied = embedding(3)
    return {
        "another base's names": (
            "no-site",
            config,
            tensors,
            {k.replace("q_proj", "query"): v for k, v in weights.items()},
            {},
        ),
        "another base's shapes": (
            "base-shape",
            config,
            tensors,
            {**weights, name: np.ones((36, 25), np.float32)},
            {},
        ),
        "transposed base": ("base-shape", config, tensors, {k: v.T for k, v in weights.items()}, {}),
        "a zero row under DoRA": ("zero-row", dora, silent, dead, {}),
        "magnitudes of another base": (
            "far-magnitude",
            dora,
            with_m,
            {k: v * 3 for k, v in weights.items()},
            {},
        ),
        "an update without measure": ("large", config, {k: v * 30 for k, v in tensors.items()}, weights, {}),
        "an update that bfloat16 loses": (
            "merge-loss",
            config,
            {k: v / 40 for k, v in tensors.items()},
            weights,
            {},
        ),
        "a tied embedding": (
            "tied",
            *tied,
            {"model.embed_tokens.weight": np.full((50, 24), 0.5, np.float32)},
            {"tie_word_embeddings": True},
        ),
    }
