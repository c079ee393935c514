"""What PEFT passes over in silence, said of an adapter file; none of it is an error."""

from collections.abc import Iterable, Mapping

from ...config import LoraConfig
from ...kinds import nearest
from ..safetensors import show
from .keys import LISTED, Keys
from .sites import Place, Resolver, targeted


def notes_on(config: LoraConfig, keys: Keys, places: Mapping[str, Place], resolver: Resolver) -> list[str]:
    """Return a sentence for each name in the config that means nothing here, and for what had to be assumed."""
    notes: list[str] = list(resolver.assumed)
    modules = [place.module for place in places.values()]
    targets = targeted(config)
    missing = targets.without(modules) if targets else []
    notes += _each("target_modules", missing, "has no adapter", modules)
    there = {".".join(name.split(".")[:i]) for name in keys.plain for i in range(1, name.count(".") + 1)}
    saved = [n for n in config.modules_to_save or () if not any(module.endswith(n) for module in there)]
    notes += _each("modules_to_save", saved, "has no tensors", there)
    for field, unused in resolver.numbers.unused().items():
        notes += _each(field, unused, "fits no site", modules)
    if config.bias != "none" and not any(name.rpartition(".")[2] == "bias" for name in keys.plain):
        notes.append(f"bias: {config.bias!r}, and no bias is there")
    return notes


def _each(field: str, names: list[str], what: str, near: Iterable[str]) -> list[str]:
    """A note for each of the first few names, with the name that resembles it most, and one for the others."""
    ends = sorted({known.rpartition(".")[2] for known in near})[:1000]
    notes = [f"{field}: {show(name)} {what}{nearest(name, ends)}" for name in names[:LISTED]]
    more = len(names) - LISTED
    return notes + [f"{field}: {more} more names of which each {what}"] * (more > 0)
