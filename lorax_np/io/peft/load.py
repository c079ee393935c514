"""An adapter directory, loaded: checked by names and shapes first, then read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ...backend import Array
from ...config import LoraConfig
from ...config.fields import MARK
from ...errors import ConfigError, DtypeError, FormatError, ShapeError
from ...params import Adapter, AnyAdapter, ConvAdapter
from ..safetensors import HostArray, SafetensorsFile, open_safetensors, show
from .base import fit
from .check import check_file
from .keys import sort_keys
from .settings import CONFIG, read_config
from .sites import AdapterFiles, Place, Resolver

WEIGHTS = "adapter_model.safetensors"
PICKLES = "adapter_model.bin", "adapter_model.pt", "adapter_model.pth"
TIMES = 5  # that a directory may be replaced while it is read
PIECE = 1 << 22  # numbers that are looked at at a time


def load_adapter(
    dir: str | os.PathLike[str], *, weights: Mapping[str, Array] | None = None, residual_base: bool = False
) -> AdapterFiles:
    """Load an adapter from a directory, PEFT's or ours.

    dir : a directory with adapter_config.json and adapter_model.safetensors; an adapter that PEFT calls other
        than default lies in a directory of that name below
    weights : the base's arrays by their names in a checkpoint, as open_checkpoint gives them: then every site
        has to be there, in a shape that fits; where all names lack one prefix, or have one too many, they are
        read so
    residual_base : the base at hand is the one that the adapter's start left, not the original

    Returns AdapterFiles, whose notes say what was found and is no error. Nothing is ever unpickled.
    Raises FormatError for files that are damaged, do not fit their config, or are right only beside a base that
    is not there; ConfigError for a config that is wrong or asks for what this version does not do; the system's
    OSError. Each is one line with the path. Source: specs/adapter_files.md.

    >>> from tempfile import TemporaryDirectory
    >>> from lorax_np.io.peft import save_adapter
    >>> config = LoraConfig(r=2, target_modules=["up"])
    >>> with TemporaryDirectory() as folder:
    ...     save_adapter(folder, {"up": Adapter(np.ones((2, 3)), np.ones((4, 2)))}, config)
    ...     found = load_adapter(folder)
    >>> found.adapters["up"].A.shape, found.sites["up"].scaling, found.notes
    ((2, 3), 4.0, ())
    """
    config, file = _opened(Path(dir))
    keys = sort_keys(file.path, file.names)
    shapes = {name: file.shape(name) for name in file.names}
    dtypes = {name: file.dtype(name) for name in file.names}
    resolver = Resolver(file.path, config, keys, shapes)
    left = file.metadata.get(MARK, "")
    places, notes = check_file(file.path, config, resolver, dtypes, left=left, residual_base=residual_base)
    biases = {} if config.bias == "none" else own_biases(places, keys.plain)
    adapters = {name: _adapter(file, place, biases.get(name)) for name, place in places.items()}
    others = {name: key for name, key in keys.plain.items() if key not in biases.values()}
    saved = {name: file[key] for name, key in others.items() if not _copy(name, others)}
    sites = {name: place.site for name, place in places.items()}
    notes += _zeros(adapters)
    found = AdapterFiles(adapters, config, sites, saved, file.metadata, tuple(notes))
    return found if weights is None else fit(file.path, found, weights)


def _opened(folder: Path) -> tuple[LoraConfig, SafetensorsFile]:
    """Config and weights of one directory, though somebody may put another in its place meanwhile."""
    for _ in range(TIMES):
        before = _identity(folder)
        try:
            found = read_config(_config_path(folder)), open_safetensors(_weights_path(folder))
        except (ConfigError, FormatError, OSError):
            if before == _identity(folder):
                raise
            continue
        if before == _identity(folder):
            return found
    raise FormatError(f"{folder}: expected a directory that stays while it is read, got {TIMES} in turn")


def _identity(folder: Path) -> tuple[int, ...]:
    """What tells one directory from another that takes its place."""
    found = folder.stat()
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _config_path(folder: Path) -> Path:
    """The config's file, or a FormatError that says what lies there instead."""
    if not folder.is_dir():
        if folder.suffix in (".bin", ".pt", ".pth"):
            _refuse_pickle(folder, "an adapter directory")
        raise FormatError(f"{folder}: expected an adapter directory, got a file")
    path = folder / CONFIG
    if not path.exists():
        below = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        came = f"adapters in directories below: {', '.join(below[:5])}" if below else "no such file"
        raise FormatError(f"{path}: expected the config of an adapter, got {came}")
    if path.is_dir():
        raise FormatError(f"{path}: expected a file, got a directory")
    return path


def _weights_path(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.exists():
        pickle = next((name for name in PICKLES if (folder / name).exists()), None)
        if pickle:
            _refuse_pickle(folder / pickle, WEIGHTS)
        raise FormatError(f"{path}: expected the weights of an adapter, got no such file")
    return path


def _refuse_pickle(path: Path, wanted: str) -> NoReturn:
    raise FormatError(
        f"{path}: expected {wanted}, got a pickle, which can run code and is never loaded here: "
        "convert it once, with torch.load(weights_only=True) and safetensors.torch.save_file"
    )


def _copy(name: str, names: Mapping[str, str]) -> bool:
    """Whether a bias is one of those that PEFT writes a second and a third time with bias="all".

    A module that trains whole has its bias under its own name. The other two are its copy within the wrapper,
    and the one that it stands in for.
    """
    module, _, last = name.rpartition(".")
    outer, _, wrapper = module.rpartition(".")
    return last == "bias" and wrapper in ("modules_to_save", "original_module") and f"{outer}.bias" in names


def own_biases(places: Mapping[str, Place], plain: Mapping[str, str]) -> dict[str, str]:
    """The key of the base bias that trains at each site that has one."""
    wanted = {n: f"{place.module}.bias" for n, place in places.items() if place.site.kind in ("linear", "conv")}
    return {name: plain[bias] for name, bias in wanted.items() if bias in plain}


def _adapter(file: SafetensorsFile, place: Place, bias: str | None) -> AnyAdapter:
    """Read one adapter. Raises FormatError where its parts are of several dtypes, or not finite."""
    parts: dict[str, Any] = {part: file[key] for part, key in place.wrapper.keys.items()}
    if bias is not None:
        parts["b"] = file[bias]
    for part, array in parts.items():
        if not _finite(array):
            key = bias if part == "b" else place.wrapper.keys[part]
            raise FormatError(f"{file.path}: {show(key)}: expected finite numbers, got NaN or infinity")
    if "m" in parts:
        parts["m"] = parts["m"].reshape(-1)
    try:
        return ConvAdapter(**parts) if place.site.kind == "conv" else Adapter(**parts)
    except (ConfigError, DtypeError, ShapeError) as error:
        raise FormatError(f"{file.path}: {show(place.site.name)}: {error}") from None


def _finite(array: HostArray) -> bool:
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + PIECE]).all()) for i in range(0, flat.size, PIECE))


def _zero(array: Any) -> bool:
    flat = array.reshape(-1)
    return not any(bool((flat[i : i + PIECE] != 0).any()) for i in range(0, flat.size, PIECE))


def _zeros(adapters: Mapping[str, AnyAdapter]) -> list[str]:
    """A note where B, or A, is all zero, so that the adapter changes nothing."""
    idle = [n for n, a in adapters.items() if a.A is not None and (_zero(a.B) or _zero(a.A))]
    if not idle:
        return []
    where = "every site" if len(idle) == len(adapters) else f"{len(idle)} of {len(adapters)} sites"
    return [f"s·BA is 0 at {where}, {show(idle[0])} the first: not trained, or not saved"]
