"""What all formats share: an adapter in memory, what is known of its base, and a plan of what to write."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ...backend import Array, HostArray, to_host
from ...config import Site
from ...errors import ConfigError, DtypeError, FormatError, ShapeError
from ...kinds import shown
from ...params import Adapter, AnyAdapter, ConvAdapter
from ..checkpoint import open_checkpoint
from ..gguf import open_gguf
from ..gguf_names import hf_weights
from ..peft import AdapterFiles
from ..safetensors import SafetensorsFile, open_safetensors, show

Factors = dict[str, AnyAdapter]
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_positions", "shared", "tok_embeddings")


class Base(NamedTuple):
    """A checkpoint: the shape of each weight by name, its config.json, and the weights, read when asked for."""

    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    weights: Mapping[str, Array]

    @property
    def modules(self) -> list[str]:
        """Names of what has a weight of at least two axes."""
        return [name[:-7] for name, shape in self.shapes.items() if name.endswith(".weight") and len(shape) > 1]

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Shape of a module's weight, or None."""
        return self.shapes.get(f"{module}.weight")


def base_of(path: str | os.PathLike[str]) -> Base:
    """Open a checkpoint; none of its values is read. Raises as open_checkpoint does."""
    if Path(path).suffix == ".gguf":
        weights = hf_weights(open_gguf(path))
        return Base({name: weights.shape(name) for name in weights}, weights.config, weights)
    found = open_checkpoint(path)
    return Base({name: found.shape(name) for name in found}, found.config, found)


@dataclass(frozen=True)
class Options:
    """What some formats need to be told.

    base        : the base checkpoint, of which names, shapes and config are read
    alpha       : α, of a file that does not say it
    names       : kohya's name of a module -> its dotted name
    prefix      : kohya's word for the part of the model, such as lora_unet
    enable_lora : which of the equal parts of a fused layer have an update, for loralib's MergedLinear
    fold        : whether B may be rounded once more, where a target has one scaling for all
    """

    base: Base | None = None
    alpha: float | None = None
    names: Mapping[str, str] | None = None
    prefix: str | None = None
    enable_lora: Sequence[bool] | None = None
    fold: bool = False


class Read(NamedTuple):
    """An adapter that was read, and what had to be assumed or could not be kept, a sentence each."""

    files: AdapterFiles
    notes: list[str]


class Plan(NamedTuple):
    """What a conversion would write: names of files in a directory if it is one, and how to write them."""

    names: list[str]
    notes: list[str]
    store: Callable[[Path], None]


def refuse(where: object, wanted: str, came: object) -> NoReturn:
    """Raise FormatError: where, what was wanted, what came."""
    raise FormatError(f"{where}: expected {wanted}, got {came}") from None


def number(where: object, value: object) -> float:
    """A number of a file as a float. Raises FormatError for anything else, and for what no float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        refuse(where, "a number", shown(value))
    return float(value)


def tensors_of(path: Path) -> SafetensorsFile:
    """Open the tensors of an adapter, once they hold something."""
    file = open_safetensors(path)
    if not len(file):
        refuse(path, "an adapter's tensors", "none")
    return file


def grouped(
    file: SafetensorsFile, ends: Mapping[str, str], *, alone: Set[str] = frozenset()
) -> dict[str, dict[str, HostArray]]:
    """Tensors by module and then by part: ends gives the part that the end of a name stands for.

    Raises FormatError for another end, and for a module that has neither A and B nor just parts of `alone`.
    """
    found: dict[str, dict[str, HostArray]] = {}
    for name in file.names:
        for end, part in ends.items():
            if name.endswith(end) and name != end:
                found.setdefault(name[: -len(end)], {})[part] = file[name]
                break
        else:
            refuse(file.path, f"names that end in {', '.join(ends)}", show(name))
    for module, parts in found.items():
        missing = {"A", "B"} - parts.keys()
        if missing and not parts.keys() <= alone:
            refuse(f"{file.path}: {show(module)}", f"{min(missing)} beside {', '.join(sorted(parts))}", "none")
    return found


def made(where: object, parts: Mapping[str, HostArray]) -> AnyAdapter:
    """An adapter of parts, a convolution's where A has kernel axes. Raises FormatError where they do not."""
    kind = ConvAdapter if parts["A"].ndim > 2 else Adapter
    try:
        return kind(**parts)
    except (ConfigError, DtypeError, ShapeError) as error:
        refuse(where, "parts that fit each other", f"{type(error).__name__}: {error}")


def with_bias(where: object, adapter: AnyAdapter, b: HostArray) -> AnyAdapter:
    """An adapter with a trained base bias besides. Raises FormatError where it does not fit."""
    try:
        return replace(adapter, b=b)
    except (DtypeError, ShapeError) as error:
        refuse(where, "a bias that fits B", f"{type(error).__name__}: {error}")


def two_axes(where: object, parts: Mapping[str, HostArray]) -> None:
    """Check that A and B are matrices."""
    for part in ("A", "B"):
        if parts[part].ndim != 2:
            refuse(f"{where}: {part}", "two axes", f"the shape {parts[part].shape}")


# ---- what a target can hold --------------------------------------------------------------------------------

RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts after which the base is another


def check_holds(
    files: AdapterFiles,
    target: str,
    options: Options,
    *,
    dora: bool = False,
    biases: bool = False,
    kinds: Sequence[str] = ("linear",),
) -> list[str]:
    """Raise FormatError, naming the site, for what a target format has no place for; return notes."""
    start = files.config.init_lora_weights
    if isinstance(start, str) and start.startswith(RESIDUAL):
        refuse(
            f"{target}: init_lora_weights",
            "a start that leaves the base as it is",
            f"{start!r}, whose A and B belong to a changed base: make it a plain adapter of rank 2r first",
        )
    notes = []
    for name, array in files.saved.items():
        if biases and name.endswith(".bias"):
            continue
        if name not in {site.weight for site in files.sites.values()}:
            refuse(target, f"no more than A and B{' and m' if dora else ''}", f"{show(name)} besides")
        _check_repeats(f"{target}: {name}", array, name, options.base)
        notes.append(f"{name}, which PEFT copies from the base into its file, is the base's and left out")
    for name, adapter in files.adapters.items():
        kind = files.sites[name].kind if name in files.sites else "linear"
        where = f"{target}: {name}"
        if adapter.A is None:
            refuse(where, "A and B", "a trained bias alone")
        if kind not in kinds:
            refuse(where, f"{' or '.join(kinds)} sites", f"{kind}, for which the format has no place")
        if adapter.m is not None and not dora:
            refuse(
                where, "no magnitude, for which the format has no place", "DoRA's m; merge the adapter instead"
            )
        if adapter.bB is not None:
            refuse(where, "no bias of B, for which the format has no place", "bB (lora_bias)")
        if adapter.b is not None and not biases:
            refuse(where, "no trained bias, for which the format has no place", "b (bias)")
        if options.base is not None:
            check_fits(where, name, adapter, kind, options.base)
    return notes


def check_fits(where: object, name: str, adapter: AnyAdapter, kind: str, base: Base) -> None:
    """Check that the base has a module's weight, in the shape that A and B say, either way round if linear."""
    if adapter.A is None or adapter.B is None:
        return
    shape = base.shape(name) or base.shape(f"{name}.conv")  # loralib's Conv2d has its base below itself
    if shape is None:
        refuse(where, "a module of the base", "a name that it does not have")
    d_out, d_in, *kernel = adapter.B.shape[0], *adapter.A.shape[1:]
    wanted = (d_in, d_out) if kind == "embedding" else (d_out, d_in, *kernel)
    if shape != wanted and not (kind == "linear" and shape == wanted[::-1]):
        refuse(where, f"a weight of the base of shape {wanted}, set by A and B", shape)


def _check_repeats(where: str, array: HostArray, name: str, base: Base | None) -> None:
    """PEFT saves the base weight of an adapted embedding or head; another one than the base's is training."""
    if base is None:
        refuse(where, "a base (--base), to see that this weight beside A and B is the base's own", "none")
    if name not in base.shapes:
        refuse(where, "a weight of the base", "a name that is not there")
    own = to_host(base.weights[name])
    if own.shape != array.shape or not np.array_equal(own.astype(np.float64), array.astype(np.float64)):
        refuse(where, "the base's own weight, as PEFT copies it", "another: it was trained, or resized")


def matrices(site: Site, adapter: AnyAdapter) -> tuple[HostArray, HostArray]:
    """A and B on the host, whose presence check_holds has seen to."""
    if adapter.A is None or adapter.B is None:
        refuse(site.name, "A and B", "none")
    return to_host(adapter.A), to_host(adapter.B)
