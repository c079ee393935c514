"""The files of a planned checkpoint, made: here by threads, or elsewhere by an executor; and what was made."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..io.checkpoint import INDEX, Checkpoint, open_checkpoint
from .place import Workplace, check_apart
from .plan import CheckpointPlan
from .threads import one_thread_each
from .work import Job, Made, begin_file, make_file

Progress = Callable[[int, int], None]  # bytes written so far, and of all
WEIGHTS = ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"
NAMED = (  # how the files begin that go along with a single file of weights
    *("config.json", "generation_config", "tokenizer", "special_tokens_map", "added_tokens"),
    *("vocab", "merges", "chat_template", "preprocessor_config"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, or what would be.

    out : the new folder;  files : bytes by name;  changed : names of the tensors that are not copies
    notes : what the reader of the result has to know;  resumed : files that were there from a run before
    kept : bytes of tensors that were, in those files and in what was begun of others
    """

    out: Path
    files: dict[str, int]
    changed: tuple[str, ...]
    notes: tuple[str, ...]
    sites: int
    tensors: int
    seconds: float = 0.0
    resumed: tuple[str, ...] = ()
    kept: int = 0
    dry: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        plain = {name: getattr(self, name) for name in ("files", "sites", "tensors", "seconds", "kept", "dry")}
        more = {"out": str(self.out), "bytes": self.nbytes, "changed": list(self.changed)}
        return plain | more | {"notes": list(self.notes), "resumed": list(self.resumed)}


class Sources:
    """What is read, and a word that changes when any of it does."""

    def __init__(
        self,
        base: Path,
        adapter: Path,
        original: Path | None = None,
        *,
        sign: float = 1.0,
        residual: bool = False,
    ) -> None:
        """Look at the files' names, sizes and times of change."""
        self.paths = [path for path in (base, adapter, original) if path is not None]
        self.base, self.adapter = str(base.resolve()), str(adapter.resolve())
        self.original = "" if original is None else str(original.resolve())
        self.sign, self.residual = sign, residual
        files = [*open_checkpoint(base).files]
        for place in self.paths[1:]:
            files += sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
        found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        self.mark = sha256(json.dumps([found, sign, residual]).encode()).hexdigest()


class How(NamedTuple):
    """Where files are made, who is told, and what becomes of those that are finished."""

    executor: Executor | None = None
    progress: Progress | None = None
    dry_run: bool = False
    resume: bool = True
    jobs: int | None = None


def written(base: Checkpoint, plan: CheckpointPlan, out: Path, sources: Sources, how: How) -> Outcome:
    """Make all files of a plan in a workplace, or only tell what they would be."""
    check_apart(out, *sources.paths)
    if how.jobs is not None and (isinstance(how.jobs, bool) or how.jobs < 1):
        raise ConfigError(f"jobs: expected at least 1, got {how.jobs!r}")
    others = other_files(base)
    place = Workplace(out, plan.digest(sources.mark), resume=how.resume)
    sizes = {file.name: file.nbytes for file in plan.files}
    sizes |= {path.name: path.stat().st_size for path in others}
    if plan.index is not None:
        sizes[index_name(base)] = len(plan.index_text().encode())
    changed = tuple(task.name for task in plan.tasks if task.kind != "copy")
    outcome = Outcome(out, sizes, changed, plan.notes, 0, len(plan.tasks), dry=how.dry_run)
    if how.dry_run:
        return outcome
    with place:
        resumed = tuple(file.name for file in plan.files if file.name in place.finished)
        job = Job(
            sources.base,
            sources.adapter,
            sources.original,
            str(place.folder),
            str(place.begun),
            place.digest,
            plan.files[0],
            sign=sources.sign,
            mark=sources.mark,
            residual=sources.residual,
        )
        left = [job._replace(file=file) for file in plan.files if file.name not in resumed]
        kept = sum(f.nbytes for f in plan.files if f.name in resumed)
        count = _Count(how.progress, plan.nbytes, kept)
        if how.executor is None:
            with one_thread_each():
                kept += _here(left, place, count, how.jobs or os.cpu_count() or 1)
        else:
            kept += _elsewhere(left, place, count, how.executor)
        for path in others:
            shutil.copyfile(path, place.folder / path.name)
        if plan.index is not None:
            (place.folder / index_name(base)).write_text(plan.index_text(), encoding="utf-8")
        if base.config and (plan.config or not (base.folder / "config.json").is_file()):
            text = json.dumps({**base.config, **plan.config}, indent=2, ensure_ascii=False) + "\n"
            (place.folder / "config.json").write_text(text, encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(place.folder.iterdir())}
    return replace(outcome, files=sizes, resumed=resumed, kept=kept)


class _Count:
    """Bytes so far, from several threads."""

    def __init__(self, progress: Progress | None, total: int, done: int) -> None:
        self.progress, self.total, self.done = progress, total, done
        self._lock = threading.Lock()

    def __call__(self, more: int) -> None:
        with self._lock:
            self.done += more
            if self.progress is not None:
                self.progress(self.done, self.total)


def _here(left: list[Job], place: Workplace, count: _Count, threads: int) -> int:
    """File after file, each brought to the disk beside the next; return how many bytes were there before."""
    kept, end = 0, None
    with ThreadPoolExecutor(1) as disk:
        for job in left:
            finish = begin_file(job._replace(threads=threads), count)
            kept += end.result() if end is not None else 0  # one file waits for the disk, no more
            end = disk.submit(_ended, finish, place)
        return kept + (end.result() if end is not None else 0)


def _ended(finish: Callable[[], Made], place: Workplace) -> int:
    made = finish()
    place.done(made.name)
    return made.kept


def _elsewhere(left: list[Job], place: Workplace, count: _Count, executor: Executor) -> int:
    """A task for each file; after an error or an interrupt no further one is begun."""
    futures: dict[Future[Made], Job] = {executor.submit(make_file, job): job for job in left}
    kept = 0
    try:
        for future in as_completed(futures):
            made = future.result()
            place.done(made.name)
            kept += made.kept
            count(futures[future].file.nbytes)
    finally:
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()
    return kept


def other_files(base: Checkpoint) -> list[Path]:
    """What goes along beside the weights: all in a checkpoint's directory; beside one file, known names."""
    found = [path for path in sorted(base.folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    found = [path for path in found if not path.name.endswith(WEIGHTS)]
    return found if base.path.is_dir() else [path for path in found if path.name.startswith(NAMED)]


def index_name(base: Checkpoint) -> str:
    """What the new index is called: as the base's, where it has one."""
    if base.index is None:
        return INDEX
    if base.path.is_file():
        return base.path.name
    found = [path.name for path in base.folder.glob("*.safetensors.index.json")]
    return INDEX if INDEX in found else found[0]
