"""mlx-lm: adapters.safetensors and adapter_config.json.  Read in mlx-lm 0.32.2, mlx_lm/tuner.

A module has lora_a : (d_in, r) and lora_b : (r, d_out), the transposes of A and B, and s under `scale`, so that
y = xWᵀ + s·(x lora_a) lora_b; DoRA adds m : (d_out,). One rank and one scale hold for all. Its DoRA is
`undropped_base`: the base term is scaled by m/n whole, without dropout, which differs from PEFT's in training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...backend import HostArray, dtype_name
from ..checkpoint import read_json
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
from .scales import described, is_embedding, one_rank, unified

TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"
ENDS = {".lora_a": "A", ".lora_b": "B", ".m": "m"}
LAYERS = "model.layers."
FIELDS = ("dropout", 0.0), ("scale", None)  # of lora_parameters, and what they are where they are missing


def read(path: Path, options: Options) -> Read:
    """Read a directory, or its adapters.safetensors with adapter_config.json beside it."""
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG)
    kind, dropout, scale = _settings(folder / CONFIG, config)
    file = tensors_of(folder / TENSORS if path.is_dir() else path)
    adapters, kinds = {}, {}
    for name, parts in grouped(file, ENDS).items():
        where = f"{file.path}: {name}"
        if parts["A"].ndim == 3:
            refuse(
                where, "a matrix", "one for each expert (LoRASwitchLinear), whose fused names differ by model"
            )
        two_axes(where, parts)
        found = {part: array.T if part in "AB" else array for part, array in parts.items()}
        if (kind == "dora") != ("m" in found):
            refuse(
                where,
                f"{'a' if kind == 'dora' else 'no'} magnitude, as fine_tune_type is {kind}",
                sorted(found),
            )
        if is_embedding(name, found["A"], found["B"], options.base):
            if "m" in found:
                refuse(
                    where, "DoRA on linear layers", "DoRAEmbedding, whose m has one entry a token, not a column"
                )
            _check_untied(where, options)
            kinds[name] = "embedding"
        adapters[name] = made(where, _one_dtype(found))
    model = config.get("model")
    files, notes = described(
        adapters,
        dict.fromkeys(adapters, scale),
        base=options.base,
        where=file.path,
        dropout=dropout,
        kinds=kinds,
        model=model if isinstance(model, str) else None,
    )
    if kind == "dora" and dropout:
        notes.append("trained with the convention undropped_base: in training with dropout PEFT's DoRA differs")
    return Read(files, notes)


def plan(files: AdapterFiles, options: Options) -> Plan:
    """Say what would be written. Raises FormatError for what mlx-lm has no place for."""
    held = check_holds(files, "mlx", options, dora=True, kinds=("linear", "embedding"))
    rank = one_rank(files, "mlx")
    scale, adapters, notes = unified(files, "mlx", lambda site: site.scaling, "scale", fold=options.fold)
    notes = [*held, *notes]
    tensors: dict[str, HostArray] = {}
    for name, adapter in adapters.items():
        if files.sites[name].kind == "embedding":
            if adapter.m is not None:
                refuse(
                    f"mlx: {name}",
                    "DoRA on linear layers",
                    "m of an embedding, one a column; mlx has one a token",
                )
            _check_untied(f"mlx: {name}", options)
        A, B = matrices(files.sites[name], adapter)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A.T, B.T
        if adapter.m is not None:
            tensors[f"{name}.m"] = adapter.m  # type: ignore[assignment]
    keys, layers = _keys(list(adapters), options)
    dropout = files.config.lora_dropout
    document: dict[str, Any] = {
        "fine_tune_type": "dora" if files.config.use_dora else "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
    }
    if files.config.base_model_name_or_path is not None:
        document["model"] = files.config.base_model_name_or_path
    if files.config.use_dora and dropout:
        notes.append("mlx-lm's DoRA is undropped_base: further training with dropout differs from PEFT's")

    def store(dest: Path) -> None:
        check_free(dest)
        with new_directory(dest, ()) as folder:
            write_safetensors(folder / TENSORS, tensors, {"format": "mlx"})
            (folder / CONFIG).write_text(json.dumps(document, indent=4, sort_keys=True), encoding="utf-8")

    return Plan([CONFIG, TENSORS], notes, store)


def _settings(path: Path, config: Mapping[str, Any]) -> tuple[str, float, float]:
    """fine_tune_type, dropout and scale, checked."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        refuse(f"{path}: fine_tune_type", "lora or dora", repr(kind))
    given = config.get("lora_parameters")
    if not isinstance(given, dict):
        refuse(f"{path}: lora_parameters", "an object with rank, scale and dropout", repr(given))
    dropout, scale = (number(f"{path}: lora_parameters: {n}", given.get(n, d)) for n, d in FIELDS)
    return kind, dropout, scale


def _one_dtype(parts: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """The parts in one dtype: mlx-lm keeps m in float32 beside factors in 16 bits; widening them is exact."""
    names = {dtype_name(array) for array in parts.values()}
    if names <= {"float16", "bfloat16", "float32"} and len(names) > 1:
        return {part: array.astype(np.float32) for part, array in parts.items()}
    return dict(parts)


def _check_untied(where: str, options: Options) -> None:
    """mlx-lm's embedding serves a tied head with its update, PEFT's does not: only untied ones agree."""
    tied = options.base.config.get("tie_word_embeddings") if options.base is not None else None
    if tied is not False:
        came = "one that is tied" if tied else "a base that does not say (--base)"
        refuse(where, "an untied model, since mlx-lm's embedding also serves a tied head", came)


def _keys(names: list[str], options: Options) -> tuple[list[str], int]:
    """keys and num_layers, by which mlx-lm makes exactly these layers.

    Names within a layer hold for the last num_layers layers, whole names wherever they are; -1 layers are all.
    """
    layers = options.base.config.get("num_hidden_layers") if options.base is not None else None
    inside = [name.removeprefix(LAYERS).partition(".") for name in names if name.startswith(LAYERS)]
    if isinstance(layers, int) and inside and all(number.isdecimal() for number, _, _ in inside):
        numbers, keys = {int(number) for number, _, _ in inside}, {key for _, _, key in inside}
        first = min(numbers)
        if numbers == set(range(first, layers)) and len(inside) == len(numbers) * len(keys):
            return sorted(keys | {name for name in names if not name.startswith(LAYERS)}), layers - first
    return sorted(names), -1
