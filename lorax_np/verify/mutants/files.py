"""Faults of an adapter written to a file and read back: layout, what is left out, what scales it."""

import json
import struct
from math import sqrt
from typing import Any

import numpy as np

from ..batteries.files import CONFIG, KEYS, TENSORS
from ..cases import Case, HostArray
from .fault import Fault, Faulty, row_norms

WORDS = {"float32": "F32", "float64": "F64", "float16": "F16"}


def written(tensors: dict[str, HostArray]) -> bytes:
    """Tensors as a safetensors file, in C order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start, parts = 0, []
    for name, value in tensors.items():
        raw = value.tobytes()
        word, end = WORDS[value.dtype.name], start + len(raw)
        header[name] = {"dtype": word, "shape": list(value.shape), "data_offsets": [start, end]}
        parts.append(raw)
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def _parsed(raw: bytes) -> dict[str, HostArray]:
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    dtypes = {word: name for name, word in WORDS.items()}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            found[name] = np.frombuffer(data[start:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return found


class Filed(Faulty):
    """Saves and loads an adapter right; each fault changes one of four small things."""

    def tensors(self, case: Case) -> dict[str, HostArray]:
        """What is saved, by the names of KEYS: everything that is trained."""
        found = {"A": case.A, "B": case.B, "bB": case.bB, "m": case.m, "b": case.b if case.train_b else None}
        return {name: value for name, value in found.items() if value is not None}

    def written(self, tensors: dict[str, HostArray]) -> bytes:
        """The bytes of the tensor file."""
        return written(tensors)

    def settings(self, case: Case) -> dict[str, Any]:
        """What the configuration file says."""
        c = case.config
        return {"r": c.r, "lora_alpha": c.lora_alpha, "use_rslora": c.use_rslora, "use_dora": c.use_dora}

    def back(self, found: dict[str, HostArray]) -> dict[str, HostArray]:
        """What is loaded, of what was read."""
        return found

    def save(self, case: Case) -> dict[str, bytes]:
        """The two files of the case's adapter, by name."""
        tensors = {KEYS[name]: value for name, value in self.tensors(case).items()}
        return {TENSORS: self.written(tensors), CONFIG: json.dumps(self.settings(case)).encode()}

    def load(self, files: dict[str, bytes]) -> dict[str, Any]:
        """A, B, m, b, bB as far as they are there, and scaling."""
        names = {key: name for name, key in KEYS.items()}
        read = {names[key]: value for key, value in _parsed(files[TENSORS]).items() if key in names}
        said = json.loads(files[CONFIG])
        r, alpha = said.get("r", 8), said.get("lora_alpha", 8)
        s = alpha / (sqrt(r) if said.get("use_rslora", False) else r)
        return {**self.back(read), "scaling": float(s)}


class SavesBTransposed(Filed):
    """Writes B as (r, d_out)."""

    def tensors(self, case: Case) -> dict[str, HostArray]:
        """B the other way round."""
        found = super().tensors(case)
        return found | {"B": np.ascontiguousarray(found["B"].T)}


class KerasLayout(Filed):
    """Keeps A as (d_in, r) and B as (r, d_out) in its files, which it reads back itself."""

    def tensors(self, case: Case) -> dict[str, HostArray]:
        """Both factors the other way round."""
        found = super().tensors(case)
        return found | {name: np.ascontiguousarray(found[name].T) for name in ("A", "B")}

    def back(self, found: dict[str, HostArray]) -> dict[str, HostArray]:
        """Both turned back."""
        return found | {name: found[name].T for name in ("A", "B")}


class LeavesOut(Filed):
    """Saves all but one tensor, and gives it some value when it is loaded."""

    def __init__(self, name: str) -> None:
        """name : of the tensor that is lost."""
        super().__init__()
        self.name = name

    def tensors(self, case: Case) -> dict[str, HostArray]:
        """All but one."""
        return {name: value for name, value in super().tensors(case).items() if name != self.name}


class MagnitudeOfFactors(LeavesOut):
    """Leaves the magnitude out, and starts it anew from the factors."""

    def back(self, found: dict[str, HostArray]) -> dict[str, HostArray]:
        """m of the update alone."""
        return found | {"m": row_norms(found["B"] @ found["A"])}


class DrawsAnew(Filed):
    """Loads B, and draws A again from its own seed."""

    def back(self, found: dict[str, HostArray]) -> dict[str, HostArray]:
        """Another A."""
        A = found["A"]
        return found | {"A": np.asarray(np.random.default_rng(3).normal(size=A.shape), A.dtype)}


class Unsaid(Filed):
    """Leaves a setting out of the configuration file."""

    def __init__(self, name: str) -> None:
        """name : of the setting."""
        super().__init__()
        self.name = name

    def settings(self, case: Case) -> dict[str, Any]:
        """All but one."""
        return {name: value for name, value in super().settings(case).items() if name != self.name}


class Swaps(Filed):
    """Writes A under B's name and B under A's, and reads them so."""

    def tensors(self, case: Case) -> dict[str, HostArray]:
        """The factors exchanged."""
        found = super().tensors(case)
        return found | {"A": found["B"], "B": found["A"]}

    def back(self, found: dict[str, HostArray]) -> dict[str, HostArray]:
        """And exchanged back."""
        return found | {"A": found["B"], "B": found["A"]}


class InMemoryOrder(Filed):
    """Writes the bytes of an array as they lie in memory; it keeps B in Fortran's order."""

    def written(self, tensors: dict[str, HostArray]) -> bytes:
        """B's bytes by columns under its own shape."""
        B = tensors[KEYS["B"]]
        return written(tensors | {KEYS["B"]: B.ravel(order="F").reshape(B.shape)})


class SavesHalf(Filed):
    """Writes float16 whatever the adapter's dtype."""

    def __init__(self) -> None:
        """The dtype to come back to is that of the last save."""
        super().__init__()
        self.dtype: Any = "float32"

    def tensors(self, case: Case) -> dict[str, HostArray]:
        """All in half precision."""
        self.dtype = case.A.dtype
        return {name: value.astype("float16") for name, value in super().tensors(case).items()}

    def back(self, found: dict[str, HostArray]) -> dict[str, HostArray]:
        """In the dtype of before, without the digits."""
        return {name: value.astype(self.dtype) for name, value in found.items()}


class FoldsScale(Filed):
    """Writes s·B, beside the alpha and r that scale it once more."""

    def tensors(self, case: Case) -> dict[str, HostArray]:
        """B with s in it."""
        found = super().tensors(case)
        return found | {"B": (case.scaling * found["B"]).astype(found["B"].dtype)}


class WritesScale(Filed):
    """Writes s where lora_alpha is meant."""

    def settings(self, case: Case) -> dict[str, Any]:
        """The scaling under alpha's name."""
        return super().settings(case) | {"lora_alpha": case.scaling}


def _file(id: str, title: str, make: Any, sources: tuple[str, ...] = ()) -> Fault:
    return Fault(id, title, "file", sources, "faults.1", make=make)


FAULTS = (
    _file("F1", "B saved as (r, d_out)", SavesBTransposed),
    _file("F2", "factors stored as (in, out), and read back so", KerasLayout),
    _file("F3", "a trained base bias not saved", lambda: LeavesOut("b"), ("peft#3306",)),
    _file("F4", "A drawn anew when the adapter is loaded", DrawsAnew, ("peft#3310",)),
    _file("F5", "alpha not saved: the default is loaded", lambda: Unsaid("lora_alpha")),
    _file("F6", "use_rslora not saved", lambda: Unsaid("use_rslora")),
    _file("F7", "the magnitude not saved, and made of the factors again", lambda: MagnitudeOfFactors("m")),
    _file("F8", "A and B under each other's name, and read back so", Swaps),
    _file("F9", "a strided B written in the order of its memory", InMemoryOrder),
    _file("F10", "float16 written whatever the adapter's dtype", SavesHalf),
    _file("F11", "s·B saved beside alpha and r: scaled twice", FoldsScale),
    _file("F12", "bB not saved", lambda: LeavesOut("bB")),
    _file("F13", "s saved under alpha's name: divided by the rank twice", WritesScale),
)
