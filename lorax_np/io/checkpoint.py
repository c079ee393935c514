"""A checkpoint opened as a mapping: a file, a directory, an index of shards, or GGUF.  specs/checkpoints.md.

An index is a file from a stranger: it names files of its own directory, and says of each tensor where it is.
Both are checked against the files before anything is read.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from ..backend import Array
from ..config.fields import MARK
from ..errors import FormatError
from ..shapes import shape_in
from .layout import word_of
from .safetensors import SafetensorsFile, _unique, open_safetensors, show

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON = 100_000_000  # bytes, as of a header
PICKLES = "*.bin", "*.pt", "*.pth", "*.ckpt"


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Mapping[str, Array]):
    """Arrays by name over the files of a checkpoint, read when they are asked for; made by open_checkpoint."""

    path: Path  # as it was given
    config: dict[str, Any]  # of its config.json; empty where there is none
    shards: dict[str, SafetensorsFile]  # by file name; empty for a GGUF file
    index: dict[str, Any] | None  # what the index says, where there is one
    _where: dict[str, str]  # name -> file name
    _arrays: Mapping[str, Array] = field(default_factory=dict)  # of a GGUF file

    @property
    def folder(self) -> Path:
        """The directory in which its files lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(file.path for file in self.shards.values()) or (self.path,)

    @property
    def residual(self) -> str:
        """The start that took s·BA out of these weights and left the rest, as their files say; "" for none."""
        return next((f.metadata[MARK] for f in self.shards.values() if MARK in f.metadata), "")

    def shard(self, name: str) -> SafetensorsFile:
        """Return the open file that holds one tensor. Raises KeyError."""
        return self.shards[self._find(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without touching its bytes. Raises KeyError."""
        return self.shard(name).shape(name) if self.shards else shape_in(self._arrays, name)

    def word(self, name: str) -> str:
        """The safetensors format's word for the dtype of one tensor, as "F32". Raises KeyError."""
        return self.shard(name).dtype(name) if self.shards else word_of(self[name], show(name))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as arrays; those of a GGUF file are counted as float32, as most are read."""
        if self.shards:
            return sum(file.nbytes(name) for file in self.shards.values() for name in file.names)
        return 4 * sum(prod(self.shape(name)) for name in self)

    def __getitem__(self, name: str) -> Array:
        """One tensor, read-only. Raises KeyError, and FormatError as the files' readers do."""
        return self.shard(name)[name] if self.shards else self._arrays[name]

    def release(self) -> None:
        """Have the system take back the files' pages that were read. Arrays stay valid: they are read again."""
        for file in (*self.shards.values(), self._arrays):
            if callable(release := getattr(file, "release", None)):
                release()

    def __contains__(self, name: object) -> bool:
        return name in self._where or name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._where if self.shards else self._arrays)

    def __len__(self) -> int:
        return len(self._where if self.shards else self._arrays)

    __eq__ = object.__eq__  # a Mapping would compare arrays, whose == is not a bool
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {len(self)} tensors in {len(self.files)} files>"

    def _find(self, name: str) -> str:
        if name not in self._where:
            raise KeyError(f"{self.path}: no tensor named {show(name)}")
        return self._where[name]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and check its headers and its index; no tensor is read before it is asked for.

    path : a .safetensors file; a .gguf file; an index.json; or a directory with model.safetensors, with
           model.safetensors.index.json, or with no more than one file that could be meant

    A GGUF file gives its tensors under the names they have in a Hugging Face checkpoint, as float arrays, and
    where no config.json lies beside it, the config that its metadata implies.
    Raises FormatError, one line with the path, for whatever cannot be one whole checkpoint: an index that names
    a file elsewhere, a shard that is missing, a tensor that is in no shard, in two, or in another than the
    index says; a pickle. The system's OSError where there is no such path.
    Source: specs/checkpoints.md.

    >>> from tempfile import TemporaryDirectory
    >>> import numpy as np
    >>> from lorax_np.io.writer import write_safetensors
    >>> with TemporaryDirectory() as folder:
    ...     write_safetensors(Path(folder, "model.safetensors"), {"w": np.eye(2)})
    ...     open_checkpoint(folder)["w"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    given = Path(path)
    found = _in_directory(given) if given.is_dir() else given
    config = read_json(found.parent / "config.json") if (found.parent / "config.json").is_file() else {}
    if found.suffix == ".gguf":
        arrays, implied = _gguf(found)
        return Checkpoint(given, config or implied, {}, None, {}, arrays)
    if found.name.endswith(".index.json"):
        index = read_json(found)
        shards = _shards(found, index)
        return Checkpoint(given, config, shards, index, {name: f for f in shards for name in shards[f].names})
    file = open_safetensors(found)
    return Checkpoint(given, config, {found.name: file}, None, dict.fromkeys(file.names, found.name))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, each key once. Raises FormatError, and the system's OSError."""
    with path.open("rb") as file:
        raw = file.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        _refuse(path, f"at most {MAX_JSON} bytes of JSON", "more")
    try:
        found = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        _refuse(path, "a JSON object", "JSON nested too deep")
    except ValueError as error:
        _refuse(path, "a JSON object in UTF-8", error)
    if not isinstance(found, dict):
        _refuse(path, "a JSON object", show(found))
    return found


def _refuse(where: Path | str, wanted: str, came: object) -> NoReturn:
    raise FormatError(f"{where}: expected {wanted}, got {came}") from None


def _in_directory(folder: Path) -> Path:
    """The file that a directory is opened by."""
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.gguf"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:4])
            _refuse(folder, f"{SINGLE}, {INDEX}, or one {pattern}", f"{len(found)} of them: {names}")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    came = f"no such file{', but the pickle ' + show(pickles[0]) if pickles else ''}"
    hint = ", which can run code and is never loaded here: convert it with safetensors.torch" if pickles else ""
    _refuse(folder, f"{SINGLE}, {INDEX}, or one .safetensors or .gguf file", came + hint)


def _shards(path: Path, index: Mapping[str, Any]) -> dict[str, SafetensorsFile]:
    """The files that an index names, opened, once they hold exactly what it says."""
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        _refuse(f"{path}: weight_map", "file names by tensor, at least one", show(where))
    shards: dict[str, SafetensorsFile] = {}
    for name in sorted(set(where.values())):
        if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            _refuse(f"{path}: weight_map", "names of .safetensors files beside the index", show(name))
        if not (path.parent / name).is_file():
            _refuse(path, f"the shard {show(name)} beside the index", "no such file")
        shards[name] = open_safetensors(path.parent / name)
    _check_whole(path, where, shards)
    total = (index.get("metadata") or {}).get("total_size") if isinstance(index.get("metadata"), dict) else None
    held = sum(file.place(name)[1] for file in shards.values() for name in file.names)
    if total is not None and (isinstance(total, bool) or total != held):
        _refuse(f"{path}: metadata: total_size", f"{held}, the bytes of the tensors in the shards", show(total))
    return shards


def _check_whole(path: Path, where: Mapping[str, str], shards: Mapping[str, SafetensorsFile]) -> None:
    """Each tensor is in one shard, the one that the index says, and there is no other."""
    found: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.names:
            if name in found:
                _refuse(path, f"each tensor in one shard, {show(name)} in {found[name]}", f"it in {file} too")
            found[name] = file
    for name, file in where.items():
        if found.get(name) != file:
            came = f"it in {found[name]}" if name in found else "it in none of the shards"
            _refuse(path, f"the tensor {show(name)} in {show(file)}, as the index says", came)
    for name in found.keys() - where.keys():
        _refuse(path, f"every tensor in the index, {show(name)} of {found[name]} too", "no such entry")


def _gguf(path: Path) -> tuple[Mapping[str, Array], dict[str, Any]]:
    """Tensors of a GGUF file under their names in a Hugging Face checkpoint, and the config they imply."""
    try:
        reader, names = (import_module(f".{name}", __package__) for name in ("gguf", "gguf_names"))
    except ImportError:
        _refuse(path, "a safetensors file", "a GGUF file, which this version does not read")
    file = reader.open_gguf(path)
    return names.hf_weights(file), names.hf_config(file)
