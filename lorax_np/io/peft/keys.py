"""Keys of an adapter file and what they mean: the part of an adapter, the module, and how deep it is wrapped.

PEFT puts a wrapper around each module that it adapts and names what it wraps base_layer; one around each
parameter where several of one module are adapted. So the key of what lies below a wrapper has base_layer in its
path, and a module's parameters are told apart by their depth alone. specs/adapter_files.md has the table.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...errors import FormatError
from ...kinds import nearest
from ..safetensors import show

PREFIX = "base_model.model."
WRAPPED = "base_layer"
PARTS = {  # the end of a key -> the field of an Adapter
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bB",
    "lora_magnitude_vector": "m",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}
LINEAR = {"A": "lora_A.weight", "B": "lora_B.weight", "bB": "lora_B.bias", "m": "lora_magnitude_vector"}
EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"}
LIKE = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.?([^.]*)(\.weight|\.bias)?$")
LONGEST = 1000  # characters of a name
LISTED = 5  # names that one message lists


class Wrapper(NamedTuple):
    """One wrapper's own keys, by the field of an Adapter."""

    module: str
    depth: int  # wrappers outside it around the same module
    keys: dict[str, str]
    embedding: bool


class Keys(NamedTuple):
    """All keys of a file, sorted."""

    wrappers: dict[str, list[Wrapper]]  # by module, the outermost first
    plain: dict[str, str]  # name in a checkpoint -> key, of whatever else is there
    prefix: str


def sort_keys(path: Path, names: Iterable[str]) -> Keys:
    """Sort a file's keys. Raises FormatError for names that no module has, and for what is said twice."""
    names = list(names)
    check_names(path, names)
    prefixed = [name.startswith(PREFIX) for name in names]
    if any(prefixed) and not all(prefixed):
        came = some(name for name, has in zip(names, prefixed, strict=True) if not has)
        raise FormatError(f"{path}: expected every key to begin with {PREFIX} or none, got {came} without it")
    prefix = PREFIX if any(prefixed) else ""
    found: dict[tuple[str, int], Wrapper] = {}
    plain: dict[str, str] = {}
    for key in names:
        body = key.removeprefix(prefix)
        end = next((end for end in PARTS if body.endswith(f".{end}")), None)
        if end is None:
            _check_plain(path, key)
            name = ".".join(part for part in body.split(".") if part != WRAPPED)
            if name in plain:
                twice = f"{show(plain[name])} and {show(key)}"
                raise FormatError(f"{path}: expected {show(name)} once, got {twice}")
            plain[name] = key
            continue
        module, depth = _unwrapped(body.removesuffix(f".{end}"))
        embedding = "embedding" in end
        wrapper = found.setdefault((module, depth), Wrapper(module, depth, {}, embedding))
        if PARTS[end] in wrapper.keys:
            twice = f"{show(wrapper.keys[PARTS[end]])} and {show(key)}"
            raise FormatError(f"{path}: {show(module)}: expected one {PARTS[end]}, got {twice}")
        wrapper.keys[PARTS[end]] = key
        if embedding:
            found[module, depth] = wrapper._replace(embedding=True)
    wrappers: dict[str, list[Wrapper]] = {}
    for module, depth in sorted(found):
        wrappers.setdefault(module, []).append(found[module, depth])
        if found[module, depth].depth != len(wrappers[module]) - 1:
            came = f"the depth {depth} without that outside it"
            raise FormatError(f"{path}: {show(module)}: expected wrappers at every depth, got {came}")
    keys = Keys(wrappers, plain, prefix)
    _check_again(path, keys)
    return keys


def _check_plain(path: Path, key: str) -> None:
    """A key that is no part of an adapter does not look like one."""
    if match := LIKE.search(key):
        hint = "" if match[2] in ("", "weight", "bias") else ": the adapter's name does not belong in a key"
        raise FormatError(f"{path}: expected keys that end in {', '.join(PARTS)}, got {show(key)}{hint}")


def _unwrapped(path: str) -> tuple[str, int]:
    """A wrapper's module, and how many wrappers of the same module are outside it."""
    parts = path.split(".")
    depth = 0
    while depth < len(parts) and parts[-1 - depth] == WRAPPED:
        depth += 1
    return ".".join(part for part in parts if part != WRAPPED), depth


def _check_again(path: Path, keys: Keys) -> None:
    """Each key is the one that its meaning is written under, so that nothing was taken for what it is not."""
    depths = {module: len(wrappers) for module, wrappers in keys.wrappers.items()}
    wrong = []
    for module, wrappers in keys.wrappers.items():
        for depth, wrapper in enumerate(wrappers):
            for part, key in wrapper.keys.items():
                want = key_of(module, depth, part, depths, embedding=wrapper.embedding)
                wrong += [(key, keys.prefix + want)] * (key != keys.prefix + want)
    for name, key in keys.plain.items():
        want = keys.prefix + plain_key(name, depths)
        wrong += [(key, want)] * (key != want)
    if wrong:
        key, want = wrong[0]
        raise FormatError(f"{path}: expected the key {show(want)}, got {show(key)}")


def key_of(module: str, depth: int, part: str, depths: Mapping[str, int], *, embedding: bool = False) -> str:
    """Return the key, without prefix, of one part of the adapter in a module's wrapper.

    >>> key_of("mlp.experts", 1, "A", {"mlp.experts": 2})
    'mlp.experts.base_layer.lora_A.weight'
    """
    return ".".join([_within(module, depths), *[WRAPPED] * depth, (EMBEDDING if embedding else LINEAR)[part]])


def plain_key(name: str, depths: Mapping[str, int]) -> str:
    """Return the key, without prefix, of a tensor by its name in a checkpoint.

    >>> plain_key("q_proj.bias", {"q_proj": 1}), plain_key("norm.bias", {"q_proj": 1})
    ('q_proj.base_layer.bias', 'norm.bias')
    """
    return _within(name, depths)


def _within(name: str, depths: Mapping[str, int]) -> str:
    """A name with base_layer after each module that is wrapped and in which it lies."""
    parts = name.split(".")
    path = parts[:1]
    for i, part in enumerate(parts[1:], 1):
        path += [WRAPPED] * depths.get(".".join(parts[:i]), 0) + [part]
    return ".".join(path)


def check_names(where: object, names: Iterable[str]) -> None:
    """Raise FormatError for a name that no module can have: it may end as a file's, a key's, or a message's."""
    for name in names:
        parts = name.split(".")
        if len(name) > LONGEST or not name.isprintable() or set(name) & set("/\\ ") or "" in parts:
            wanted = f"dotted names without spaces and slashes, of at most {LONGEST} characters"
            raise FormatError(f"{where}: expected {wanted}, got {show(name)}")


def some(names: Iterable[str], near: Iterable[str] = ()) -> str:
    """Some names as a message shows them, the first with the known name nearest to it."""
    names = sorted(names)
    hint = nearest(names[0], list(near)[:1000]) if names else ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    first, *rest = [show(name) for name in names[:LISTED]]
    return ", ".join([first + hint, *rest]) + more
