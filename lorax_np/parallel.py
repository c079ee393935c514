"""Several processes that train as one: how many they are, and sums over all of them.  See specs/training.md.

Every rank calls the same methods in the same order. Buffers are flat arrays, of any library; between processes
they travel through the host's memory.
"""

import threading
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from .backend import Array, HostArray, from_host, launched_ranks, to_host
from .errors import BackendError, ConfigError

REDUCTIONS = "ordered", "allreduce"
MOST = 1 << 30  # bytes that one call of MPI moves, of all ranks together: it counts in C's int


class Communicator(Protocol):
    """One rank's view of all of them."""

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102

    def gather(self, part: HostArray) -> list[HostArray]:
        """Every rank's flat buffer, in rank order, on every rank; all have one length and dtype."""
        ...

    def allreduce(self, part: HostArray) -> HostArray:
        """The sum of every rank's flat buffer, added in whatever order the library likes."""
        ...

    def broadcast(self, part: HostArray) -> HostArray:
        """Rank 0's flat buffer, on every rank."""
        ...

    def abort(self, code: int) -> None:
        """End every rank's process: whoever fails alone must not leave the others waiting."""
        ...


class Alone:
    """One process, which is rank 0 of 1."""

    rank, size = 0, 1

    def gather(self, part: HostArray) -> list[HostArray]:
        """Its own buffer."""
        return [part]

    def allreduce(self, part: HostArray) -> HostArray:
        """Its own buffer."""
        return part

    def broadcast(self, part: HostArray) -> HostArray:
        """Its own buffer."""
        return part

    def abort(self, code: int) -> None:
        """Nobody else waits."""


class Mpi:
    """Ranks of MPI, over mpi4py; without a launcher such as mpiexec there is one."""

    def __init__(self) -> None:
        """Join the world. Raises BackendError where mpi4py, or an MPI for it, is missing."""
        try:
            self._mpi: Any = import_module("mpi4py.MPI")
        except Exception as error:  # the package, or the library that it loads
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            wanted = "a working mpi4py for several ranks"
            raise BackendError(f"MPI: expected {wanted}, got: {reason}; pip install 'lorax-np[mpi]'") from None
        self._world = self._mpi.COMM_WORLD
        self.rank, self.size = int(self._world.Get_rank()), int(self._world.Get_size())

    def gather(self, part: HostArray) -> list[HostArray]:
        """Every rank's buffer, by MPI_Allgather of its bytes."""
        mine, found = np.ascontiguousarray(part), []
        for piece in self._pieces(mine):
            every = np.empty((self.size, piece.size), mine.dtype)
            self._world.Allgather(_bytes(piece), _bytes(every))
            found.append(every)
        return (
            list(found[0]) if len(found) == 1 else [np.concatenate(rows) for rows in zip(*found, strict=True)]
        )

    def allreduce(self, part: HostArray) -> HostArray:
        """The sum, by MPI_Allreduce."""
        mine = np.ascontiguousarray(part)
        every = np.empty_like(mine)
        for piece, total in zip(self._pieces(mine), self._pieces(every), strict=True):
            self._world.Allreduce(piece, total, op=self._mpi.SUM)
        return every

    def broadcast(self, part: HostArray) -> HostArray:
        """Rank 0's buffer, by MPI_Bcast of its bytes."""
        found = np.array(part)
        for piece in self._pieces(found):
            self._world.Bcast(_bytes(piece), root=0)
        return found

    def abort(self, code: int) -> None:
        """MPI_Abort."""
        self._world.Abort(code)

    def _pieces(self, flat: HostArray) -> list[HostArray]:
        """A buffer in parts that one call can move, as many on every rank; at least one, of nothing perhaps."""
        most = max(1, MOST // (flat.itemsize * self.size))
        return [flat[i : i + most] for i in range(0, max(1, flat.size), most)]


class Threads:
    """Ranks that are threads of one process; made by threads()."""

    def __init__(self, rank: int, size: int, board: list[Any], gate: threading.Barrier) -> None:
        """Take a place at the board on which each rank lays its buffer."""
        self.rank, self.size, self._board, self._gate = rank, size, board, gate

    def gather(self, part: HostArray) -> list[HostArray]:
        """Every rank's buffer, copied before anybody goes on to write to its own."""
        self._board[self.rank] = part
        self._gate.wait()
        every = [np.array(other) for other in self._board]
        self._gate.wait()
        return every

    def allreduce(self, part: HostArray) -> HostArray:
        """The sum, in rank order."""
        total, *others = self.gather(part)
        for other in others:
            total += other
        return total

    def broadcast(self, part: HostArray) -> HostArray:
        """Rank 0's buffer."""
        return self.gather(part)[0]

    def abort(self, code: int) -> None:
        """Whoever waits, now or later, gets a BrokenBarrierError."""
        self._gate.abort()


def threads(size: int) -> list[Threads]:
    """Return the communicators of so many threads, one for each.

    >>> [(one.rank, one.size) for one in threads(2)]
    [(0, 2), (1, 2)]
    """
    board, gate = [None] * size, threading.Barrier(size)
    return [Threads(rank, size, board, gate) for rank in range(size)]


def world() -> Communicator:
    """Return MPI's ranks where this process was started as one of several, and a process alone elsewhere."""
    return Mpi() if launched_ranks() > 1 else Alone()


# ---- sums --------------------------------------------------------------------------------------------------


def counted(ranks: Communicator, *numbers: int) -> list[int]:
    """Return the sums of integers over all ranks.

    >>> counted(Alone(), 3, 4)
    [3, 4]
    """
    every = ranks.gather(np.array(numbers, np.int64))
    return [int(total) for total in np.sum(every, axis=0)]


def summed(ranks: Communicator, parts: Iterable[Array], *, reduction: str = "ordered") -> Array:
    """Return the sum of every rank's flat buffers; each rank has equally many, and at least one.

    ordered : ((rank 0's first + rank 1's first) + ...) + rank 0's second + ...: the order of one process that
        has them all, buffer j·R + k being rank k's j-th, so that its bits are the same        (training.6)
    allreduce : each rank adds its own, and the library adds these sums: one exchange, bits by rank count

    Raises ConfigError for another reduction, and where there is no part.

    >>> float(summed(Alone(), [np.ones(1), np.ones(1)])[0])
    2.0
    """
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    total: Array | None = None
    for part in parts:
        if ranks.size == 1 or reduction == "allreduce":
            total = part if total is None else total + part
            continue
        for other in ranks.gather(to_host(part)):
            placed = from_host(other, part)
            total = placed if total is None else total + placed
    if total is None:
        raise ConfigError("parts: expected at least one buffer a rank, got none")
    if ranks.size > 1 and reduction == "allreduce":
        total = from_host(ranks.allreduce(to_host(total)), total)
    return total


def same_everywhere(ranks: Communicator, digest: bytes) -> bool:
    """Return whether every rank has the same bytes, of one length, such as a hash of the parameters.

    >>> same_everywhere(Alone(), b"digest")
    True
    """
    every = ranks.gather(np.frombuffer(digest, np.uint8))
    return all(np.array_equal(other, every[0]) for other in every)


def _bytes(array: HostArray) -> HostArray:
    return array.reshape(-1).view(np.uint8)


def broadcast_bytes(ranks: Communicator, data: bytes) -> bytes:
    """Return rank 0's bytes, whose length the other ranks need not know.

    >>> broadcast_bytes(Alone(), b"state")
    b'state'
    """
    size = int(ranks.broadcast(np.array([len(data)], np.int64))[0])
    buffer = np.zeros(size, np.uint8)
    if ranks.rank == 0:
        buffer[:] = np.frombuffer(data, np.uint8)
    return ranks.broadcast(buffer).tobytes()
