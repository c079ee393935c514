"""One file of a new checkpoint, made: rows are read, updated, rounded and written, block by block.

Beside the blocks nothing of a tensor is in memory. Blocks do not depend on how many threads there are, so
neither do the bytes.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..backend import Array, HostArray, to_host
from ..io.checkpoint import open_checkpoint
from ..io.safetensors import BITS, show
from ..io.writer import SafetensorsWriter
from .begun import Begun, Piece
from .fitted import fitted
from .merge_plans import ROWS, indices_of
from .plan import NAMES, FilePlan, Task
from .reading import opened, read_into, stored_dtype
from .update import WIDE, Blocks, Scratch, Update, matrix_shape, rounded, to_numpy, update_of

BLOCK = 1 << 19  # entries of rows that are updated at a time; smaller ones have threads wait for each other
UNIT = 1 << 24  # bytes of a tensor that one thread takes at a time
ROWWISE = "cast", "update", "rows"  # kinds of tasks that are computed rows by rows
Progress = Callable[[int], None]  # told how many bytes more are written


class Job(NamedTuple):
    """What another process has to know to make one file."""

    base: str
    adapter: str
    original: str  # where tensors of the kind "original" come from; empty for none
    folder: str
    begun: str  # the folder of what is not finished
    work: str  # a word for all that decides the bytes
    file: FilePlan
    sign: float = 1.0  # of the update
    mark: str = ""  # what the sources looked like
    residual: bool = False  # whether the base is what the adapter's start left
    threads: int = 1


class Unit(NamedTuple):
    """Some rows of one tensor; of one that is copied, some bytes."""

    task: Task
    start: int
    stop: int
    row: int  # bytes of one, as they are written

    @property
    def piece(self) -> Piece:
        """Where they lie in the new tensor."""
        return Piece(self.task.name, self.start * self.row, (self.stop - self.start) * self.row)


class Made(NamedTuple):
    """A file that is whole: its name, and how many bytes of its tensors were there from a run before."""

    name: str
    kept: int


def make_file(job: Job, progress: Progress | None = None, stop: threading.Event | None = None) -> Made:
    """Make one file of a new checkpoint; what an earlier run has put down of it is taken up."""
    return begin_file(job, progress, stop)()


def begin_file(
    job: Job, progress: Progress | None = None, stop: threading.Event | None = None
) -> Callable[[], Made]:
    """Write all of one file, and return what brings it to the disk and puts it in its place."""
    with ExitStack() as stack:
        maker = _Maker(job, stack)
        path = Path(job.folder, job.file.name)
        entries, said = job.file.entries(), job.file.metadata or None
        file = stack.enter_context(Begun(path, Path(job.begun), job.work, entries, said))
        order = {name: place for place, name in enumerate(file.writer.names)}
        tasks = sorted(job.file.tasks, key=lambda task: order[task.name])
        units = (unit for task in tasks for unit in maker.units(task))

        def make(unit: Unit) -> None:
            piece = unit.piece
            if not file.take(piece):
                maker.make(unit, file.writer)
                file.put(piece)
            if progress is not None:
                progress(piece.size)

        _run(units, make, job.threads, stop or threading.Event())
        rest = stack.pop_all()

    def finish() -> Made:
        rest.close()
        return Made(job.file.name, file.kept)

    return finish


def _run(units: Iterator[Unit], make: Callable[[Unit], None], threads: int, stop: threading.Event) -> None:
    """Make all units, by several threads where there are several; the first error stops them all."""

    def work() -> None:
        while not stop.is_set():
            with lock:
                unit = next(units, None)
            if unit is None:
                return
            make(unit)

    lock = threading.Lock()
    if threads == 1:
        work()
        return
    with ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            wait(workers, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for worker in workers:
        worker.result()


class _Maker:
    """The open files behind one job."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        self.job = job
        self.base = open_checkpoint(job.base)
        self.original = open_checkpoint(job.original) if job.original else None
        self.adapter = fitted(job.adapter, job.base, job.mark, job.residual)
        self._file = opened(stack)
        self._ratios: dict[str, HostArray | None] = {}
        self._lock = threading.RLock()
        self._local = threading.local()

    @property
    def scratch(self) -> Scratch:
        """The memory of this thread."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        found: Scratch = self._local.scratch
        return found

    # ---- what is to be done --------------------------------------------------------------------------------

    def units(self, task: Task) -> Iterator[Unit]:
        """Cut one tensor into units: of bytes where it is copied, of rows where it is computed."""
        if task.kind in ("copy", "original"):
            count, step, row = task.nbytes, 4 * UNIT, 1
        elif task.kind in ROWWISE:
            count, cols = matrix_shape(task.shape or (1,), self._kind(task))
            step = _rows_of(cols) * max(1, UNIT // max(1, _rows_of(cols) * cols * 4))
            row = cols * BITS[task.word] // 8
        else:
            count, step, row = 1, 1, task.nbytes
        for start in range(0, count, step):
            yield Unit(task, start, min(start + step, count), row)

    def make(self, unit: Unit, writer: SafetensorsWriter) -> None:
        """Write one unit."""
        task = unit.task
        if task.kind in ("copy", "original"):
            source = self.original if task.kind == "original" and self.original is not None else self.base
            file = source.shard(task.source)
            offset = file.place(task.source)[0] + unit.start
            writer.copy_part(task.name, unit.start, self._file(file.path), offset, unit.stop - unit.start)
            writer.hurry(task.name, unit.start, unit.stop - unit.start)
        elif task.kind in ROWWISE:
            self._rows(unit, writer)
        else:
            found = self._small(task)
            if task.word in NAMES:
                flat = to_numpy(found, WIDE).reshape(1, -1)
                found = rounded(flat, NAMES[task.word], show(task.name), Scratch()).reshape(task.shape)
            writer.write(task.name, found)

    # ---- rows ------------------------------------------------------------------------------------------------

    def _rows(self, unit: Unit, writer: SafetensorsWriter) -> None:
        """Rows of a tensor read, updated, rounded and written, block by block."""
        task, written = unit.task, 0
        update = self._update(task)
        ratio = self._ratio(task, update)
        cols = matrix_shape(task.shape or (1,), self._kind(task))[1]
        begin = unit.start * cols * (BITS[task.word] // 8)
        for first, V in self._sums(task, update, unit.start, unit.stop):
            if update is not None:
                update.scale_rows(V, first)
            if ratio is not None:
                np.multiply(V, ratio, out=V)  # (merge.2)
            self._put_rows(task, V, first)
            as_it_is = task.kind == "cast"  # infinity may stand in the base, where nothing is computed with it
            found = rounded(V, NAMES[task.word], show(task.name), self.scratch, new_only=as_it_is)
            writer.write_part(task.name, begin + written, found)
            written += found.nbytes
        writer.hurry(task.name, begin, written)

    def _sums(
        self, task: Task, update: Update | None, start: int, stop: int
    ) -> Iterator[tuple[int, HostArray]]:
        """First row, and rows of W + s·BA in float64, by blocks of rows."""
        cols = matrix_shape(task.shape or (1,), self._kind(task))[1]
        step = _rows_of(cols)
        for first in range(start, stop, step):
            W = self._read(task, first, min(first + step, stop), cols)
            V = self.scratch("V", W.shape, WIDE)
            np.copyto(V, W)
            if update is not None:
                update.add(V, first, self.scratch)
            yield first, V

    def _read(self, task: Task, start: int, stop: int, cols: int) -> HostArray:
        """Some rows of a tensor of the base, as it stores them, or of what stands in for it."""
        stands_in = task.saved in self.adapter.saved and not task.saved.endswith(ROWS)
        if stands_in or not self.base.shards:
            whole = self.adapter.saved[task.saved] if stands_in else self._decoded(task.source)
            return to_host(whole).reshape(-1, cols)[start:stop]
        file = self.base.shard(task.source)
        dtype = stored_dtype(file.dtype(task.source), str(file.path))
        found = self.scratch("W", (stop - start, cols), dtype)
        offset = file.place(task.source)[0] + start * cols * dtype.itemsize
        read_into(self._file(file.path), found, offset, file.path)
        return found

    def _decoded(self, name: str) -> Array:
        """A tensor of a GGUF file, which is decoded whole: kept until this thread wants another."""
        if getattr(self._local, "name", None) != name:
            self._local.name, self._local.whole = name, self.base[name]
        found: Array = self._local.whole
        return found

    def _ratio(self, task: Task, update: Update | None) -> HostArray | None:
        """k = m/n of DoRA by columns, computed once, by whichever thread needs it first."""
        if update is None or update.m is None or update.by_rows:
            return None
        with self._lock:
            if task.name not in self._ratios:
                rows = matrix_shape(task.shape, self._kind(task))[0]
                blocks = Blocks(lambda: (V for _, V in self._sums(task, update, 0, rows)))
                self._ratios[task.name] = update.ratio_of_columns(blocks)
            return self._ratios[task.name]

    # ---- the adapter -----------------------------------------------------------------------------------------

    def _kind(self, task: Task) -> str:
        return self.adapter.sites[task.site].kind if task.site else "linear"

    def _update(self, task: Task) -> Update | None:
        if task.kind != "update":
            return None
        site = self.adapter.sites[task.site]
        return update_of(self.adapter.adapters[task.site], site, task.shape, sign=self.job.sign)

    def _put_rows(self, task: Task, V: HostArray, first: int) -> None:
        """Trained rows of an embedding in the place of the base's."""
        if task.saved.endswith(ROWS):
            rows = self.adapter.saved[task.saved]
            for index, row in zip(indices_of(self.adapter, task.saved), rows, strict=True):
                if first <= index < first + len(V):
                    V[index - first] = row

    def _small(self, task: Task) -> HostArray:
        """A bias, or a tensor that the adapter brings along."""
        if task.kind == "saved":
            return to_host(self.adapter.saved[task.saved])
        adapter, site = self.adapter.adapters[task.site], self.adapter.sites[task.site]
        b = to_numpy(to_host(self.base[task.source] if adapter.b is None else adapter.b), WIDE)
        if adapter.bB is not None:
            b = b + self.job.sign * site.scaling * to_numpy(to_host(adapter.bB), WIDE)  # (merge.3)
        return b


def _rows_of(cols: int) -> int:
    """How many rows are a block."""
    return max(8, BLOCK // max(cols, 1) // 8 * 8)
