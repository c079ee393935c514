"""Count, mean and scatter of a layer's inputs: all that a start needs of them, whatever their number."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..backend import FLOATS, Array, HostArray, all_finite, dtype_name, to_host
from ..errors import ConfigError, DtypeError, ShapeError
from ..shapes import axes, rows

PIECE = 1 << 20  # entries of the inputs that are float64 at a time


class Moments(NamedTuple):
    """What remains of N rows x, in float64."""

    rows: int  # N
    mean: HostArray  # (d_in,)       μ
    scatter: HostArray  # (d_in, d_in)  Σ (x − μ)ᵀ(x − μ)


def input_moments(inputs: Array | Iterable[Array] | Moments) -> Moments:
    """Count, mean and scatter of a layer's inputs.

    inputs : (..., d_in)   all of them, any leading axes; or batches of them, each read once; or what this made

    Memory for d_in² numbers and a piece of a batch, however many rows there are. Their order, and how they are
    cut into batches, moves the result by roundings of float64 only.
    Raises ConfigError for no rows, NaN or infinity; ShapeError where batches differ in d_in; DtypeError.
    Source: Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115; specs/starts.md.

    >>> found = input_moments([np.array([[1.0, 0.0]]), np.array([[3.0, 0.0]])])
    >>> found.rows, found.mean.tolist(), found.scatter.tolist()
    (2, [2.0, 0.0], [[2.0, 0.0], [0.0, 0.0]])
    """
    if isinstance(inputs, Moments):
        return inputs
    found: Moments | None = None
    for x in _pieces(inputs):
        centre = np.mean(x, axis=0)
        x -= centre
        piece = Moments(len(x), centre, x.T @ x)
        found = piece if found is None else joined(found, piece)
    if found is None:
        raise ConfigError("inputs: expected at least one row, got none")
    return found


def joined(one: Moments, other: Moments) -> Moments:
    """The moments of the rows of both."""
    rows, shift = one.rows + other.rows, other.mean - one.mean
    scatter = one.scatter + other.scatter
    scatter += (one.rows * other.rows / rows) * np.outer(shift, shift)  # (starts.1)
    return Moments(rows, one.mean + (other.rows / rows) * shift, scatter)  # (starts.2)


def _pieces(inputs: Array | Iterable[Array]) -> Iterator[HostArray]:
    """Some rows at a time, as float64 copies; none of them empty."""
    if not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: expected an array or batches of them, got {type(inputs).__name__}")
    batches: Iterable[Array] = [inputs] if hasattr(inputs, "shape") else inputs  # type: ignore[list-item]
    wide = None
    for batch in batches:
        wide = axes(inputs=(batch, "... d_in"))["d_in"] if wide is None else wide
        if tuple(batch.shape)[-1:] != (wide,):
            raise ShapeError(
                f"inputs: expected (..., d_in) with d_in={wide} set by the first, got {batch.shape}"
            )
        if dtype_name(batch) not in FLOATS[:-1]:
            raise DtypeError(f"inputs: expected one of {', '.join(FLOATS[:-1])}, got {dtype_name(batch)}")
        x, step = rows(to_host(batch)), max(1, PIECE // wide)
        for start in range(0, x.shape[0], step):
            piece = np.array(x[start : start + step], dtype=np.float64)
            if not all_finite(piece):
                raise ConfigError("inputs: expected finite numbers, got NaN or infinity")
            yield piece
