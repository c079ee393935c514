"""Rows that belong to groups: an expert, a packed adapter, a sample's adapter. Which rows are whose."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, HostArray, cast, dtype_name, from_host, namespace_of, to_host
from ..errors import ConfigError, ShapeError


class Routing(NamedTuple):
    """Where the rows of each group stand, once the rows are in the order of the groups."""

    bounds: tuple[int, ...]  # the rows of group g are bounds[g] to bounds[g + 1]
    order: HostArray | None  # (N,)  the row of x that stands there, or None where x is in that order
    back: HostArray | None  # (N,)  where row n of x has gone


def route(ids: HostArray, groups: int) -> Routing:
    """Sort rows by group, those of one group kept in their order.

    ids : (N,)  the group of each row, from 0
    """
    counts = np.bincount(ids, minlength=groups)
    bounds = (0, *np.cumsum(counts).tolist())
    if np.all(ids[1:] >= ids[:-1]):
        return Routing(bounds, None, None)
    order = np.argsort(ids, kind="stable")
    return Routing(bounds, order, np.argsort(order, kind="stable"))


def gather(x: Array, routing: Routing) -> list[Array]:
    """The rows of each group: x : (N, ...) -> for each group (its count, ...)."""
    if routing.order is not None:
        x = namespace_of(x=x).take(x, from_host(routing.order, x), axis=0)
    ends = zip(routing.bounds, routing.bounds[1:], strict=False)
    return [x[begin:end, ...] for begin, end in ends]


def scatter(parts: Sequence[Array], routing: Routing) -> Array:
    """Undo gather: for each group (its count, ...) -> (N, ...), the rows where they came from."""
    whole: Any = zeros((routing.bounds[-1], *parts[0].shape[1:]), parts)
    for part, begin, end in zip(parts, routing.bounds, routing.bounds[1:], strict=False):
        whole[begin:end, ...] = part
    if routing.back is not None:
        whole = namespace_of(x=whole).take(whole, from_host(routing.back, whole), axis=0)
    found: Array = whole
    return found


def zeros(shape: tuple[int, ...], like: Sequence[Array]) -> Array:
    """Zeros of a shape in the library, on the device and in the dtype of some arrays; complex if any is."""
    names = [dtype_name(array) for array in like]
    dtype = "complex128" if "complex128" in names else names[0]
    found: Array = cast(from_host(np.zeros(shape), like[0]), dtype)
    return found


def host_ids(name: str, ids: Any, count: int, *, low: int, high: int, what: str) -> HostArray:
    """Integers of an array or a sequence, on the host, as many as `count` and within low..high − 1.

    Raises ShapeError for another number of them, and ConfigError for what is no such integer.
    """
    found = np.asarray(to_host(ids) if hasattr(ids, "shape") else list(ids))
    found = found.astype(np.int64) if found.size == 0 else found
    if found.dtype.kind not in "iu":
        raise ConfigError(f"{name}: expected integers, got {found.dtype}")
    found = found.reshape(-1)
    if found.size != count:
        raise ShapeError(f"{name}: expected {count} of them, one for each {what}, got {found.size}")
    wrong = found[(found < low) | (found >= high)]
    if wrong.size:
        raise ConfigError(f"{name}: expected integers from {low} to {high - 1}, got {wrong[0]}")
    return found
