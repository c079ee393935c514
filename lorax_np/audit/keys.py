"""Keys and config of an adapter directory, read without trust and sorted into sites."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..backend import HostArray
from ..config import TIERS, LoraConfig
from ..config.fields import MARK
from ..config.site import FUSED, OUT, Kind
from ..errors import ConfigError, FormatError
from ..io.peft.sites import Numbers
from ..io.safetensors import open_safetensors
from ..kinds import nearest, shown, silent
from .report import Finding

PREFIX = "base_model.model."
SCALES = "scale", "scaling", "lora_scale", "lora_scaling"
MOST = 1 << 24  # bytes of a config file
ENDINGS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bB",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}
EMBEDDINGS = "embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"
NAMED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?$"
)


class Place(NamedTuple):
    """The tensors of one site, by the fields of an Adapter, as they are stored."""

    name: str
    kind: Kind
    parts: dict[str, HostArray]
    attention: str = ""  # the attention module that it is q, k and v of, under its name, or the output

    @property
    def weight(self) -> str:
        """What its weight is called in a checkpoint."""
        return f"{self.name}.{FUSED if self.name == self.attention else 'weight'}"


class Read(NamedTuple):
    """One directory: its config, sites, what else it holds, and what was found on the way."""

    config: LoraConfig
    raw: Mapping[str, Any]
    places: dict[str, Place]
    others: dict[str, HostArray]  # by key without the prefix
    findings: list[Finding]
    left: str  # the start that the file says left its base, or ""
    broken: frozenset[str]  # fields of the config that had to be left out
    numbers: Numbers  # rank and α by name, in bounded time: the patterns are a stranger's

    def say(self, id: str, text: str, site: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(id, site, text))


def read(folder: Path) -> Read:
    """Read a directory, or raise FormatError where there is no config to judge by."""
    findings: list[Finding] = []
    raw = _json(folder / "adapter_config.json")
    config, broken = _config(raw, findings)
    tensors, left = _tensors(folder, findings)
    places: dict[str, Place] = {}
    others: dict[str, HostArray] = {}
    bare = 0
    for key in sorted(tensors, key=natural):
        value, name = tensors[key], key.removeprefix(PREFIX)
        bare += name == key and not key.endswith(".alpha")
        if found := NAMED.search(name):
            findings.append(Finding("adapter-name", "", f"{key}: expected it without .{found[2]}"))
            name = name[: found.start()] + f".{found[1]}" + (found[3] or "")
        ending = next((end for end in ENDINGS if name.endswith("." + end)), None)
        if ending is None:
            others[name] = value
            continue
        if ending == "lora_magnitude_vector.weight":
            findings.append(Finding("old-magnitude", "", f"{key}: expected it without .weight"))
        site = name[: -len(ending) - 1]
        kind: Kind = "embedding" if "embedding" in ending else _kind(site, config, value)
        place = places.setdefault(site, Place(site, kind, {}))
        place.parts[ENDINGS[ending]] = value
        if "embedding" in ending and place.kind != "embedding":
            places[site] = place._replace(kind="embedding")
    places = dict(_with_attention(places))
    if tensors and bare:
        findings.append(Finding("prefix", "", f"{bare} of {len(tensors)} keys"))
    if not places and not any(f.id in ("pickle", "unreadable") for f in findings):
        findings.append(
            Finding("empty", "", f"expected keys with {', '.join(ENDINGS)}, got {len(tensors)} others")
        )
    try:
        numbers = Numbers(folder / "adapter_config.json", config, len(places))
    except (ConfigError, FormatError) as error:
        findings.append(Finding("config", "", str(error)))
        broken |= {"rank_pattern", "alpha_pattern"}
        config = replace(config, rank_pattern={}, alpha_pattern={})
        numbers = Numbers(folder / "adapter_config.json", config, len(places))
    return Read(config, raw, places, others, findings, left, broken, numbers)


def _with_attention(places: Mapping[str, Place]) -> Iterator[tuple[str, Place]]:
    """The same places, those of attention modules known as such: below a wrapper lies the output's."""
    below = f".base_layer.{OUT}"
    modules = {name.removesuffix(below) for name in places if name.endswith(below)} & places.keys()
    for name, place in places.items():
        module = name.removesuffix(below)
        if module in modules:
            name = module if name == module else f"{module}.{OUT}"
            place = place._replace(name=name, attention=module)
        yield name, place


def _kind(site: str, config: LoraConfig, value: HostArray) -> Kind:
    module = site.removesuffix(".base_layer")
    if any(f".{module}".endswith("." + name.rpartition(".")[0]) for name in config.target_parameters or ()):
        return "experts"
    return "conv" if value.ndim > 2 else "linear"


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FormatError(f"{path}: expected the config of an adapter, got no such file")
    if path.stat().st_size > MOST:
        raise FormatError(f"{path}: expected at most {MOST} bytes, got {path.stat().st_size}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, got {' '.join(str(error).splitlines())[:200]}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, got {shown(found)}")
    return found


def _config(raw: Mapping[str, Any], findings: list[Finding]) -> tuple[LoraConfig, frozenset[str]]:
    """The config less the fields that are wrong, each of which is a finding, and their names."""
    kept = dict(raw)
    while True:
        try:
            config = LoraConfig.from_dict(kept)
            break
        except ConfigError as error:
            name = str(error).partition(":")[0]
            findings.append(Finding("config", "", str(error)))
            if name not in kept:
                raise FormatError(f"adapter_config.json: {error}") from None
            del kept[name]
    for name, value in config.extra.items():
        if silent(value, None) or name in SCALES:
            continue
        near = nearest(name, TIERS) or nearest(name.replace("_", ""), [n.replace("_", "") for n in TIERS])
        id = "ignored-field" if near else "unknown-field"
        findings.append(Finding(id, "", f"{name}: expected a known field, got {shown(value)}{near}"))
    for name, tier in TIERS.items():
        value, default = getattr(config, name), LoraConfig.__dataclass_fields__[name].metadata["default"]
        if tier == "exotic" and not silent(value, default):
            findings.append(Finding("exotic", "", f"{name}: {shown(value)}"))
    return config, frozenset(raw.keys() - kept.keys())


def _tensors(folder: Path, findings: list[Finding]) -> tuple[Mapping[str, HostArray], str]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickles = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        if not pickles:
            raise FormatError(f"{path}: expected the weights of an adapter, got no such file")
        convert = "convert it once, with torch.load(weights_only=True) and safetensors.torch.save_file"
        findings.append(Finding("pickle", "", f"{pickles[0]}: never loaded here; {convert}"))
        return {}, ""
    try:
        file = open_safetensors(path)
        return {name: file[name] for name in file}, file.metadata.get(MARK, "")
    except FormatError as error:
        findings.append(Finding("unreadable", "", str(error)))
        return {}, ""


def expected(found: Read, place: Place) -> tuple[int, float, float]:
    """Rank, α and s that the config gives a site, as far as it can be resolved."""
    name = place.attention or place.name.removesuffix(".base_layer")
    site = found.numbers.site(name, kind=place.kind)
    return site.r, site.alpha, site.scaling


def expected_or_none(found: Read, place: Place) -> tuple[int, float, float] | None:
    """What the config gives a site, or None where it contradicts itself there."""
    try:
        return expected(found, place)
    except ConfigError:
        return None


def natural(name: str) -> list[Any]:
    """Order in which layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
