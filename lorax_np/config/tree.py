"""A model's modules, from the names and shapes in its checkpoint: what each is, in the order it was made in."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar, cast, get_args

from ..errors import ConfigError
from ..kinds import nearest, shown
from .families import EMBEDDINGS, LAST, ORDERS, ROUTERS, TARGETS, TRANSPOSED, TRANSPOSED_EXPERTS
from .site import FUSED, OUT, Kind

Shape = tuple[int, ...]
KINDS = get_args(Kind)
DEEPEST = 100  # parts of a module's name
T = TypeVar("T")


@dataclass(slots=True)
class Module:
    """One module: its dotted name, its own tensors by their last part, and its children."""

    name: str
    tensors: dict[str, str] = field(default_factory=dict)  # "weight" -> its name in the checkpoint
    children: dict[str, "Module"] = field(default_factory=dict)


@dataclass(frozen=True)
class Tree:
    """The modules of a checkpoint, in the order in which a model makes them, and what each is.

    shape : the shape of a tensor by its name; asked for no more than is needed
    kinds, groups : what the caller said of modules, by their names or the ends of their names
    """

    modules: Mapping[str, Module]
    shape: Callable[[str], Shape]
    model_type: str | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)

    def weight(self, name: str) -> str | None:
        """The checkpoint's name of a module's weight, or None where it has none of its own."""
        module = self.modules.get(name)
        return module.tensors.get("weight") if module else None

    def attention(self, name: str) -> bool:
        """Whether a module has q, k and v in one parameter of two axes, and its output beside it."""
        module = self.modules[name]
        fused = module.tensors.get(FUSED)
        return fused is not None and len(self.shape(fused)) == 2 and self.kind(f"{name}.{OUT}") == "linear"

    def bias(self, name: str) -> str | None:
        """The checkpoint's name of a module's bias, a vector, or None."""
        found = self.modules[name].tensors.get("bias")
        return found if found is not None and len(self.shape(found)) == 1 else None

    def kind(self, name: str) -> Kind | None:
        """What a module is: linear, embedding, conv or None; as was said, else by its weight and name."""
        weight = self.weight(name)
        if weight is None:
            return None
        if (said := named(self.kinds, name)) is not None:
            return said
        axes, last = len(self.shape(weight)), name.rpartition(".")[2]
        if axes == 2 and last in ROUTERS and self._fused(f"{name.removesuffix(last)}experts"):
            return None
        if axes == 2:
            bare = self.modules[name].tensors.get("bias") is None
            return "embedding" if bare and re.fullmatch(EMBEDDINGS, last) else "linear"
        return "conv" if axes in (3, 4, 5) else None

    def _fused(self, name: str) -> bool:
        """Whether a module holds the weights of experts in parameters of three axes."""
        found = self.modules.get(name)
        return found is not None and any(len(self.shape(tensor)) == 3 for tensor in found.tensors.values())

    def transposed(self, name: str, declared: bool) -> bool:
        """Whether a linear module's weight lies (d_in, d_out): by the model's type, else as declared."""
        model_type = self.model_type or ""
        if model_type in TRANSPOSED:
            return name.rpartition(".")[2] in TRANSPOSED[model_type]
        return declared and model_type not in TARGETS

    def experts_transposed(self) -> bool:
        """Whether fused experts lie (E, d_in, d_out)."""
        return self.model_type in TRANSPOSED_EXPERTS

    def sites(self) -> list[str]:
        """The names of all modules that an adapter can stand beside."""
        return [name for name in self.modules if self.kind(name) is not None]


def grown(
    names: Iterable[str],
    shape: Callable[[str], Shape],
    *,
    model_type: str | None = None,
    kinds: Mapping[str, str] | None = None,
    groups: Mapping[str, int] | None = None,
) -> Tree:
    """Return the tree of modules over a checkpoint's names; ConfigError for what is said of no module."""
    root = Module("")
    for tensor in names:
        *path, last = tensor.split(".")
        if len(path) > DEEPEST:
            raise ConfigError(
                f"weights: expected names of at most {DEEPEST} parts, got {len(path)} in {shown(tensor)}"
            )
        module = root
        for part in path:
            name = f"{module.name}.{part}" if module.name else part
            module = module.children.setdefault(part, Module(name))
        module.tensors[last] = tensor
    modules = {module.name: module for module in _walked(root)}
    _check("kinds", kinds or {}, modules, lambda kind: kind in KINDS[:3], f"one of {', '.join(KINDS[:3])}")
    _check("groups", groups or {}, modules, lambda n: type(n) is int and n > 0, "an int of at least 1")
    return Tree(modules, cache(shape), model_type, cast(dict[str, Kind], dict(kinds or {})), dict(groups or {}))


def fits(key: str, name: str) -> bool:
    """Whether a listed key means a name: the whole of it, or its end after a dot."""
    return name == key or name.endswith(f".{key}")


def named(said: Mapping[str, T], name: str) -> T | None:
    """Return what is said of a name, the longest key first."""
    found = max((key for key in said if fits(key, name)), key=len, default=None)
    return None if found is None else said[found]


def ordered(siblings: Iterable[str]) -> list[str]:
    """Return siblings in the order of registration: as they came, unless that is the alphabet's, as in files.

    >>> ordered(["down_proj", "gate_proj", "up_proj"]), ordered(["0", "1", "10", "2"]), ordered(["b", "a"])
    (['gate_proj', 'up_proj', 'down_proj'], ['0', '1', '2', '10'], ['b', 'a'])
    """
    given = list(siblings)
    if given != sorted(given):
        return given
    if all(part.isdecimal() for part in given):
        return sorted(given, key=int)
    order = max(ORDERS, key=lambda order: len(set(order) & set(given)))
    if len(set(order) & set(given)) < 2:
        order = ()
    place = {part: i for i, part in enumerate(order)}
    return sorted(given, key=lambda part: (part in LAST, place.get(part, len(order))))


def _walked(root: Module) -> Iterator[Module]:
    """A module and all below it, parents first, siblings in order, and so each one's own tensors."""
    left = [root]
    while left:
        module = left.pop()
        module.tensors = {last: module.tensors[last] for last in ordered(module.tensors)}
        yield module
        left += [module.children[part] for part in reversed(ordered(module.children))]


def _check(
    argument: str, said: Mapping[str, T], modules: Mapping[str, Module], good: Callable[[T], bool], wanted: str
) -> None:
    for key, value in said.items():
        if not good(value):
            raise ConfigError(f"{argument}[{key!r}]: expected {wanted}, got {value!r}")
        if not any(fits(key, name) for name in modules):
            ends = {name.rpartition(".")[2] for name in modules} | modules.keys()
            raise ConfigError(f"{argument}: expected names of modules, got {key!r}{nearest(key, ends)}")
