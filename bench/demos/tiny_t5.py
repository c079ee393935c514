"""A T5 that nobody trained: drawn at random, with a tokenizer made of the strings that it is to translate."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import texts

WIDTH, HEADS, KEYS, INNER, LAYERS, BUCKETS, VOCABULARY = 128, 4, 32, 512, 2, 32, 1200
SPECIAL = ("<pad>", "</s>", "<unk>")


def base(cache: Path) -> Path:
    """A directory with config.json, model.safetensors and tokenizer.json, made once."""
    place = cache / "tiny-t5"
    if not place.is_dir():
        part = place.with_name("tiny-t5.part")
        part.mkdir(parents=True, exist_ok=True)
        rows = texts.strings(cache)
        tokenizer = _tokenizer([text for row in rows for text in (row["source"], row["target"])])
        tokenizer.save(str(part / "tokenizer.json"))
        special = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[2]}
        _write(part / "tokenizer_config.json", special)
        _write(part / "config.json", _config(tokenizer.get_vocab_size()))
        _weights(part / "model.safetensors", tokenizer.get_vocab_size())
        part.replace(place)
    return place


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _tokenizer(lines: list[str]) -> Any:
    """Pairs of bytes, merged as often as they occur; an end token behind every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    found = Tokenizer(models.BPE(unk_token=SPECIAL[2]))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(lines, trainer)
    end = SPECIAL[1]
    found.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, SPECIAL.index(end))]
    )
    return found


def _config(vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True,
        "d_model": WIDTH, "d_kv": KEYS, "d_ff": INNER, "num_heads": HEADS, "num_layers": LAYERS,
        "num_decoder_layers": LAYERS, "vocab_size": vocabulary, "feed_forward_proj": "relu",
        "dropout_rate": 0.0,
        "relative_attention_num_buckets": BUCKETS, "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False, "scale_decoder_outputs": False,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip


def _weights(file: Path, vocabulary: int) -> None:
    """Every tensor drawn so that what comes out of a layer is about as large as what goes in."""
    import lorax_np as lx

    rng, wide, found = np.random.default_rng(0), HEADS * KEYS, dict[str, np.ndarray]()

    def draw(name: str, *shape: int, sigma: float) -> None:
        found[f"{name}.weight"] = (sigma * rng.standard_normal(shape)).astype("float32")

    def attention(name: str) -> None:
        draw(f"{name}.q", wide, WIDTH, sigma=(WIDTH * KEYS) ** -0.5)
        for part in "kv":
            draw(f"{name}.{part}", wide, WIDTH, sigma=WIDTH**-0.5)
        draw(f"{name}.o", WIDTH, wide, sigma=wide**-0.5)

    draw("shared", vocabulary, WIDTH, sigma=1.0)
    draw("lm_head", vocabulary, WIDTH, sigma=WIDTH**-0.5)
    for stack in ("encoder", "decoder"):
        found[f"{stack}.final_layer_norm.weight"] = np.ones(WIDTH, "float32")
        for i in range(LAYERS):
            parts = ["SelfAttention", *(["EncDecAttention"] if stack == "decoder" else []), "DenseReluDense"]
            for j, part in enumerate(parts):
                name = f"{stack}.block.{i}.layer.{j}"
                found[f"{name}.layer_norm.weight"] = np.ones(WIDTH, "float32")
                if part == "DenseReluDense":
                    draw(f"{name}.{part}.wi", INNER, WIDTH, sigma=WIDTH**-0.5)
                    draw(f"{name}.{part}.wo", WIDTH, INNER, sigma=INNER**-0.5)
                else:
                    attention(f"{name}.{part}")
        draw(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", BUCKETS, HEADS, sigma=0.1)
    lx.write_safetensors(file, found, {"format": "pt"})
