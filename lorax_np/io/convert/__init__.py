"""Adapters from and to the formats of other programs; each has a file here.  Tables: specs/conversions.md."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ...errors import FormatError
from ..peft import AdapterFiles
from .detection import Detected, detect
from .model import Options, Plan, Read, base_of

FORMATS = "peft", "mlx", "loralib", "kohya", "torchtune", "gguf"

__all__ = ["FORMATS", "Converted", "Detected", "convert", "detect"]


class Converted(NamedTuple):
    """What a conversion did: formats, files written, sites, and what was assumed, rounded or left out."""

    source_format: str
    target_format: str
    files: tuple[Path, ...]
    sites: int
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    target_format: str,
    dest: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    base: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    names: Mapping[str, str] | None = None,
    prefix: str | None = None,
    enable_lora: Sequence[bool] | None = None,
    fold: bool = False,
    dry_run: bool = False,
) -> Converted:
    """Convert an adapter, so that its update of every weight stays exactly the same, or refuse.

    source        : a directory or a file; its format is detected unless source_format says it
    target_format : peft, mlx or torchtune, where dest becomes a directory; loralib, kohya or gguf, a file
    base          : the base checkpoint: its names, shapes and config.json, and weights that a file repeats
    alpha         : α, of a file that does not say it (loralib, and torchtune without a config)
    names         : kohya's names of modules -> dotted names, where no base tells them apart
    prefix        : kohya's word for the part of the model (default: lora_unet when written)
    enable_lora   : which equal parts of a fused layer have an update, for loralib's MergedLinear
    fold          : allow B to be rounded once more, where the target has one scaling for all sites
    dry_run       : check everything and write nothing

    Returns what was done, with a note for each thing that was assumed, rounded or left out.
    Raises FormatError, one line, where the target has no place for something (DoRA, biases, saved modules,
    convolutions, several ranks or scalings), where something needed is not known, or where the source breaks
    its format; nothing is half written. What is at dest already is not overwritten, except by a single file.
    Source: the packages named in specs/conversions.md.

    >>> convert("adapter", "ggml", "out")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    lorax_np.errors.FormatError: target_format: expected one of peft, mlx, loralib, ..., gguf, got 'ggml'
    """
    for what, word in (("target_format", target_format), ("source_format", source_format)):
        if word is not None and word not in FORMATS:
            raise FormatError(f"{what}: expected one of {', '.join(FORMATS)}, got {word!r}")
    source, dest = Path(source), Path(dest)
    found = source_format or detect(source).format
    options = Options(
        base=base_of(base) if base is not None else None,
        alpha=alpha,
        names=names,
        prefix=prefix,
        enable_lora=enable_lora,
        fold=fold,
    )
    read = read_adapter(source, found, options)
    plan = plan_adapter(read.files, target_format, options)
    files = tuple(dest / name for name in plan.names) or (dest,)
    if not dry_run:
        plan.store(dest)
    return Converted(found, target_format, files, len(read.files.adapters), (*read.notes, *plan.notes))


def read_adapter(path: Path, format: str, options: Options) -> Read:
    """Read an adapter of a format; each format's file has such a function. Raises as convert does."""
    found: Read = import_module(f".{format}", __name__).read(path, options)
    return found


def plan_adapter(files: AdapterFiles, format: str, options: Options) -> Plan:
    """Say what would be written of an adapter in a format. Raises as convert does."""
    found: Plan = import_module(f".{format}", __name__).plan(files, options)
    return found
