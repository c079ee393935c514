"""A run's state on the disk: whole at every moment, however the process ends.  See specs/training.md.

state/step-N/ holds tensors.safetensors and state.json; state/latest is one line, the name of the last that is
whole. What ends in .tmp was never finished, and is not read.  (training.9)
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..backend import Array
from ..errors import FormatError
from ..io.checkpoint import read_json
from ..io.safetensors import HostArray, open_safetensors
from ..io.system import sync_folder
from ..io.writer import write_safetensors

TENSORS, ABOUT, LATEST = "tensors.safetensors", "state.json", "latest"
KEPT = 2  # saves that stay
NAME = re.compile(r"step-(\d{1,18})")


class Saved(NamedTuple):
    """A save as it was read."""

    step: int
    tensors: dict[str, HostArray]
    about: dict[str, Any]


def save_state(folder: Path, step: int, tensors: Mapping[str, Array], about: Mapping[str, Any]) -> None:
    """Save a state as folder/step-N, then say that it is the latest, then remove all but the last two.

    tensors : arrays by name
    about   : what JSON has, floats to the last bit

    Raises the system's OSError as one line, as for a full disk; then the save before is the latest, as it was.
    """
    before = latest_step(folder)
    if before == step:
        return
    part, place = folder / f"step-{step}.tmp", folder / f"step-{step}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_safetensors(part / TENSORS, tensors)
        write_whole(part / ABOUT, (json.dumps(dict(about), allow_nan=False) + "\n").encode())
        sync_folder(part)
        shutil.rmtree(place, ignore_errors=True)  # of a process that ended before it was the latest
        part.rename(place)
        sync_folder(folder)
        write_whole(folder / LATEST, f"{place.name}\n".encode())
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        last = "nothing is saved" if before is None else f"step {before} is saved, whole"
        raise OSError(f"{place}: expected room for a save, got: {error.strerror or error}; {last}") from None
    tidy(folder)


def tidy(folder: Path) -> None:
    """Remove what is neither the latest save nor the one before it: older ones, and what was never finished."""
    latest = latest_step(folder)
    numbers = [int(found[1]) for path in folder.glob("step-*") if (found := NAME.fullmatch(path.name))]
    kept = sorted(n for n in numbers if latest is not None and n <= latest)[-KEPT:]
    for path in folder.glob("step-*"):
        if path.name not in {f"step-{n}" for n in kept}:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def latest_step(folder: Path) -> int | None:
    """The step of the last whole save, None where there is none. Raises FormatError for another line."""
    try:
        line = (folder / LATEST).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    found = NAME.fullmatch(line.rstrip("\n"))
    if found is None:
        raise FormatError(f"{folder / LATEST}: expected one line step-N, got {line[:40]!r}")
    return int(found[1])


def load_state(folder: Path) -> Saved:
    """Read the last whole save. Raises FormatError where there is none, or where a file of it is damaged."""
    step = latest_step(folder)
    if step is None:
        raise FormatError(f"{folder}: expected a save to go on from, got none")
    place = folder / f"step-{step}"
    if not place.is_dir():
        raise FormatError(f"{folder / LATEST}: expected the directory {place.name} beside it, got none")
    about = read_json(place / ABOUT)
    if about.get("step") != step:
        raise FormatError(f"{place / ABOUT}: step: expected {step}, got {about.get('step')!r}")
    file = open_safetensors(place / TENSORS)
    return Saved(step, {name: file[name] for name in file.names}, about)


def write_whole(path: Path, data: bytes) -> None:
    """Put bytes in the place of a file: on the disk, and at once. The system's OSError names the file."""
    part = path.with_name(f".{path.name}.tmp")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync_folder(path.parent)
