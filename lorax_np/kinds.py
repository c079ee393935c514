"""Kinds of JSON content: what a value may be, in immutable form, and what is said where it does not fit."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, NamedTuple

from .errors import ConfigError

Test = Callable[[Any], Any]


class Kind(NamedTuple):
    """What a value must be, in words and as a test of its canonical form; the words it may be, if any."""

    wanted: str
    fits: Test
    words: tuple[str, ...] = ()


def canonical(value: Any) -> Any:
    """Return JSON content in immutable form and in Python's own types; TypeError for anything else."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # plain, also from an enum of strings
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(canonical, value)))
    if isinstance(value, (list, tuple)):
        return tuple(map(canonical, value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return MappingProxyType({str.__str__(key): canonical(item) for key, item in value.items()})
    raise TypeError


def thawed(value: Any) -> Any:
    """Undo canonical: fresh dicts and lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: thawed(item) for key, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


def whole(value: Any) -> bool:
    """Whether a value is an int of at least 0 that fits 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def finite(value: Any) -> bool:
    """Whether a value is a number, neither NaN nor infinite, as an int either."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def text(value: Any) -> bool:
    """Whether a value is a str."""
    return isinstance(value, str)


def regex(value: Any) -> bool:
    """Whether a value is a regular expression that compiles."""
    try:
        return isinstance(value, str) and bool(re.compile(f"(?:{value})"))
    except (re.error, OverflowError, RecursionError):
        return False


def list_of(item: Test) -> Test:
    """A test for a list, each item of which passes a test."""
    return lambda v: isinstance(v, tuple) and all(map(item, v))


def dict_of(key: Test, item: Test) -> Test:
    """A test for a mapping, each key and item of which pass theirs."""
    return lambda v: isinstance(v, Mapping) and all(key(k) and item(v[k]) for k in v)


def word(*words: str) -> Kind:
    """The kind of one of these words."""
    return Kind(f"one of {', '.join(words)}", lambda v: v in words, words)


def or_none(kind: Kind) -> Kind:
    """The same kind, or None."""
    return Kind(f"{kind.wanted}, or None", lambda v: v is None or kind.fits(v), kind.words)


ANY = Kind("JSON content", lambda v: True)
FLAG = Kind("True or False", lambda v: isinstance(v, bool))
SETTINGS = Kind("a mapping from str to JSON content", lambda v: isinstance(v, Mapping))

# ---- Reading, and what is said when it fails ---------------------------------------------------------------


def read(given: Mapping[str, tuple[Kind, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that fit their kind, in canonical form, and a sentence for each that does not."""
    values: dict[str, Any] = {}
    problems = []
    for name, (kind, value) in given.items():
        try:
            values[name] = _fitting(kind, value)
        except TypeError:
            problems.append(problem(name, kind.wanted, _unfit_part(kind, value), kind.words))
        except RecursionError:
            problems.append(problem(name, "JSON content without deep nesting", value))
    return values, problems


def _fitting(kind: Kind, value: Any) -> Any:
    found = canonical(value)
    if not kind.fits(found):
        raise TypeError
    return found


def _unfit_part(kind: Kind, value: Any) -> Any:
    """Return the first entry of a list or mapping that alone does not fit; else the value as it came."""
    single: Iterable[Any] = ()
    if isinstance(value, Mapping):
        single = ({key: item} for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        single = ([item] for item in value)
    for part in single:
        try:
            _fitting(kind, part)
        except TypeError:
            return part
    return value


def content(name: str, d: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return d if it is a mapping from str; raise ConfigError else."""
    if not isinstance(d, Mapping):
        refuse([problem(name, "a mapping", d)])
    refuse([problem(name, "only str as keys", key) for key in d if not isinstance(key, str)])
    return d


def silent(value: Any, default: Any) -> bool:
    """Say whether a value asks for nothing: None, False, {}, [] or the default. 0 is a value."""
    return value is None or value is False or value == default or value in ((), {})


def problem(name: str, wanted: str, got: object, words: Iterable[str] = ()) -> str:
    """The sentence on a value that does not fit."""
    return f"{name}: expected {wanted}, got {shown(got)}{nearest(got, words)}"


def nearest(word: object, words: Iterable[str]) -> str:
    """Return the hint at the known word that resembles this one most, or an empty str."""
    by_case = {known.lower(): known for known in words}
    near = get_close_matches(word.lower()[:80], by_case, 1) if isinstance(word, str) else []
    return f" (did you mean {by_case[near[0]]!r}?)" if near else ""


def name_of(name: str) -> str:
    """A field's name as a message shows it."""
    return name if name.isidentifier() else shown(name)


def shown(value: object) -> str:
    """A value as a message shows it, in one short piece."""
    try:
        text = repr(thawed(value))
    except (ValueError, RecursionError):  # an int of thousands of digits; nesting without end
        return f"a value of type {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse(problems: list[str]) -> None:
    """Raise one ConfigError of one line, if there is a problem."""
    if problems:
        raise ConfigError(" ".join("; ".join(problems).splitlines()))
