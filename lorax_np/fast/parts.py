"""A large product in parts, each by a thread of its own, while BLAS has one thread.

What BLAS would do itself, but for two things: here no thread waits in a loop, which on a busy machine costs
more than it brings, and of float32 the sums are those of one thread, to the bit where OpenBLAS has kernels for
AVX-512, elsewhere to rounding. Why: specs/training_speed.md.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING

from ..backend import HostArray
from .cblas import Multiply

if TYPE_CHECKING:
    from concurrent.futures import Executor

LEAST = 1 << 23  # multiplications of a part: fewer are over before another thread has begun
STEP = 16  # rows or columns that the kernels of BLAS do at once: no part ends within them
_count: ContextVar[int] = ContextVar("parts", default=1)


@contextmanager
def in_parts(count: int) -> Iterator[None]:
    """Within this context, and in this thread alone, gemm cuts large products into so many parts."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def parts_of(a: HostArray, b: HostArray) -> int:
    """Into how many parts ab is cut."""
    (m, k), (_, n) = a.shape, b.shape
    return max(1, min(_count.get(), int(m * k * n // LEAST)))


def multiply_parts(
    multiply: Multiply, count: int, a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float
) -> None:
    """out ← α·ab + β·out, by rows of out or by columns, of which there are more; all has ended afterwards.

    >>> import numpy as np
    >>> out = np.zeros((40, 3))
    >>> def multiply(a, b, out, alpha, beta):
    ...     out[...] = len(out)
    >>> multiply_parts(multiply, 2, np.ones((40, 5)), np.ones((5, 3)), out, 1.0, 0.0)
    >>> out[:, 0].tolist() == [32] * 32 + [8] * 8
    True
    """
    from concurrent.futures import wait

    m, n = out.shape
    height = -(-max(m, n) // (count * STEP)) * STEP
    cuts = [slice(at, at + height) for at in range(0, max(m, n), height)]

    def part(cut: slice) -> None:
        if m >= n:
            multiply(a[cut], b, out[cut], alpha, beta)
        else:
            multiply(a, b[:, cut], out[:, cut], alpha, beta)

    waiting = [_threads().submit(part, cut) for cut in cuts[1:]]
    try:
        part(cuts[0])
    finally:
        wait(waiting)
    for each in waiting:
        each.result()


@cache
def _threads() -> "Executor":
    """Threads that stay; a forked process makes its own."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lorax_np_product")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)
