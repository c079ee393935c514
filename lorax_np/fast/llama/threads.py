"""How many workers there are, what each does, and each with one thread of the one BLAS there is."""

import os
from collections.abc import Callable
from contextvars import copy_context
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ...errors import ConfigError
from ..gemm import engine
from ..parts import in_parts

BUFFER = 16  # entries, NumPy's least: it then works on rows where they lie, and does not gather several to copy

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

Work = TypeVar("Work")
Found = TypeVar("Found")


def worker_count(workers: int | str, sequences: int) -> int:
    """As many as cores for "auto", and no more than sequences; one where BLAS cannot be told its threads."""
    if workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = cores if engine().threads is not None else 1
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers: expected 'auto' or a number of at least 1, got {workers!r}")
    return max(1, min(workers, sequences))


def in_threads(work: Callable[[int, Work], Found], given: list[Work]) -> list[Found]:
    """[work(0, given[0]), work(1, given[1]), ...], each in a thread; all have ended when this returns.

    BLAS has one thread meanwhile. Where it had more of them than there are workers, large products are cut into
    parts for the others (fast/parts.py).
    """
    control = engine().threads
    if control is None:  # there is one worker, and BLAS does as it likes
        return [_quietly(work, who, 1, each) for who, each in enumerate(given)]
    from concurrent.futures import wait

    waiting: list[Future[Found]] = []
    before = control.get()
    parts = max(1, before // max(1, len(given)))
    control.set(1)
    try:
        if len(given) == 1:
            return [_quietly(work, 0, parts, given[0])]
        for who, each in enumerate(given):
            run = copy_context().run
            waiting.append(_threads(len(given)).submit(run, _quietly, work, who, parts, each))
        return [each.result() for each in waiting]
    finally:
        try:
            wait(waiting)
        finally:  # whoever interrupts this too gets the process's threads back all the same
            control.set(before)


def _quietly(work: Callable[[int, Work], Found], who: int, parts: int, given: Work) -> Found:
    size = np.setbufsize(BUFFER)
    try:
        with np.errstate(all="ignore"), in_parts(parts):  # e^-u may overflow: its reciprocal is rightly 0
            return work(who, given)
    finally:
        np.setbufsize(size)


@cache
def _threads(count: int) -> "Executor":
    """Threads that stay, and with them the memory that each keeps for reuse; a forked process makes its own."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(count, thread_name_prefix="lorax_np")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)


def shares(lengths: list[int], workers: int, most: int) -> list[list[list[int]]]:
    """Which sequences each worker does, by their places, in runs of about `most` rows; empty ones nobody does.

    The longest first, each to whom has least so far. Lengths alone decide.

    >>> shares([5, 0, 9, 3], workers=2, most=100)
    [[[2]], [[0, 3]]]
    """
    load, mine = [0] * workers, [list[int]() for _ in range(workers)]
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[place]:
            who = load.index(min(load))
            load[who] += lengths[place]
            mine[who].append(place)
    return [_runs(sorted(places), lengths, most) for places in mine]


def _runs(places: list[int], lengths: list[int], most: int) -> list[list[int]]:
    """The places in order, cut into runs of about equal numbers of rows."""
    total = sum(lengths[place] for place in places)
    count, runs, rows = max(1, round(total / most)), list[list[int]](), 0
    for place in places:
        if not runs or rows + lengths[place] / 2 > total * len(runs) / count:
            runs.append([])
        runs[-1].append(place)
        rows += lengths[place]
    return runs
