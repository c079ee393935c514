"""Arrays for results and scratch, in memory that is handed out again once nobody holds it.

A fresh large array costs page faults, as the system clears its memory anew each time. Callers see the semantics
of fresh arrays: memory is handed out again only when no array over it is left, and its content is never read.
Each thread has memory of its own. Reasons: specs/decisions/buffers.md.
"""

import sys
from collections import OrderedDict
from math import prod
from threading import local

import numpy as np

from ..backend import HostArray

LEAST, MOST = (
    1 << 16,
    1 << 25,
)  # bytes: below, malloc is quick; above, the faults are nothing beside the product
LIMIT = 1 << 27  # bytes that a thread keeps at most, in use or not
LINE = 64  # bytes of a cache line: where each array begins


class Pool(local):
    """The blocks of one thread, by size; the sizes longest unused come first."""

    def __init__(self) -> None:
        """No block at first."""
        self.blocks: OrderedDict[int, list[HostArray]] = OrderedDict()
        self.held = 0

    def take(self, nbytes: int) -> HostArray:
        """A block of so many bytes that nobody else holds."""
        blocks = self.blocks.setdefault(nbytes, [])
        self.blocks.move_to_end(nbytes)
        for i in range(len(blocks)):
            if _holders(blocks, i) == FREE:
                return blocks[i]
        block = aligned(nbytes)
        blocks.append(block)
        self.held += nbytes
        while self.held > LIMIT:
            self._forget()
        return block

    def _forget(self) -> None:
        """Let go of one block of the size longest unused; who holds it keeps it."""
        size, blocks = next(iter(self.blocks.items()))
        if blocks:
            blocks.pop(0)
            self.held -= size
        if not blocks:
            del self.blocks[size]


def _holders(blocks: list[HostArray], i: int) -> int:
    """How many references there are to a block: every array over it holds one."""
    return sys.getrefcount(blocks[i])


def aligned(nbytes: int) -> HostArray:
    """Bytes that begin on a cache line, so that where memory lies never shows in a result."""
    whole = np.empty(nbytes + LINE, np.uint8)
    start = -whole.__array_interface__["data"][0] % LINE
    # an array over a buffer, not a view of `whole`: arrays made from it then hold it and not `whole`
    return np.frombuffer(memoryview(whole.data)[start : start + nbytes], np.uint8)


FREE = _holders([aligned(1)], 0)  # of a block that only its list holds, as this Python counts
COUNTED = getattr(sys, "_is_gil_enabled", lambda: True)() and hasattr(sys, "getrefcount")
_pool = Pool()


def empty(shape: tuple[int, ...], dtype: str) -> HostArray:
    """Return an array whose content is arbitrary, as numpy.empty does.

    >>> empty((2, 3), "float32").shape
    (2, 3)
    """
    kind = np.dtype(dtype)
    nbytes = prod(shape) * kind.itemsize
    if not COUNTED or not LEAST <= nbytes <= MOST:
        return np.empty(shape, kind)
    return _pool.take(nbytes).view(kind).reshape(shape)


def release() -> None:
    """Let go of all memory that this thread keeps for reuse."""
    _pool.blocks.clear()
    _pool.held = 0
