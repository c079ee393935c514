"""Nested records and dotted names: leaves, map and add over them, and all leaves in one contiguous buffer.

A tree is a mapping, a dataclass or a named tuple whose values are trees, arrays, or None where nothing is. The
name of an array is the path to it, joined by dots; keys may hold dots themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, TypeVar

from .backend import Array, namespace_of, one_dtype
from .errors import ConfigError, ShapeError

Tree = TypeVar("Tree")
Leaves = dict[str, Array]


def leaves(tree: Any) -> Leaves:
    """Return the arrays of a tree by dotted name, in the tree's order; None is left out.

    Raises ConfigError where two arrays get one name, TypeError for what is no tree.

    >>> import numpy as np
    >>> list(leaves({"layers.0.q": {"A": np.ones((1, 2)), "m": None}, "head": np.ones(3)}))
    ['layers.0.q.A', 'head']
    """
    found: Leaves = {}
    for name, value in _walk(tree, ""):
        if name in found:
            raise ConfigError(f"{name}: expected one array of this name, got two")
        found[name] = value
    return found


def with_leaves(tree: Tree, new: Mapping[str, Array]) -> Tree:
    """Return a tree like this one, its arrays replaced by those of the same names.

    Raises ConfigError unless the names are exactly this tree's. Shapes may differ.

    >>> import numpy as np
    >>> with_leaves({"q": {"A": np.ones(2), "m": None}}, {"q.A": np.zeros(1)})
    {'q': {'A': array([0.]), 'm': None}}
    """
    have = leaves(tree)
    _same_names(have, new)
    found: Tree = _rebuilt(tree, "", new)
    return found


def tree_map(f: Callable[..., Array], tree: Tree, *others: Any) -> Tree:
    """Return a tree like the first whose arrays are f of the arrays at the same names in all.

    >>> import numpy as np
    >>> tree_map(lambda a, b: a - b, {"A": np.array([3.0])}, {"A": np.array([1.0])})
    {'A': array([2.])}
    """
    first, rest = leaves(tree), [leaves(other) for other in others]
    for other in rest:
        _same_names(first, other)
    return with_leaves(
        tree, {name: f(value, *(other[name] for other in rest)) for name, value in first.items()}
    )


def tree_add(a: Tree, b: Tree) -> Tree:
    """Return the sum of two trees of the same names and shapes.

    >>> import numpy as np
    >>> tree_add({"A": np.array([3.0])}, {"A": np.array([1.0])})
    {'A': array([4.])}
    """

    def add(x: Array, y: Array) -> Array:
        if tuple(x.shape) != tuple(y.shape):
            raise ShapeError(f"b: expected {tuple(x.shape)}, set by a, got {tuple(y.shape)}")
        return x + y

    return tree_map(add, a, b)


def _parts(tree: Any) -> Iterator[tuple[str, Any]] | None:
    """The named parts of a node, None where it is an array."""
    if isinstance(tree, Mapping):
        return iter(tree.items())
    if is_dataclass(tree) and not isinstance(tree, type):
        return ((field.name, getattr(tree, field.name)) for field in fields(tree))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return zip(tree._fields, tree, strict=True)
    return None


def _walk(tree: Any, name: str) -> Iterator[tuple[str, Array]]:
    parts = _parts(tree)
    if parts is not None:
        for key, value in parts:
            yield from _walk(value, f"{name}.{key}" if name else str(key))
    elif tree is not None:
        if not name or not hasattr(tree, "shape"):
            raise TypeError(f"{name or 'tree'}: expected a record or mapping of arrays, got {tree!r:.60}")
        yield name, tree


def _rebuilt(tree: Any, name: str, new: Mapping[str, Array]) -> Any:
    parts = _parts(tree)
    if parts is None:
        return None if tree is None else new[name]
    made = {key: _rebuilt(value, f"{name}.{key}" if name else str(key), new) for key, value in parts}
    return made if isinstance(tree, Mapping) else type(tree)(**made)


def _same_names(have: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    for missing in have:
        if missing not in got:
            raise ConfigError(f"{missing}: expected an array of this name, got none")
    for extra in got:
        if extra not in have:
            raise ConfigError(f"{extra}: expected no array of this name, got one")


# ---- all leaves in one buffer ------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the arrays of a dictionary lie in one flat buffer, one after the other in this order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]  # one more than names: array i lies at bounds[i] to bounds[i + 1]

    @property
    def size(self) -> int:
        """How many numbers the buffer holds."""
        return self.bounds[-1]


def layout(arrays: Mapping[str, Array]) -> Layout:
    """Return the layout of a dictionary of arrays, in its order.

    >>> import numpy as np
    >>> layout({"A": np.ones((2, 3)), "m": np.ones(4)}).bounds
    (0, 6, 10)
    """
    shapes = tuple(tuple(value.shape) for value in arrays.values())
    return Layout(tuple(arrays), shapes, (0, *accumulate(prod(shape) for shape in shapes)))


def flatten(arrays: Mapping[str, Array], where: Layout | None = None) -> Array:
    """Return a new contiguous buffer : (size,) that holds all the arrays, in the layout's order.

    Raises ConfigError for other names than the layout's or for none at all, ShapeError for another shape, and
    DtypeError where the arrays do not share one dtype.

    >>> import numpy as np
    >>> flatten({"A": np.ones((1, 2)), "m": np.zeros(1)}).tolist()
    [1.0, 1.0, 0.0]
    """
    where = where or layout(arrays)
    _same_names(dict.fromkeys(where.names), arrays)
    if not where.names:
        raise ConfigError("arrays: expected at least one, got none")
    for name, shape in zip(where.names, where.shapes, strict=True):
        if tuple(arrays[name].shape) != shape:
            raise ShapeError(f"{name}: expected {shape}, set by the layout, got {tuple(arrays[name].shape)}")
    one_dtype(**arrays)
    xp = namespace_of(**arrays)
    flat: Array = xp.concat([xp.reshape(arrays[name], (-1,)) for name in where.names])
    return flat


def unflatten(flat: Array, where: Layout) -> Leaves:
    """Return the arrays of a layout as views of its buffer : (size,): writing to one writes to the other.

    >>> import numpy as np
    >>> flat = np.zeros(3)
    >>> unflatten(flat, layout({"A": np.ones((1, 2)), "m": np.ones(1)}))["A"][0, 1] = 5
    >>> flat.tolist()
    [0.0, 5.0, 0.0]
    """
    if tuple(flat.shape) != (where.size,):
        raise ShapeError(f"flat: expected ({where.size},), set by the layout, got {tuple(flat.shape)}")
    xp, ends = namespace_of(flat=flat), where.bounds
    return {
        name: xp.reshape(flat[a:b], shape)
        for name, shape, a, b in zip(where.names, where.shapes, ends, ends[1:], strict=False)
    }
