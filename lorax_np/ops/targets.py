"""Labels and row bounds, read and checked on the host once, and how many labels count.  See specs/loss.md."""

from collections.abc import Sequence
from typing import Any

from ..backend import Array, dtype_name, to_host
from ..errors import ConfigError, DtypeError, ShapeError

IGNORED = -100  # the label of what has none


def count_kept(labels: Array) -> int:
    """Return how many entries of labels carry one, that is are not −100: what a step's n is the sum of.

    Source: specs/loss.md.

    >>> import numpy as np
    >>> count_kept(np.array([3, -100, 0]))
    2
    """
    return int((to_host(labels) != IGNORED).sum())


def check_n(n: int) -> int:
    """Return n as Python's integer, which widens no array.  See specs/loss.md.

    Raises ConfigError unless it is an integer of 1 or more.
    """
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ConfigError(f"n: expected the number of labels of the whole step, at least 1, got {n!r}")
    return int(n)


def targets(labels: Array, V: int, *, len_: int) -> tuple[Any, Any]:
    """Return labels : (N,) with 0 in place of −100, and which are kept, on the host.  See specs/loss.md."""
    host = to_host(labels)
    if tuple(host.shape) != (len_,):
        raise ShapeError(f"labels: expected (N,) with N={len_} set by the rows, got {tuple(host.shape)}")
    if host.dtype.kind not in "iu":
        raise DtypeError(f"labels: expected integers, got {dtype_name(host)}")
    kept = host != IGNORED  # before any cast: 2⁶⁴ − 100 would become −100
    bad = (kept & ((host < 0) | (host >= V))).nonzero()[0]
    if len(bad):
        raise ConfigError(f"labels: expected 0 to {V - 1} or −100, got {host[bad[0]]} in row {bad[0]}")
    return host.astype("int64") * kept, kept


def check_shares(y: Array) -> None:
    """Raise ConfigError, with its row, where an entry of y : (...) is not from 0 to 1.  See specs/loss.md."""
    host: Any = to_host(y)
    flat = host.reshape(-1)
    bad = (~((flat >= 0) & (flat <= 1))).nonzero()[0]    # NaN is neither
    if len(bad):
        row = bad[0] // (flat.size // host.shape[0]) if host.ndim else 0
        raise ConfigError(f"y: expected labels from 0 to 1, got {flat[bad[0]]} in row {row}")


def two_axes(**arrays: Array) -> None:
    """Raise ShapeError unless each array has two axes; the first may hold nothing.  See specs/loss.md."""
    for name, x in arrays.items():
        if x.ndim != 2:
            raise ShapeError(f"{name}: expected two axes, got {tuple(x.shape)}")


def integers(name: str, values: Sequence[int] | Array) -> list[int]:
    """Return a sequence, or an array of one axis, of integers as Python's own.  See specs/pooling.md."""
    if isinstance(values, (tuple, list)):
        if not all(hasattr(i, "__index__") for i in values):
            raise DtypeError(f"{name}: expected integers, got {values[:8]!r}")
        return [int(i) for i in values]
    host = to_host(values)  # type: ignore[arg-type]
    if host.ndim != 1:
        raise ShapeError(f"{name}: expected one axis, got {tuple(host.shape)}")
    if host.dtype.kind not in "iu":
        raise DtypeError(f"{name}: expected integers, got {dtype_name(host)}")
    found: list[int] = host.tolist()
    return found


def bounds_of(starts: Sequence[int] | Array, N: int) -> list[tuple[int, int]]:
    """Return where each sequence begins and ends, from S + 1 bounds, checked.

    Raises ShapeError unless the bounds begin at 0, rise, and end at N.  See specs/pooling.md.
    """
    ends = integers("starts", starts)
    bounds = [(ends[i], ends[i + 1]) for i in range(len(ends) - 1)]
    if not ends or ends[0] != 0 or ends[-1] != N or any(b <= a for a, b in bounds):
        shown = ", ".join(str(b) for b in ends[:6]) + (", ..." if len(ends) > 6 else "")
        wanted = f"0, then rising bounds up to N={N} set by the rows"
        raise ShapeError(f"starts: expected {wanted}, got {shown or 'none'}")
    return bounds
