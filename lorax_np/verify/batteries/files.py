"""Checks of an adapter's files: by their own reader, by two other ones, and by the layer that comes of them."""

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ... import Adapter, Linear, LoraConfig, lora_linear_forward, open_safetensors
from ..bounds.worst import bounds
from ..cases import PROFILES, UNIT, Case, draw
from ..truths import truth
from .edges import Checks, law, off
from .tensors import answer, ask, chosen

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEYS = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bB": "lora_B.bias",
    "m": "lora_magnitude_vector",
    "b": "base_layer.bias",
}


def _file_cases(battery: str, profile: str, seed: int, only: str) -> Iterator[Case]:
    for i, (kind, rslora) in enumerate((("lora", False), ("dora", False), ("lora", True))):
        id = f"{battery}/{kind}/{i}"
        if chosen(id, only):
            shape = ((5, 7, 3, (2,)), (5, 7, 2, (2,)), (6, 9, 5, (2,)))[i]
            yield draw(
                id, kind, shape, PROFILES[profile], (seed, i, 43), rslora=rslora, bias="trained", lora_bias=True
            )


def battery_reloaded(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """What is saved comes back bit for bit, with its s.  (faults.1)"""
    if not (hasattr(subject, "save") and hasattr(subject, "load")):
        return
    for case in _file_cases("reloaded", profile, seed, only):

        def run(case: Case = case) -> str | None:
            got = ask(subject, "load", ask(subject, "save", case.copy()))
            for name in ("A", "B", "m", "b", "bB"):
                want = getattr(case, name)
                came = None if got.get(name) is None else np.asarray(got[name])
                if want is not None and (came is None or came.shape != want.shape or (came != want).any()):
                    return f"{name} is {'missing' if came is None else 'not what was saved'}"
            return (
                None if abs(got["scaling"] - case.scaling) <= 1e-12 * case.scaling else f"s is {got['scaling']}"
            )

        yield law(case.id, "reloaded", case.kind, "saved and loaded, the adapter is the same", run)


def battery_foreign(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Another reader finds PEFT's names, shapes and numbers in what is saved, and computes the same update."""
    if not hasattr(subject, "save"):
        return
    for case in _file_cases("foreign", profile, seed, only):

        def run(case: Case = case) -> str | None:
            files = ask(subject, "save", case.copy())
            return _readable(case, files[TENSORS], json.loads(files[CONFIG]))

        yield law(case.id, "foreign", case.kind, "another program reads the same layer", run)


def battery_rebuilt(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """The engine's own reader makes a layer of what is saved, and it computes the same."""
    if not hasattr(subject, "save"):
        return
    for case in _file_cases("rebuilt", profile, seed, only):
        yield law(
            case.id, "rebuilt", case.kind, "the engine computes the same", partial(_rebuilt, subject, case)
        )


def _rebuilt(subject: Any, case: Case) -> str | None:
    files = ask(subject, "save", case.copy())
    with TemporaryDirectory() as folder:
        path = Path(folder) / TENSORS
        path.write_bytes(files[TENSORS])
        found = open_safetensors(path)
        read = {name: np.array(found[name]) for name in found}
        del found
    parts = {name: read.get(key) for name, key in KEYS.items()}
    try:
        base = Linear(case.W, None if case.train_b else case.b)
        adapter = Adapter(parts["A"], parts["B"], parts["m"], parts["b"], parts["bB"])
        config = LoraConfig.from_dict({"peft_type": "LORA", **json.loads(files[CONFIG])})
        y, _ = lora_linear_forward(case.x, base, adapter, scaling=config.scaling)
    except (ValueError, TypeError) as error:  # the engine's own refusals of shapes, dtypes and configurations
        return f"no layer can be made of it: {error}"
    return off("y", y, truth.dense(case), 2 * bounds(case, UNIT[case.x.dtype.name])["y"])


def battery_resumed(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """With what it loads, the subject's own layer computes what it did before it saved."""
    if not (hasattr(subject, "save") and hasattr(subject, "load")):
        return
    for case in _file_cases("resumed", profile, seed, only):
        yield law(
            case.id,
            "resumed",
            case.kind,
            "the loaded layer computes the same",
            partial(_resumed, subject, case),
        )


def _resumed(subject: Any, case: Case) -> str | None:
    got = ask(subject, "load", ask(subject, "save", case.copy()))
    arrays: Any = {name: np.asarray(got[name]) for name in ("A", "B", "m", "bB") if got.get(name) is not None}
    if case.bB is not None and "bB" not in arrays:
        arrays["bB"] = np.zeros_like(case.bB)
    if case.train_b:
        arrays["b"] = np.asarray(got["b"]) if got.get("b") is not None else np.zeros_like(case.W[:, 0])
    r = arrays["A"].shape[0]
    at = replace(
        case, config=LoraConfig(r=r, lora_alpha=got["scaling"] * r, use_dora=case.m is not None), **arrays
    )
    want = answer(subject, case)["y"]
    return off("y", answer(subject, at)["y"], want, 2 * bounds(case, UNIT[case.x.dtype.name])["y"])


def _readable(case: Case, raw: bytes, config: dict[str, Any]) -> str | None:
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    wanted = {"lora_A.weight": case.A, "lora_B.weight": case.B, "lora_magnitude_vector": case.m}
    wanted |= {"lora_B.bias": case.bB, "base_layer.bias": case.b if case.train_b else None}
    for name, value in wanted.items():
        if value is None:
            continue
        if name not in header:
            return f"no {name} in the file"
        entry = header[name]
        word = {"float32": "F32", "float64": "F64"}[value.dtype.name]
        start, end = (8 + size + at for at in entry["data_offsets"])
        if (entry["dtype"], tuple(entry["shape"])) != (word, value.shape) or raw[start:end] != value.tobytes():
            return f"{name}: expected {word} {value.shape} and its bytes, got {entry['dtype']} {entry['shape']}"
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    s = alpha / (sqrt(r) if config.get("use_rslora", False) else r)
    return None if abs(s - case.scaling) <= 1e-12 * case.scaling else f"the file says s = {s}"
