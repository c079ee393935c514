"""The sites that a file's wrappers stand for, by the config; and what loading returns."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ...config import LoraConfig, Site, site_at
from ...config.regexes import Budget, Regex, plain
from ...config.site import FUSED, OUT, Kind, output_of
from ...errors import ConfigError, FormatError
from ...kinds import nearest
from ...params import AnyAdapter
from ..safetensors import HostArray, show
from .keys import Keys, Wrapper, some

Shape = tuple[int, ...]
PAIRS = 20_000_000  # keys of a pattern by names that are compared
ORDER = {"gate_up_proj": 0, "gate_proj": 0, "up_proj": 1, "down_proj": 2}  # as modules of experts declare them


class AdapterFiles(NamedTuple):
    """What an adapter directory holds.

    adapters : the adapter of each site, by the site's name; arrays are views of the file, not to be written to
    config : LoraConfig
    sites : each site's numbers, by the same names
    saved : tensors beside the adapters, by their names in a checkpoint: modules that were trained whole, biases
        of modules without an adapter, embeddings, the base weights that a start left; and the trained rows of
        an embedding, as its name and .token_adapter.trainable_tokens_delta
    metadata : what the weights' file says of itself
    notes : what was taken as good and may surprise, a sentence each
    """

    adapters: dict[str, AnyAdapter]
    config: LoraConfig
    sites: dict[str, Site]
    saved: dict[str, HostArray]
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()


class Place(NamedTuple):
    """One wrapper and the site that it is."""

    site: Site
    wrapper: Wrapper

    @property
    def module(self) -> str:
        """The module that is wrapped; of experts, the one that has the parameter."""
        return self.wrapper.module


# ---- ranks and α -------------------------------------------------------------------------------------------


class Numbers:
    """Rank and α by name, from a config whose patterns are a stranger's.

    The numbers are those of site_at, in bounded time: specs/adapter_files.md.
    """

    def __init__(self, path: Path, config: LoraConfig, names: int) -> None:
        """Prepare the patterns for so many names."""
        self.path, self.config = path, config
        self._patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
        keys = sum(len(pattern or ()) for pattern in self._patterns.values())
        if keys * names > PAIRS:
            raise FormatError(f"{path}: expected fewer keys in patterns for {names} sites, got {keys}")
        budget = Budget()
        self._names: dict[str, dict[int, list[str]]] = {}  # keys that are names, by their length
        self._regexes: dict[str, dict[str, Regex]] = {}  # the other ones
        for field, pattern in self._patterns.items():
            by_length: dict[int, list[str]] = {}
            for key in filter(plain, pattern or ()):
                by_length.setdefault(len(key), []).append(key)
            self._names[field] = by_length
            others = (key for key in pattern or () if not plain(key))
            self._regexes[field] = {key: Regex(rf"(.*\.)?({key})$", budget) for key in others}
        self.used: set[tuple[str, str]] = set()  # keys that have fitted a name
        self._at = lru_cache(None)(self._own)

    def site(
        self, name: str, kind: Kind = "linear", weight: str | None = None, transposed: bool | None = None
    ) -> Site:
        """Return the site of a name, as site_at does."""
        r = self._value("rank_pattern", name, self.config.r)
        alpha = self._value("alpha_pattern", name, self.config.lora_alpha)
        try:
            return site_at(self._at(r, alpha), name, kind=kind, weight=weight, transposed=transposed)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def unused(self) -> dict[str, list[str]]:
        """The keys that have fitted no name so far, by the patterns' fields."""
        said = {field: list(pattern or ()) for field, pattern in self._patterns.items()}
        return {f: [key for key in keys if (f, key) not in self.used] for f, keys in said.items()}

    def _own(self, r: int, alpha: float) -> LoraConfig:
        return replace(self.config, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    def _value(self, field: str, name: str, default: Any) -> Any:
        pattern = self._patterns[field] or {}
        found = {key: pattern[key] for key in self._fitting(field, name)} if pattern else {}
        self.used |= {(field, key) for key in found}
        if len(set(found.values())) > 1:
            raise ConfigError(f"{self.path}: {field}: expected one value for {show(name)}, got {show(found)}")
        return next(iter(found.values()), default)

    def _fitting(self, field: str, name: str) -> Iterator[str]:
        """The keys of a pattern that fit a name."""
        for end in ends(name):
            yield from (key for key in self._names[field].get(len(end), ()) if _same(key, end))
        for key, regex in self._regexes[field].items():
            if regex.match(name):
                yield key


def _same(key: str, end: str) -> bool:
    """Whether a key that is a name fits the end of one: as a regular expression, its dots are any character."""
    return key == end or all(a in (b, ".") for a, b in zip(key, end, strict=True))


# ---- which names the config means --------------------------------------------------------------------------


class Names:
    """Names as a config lists them, or one regular expression for all of them."""

    def __init__(self, said: Any) -> None:
        """Take a field's value: None, a list of names, or text."""
        self.listed = () if said is None or isinstance(said, str) else tuple(said)
        self._set = set(self.listed)
        self._regex = Regex(said) if isinstance(said, str) else None

    def mean(self, name: str) -> bool:
        """Whether a name is listed, or ends in a dot and a listed one, or is matched as a whole."""
        if self._regex:
            return self._regex.fullmatch(name)
        return not self._set.isdisjoint(ends(name))

    def without(self, names: Iterable[str]) -> list[str]:
        """The listed names that mean none of some names."""
        there = set(chain.from_iterable(map(ends, names)))
        return [name for name in self.listed if name not in there]


def ends(name: str) -> list[str]:
    """A dotted name, and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def targeted(config: LoraConfig) -> Names | None:
    """What target_modules means by name; None where it does not say it by names."""
    said = config.target_modules
    if said is None or (isinstance(said, str) and said.lower() == "all-linear"):
        return None
    return Names(said)


# ---- the sites of a file -----------------------------------------------------------------------------------


class Resolver:
    """Which site each wrapper of a file is."""

    def __init__(self, path: Path, config: LoraConfig, keys: Keys, shapes: Mapping[str, Shape]) -> None:
        """Take a file's keys, sorted, and each key's shape."""
        self.path, self.config, self.keys, self.shapes = path, config, keys, shapes
        self.numbers = Numbers(path, config, sum(map(len, keys.wrappers.values())))
        self.assumed: list[str] = []  # what the files do not say
        self._targets = targeted(config)
        self._parameters: dict[str, list[str]] = {}  # end of a module's name -> its targeted parameters
        for name in dict.fromkeys(config.target_parameters or ()):
            module, _, parameter = name.rpartition(".")
            self._parameters.setdefault(module, []).append(parameter)

    def places(self) -> dict[str, Place]:
        """Return the places of all wrappers by their sites' names.

        Raises FormatError where wrappers and config do not fit each other.
        """
        found: dict[str, Place] = {}
        for module, wrappers in self.keys.wrappers.items():
            for wrapper in wrappers:
                for field in "AB":
                    if field not in wrapper.keys:
                        there = some(wrapper.keys.values())
                        raise FormatError(f"{self.path}: {show(module)}: expected A and B, got {there} alone")
            for site, wrapper in zip(self._sites(module, wrappers), wrappers, strict=True):
                found[site.name] = Place(site, wrapper)
        return found

    def _sites(self, module: str, wrappers: list[Wrapper]) -> list[Site]:
        parameters = self.parameters(module)
        if parameters and (len(wrappers) > 1 or self._targets is None or not self._targets.mean(module)):
            return self._experts(module, parameters, len(wrappers))
        if len(wrappers) > 1:
            wanted = f"{len(wrappers)} of its parameters in target_parameters"
            raise FormatError(f"{self.path}: {show(module)}: expected {wanted}, got none")
        if wrappers[0].embedding:
            return [self.numbers.site(module, kind="embedding", transposed=False)]
        if len(self.shapes[wrappers[0].keys["A"]]) > 2:
            return [self.numbers.site(module, kind="conv", transposed=False)]
        parent, _, last = module.rpartition(".")
        if last == OUT and parent in self.keys.wrappers:
            return [output_of(self.numbers.site(parent, weight=f"{parent}.{FUSED}"))]
        attention = f"{module}.{OUT}" in self.keys.wrappers
        return [self.numbers.site(module, weight=f"{module}.{FUSED}" if attention else None)]

    def _experts(self, module: str, parameters: list[str], count: int) -> list[Site]:
        if len(parameters) != count:
            wanted = f"wrappers for {', '.join(parameters)}, as target_parameters has it"
            raise FormatError(f"{self.path}: {show(module)}: expected {wanted}, got {count} of them")
        if count > 1 and not set(parameters) <= ORDER.keys():
            self.assumed.append(
                f"target_parameters: {show(module)} declares {', '.join(parameters)} in this order"
            )
        names = [f"{module}.{parameter}" for parameter in reversed(parameters)]  # the outermost first
        return [self.numbers.site(name, kind="experts", weight=name, transposed=False) for name in names]

    def parameters(self, module: str) -> list[str]:
        """The targeted parameters of a module, in the order in which it declares them, as far as is known."""
        found = chain.from_iterable(self._parameters.get(end, ()) for end in (*ends(module), ""))
        names = list(dict.fromkeys(found))
        return sorted(names, key=lambda name: ORDER[name]) if set(names) <= ORDER.keys() else names


def hint(name: str, names: Iterable[str]) -> str:
    """The hint at the last part of a name that resembles this one most."""
    return nearest(name, sorted({known.rpartition(".")[2] for known in names})[:1000])
