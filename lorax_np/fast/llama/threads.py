"""How many workers, each with how many threads of the one BLAS there is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import ConfigError
from ..gemm import engine


def worker_count(workers: int | str, sequences: int) -> int:
    """As many as there are cores, and no more than sequences; one where BLAS cannot be told its threads."""
    if workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = cores if engine().threads is not None else 1
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f'workers: expected "auto" or a number of at least 1, got {workers!r}')
    return max(1, min(workers, sequences))


@contextmanager
def blas_threads(workers: int) -> Iterator[None]:
    """Within it each worker's products use one thread, where there are several workers."""
    control = engine().threads
    if workers == 1 or control is None:
        yield
        return
    before = control.get()
    control.set(1)
    try:
        yield
    finally:
        control.set(before)


def shares(lengths: list[int], workers: int, most: int) -> list[list[list[int]]]:
    """Which sequences each worker does, by their places, in runs of about `most` rows at most.

    The longest first, each to whom has least so far; the order depends on the lengths alone.
    """
    load, mine = [0] * workers, [list[int]() for _ in range(workers)]
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        who = load.index(min(load))
        load[who] += lengths[place]
        mine[who].append(place)
    return [_runs(sorted(places), lengths, most) for places in mine]


def _runs(places: list[int], lengths: list[int], most: int) -> list[list[int]]:
    total = sum(lengths[place] for place in places)
    count = max(1, round(total / most))
    runs, rows = [list[int]()], 0
    for place in places:
        if runs[-1] and rows + lengths[place] / 2 > total * len(runs) / count:
            runs.append([])
        runs[-1].append(place)
        rows += lengths[place]
    return [run for run in runs if run]
