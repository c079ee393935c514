"""Golden vectors: a directory of small layers with the truth, for implementations in any language.

write_vectors makes one; check_vectors proves one, down to each byte and each truth. Format: specs/vectors.md.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ... import FormatError, open_safetensors
from ..cases import HostArray
from .bugs import differs
from .case import Group, Vector, number_of
from .schema import GENERATOR, INPUTS, OUTPUTS, PROFILES, SCHEMA, SCHEMA_NAME, schema_faults
from .truth import refusal, vector_problems
from .write import (
    MANIFEST,
    MOST,
    SUMS,
    Progress,
    Summary,
    files_of,
    sums,
    tensors_of,
    to_json,
    to_text,
    write_vectors,
)

__all__ = ["Group", "Summary", "Vector", "check_vectors", "load_vectors", "refusal", "vectors", "write_vectors"]

_SETTINGS = ("r", "alpha", "rslora", "p", "bias", "lora_bias", "dora")


def vectors(
    directory: str | os.PathLike[str], check: bool = False, seed: int = 0, progress: Progress | None = None
) -> tuple[int, list[str]]:
    """Write or check a directory; the exit code, 0 or 1 where there are problems, and the lines to print.

    Raises FormatError or OSError, bad usage, where the directory is not one to write to, or none to check.
    """
    start, place = time.perf_counter(), Path(directory)
    if not check:
        summary = write_vectors(place, seed, progress)
        return 0, [f"wrote {place}: {summary}, seed {seed}, {time.perf_counter() - start:.1f} s"]
    if not (place / MANIFEST).is_file():
        came = f"one without {MANIFEST}" if place.is_dir() else "a file" if place.exists() else "nothing there"
        raise FormatError(f"{place}: expected a directory of vectors, got {came}")
    problems = check_vectors(place, progress)
    seconds = f"{time.perf_counter() - start:.1f} s"
    if problems:
        return 1, [
            *(f"PROBLEM  {line}" for line in problems),
            f"FAIL  {place}: {len(problems)} problem{'s' * (len(problems) > 1)}, {seconds}",
        ]
    data = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    known = f"{data['numberOfTests']} tests, {len(data['bugs'])} known faults"
    return 0, [f"PASS  {place}: {known}, generator {data['generatorVersion']}, seed {data['seed']}, {seconds}"]


def load_vectors(directory: str | os.PathLike[str]) -> list[Group]:
    """Read the groups of a directory. Raises FormatError where it is damaged; truths are not recomputed."""
    root = Path(directory)
    data = _manifest(root)
    faults = list(schema_faults(data, SCHEMA)) or list(_manifest_problems(root, data))
    if faults:
        raise FormatError(f"{root / MANIFEST}: {faults[0]}")
    return [_group(root, entry, data) for entry in data["testGroups"]]


def check_vectors(directory: str | os.PathLike[str], progress: Progress | None = None) -> list[str]:
    """What is wrong with a vectors directory, a line each; nothing is, where the list is empty.

    First the SHA-256 of every file, the manifest's schema and each file's format; where all that holds, each
    truth is computed again, each text compared with its twin, and each known fault seen to differ.
    """
    root = Path(directory)
    try:
        problems = _file_problems(root)
        if problems:
            return problems
        data = _manifest(root)
        problems = list(schema_faults(data, SCHEMA)) or list(_manifest_problems(root, data))
        if problems:
            return problems
        made = [_group(root, entry, data) for entry in data["testGroups"]]
        tests = {vector.id: vector for group in made for vector in group.vectors}
        for i, group in enumerate(made):
            if progress is not None:
                progress(group.name, i, len(made) + 1)
            problems += _group_problems(root, group, tests, data["generatorVersion"] == GENERATOR)
        if progress is not None:
            progress("bugs", len(made), len(made) + 1)
        problems += _bug_problems(root, data, made)
    except (FormatError, OSError) as error:
        problems = [str(error)]
    return problems


# ---- files and manifest ------------------------------------------------------------------------------------


def _file_problems(root: Path) -> list[str]:
    """Where the list of sums is not what the files give."""
    if not (root / SUMS).is_file():
        return [f"{SUMS}: expected a file, got none"]
    for path in files_of(root):
        if not path.is_file() or path.stat().st_size >= MOST:
            return [f"{path.relative_to(root)}: expected a file of less than {MOST} bytes"]
    listed, found = (root / SUMS).read_bytes(), sums(root)
    if listed == found:
        return []
    want, have = _by_name(listed), _by_name(found)
    problems = [f"{name}: expected a file, got none" for name in want.keys() - have.keys()]
    problems += [f"{name}: expected no file that {SUMS} does not list" for name in have.keys() - want.keys()]
    changed = [name for name in want.keys() & have.keys() if want[name] != have[name]]
    problems += [f"{name}: expected SHA-256 {want[name]}, got {have[name]}" for name in changed]
    return sorted(problems) or [f"{SUMS}: expected lines as sha256sum prints them, sorted by name"]


def _by_name(listed: bytes) -> dict[str, str]:
    lines = (line.partition("  ") for line in listed.decode("utf-8", "replace").splitlines())
    return {name: digest for digest, _, name in lines}


def _manifest(root: Path) -> Any:
    try:
        return json.loads((root / MANIFEST).read_bytes().decode("ascii"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{root / MANIFEST}: expected JSON in ASCII, got {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _manifest_problems(root: Path, data: Mapping[str, Any]) -> Iterator[str]:
    """What no schema can say: numbers follow from ids, flags have notes, files are there and no others."""
    tests = [test for group in data["testGroups"] for test in group["tests"]]
    numbers = [test["tcId"] for test in tests]
    if len(set(numbers)) != len(numbers) or len(numbers) != data["numberOfTests"]:
        yield f"numberOfTests: expected {len(set(numbers))} different tcIds, got {data['numberOfTests']}"
    for test in tests:
        if test["tcId"] != number_of(test["id"]):
            yield f"{test['id']}: expected tcId {number_of(test['id'])}, got {test['tcId']}"
        for flag in test["flags"]:
            if flag not in data["notes"]:
                yield f"{test['id']}: expected a note on {flag}, got none"
        if test.get("instead", numbers[0]) not in numbers:
            yield f"{test['id']}: expected a test of number {test['instead']}, got none"
    for bug in data["bugs"]:
        for number in set(bug["shownBy"]) - set(numbers):
            yield f"{bug['id']}: expected a test of number {number}, got none"
    named = {MANIFEST, SUMS, SCHEMA_NAME} | {bug["file"] for bug in data["bugs"]}
    named |= {group[key] for group in data["testGroups"] for key in ("file", "text") if key in group}
    found = {path.relative_to(root).as_posix() for path in files_of(root)}
    for name in sorted(named ^ found):
        yield f"{name}: expected " + (
            "a file, got none" if name in named else "no file that the manifest lacks"
        )
    if SCHEMA_NAME in found and (root / SCHEMA_NAME).read_bytes() != to_json(SCHEMA):
        yield f"{SCHEMA_NAME}: expected the schema of this version, got another"


# ---- tensors -----------------------------------------------------------------------------------------------


def _tensors(path: Path) -> dict[int, dict[str, HostArray]]:
    """The arrays of a file by tcId and name. Raises FormatError for other names and dtypes."""
    found: dict[int, dict[str, HostArray]] = {}
    names = [re.escape(name) for name in (*INPUTS, *OUTPUTS)]
    pattern = rf"([1-9]\d{{0,9}})\.((?:sigma\.(?:{'|'.join(PROFILES)})\.)?(?:{'|'.join(names)}))"
    file = open_safetensors(path)
    for name in file:
        parts = re.fullmatch(pattern, name)
        if parts is None:
            raise FormatError(f"{path}: expected tensors as tcId.name, got {name!r}")
        if file.dtype(name) != "F32":
            raise FormatError(f"{path}: {name}: expected F32, got {file.dtype(name)}")
        found.setdefault(int(parts[1]), {})[parts[2]] = np.array(file[name])
    return found


def _group(root: Path, entry: Mapping[str, Any], data: Mapping[str, Any]) -> Group:
    path = root / entry["file"]
    tensors = _tensors(path)
    strange = tensors.keys() - {test["tcId"] for test in entry["tests"]}
    if strange:
        raise FormatError(f"{path}: expected tensors of the group's tests, got some of {min(strange)}")
    ids = {test["tcId"]: test["id"] for group in data["testGroups"] for test in group["tests"]}
    made = []
    for test in entry["tests"]:
        mine = tensors.get(test["tcId"], {})
        sigma = {
            profile: {
                name: mine[f"sigma.{profile}.{name}"] for name in OUTPUTS if f"sigma.{profile}.{name}" in mine
            }
            for profile in test["profiles"]
        }
        vector = Vector(
            test["id"],
            {name: test[name] for name in _SETTINGS},
            {name: mine[name] for name in INPUTS if name in mine},
            {name: mine[name] for name in OUTPUTS if name in mine},
            tuple(test["flags"]),
            test["result"],
            sigma,
            test.get("comment", ""),
            ids[test["instead"]] if "instead" in test else "",
        )
        made.append(vector)
    return Group(entry["name"], tuple(made), entry["compare"], entry["type"], "text" in entry)


def _group_problems(root: Path, group: Group, tests: Mapping[str, Vector], same: bool) -> Iterator[str]:
    """What is wrong with the tensors of a group, and with its twin in text."""
    file = f"{group.name}.safetensors"
    tensors = tensors_of(group)
    if len(tensors) != sum(map(len, _tensors(root / file).values())):
        yield f"{file}: expected sigma of the profiles that the manifest names, got others"
    if group.text and (root / f"{group.name}.txt").read_bytes() != to_text(tensors):
        yield f"{group.name}.txt: expected the numbers of {file}, got others"
    for vector in group.vectors:
        for problem in vector_problems(vector, group, tests, same):
            yield f"{vector.id} (tcId {vector.tcId}): {problem}"


def _bug_problems(root: Path, data: Mapping[str, Any], made: list[Group]) -> Iterator[str]:
    """Which files of known faults do not differ from the truth, each test of theirs in some tensor."""
    home = {vector.tcId: (vector, group) for group in made for vector in group.vectors}
    for bug in data["bugs"]:
        tensors = _tensors(root / bug["file"])
        if tensors.keys() != set(bug["shownBy"]):
            yield f"{bug['file']}: expected tensors of {bug['shownBy']}, got {sorted(tensors)}"
            continue
        for number, outputs in tensors.items():
            vector, group = home[number]
            if any(name in outputs and outputs[name].shape != v.shape for name, v in vector.outputs.items()):
                yield f"{bug['file']}: expected the shapes of tcId {number}, got others"
            elif not differs(outputs, vector, group.compare):
                yield f"{bug['file']}: expected something wrong with tcId {number}, got nothing"
