"""Checkpoints and adapter directories made up for the tests: every part generic, B and bB not zero, α not r."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from lorax_np.io.writer import write_safetensors

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PREFIX = "base_model.model."


def weights(rng, dtype="bfloat16", *, layers=2, d=24, ff=40, vocab=56, head=True, bias=True):
    """A small decoder's tensors by name; the widths are odd multiples of 8, so that blocks have ends."""
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (d, d) for p in "qkvo"}
        shapes |= {f"{at}mlp.up_proj.weight": (ff, d), f"{at}mlp.down_proj.weight": (d, ff)}
        shapes |= {f"{at}input_layernorm.weight": (d,)}
        if bias:
            shapes |= {f"{at}self_attn.{p}_proj.bias": (d,) for p in "qkvo"}
            shapes |= {f"{at}mlp.up_proj.bias": (ff,), f"{at}mlp.down_proj.bias": (d,)}
    if head:
        shapes["lm_head.weight"] = (vocab, d)
    found = {name: (rng.standard_normal(shape) * 0.3).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    found["model.rotary.ids"] = np.arange(12).reshape(3, 4)  # no floats
    return found


def write_checkpoint(folder, tensors, *, shards=1, config=None):
    """Write tensors into one file or several, beside the files that a model's directory has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "torch_dtype": "x", **(config or {})})
    )
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        part = {name: tensors[name] for name in names if where[name] == file}
        write_safetensors(folder / file, part, {"format": "pt"})
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"  # as transformers writes it
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def factors(rng, shape, r, *, dtype=np.float32, dora=False, bB=False, norms=None):
    """A, B and more for a linear weight (d_out, d_in), under the ends of PEFT's keys."""
    d_out, d_in = shape
    found = {
        "lora_A.weight": (rng.standard_normal((r, d_in)) * 0.4).astype(dtype),
        "lora_B.weight": (rng.standard_normal((d_out, r)) * 0.4).astype(dtype),
    }
    if dora:
        found["lora_magnitude_vector"] = rng.uniform(0.5, 2, d_out).astype(dtype)
    if bB:
        found["lora_B.bias"] = rng.standard_normal(d_out).astype(dtype)
    return found


def write_adapter(folder, parts, **config):
    """Write an adapter directory: parts maps sites, or plain names of saved tensors, to their tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for site, found in parts.items():
        if isinstance(found, dict):
            tensors |= {f"{PREFIX}{site}.{end}": array for end, array in found.items()}
        else:
            tensors[PREFIX + site] = found
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    plain = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": "all-linear", **config}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True))
    return folder


def read(folder):
    """Every tensor of a written checkpoint, as copies."""
    from lorax_np.io.checkpoint import open_checkpoint

    return {name: np.array(array) for name, array in open_checkpoint(Path(folder)).items()}


def content(folder):
    """Every file's bytes by name, those in folders too."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
