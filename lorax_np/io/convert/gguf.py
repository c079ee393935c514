"""GGUF adapters, as llama.cpp loads them.  Read in llama.cpp: src/llama-adapter.cpp, convert_lora_to_gguf.py.

A weight has NAME.lora_a : (r, d_in) and NAME.lora_b : (d_out, r) under ggml's name of it; adapter.lora.alpha, a
float32, holds for all, and s = α/r with r of each lora_b, or 1 where α is 0 or missing. The update of
token_embd has lora_a : (vocab, r). In the architecture llama the rows of B on Q and K are in ggml's order.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...backend import HostArray, dtype_name
from ..gguf import GgufFile, open_gguf
from ..gguf_names import FAMILIES, MODEL_TYPES, ggml_module, heads_of, hf_module, to_ggml_rows, to_hf_rows
from ..gguf_writer import DTYPES, write_gguf
from ..peft import AdapterFiles
from ..safetensors import show
from .model import Factors, Options, Plan, Read, check_holds, made, matrices, refuse, two_axes
from .scales import described, gathered, narrowed, plain_alpha, unified

EMBEDDING = "model.embed_tokens"


def read(path: Path, options: Options) -> Read:
    """Read a file. Options: base, for the heads of Q and K in the architecture llama."""
    file = open_gguf(path)
    kind, method = file.metadata.get("general.type"), file.metadata.get("adapter.type")
    if kind != "adapter" or method != "lora":
        refuse(path, "general.type adapter and adapter.type lora", f"{show(kind)} and {show(method)}")
    if "adapter.alora.invocation_tokens" in file.metadata:
        refuse(path, "a LoRA that is always on", "adapter.alora.invocation_tokens")
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        refuse(f"{path}: general.architecture", f"one of {', '.join(FAMILIES)}", show(architecture))
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not np.isfinite(alpha):
        refuse(f"{path}: adapter.lora.alpha", "a finite number", show(alpha))
    adapters: Factors = {}
    scalings, kinds = {}, {}
    for module, (A, B) in _pairs(file).items():
        name, where = hf_module(module), f"{path}: {show(module)}"
        if name is None:
            refuse(where, f"a module of {architecture} that has a name in Hugging Face", "none")
        if name == EMBEDDING:
            _check_untied(where, options)
            A, kinds[name] = A.T, "embedding"  # (vocab, r) -> (r, vocab)
        B = _turned(where, name, architecture, B, options, to_hf_rows)
        adapters[name] = made(where, {"A": A, "B": B})
        scalings[name] = alpha / B.shape[1] if alpha else 1.0
    return Read(*described(adapters, scalings, base=options.base, where=path, kinds=kinds))


def plan(files: AdapterFiles, options: Options) -> Plan:
    """Say what would be written. Raises FormatError for what llama.cpp has no place for."""
    held = check_holds(files, "gguf", options, kinds=("linear", "embedding"))
    if options.base is None:
        refuse("gguf", "a base (--base), for its architecture and the heads of Q and K", "none")
    model_type = options.base.config.get("model_type")
    if model_type not in MODEL_TYPES:
        refuse("gguf: model_type of the base", f"one of {', '.join(MODEL_TYPES)}", repr(model_type))
    architecture = MODEL_TYPES[model_type]
    alpha, adapters, notes = unified(files, "gguf", plain_alpha, "alpha", fold=options.fold)
    notes = [*held, *notes]
    tensors: dict[str, HostArray] = {}
    for name, adapter in adapters.items():
        where, module = f"gguf: {name}", ggml_module(name)
        if module is None:
            refuse(where, f"a module of {architecture} that has a name in GGUF", "none")
        A, B = matrices(files.sites[name], adapter)
        if dtype_name(A) not in DTYPES:
            refuse(where, f"one of {', '.join(DTYPES)}", f"{dtype_name(A)}, which would be rounded")
        if files.sites[name].kind == "embedding":
            if name != EMBEDDING:
                refuse(where, f"no embedding but {EMBEDDING}", "another")
            _check_untied(where, options)
            A = A.T  # (r, vocab) -> (vocab, r)
        elif name == EMBEDDING:
            refuse(where, "an embedding's site", files.sites[name].kind)
        tensors[f"{module}.weight.lora_a"] = A
        tensors[f"{module}.weight.lora_b"] = _turned(where, name, architecture, B, options, to_ggml_rows)
    moved: list[tuple[str, str]] = []
    found = [narrowed(alpha, site, "gguf", moved) for site in files.sites.values()]
    notes += gathered(moved)
    if files.config.lora_dropout:
        notes.append(f"lora_dropout {files.config.lora_dropout:g} is left out, as nothing trains there")
    metadata = {
        "general.architecture": ("string", architecture),
        "general.type": ("string", "adapter"),
        "adapter.type": ("string", "lora"),
        "adapter.lora.alpha": ("float32", found[0]),
    }

    def store(dest: Path) -> None:
        write_gguf(dest, metadata, tensors)

    return Plan([], notes, store)


def _pairs(file: GgufFile) -> dict[str, tuple[HostArray, HostArray]]:
    """A and B by ggml's module, as the file has them."""
    found: dict[str, dict[str, HostArray]] = {}
    for name in file:
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b") or not module.endswith(".weight"):
            hint = ", a norm, which llama.cpp leaves out in silence" if name.endswith("_norm.weight") else ""
            refuse(
                f"{file.path}: {show(name)}",
                "a name that ends in .weight.lora_a or .weight.lora_b",
                f"another{hint}",
            )
        found.setdefault(module.removesuffix(".weight"), {})[part] = file[name]
    pairs = {}
    for module, parts in found.items():
        where = f"{file.path}: {show(module)}"
        if len(parts) < 2:
            refuse(where, "lora_a and lora_b", f"{min(parts)} alone")
        A, B = parts["lora_a"], parts["lora_b"]
        two_axes(where, {"A": A, "B": B})
        pairs[module] = A, B
    return pairs


def _turned(
    where: str,
    name: str,
    architecture: str,
    B: HostArray,
    options: Options,
    turn: Callable[[HostArray, int], HostArray],
) -> HostArray:
    """The rows of B in the other order, where the architecture permutes them, (gguf.4)."""
    if not FAMILIES[architecture].permuted or not name.endswith(("self_attn.q_proj", "self_attn.k_proj")):
        return B
    if options.base is None or "num_attention_heads" not in options.base.config:
        came = "no base" if options.base is None else "one that does not say its num_attention_heads"
        refuse(where, "a base (--base), whose heads say how rows of B are ordered", came)
    heads = heads_of(name, options.base.config) or 0
    return np.ascontiguousarray(turn(B, heads))


def _check_untied(where: str, options: Options) -> None:
    """llama.cpp adds an update of token_embd to the input alone, and cannot with a head tied to it."""
    tied = options.base.config.get("tie_word_embeddings") if options.base is not None else None
    if tied is not False:
        came = "one that is tied" if tied else "a base that does not say (--base)"
        refuse(where, "an untied model, since llama.cpp has one tensor for a tied embedding and head", came)
