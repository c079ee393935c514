"""Sizes of named axes, checked together, and leading axes folded into one."""

from collections.abc import Mapping
from functools import cache, lru_cache
from math import prod
from typing import Any

from numpy import ndarray

from .backend import Array, namespace_of, one_dtype
from .errors import ShapeError

Named = tuple[
    Array | None, str
]  # an array and its axes: "... d_in", "r d_in", or "? d_out" where None may stand


def axes(**arrays: Named) -> dict[str, Any]:
    """Check that each named axis has one size in all arrays, and return the sizes.

    The axes are words; "..." in front stands for any number of leading axes, the same in all arrays that
    have it, and is returned as a tuple. Leading axes may hold nothing; a named axis holds at least 1. With "?"
    before all, None may stand for an absent array.
    Raises ShapeError, which names the array, what was wanted and who set it, and what came; TypeError for None.

    >>> import numpy as np
    >>> axes(x=(np.ones((2, 5, 12)), "... d_in"), A=(np.ones((4, 12)), "r d_in"))
    {'...': (2, 5), 'd_in': 12, 'r': 4}
    """
    numpys = True  # NumPy's own: one library, and no need to look further
    for name, (array, words) in arrays.items():
        if array is None and not words.startswith("?"):
            raise TypeError(f"{name}: expected an array, got None")
        numpys = numpys and (array is None or type(array) is ndarray)
    if not numpys:
        namespace_of(**{name: array for name, (array, _) in arrays.items()})
    there = [(name, words, tuple(array.shape)) for name, (array, words) in arrays.items() if array is not None]
    return dict(_sizes(*there))


@lru_cache(maxsize=1024)  # a step asks for the same few again and again
def _sizes(*shapes: tuple[str, str, tuple[int, ...]]) -> dict[str, Any]:
    """The size of each axis, of names, words and shapes."""
    sizes: dict[str, Any] = {}
    setter: dict[str, str] = {}
    for name, words, shape in shapes:
        names, fixed = _parsed(words)
        lead = len(shape) - len(fixed)
        good = lead >= 0 if "..." in names else lead == 0
        here: dict[str, Any] = dict(zip(fixed, shape[max(lead, 0) :], strict=False))
        if "..." in names:
            here = {"...": shape[: max(lead, 0)], **here}
        if not good or any(sizes.get(k, v) != v for k, v in here.items()) or 0 in here.values():
            known = ", ".join(f"{k}={sizes[k]} set by {setter[k]}" for k in names if k in sizes)
            known = f" with {known}" if known else " with axes of at least 1" if good else ""
            wanted = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
            raise ShapeError(f"{name}: expected {wanted}{known}, got {shape}")
        for k, v in here.items():
            sizes.setdefault(k, v)
            setter.setdefault(k, name)
    return sizes


@cache
def _parsed(words: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that words name, with "..." and without."""
    names = tuple(words.removeprefix("?").split())
    return names, tuple(word for word in names if word != "...")


def bind(**arrays: Named) -> dict[str, Any]:
    """As axes(), and check besides that the arrays share one library and one floating dtype."""
    sizes = axes(**arrays)
    one_dtype(**{name: array for name, (array, _) in arrays.items()})
    return sizes


def rows(x: Array) -> Array:
    """Fold the leading axes of x : (..., d) into one: (N, d).

    >>> import numpy as np
    >>> rows(np.ones((2, 3, 5))).shape, rows(np.ones(5)).shape, rows(np.ones((0, 5))).shape
    ((6, 5), (1, 5), (0, 5))
    """
    folded: Array = namespace_of(x=x).reshape(x, (prod(x.shape[:-1]), x.shape[-1]))
    return folded


def shape_in(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Shape of one tensor among many, or that stands among shapes; not read where their mapping can tell it.

    Raises KeyError.

    >>> shape_in({"w": (2, 3)}, "w")
    (2, 3)
    """
    tell = getattr(tensors, "shape", None)
    if callable(tell):
        return tuple(int(n) for n in tell(name))
    value = tensors[name]
    return tuple(int(n) for n in getattr(value, "shape", value))
