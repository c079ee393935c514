"""A vectors directory on disk: its bytes, and how it appears whole or not at all.  Format: specs/vectors.md."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import FormatError
from ..cases import HostArray
from ..tensorfile import encode
from .bugs import Bug, bugs
from .case import Group, Vector, number_of
from .groups import groups
from .notes import CONVENTIONS, NOTES
from .schema import COMPARED, GENERATOR, SCHEMA, SCHEMA_NAME, SEMANTICS

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
MOST = 1_000_000  # bytes of one file
Progress = Callable[[str, int, int], None]  # what is being made, how many files are done, of about how many


@dataclass(frozen=True)
class Summary:
    """What was written."""

    tests: int
    groups: int
    bugs: int
    files: int
    bytes: int

    def __str__(self) -> str:
        """One line."""
        size = f"{self.files} files, {self.bytes / 1e6:.2f} MB"
        return f"{self.tests} tests in {self.groups} groups, outputs of {self.bugs} known faults, {size}"


def write_vectors(
    directory: str | os.PathLike[str], seed: int = 0, progress: Progress | None = None
) -> Summary:
    """Write the golden vectors of a seed; the same bytes for the same seed and generator version.

    The directory is made beside its place and renamed there. One that exists is replaced if it is empty or a
    vectors directory with nothing else in it. Raises FormatError where it is something else, OSError where
    nothing can be written there.
    """
    place = Path(directory).resolve()
    replaceable(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        (beside / "bugs").mkdir(parents=True)
        summary = _fill(beside, seed, progress)
        _swap(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return summary


def replaceable(place: Path) -> None:
    """Raise FormatError where a directory holds anything that is not a vectors directory's."""
    if not place.exists():
        return
    if not place.is_dir():
        raise FormatError(f"{place}: expected a directory to write, got a file")
    top = sorted(path.name for path in place.iterdir())
    if not top:
        return
    other = top
    if MANIFEST in top and SUMS in top:
        lines = (place / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
        listed = {SUMS} | {line.partition("  ")[2] for line in lines}
        other = sorted({path.relative_to(place).as_posix() for path in files_of(place)} - listed)
    if other:
        wanted = "a new or empty directory, or one of vectors and nothing else"
        raise FormatError(f"{place}: expected {wanted}, got one that holds {other[0]!r}")


def files_of(root: Path) -> list[Path]:
    """Whatever is below a directory but directories."""
    return [path for path in root.rglob("*") if not path.is_dir()]


def _swap(made: Path, place: Path) -> None:
    """Put one directory in the place of another."""
    if not place.exists():
        made.replace(place)
        return
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    place.replace(old)
    try:
        made.replace(place)
    except BaseException:
        old.replace(place)
        raise
    shutil.rmtree(old)


def _fill(root: Path, seed: int, progress: Progress | None) -> Summary:
    made: list[Group] = []
    total, done = 100, 0

    def write(name: str, data: bytes) -> None:
        nonlocal done
        if len(data) >= MOST:
            raise ValueError(f"{name}: expected less than {MOST} bytes, got {len(data)}")
        (root / name).write_bytes(data)
        done += 1
        if progress is not None:
            progress(name, done, max(total, done))

    for group in groups(seed):
        made.append(group)
        tensors = tensors_of(group)
        write(f"{group.name}.safetensors", encode(tensors, {"format": "lorax_np.vectors/1"}))
        if group.text:
            write(f"{group.name}.txt", to_text(tensors))
    found: list[Bug] = []
    for bug in bugs(made):
        found.append(bug)
        outputs = {f"{id}.{name}": v for id, named in bug.outputs.items() for name, v in named.items()}
        write(f"bugs/{bug.fault.id}.safetensors", encode(outputs, {"format": "lorax_np.vectors/1"}))
    write(SCHEMA_NAME, to_json(SCHEMA))
    write(MANIFEST, to_json(manifest(made, found, seed)))
    write(SUMS, sums(root))
    size = sum(path.stat().st_size for path in files_of(root))
    return Summary(sum(len(group.vectors) for group in made), len(made), len(found), done, size)


# ---- bytes of the files ------------------------------------------------------------------------------------


def to_json(data: Any) -> bytes:
    """JSON in ASCII with no NaN, one space of indent, and a last newline."""
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode("ascii")


def sums(root: Path) -> bytes:
    """The SHA-256 of every file but the list itself, as sha256sum prints it, by name."""
    names = sorted(path.relative_to(root).as_posix() for path in files_of(root))
    lines = [
        f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in names if name != SUMS
    ]
    return "".join(lines).encode()


def tensors_of(group: Group) -> dict[str, HostArray]:
    """The arrays of a group by name: tcId.name, and tcId.sigma.profile.name."""
    found: dict[str, HostArray] = {}
    for v in group.vectors:
        found |= {f"{v.tcId}.{name}": value for name, value in (*v.inputs.items(), *v.outputs.items())}
        for profile, named in v.sigma.items():
            found |= {f"{v.tcId}.sigma.{profile}.{name}": value for name, value in named.items()}
    return found


def to_text(tensors: Mapping[str, HostArray]) -> bytes:
    """The twin in text: a head line for each tensor, then its integers, of which each is worth 2^exponent.

    >>> print(to_text({"7.x": np.array([[0.5, -2.0]], np.float32)}).decode(), end="")
    7.x 2 1 2 -1
    1 -4
    """
    lines = []
    for name, value in sorted(tensors.items()):
        exponent = 0
        while not np.array_equal(np.ldexp(value, -exponent), np.rint(np.ldexp(value, -exponent))):
            exponent -= 1
        whole = np.ldexp(value.astype(np.float64), -exponent).astype(np.int64)
        shape = "".join(f" {size}" for size in value.shape)
        lines.append(f"{name} {value.ndim}{shape} {exponent}")
        lines += [" ".join(map(str, row.tolist())) for row in whole.reshape(-1, (value.shape or (1,))[-1] or 1)]
    return ("\n".join(lines) + "\n").encode("ascii")


# ---- the manifest ------------------------------------------------------------------------------------------


def manifest(made: list[Group], found: list[Bug], seed: int) -> dict[str, Any]:
    """The manifest of some groups and faults. Raises ValueError where two tests would share a number."""
    numbers: dict[int, str] = {}
    for vector in (v for group in made for v in group.vectors):
        if vector.tcId in numbers:
            raise ValueError(f"tcId: expected one test of number {vector.tcId}, got {vector.id}, another")
        numbers[vector.tcId] = vector.id
    flags = {flag for group in made for v in group.vectors for flag in v.flags}
    return {
        "schema": SCHEMA_NAME,
        "generatorVersion": GENERATOR,
        "semantics": SEMANTICS,
        "comparedWith": COMPARED,
        "seed": seed,
        "numberOfTests": len(numbers),
        "notes": {flag: NOTES[flag] for flag in sorted(flags)},
        "conventions": CONVENTIONS,
        "testGroups": [_group(group) for group in made],
        "bugs": [_bug(bug) for bug in found],
    }


def _group(group: Group) -> dict[str, Any]:
    entry = {"type": group.type, "name": group.name, "compare": group.compare}
    entry["file"] = f"{group.name}.safetensors"
    if group.text:
        entry["text"] = f"{group.name}.txt"
    return {**entry, "tests": [_test(vector) for vector in group.vectors]}


def _test(v: Vector) -> dict[str, Any]:
    entry = {"tcId": v.tcId, "id": v.id, **v.settings, "flags": list(v.flags), "result": v.result}
    entry["profiles"] = list(v.sigma)
    if v.comment:
        entry["comment"] = v.comment
    if v.instead:
        entry["instead"] = number_of(v.instead)
    return entry


def _bug(bug: Bug) -> dict[str, Any]:
    return {
        "id": bug.fault.id,
        "bugType": bug.fault.kind,
        "description": bug.fault.title,
        "file": f"bugs/{bug.fault.id}.safetensors",
        "shownBy": list(bug.outputs),
    }
