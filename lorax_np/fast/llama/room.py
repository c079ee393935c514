"""Arrays that one worker uses again in every step: by name, in whatever shape a step needs."""

from itertools import pairwise
from math import prod

import numpy as np

from ...backend import HostArray
from ..buffers import aligned


def fresh(shape: tuple[int, ...], dtype: str) -> HostArray:
    """An array of arbitrary content that begins on a cache line, so that where it lies shows in no result."""
    kind = np.dtype(dtype)
    return aligned(max(1, prod(shape) * kind.itemsize))[: prod(shape) * kind.itemsize].view(kind).reshape(shape)


class Room:
    """Memory of one worker, and a generator. An array's content is arbitrary until it is written."""

    def __init__(self, dtype: str) -> None:
        """dtype : of all arrays, but those asked for otherwise."""
        self.dtype, self._flat = dtype, dict[str, HostArray]()
        self.stream = np.random.Philox(0)  # of masks, one at a time

    def take(self, name: str, *shape: int, dtype: str = "") -> HostArray:
        """The array of a name, which whoever took it before no longer uses."""
        count, kind = prod(shape), dtype or self.dtype
        flat = self._flat.get(name)
        if flat is None or len(flat) < count:
            self._flat[name] = flat = fresh((count,), kind)
        return flat[:count].reshape(shape)

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(flat.nbytes for flat in self._flat.values())


class Run:
    """Some whole sequences of a step, one after another in rows; what depends on where they lie."""

    def __init__(
        self, places: list[int], lengths: list[int], index: list[int], dropout: tuple[int, int] | None
    ) -> None:
        """places, index : of each sequence in the batch, and in the whole step;  dropout : (seed, step)."""
        self.places, self.bounds = places, np.cumsum([0, *lengths]).tolist()
        self.index, self.dropout = index, dropout

    @property
    def N(self) -> int:
        """How many rows there are."""
        last: int = self.bounds[-1]
        return last

    def sequences(self) -> list[tuple[int, int, int]]:
        """First row, end, and number in the step of each sequence."""
        return [(a, end, i) for (a, end), i in zip(pairwise(self.bounds), self.index, strict=True)]

    def blocks(self, height: int) -> list[slice]:
        """Rows in blocks of at most so many, none of them across the end of a sequence."""
        return [part for a, end, _ in self.sequences() for part in self.cut(a, end, height)]

    @staticmethod
    def cut(a: int, end: int, height: int) -> list[slice]:
        """Rows from a to end in blocks of at most so many."""
        return [slice(at, min(at + height, end)) for at in range(a, end, height)]
