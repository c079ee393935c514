"""torchtune: adapter_model.safetensors in its own names, and adapter_config.json.  Read in torchtune 0.6.1.

A module has lora_a.weight : (r, d_in), lora_b.weight : (d_out, r), and magnitude : (d_out,) with DoRA; names
are those of torchtune's Llama, and in the families that it permutes, the rows of Q and K stand in ggml's order,
of the weights and so of B and of the magnitude. One r and one α hold for all.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...backend import HostArray, to_host
from ..checkpoint import read_json
from ..gguf_names import heads_of, to_ggml_rows, to_hf_rows
from ..peft import AdapterFiles
from ..replace import new_directory
from ..whole import check_free
from ..writer import write_safetensors
from .model import (
    Options,
    Plan,
    Read,
    check_holds,
    grouped,
    made,
    matrices,
    number,
    refuse,
    tensors_of,
    two_axes,
)
from .scales import alpha_for, described, one_rank, unified

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ENDS = {".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "m"}
LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
OF_LAYER = {ours: theirs for theirs, ours in LAYER.items()}
PERMUTED = {"llama": True, "mistral": True, "qwen2": False}  # by the model_type of a config.json


def ours(name: str) -> str | None:
    """Hugging Face's name of a module from torchtune's, or None."""
    found = re.fullmatch(r"layers\.(\d+)\.([\w.]+)", name, re.ASCII)
    if found and found[2] in LAYER:
        return f"model.layers.{found[1]}.{LAYER[found[2]]}"
    return "lm_head" if name == "output" else None


def theirs(name: str) -> str | None:
    """Undo ours."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", name, re.ASCII)
    if found and found[2] in OF_LAYER:
        return f"layers.{found[1]}.{OF_LAYER[found[2]]}"
    return "output" if name == "lm_head" else None


def read(path: Path, options: Options) -> Read:
    """Read a directory, or a file with its adapter_config.json beside it or α in the options."""
    folder = path if path.is_dir() else path.parent
    file = tensors_of(path / TENSORS if path.is_dir() else path)
    alpha = options.alpha
    if alpha is None and (folder / CONFIG).is_file():
        alpha = _alpha(folder / CONFIG)
    if alpha is None:
        refuse(file.path, f"{CONFIG} beside it, or α (--alpha)", "neither")
    adapters = {}
    for name, parts in grouped(file, ENDS).items():
        where, module = f"{file.path}: {name}", ours(name)
        if module is None:
            refuse(where, "a module of torchtune's Llama", "a name that is not in its table")
        two_axes(where, parts)
        for part in parts.keys() & {"B", "m"}:
            parts[part] = _turned(where, module, parts[part], options, to_hf_rows)
        if "m" in parts:
            _check_no_bias(where, module, options)
        adapters[module] = made(where, parts)
    scalings = {name: alpha / adapter.A.shape[0] for name, adapter in adapters.items() if adapter.A is not None}
    files, notes = described(adapters, scalings, base=options.base, where=file.path)
    return Read(files, notes)


def plan(files: AdapterFiles, options: Options) -> Plan:
    """Say what would be written. Raises FormatError for what torchtune has no place for."""
    held = check_holds(files, "torchtune", options, dora=True)
    r = one_rank(files, "torchtune")
    s, adapters, notes = unified(files, "torchtune", lambda site: site.scaling, "scaling", fold=options.fold)
    notes = [*held, *notes]
    alpha = alpha_for(s, r)
    if alpha / r != s:
        notes.append(f"s = {s!r} becomes α/r = {alpha / r!r}, the nearest there is")
    tensors: dict[str, HostArray] = {}
    for name, adapter in adapters.items():
        where, module = f"torchtune: {name}", theirs(name)
        if module is None:
            refuse(where, "a module of torchtune's Llama", "a name that is not in its table")
        A, B = matrices(files.sites[name], adapter)
        tensors[f"{module}.lora_a.weight"] = A
        tensors[f"{module}.lora_b.weight"] = _turned(where, name, B, options, to_ggml_rows)
        if adapter.m is not None:
            _check_no_bias(where, name, options)
            m = _turned(where, name, to_host(adapter.m), options, to_ggml_rows)
            tensors[f"{module}.magnitude"] = m
    if files.config.lora_dropout:
        notes.append(f"lora_dropout {files.config.lora_dropout:g} is left out, which is said in a recipe there")
    document: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted({str(theirs(name)).rpartition(".")[2] for name in adapters}),
        "peft_type": "LORA",
    }

    def store(dest: Path) -> None:
        check_free(dest)
        with new_directory(dest, ()) as folder:
            write_safetensors(folder / TENSORS, tensors, {"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(document, indent=2), encoding="utf-8")

    return Plan([CONFIG, TENSORS], notes, store)


def _check_no_bias(where: str, name: str, options: Options) -> None:
    """torchtune's DoRA scales the base bias by m/n too (scaled_bias): only layers without one agree."""
    if options.base is None:
        refuse(where, "a base (--base) without a bias there, which torchtune's DoRA would scale", "no base")
    if f"{name}.bias" in options.base.shapes:
        refuse(
            where, "a layer without a bias, which torchtune's DoRA scales and PEFT's does not", "one with it"
        )


def _alpha(path: Path) -> float:
    return number(f"{path}: lora_alpha", read_json(path).get("lora_alpha"))


def _turned(where: str, name: str, rows: HostArray, options: Options, turn: Any) -> HostArray:
    """Rows of B or of m in the other order, where torchtune has Q and K in ggml's."""
    if not name.endswith(("self_attn.q_proj", "self_attn.k_proj")):
        return rows
    config = options.base.config if options.base is not None else {}
    model_type = config.get("model_type")
    if model_type not in PERMUTED:
        came = repr(model_type) if options.base is not None else "no base (--base)"
        refuse(where, f"a base of {', '.join(PERMUTED)}, whose order of Q's and K's rows is known", came)
    heads = heads_of(name, config)
    return np.ascontiguousarray(turn(rows, heads)) if PERMUTED[model_type] and heads else rows
