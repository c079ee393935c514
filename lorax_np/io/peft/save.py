"""An adapter directory, saved: all that it holds, or nothing."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...backend import Array, to_host
from ...config import LoraConfig, Site, check_usable
from ...errors import ConfigError, FormatError
from ...params import AnyAdapter, ConvAdapter
from ..replace import new_directory
from ..safetensors import show
from ..writer import write_safetensors
from .card import CARD, WRITTEN
from .card import card as card_of
from .check import EMBEDDINGS
from .keys import PREFIX, Keys, check_names, key_of, plain_key
from .load import PICKLES, WEIGHTS, load_adapter
from .settings import CONFIG, config_bytes
from .sites import Resolver

METADATA = {"format": "pt"}  # what PEFT writes, and transformers wants to read


def save_adapter(
    dir: str | os.PathLike[str],
    adapters: Mapping[str, AnyAdapter],
    config: LoraConfig,
    *,
    sites: Mapping[str, Site] | None = None,
    saved: Mapping[str, Array] | None = None,
    metadata: Mapping[str, str] | None = None,
    card: bool = True,
    residual_base: bool = False,
) -> None:
    """Save adapters as a directory that PEFT loads, byte for byte as PEFT would write the weights.

    dir : the directory; its parents are made. What is in it and no adapter's, a tokenizer or another adapter's
        directory, stays; an adapter in it is replaced whole or, where anything fails, not at all
    adapters : by the names of modules, or of parameters under target_parameters, as inject and load_adapter
        give them; one without A and B is a bias alone
    config : LoraConfig
    sites : as inject and load_adapter give them; without them each Adapter is a linear layer's, or where
        target_parameters has its name, experts'
    saved : tensors beside the adapters by their names in a checkpoint, as in AdapterFiles
    metadata : words for the weights' header, beside {"format": "pt"}
    card : whether to write README.md; one that somebody else wrote is kept
    residual_base : as in load_adapter; False wants the base weights that a start left among saved

    Raises ConfigError or FormatError for what load_adapter would not load again, before anything is replaced;
    DtypeError for a dtype that files lack; the system's OSError. Source: specs/adapter_files.md.
    """
    check_usable(config, starting=False)
    tensors = tensors_of(adapters, config, sites=sites, saved=saved)
    target = Path(dir)
    with new_directory(target, {CONFIG, WEIGHTS, *PICKLES}) as part:
        write_safetensors(part / WEIGHTS, tensors, METADATA | dict(metadata or {}))
        _write(part / CONFIG, config_bytes(config))
        again = _loaded(part, target, residual_base)
        if again.sites.keys() != (sites or again.sites).keys():
            wanted = f"{len(again.sites)} of them, as loading finds them"
            raise ConfigError(f"sites: expected {wanted}, got {len(sites or {})}")
        if card and not _foreign_card(target / CARD):
            _write(part / CARD, card_of(config, adapters, again.sites).encode())


def tensors_of(
    adapters: Mapping[str, AnyAdapter],
    config: LoraConfig,
    *,
    sites: Mapping[str, Site] | None = None,
    saved: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """Return the tensors of an adapter's file by their keys, as host arrays where they change shape.

    Raises ConfigError where adapters, sites and saved do not fit each other, and FormatError for a name that no
    module has.
    """
    check_names("adapters", adapters)
    check_names("saved", saved or {})
    kinds = {name: _kind(name, adapter, config, sites) for name, adapter in adapters.items()}
    modules = {
        name: name.rpartition(".")[0] if kind == "experts" else name
        for name, kind in kinds.items()
        if kind != "bias"
    }
    levels = _levels(modules, kinds, config)
    depths: dict[str, int] = {}
    for module in modules.values():
        depths[module] = depths.get(module, 0) + 1
    plain: dict[str, Any] = dict(saved or {})
    tensors: dict[str, Any] = {}
    for name, adapter in adapters.items():
        if adapter.b is not None:
            bias = f"{modules.get(name, name)}.bias"
            if bias in plain:
                raise ConfigError(f"saved: expected no {show(bias)} beside the adapter's own, got one")
            plain[bias] = adapter.b
        for part in ("A", "B", "m", "bB"):
            array = getattr(adapter, part)
            if array is not None:
                key = key_of(modules[name], levels[name], part, depths, embedding=kinds[name] == "embedding")
                tensors[PREFIX + key] = _stored(array, part, adapter)
    return tensors | {PREFIX + plain_key(name, depths): array for name, array in plain.items()}


def _stored(array: Array, part: str, adapter: AnyAdapter) -> Any:
    """A convolution's magnitude has the axes of its output."""
    if part != "m" or not isinstance(adapter, ConvAdapter):
        return array
    return to_host(array).reshape(1, -1, *[1] * (len(adapter.A.shape) - 2))


def _kind(name: str, adapter: AnyAdapter, config: LoraConfig, sites: Mapping[str, Site] | None) -> str:
    if adapter.A is None:
        return "bias"
    if sites is not None:
        if name not in sites:
            raise ConfigError(f"sites: expected one for each adapter, got none for {show(name)}")
        kind: str = sites[name].kind
        if (kind == "conv") != isinstance(adapter, ConvAdapter):
            wanted, came = f"an adapter of its kind, {kind}", type(adapter).__name__
            raise ConfigError(f"{show(name)}: expected {wanted}, got {came}")
        return kind
    if isinstance(adapter, ConvAdapter):
        return "conv"
    if any(name == t or name.endswith(f".{t}") for t in config.target_parameters or ()):
        return "experts"
    if name.rpartition(".")[2] in EMBEDDINGS and name.rpartition(".")[2] != "lm_head":
        raise ConfigError(f"sites: expected the Site of {show(name)}, which may be an embedding's, got None")
    return "linear"


def _levels(modules: Mapping[str, str], kinds: Mapping[str, str], config: LoraConfig) -> dict[str, int]:
    """How many wrappers of its module are outside each site's: the parameters declared first lie deepest."""
    resolver = Resolver(Path("config"), config, Keys({}, {}, ""), {})
    levels = {}
    for name, module in modules.items():
        levels[name] = 0
        if kinds[name] == "experts":
            order = resolver.parameters(module)
            there = [f"{module}.{p}" for p in order if f"{module}.{p}" in kinds]
            if name not in there:
                raise ConfigError(f"target_parameters: expected {show(name)}, which has an adapter, got none")
            levels[name] = len(there) - 1 - there.index(name)
    return levels


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _loaded(part: Path, target: Path, residual_base: bool) -> Any:
    """What has been written, loaded: nothing takes a place that could not be loaded from there."""
    try:
        return load_adapter(part, residual_base=residual_base)
    except (ConfigError, FormatError) as error:
        raise type(error)(str(error).replace(str(part), str(target))) from None


def _foreign_card(path: Path) -> bool:
    """Whether a card is there that somebody else wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return WRITTEN.encode() not in file.read(1 << 20)
