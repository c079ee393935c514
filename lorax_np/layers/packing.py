"""The stacked form of several adapters: padded to one rank, slices of q, k and v side by side.

Layout: specs/packed.md.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import isfinite
from typing import Any, NamedTuple

from ..backend import Array, one_dtype
from ..errors import ConfigError, ShapeError
from ..params import Adapter
from ..shapes import axes
from .routing import zeros


class Pack(NamedTuple):
    """L adapters of S slices, stacked: what lora_packed_forward takes of them."""

    A: Array  # (L, S·r_max, d_in)
    B: Array  # (L, Σ d_out, r_max)
    ranks: tuple[int, ...]  # of each adapter
    scalings: tuple[float, ...]  # of each adapter
    d_outs: tuple[int, ...]  # of each slice


def pack(
    adapters: Sequence[Adapter | Sequence[Adapter]], scalings: Sequence[float], *, r_max: int | None = None
) -> Pack:
    """Stack adapters, padded with zeros to one rank.

    adapters  each an Adapter of A and B alone, or one for each slice, as of q, k and v, of one rank
    scalings  s of each
    r_max     the rank to pad to; None for the largest

    Raises ConfigError for an adapter with other parts, and where slices differ in rank or number; ShapeError,
    DtypeError, TypeError. A slice without adapter is one whose B is 0.
    Source: specs/packed.md.

    >>> import numpy as np
    >>> one, two = (Adapter(np.ones((r, 5)), np.ones((3, r))) for r in (1, 2))
    >>> stacked = pack([one, two], [0.5, 2.0])
    >>> stacked.A.shape, stacked.B.shape, stacked.ranks, stacked.d_outs
    ((2, 2, 5), (2, 3, 2), (1, 2), (3,))
    """
    table = [_factors_of(a, entry) for a, entry in enumerate(adapters)]
    if not table:
        raise ConfigError("adapters: expected one at least, got none")
    (A_first, _), d_outs = table[0][0], tuple(B.shape[0] for _, B in table[0])
    ranks = tuple(row[0][0].shape[0] for row in table)
    widest = max(ranks) if r_max is None else r_max
    if widest < max(ranks):
        raise ConfigError(f"r_max: expected at least {max(ranks)}, the largest rank, got {r_max}")
    everything = [factor for row in table for pair in row for factor in pair]
    one_dtype(**{f"adapters[{i // (2 * len(d_outs))}]": factor for i, factor in enumerate(everything)})
    A: Any = zeros((len(table), len(d_outs) * widest, A_first.shape[1]), everything)
    B: Any = zeros((len(table), sum(d_outs), widest), everything)
    for a, row in enumerate(table):
        if len(row) != len(d_outs) or [B_i.shape[0] for _, B_i in row] != list(d_outs):
            got = [B_i.shape[0] for _, B_i in row]
            raise ShapeError(
                f"adapters[{a}]: expected slices of d_out {list(d_outs)}, set by adapters[0], got {got}"
            )
        for (rows, outs, cols), (A_i, B_i) in zip(places(ranks[a], widest, d_outs), row, strict=True):
            axes(A=(A_first, "r_first d_in"), **{f"adapters[{a}].A": (A_i, "r d_in")})
            if A_i.shape[0] != ranks[a]:
                raise ConfigError(
                    f"adapters[{a}]: expected one rank for all slices, got {A_i.shape[0]} and {ranks[a]}"
                )
            A[a, rows, :], B[a, outs, cols] = A_i, B_i
    return Pack(A, B, ranks, _numbers(scalings, len(table)), d_outs)


def unpack(stacked: Pack) -> list[tuple[Adapter, ...]]:
    """Return the adapters of a pack, each as one Adapter a slice, whose arrays are views.

    >>> import numpy as np
    >>> ((adapter,),) = unpack(pack([Adapter(np.ones((1, 5)), np.ones((3, 1)))], [0.5]))
    >>> adapter.A.shape, adapter.B.shape
    ((1, 5), (3, 1))
    """
    checked = check_pack(*stacked)
    return [tuple(Adapter(A, B) for A, B in factors) for factors in each_factors(checked)]


def check_pack(
    A: Array, B: Array, ranks: Sequence[int], scalings: Sequence[float], d_outs: Sequence[int] | None
) -> Pack:
    """Check that the parts of a pack fit each other; return them as tuples of ints and floats."""
    sizes = axes(A=(A, "L S·r_max d_in"), B=(B, "L Σd_out r_max"))
    one_dtype(A=A, B=B)
    outs = (
        (sizes["Σd_out"],) if d_outs is None else tuple(_int("d_outs", d, 1, sizes["Σd_out"]) for d in d_outs)
    )
    if sum(outs) != sizes["Σd_out"]:
        raise ShapeError(f"d_outs: expected a sum of {sizes['Σd_out']}, set by B, got {sum(outs)}")
    if sizes["S·r_max"] != len(outs) * sizes["r_max"]:
        wanted = f"(L, S·r_max, d_in) with S={len(outs)} set by d_outs, r_max={sizes['r_max']} set by B"
        raise ShapeError(f"A: expected {wanted}, got {tuple(A.shape)}")
    if len(ranks) != sizes["L"]:
        raise ShapeError(f"ranks: expected {sizes['L']} of them, one for each adapter, got {len(ranks)}")
    found = tuple(_int("ranks", r, 1, sizes["r_max"]) for r in ranks)
    return Pack(A, B, found, _numbers(scalings, sizes["L"]), outs)


def places(rank: int, r_max: int, d_outs: Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Where each slice of an adapter stands: rows of A, rows of B, columns of B."""
    for i, (d_out, end) in enumerate(zip(d_outs, accumulate(d_outs), strict=True)):
        yield slice(i * r_max, i * r_max + rank), slice(end - d_out, end), slice(0, rank)


def each_factors(stacked: Pack) -> Iterator[list[tuple[Array, Array]]]:
    """For each adapter, A : (r, d_in) and B : (d_out, r) of each slice, as views."""
    for a, rank in enumerate(stacked.ranks):
        at = places(rank, stacked.B.shape[2], stacked.d_outs)
        yield [(stacked.A[a, rows, :], stacked.B[a, outs, cols]) for rows, outs, cols in at]


def _factors_of(a: int, entry: Any) -> list[tuple[Array, Array]]:
    """A and B of each slice of one adapter."""
    found = []
    for adapter in [entry] if isinstance(entry, Adapter) else list(entry):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapters[{a}]: expected Adapter, got {type(adapter).__name__}")
        if adapter.A is None or adapter.B is None:
            raise ConfigError(f"adapters[{a}]: expected A and B, got a bias alone")
        for name in ("m", "b", "bB"):
            if getattr(adapter, name) is not None:
                raise ConfigError(f"adapters[{a}]: expected A and B alone in a pack, got {name} besides")
        found.append((adapter.A, adapter.B))
    if not found:
        raise ConfigError(f"adapters[{a}]: expected an adapter for each slice, got none")
    return found


def _int(name: str, value: Any, low: int, high: int) -> int:
    number = value if isinstance(value, int) else getattr(value, "item", lambda: None)()
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise ConfigError(f"{name}: expected integers from {low} to {high}, got {value!r}")
    return number


def _numbers(scalings: Sequence[float], count: int) -> tuple[float, ...]:
    if len(scalings) != count:
        raise ShapeError(f"scalings: expected {count} of them, one for each adapter, got {len(scalings)}")
    found = []
    for s in scalings:
        try:
            number = float("nan") if isinstance(s, (bool, str, bytes)) else float(s)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not isfinite(number):
            raise ConfigError(f"scalings: expected finite floats, got {s!r}")
        found.append(number)
    return tuple(found)
