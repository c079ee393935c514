"""A whole checkpoint merged with an adapter directory, or an adapter taken out of one again.

Tensor by tensor, rows by rows, in bounded memory; what the adapter does not touch is copied by bytes. What is
computed: specs/merge.md. How, and what is promised of memory, rounding and interruption: specs/checkpoints.md.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from ..io.checkpoint import INDEX, Checkpoint, open_checkpoint
from .place import Workplace, check_apart
from .plan import (
    FLOATS,
    HEAD,
    INPUTS,
    NAMES,
    CheckpointPlan,
    Task,
    copied,
    filed,
    located,
    missing,
)
from .threads import one_thread_each
from .work import Job, loaded, make_file

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # bytes written so far, and of all
WEIGHTS = ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"
NAMED = (
    "config.json",
    "generation_config.json",
    "tokenizer",
    "special_tokens_map",
    "vocab",
    "merges",
    "added_tokens",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, or what would be.

    out : the new folder;  files : bytes by name;  changed : names of the tensors that are not copies
    notes : what the reader of the result has to know;  resumed : files that were there from a run before
    """

    out: Path
    files: dict[str, int]
    changed: tuple[str, ...]
    notes: tuple[str, ...]
    sites: int
    tensors: int
    seconds: float = 0.0
    resumed: tuple[str, ...] = ()
    dry: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        plain = {name: getattr(self, name) for name in ("files", "sites", "tensors", "seconds", "dry")}
        more = {"out": str(self.out), "bytes": self.nbytes, "changed": list(self.changed)}
        return plain | more | {"notes": list(self.notes), "resumed": list(self.resumed)}


def merge_checkpoint(
    base: PathLike,
    adapter: PathLike,
    out: PathLike,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    resume: bool = True,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    jobs: int | None = None,
) -> Outcome:
    """Write the checkpoint that computes what a base and an adapter compute together, without dropout.

    base    : what open_checkpoint takes
    adapter : a PEFT directory
    out     : a folder that is not there, or empty
    executor : where files are made, each as a task of its own: any of concurrent.futures, of processes or of
        MPI too; None makes one file after another, each by several threads
    progress : called with the bytes written so far and the bytes of all
    dry_run : write nothing, and tell what would be written
    resume  : after an interrupt, go on after the files that the same work has finished
    dtype   : of every tensor of floats; None keeps each one's own
    max_shard_size : bytes of tensors a file, a number or such as "5GB"; None keeps the base's files
    jobs    : threads; None takes one a core

    The numbers are those of lorax_np.merge, to the bit: W + s·BA in float64, rounded once. Biases, embeddings,
    convolutions, experts and Conv1D are merged in place, what modules_to_save brings replaces what was there,
    and every other file of the directory is copied. Where input and output embedding are one tensor and the
    adapter changes one of them, they become two, and the notes say so.

    Raises ConfigError where adapter and base do not fit, where a row has no direction under DoRA, where a
    result is not finite, and where out is in use; FormatError for files that are damaged, and for a trained
    bias where the model has no slot for one; ShapeError; the system's OSError. After an error nothing is left;
    after an interrupt the finished files wait beside out in `.NAME.part`.
    Source: specs/checkpoints.md.
    """
    start = time.perf_counter()
    base, adapter, out = Path(base), Path(adapter), Path(out)
    checkpoint, files = open_checkpoint(base), loaded(str(adapter.resolve()))
    plan = plan_merge(checkpoint, files, dtype, size_of(max_shard_size))
    job = Job(str(base.resolve()), str(adapter.resolve()), "", "", plan.files[0], 1.0)
    found = _written(checkpoint, plan, out, job, executor, progress, dry_run, resume, jobs, (adapter,))
    return replace(found, sites=len(files.sites), seconds=time.perf_counter() - start)


def unmerge_checkpoint(
    merged: PathLike,
    adapter: PathLike,
    out: PathLike,
    *,
    original: PathLike | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    resume: bool = True,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    jobs: int | None = None,
) -> Outcome:
    """Write the base again, from a merged checkpoint and the adapter that was merged.

    original : the base of before, where it is still there: what the adapter touched is then copied from it, and
        nothing is lost. Without it s·BA is subtracted, and each entry is off by half an ulp of W + s·BA and
        half an ulp of W at most, (merge.7), but under DoRA, for a trained bias and for saved modules, whose
        originals are in no way in the merged checkpoint: those are refused.

    All else as merge_checkpoint. Source: specs/merge.md, specs/checkpoints.md.
    """
    start = time.perf_counter()
    merged, adapter, out = Path(merged), Path(adapter), Path(out)
    first = None if original is None else Path(original)
    checkpoint, files = open_checkpoint(merged), loaded(str(adapter.resolve()))
    before = None if first is None else open_checkpoint(first)
    plan = plan_unmerge(checkpoint, files, before, dtype, size_of(max_shard_size))
    place = "" if first is None else str(first.resolve())
    job = Job(str(merged.resolve()), str(adapter.resolve()), place, "", plan.files[0], -1.0)
    apart = (adapter,) if first is None else (adapter, first)
    found = _written(checkpoint, plan, out, job, executor, progress, dry_run, resume, jobs, apart)
    return replace(found, sites=len(files.sites), seconds=time.perf_counter() - start)


# ---- plans -------------------------------------------------------------------------------------------------


def plan_merge(base: Checkpoint, files: Any, dtype: str | None, max_shard_size: int | None) -> CheckpointPlan:
    """Plan a merge: which tensor gets which site's update, bias or stand-in, and which become two."""
    tasks, notes = copied(base, dtype), []
    beside: dict[str, str] = {}
    wanted = {site.weight: name for name, site in files.sites.items()} | {name: name for name in files.saved}
    where = located(base, wanted)
    inputs = next((name for name in tasks if name.endswith(INPUTS)), None)
    head = where.get(HEAD)
    touched: set[str] = set()  # of the two ends that may be one tensor
    for name, adapter in files.adapters.items():
        site = files.sites[name]
        weight = where.get(site.weight)
        if adapter.A is not None:
            if weight is None and site.weight == HEAD and _tied(base) and inputs is not None:
                tasks[HEAD] = replace(tasks[inputs], name=HEAD, source=inputs)
                beside[HEAD], weight = inputs, HEAD
            if weight is None:
                raise missing(base.path, base, name, site.weight)
            _check_floats(base, tasks[weight], name)
            tasks[weight] = replace(tasks[weight], kind="update", site=name)
            touched |= {weight} & {HEAD, inputs, head}
        if adapter.b is not None or adapter.bB is not None:
            bias = (weight or site.weight).removesuffix("weight") + "bias"
            if bias not in tasks:
                raise FormatError(f"{name}: expected a bias in {base.path} to put a trained one in, got none")
            tasks[bias] = replace(tasks[bias], kind="bias", site=name)
    for saved, array in files.saved.items():
        name = where.get(saved, saved)
        if name in tasks and tuple(array.shape) != tasks[name].shape:
            raise ConfigError(f"{saved}: expected {tasks[name].shape}, set by {base.path}, got {array.shape}")
        if name not in tasks:
            new = next(iter(tasks.values()))
            word = FLOATS[dtype] if dtype else _main_word(tasks.values())
            tasks[name] = replace(new, name=name, shape=tuple(array.shape), source="", word=word)
            beside[name] = inputs or new.name
            notes.append(f"{name} is new: the adapter brings it, and the base has no such tensor")
        tasks[name] = replace(tasks[name], kind="saved", saved=saved, site="")
        touched |= {name} & {HEAD, inputs, head}
    config: dict[str, Any] = {}
    if touched and _tied(base) and inputs is not None:
        if head is None and HEAD not in tasks:
            tasks[HEAD] = replace(copied(base, dtype)[inputs], name=HEAD, source=inputs)
            beside[HEAD] = inputs
        config["tie_word_embeddings"] = False
        notes.append(
            f"{inputs} and {head or HEAD} were one tensor, and the adapter changes "
            f"{' and '.join(sorted(touched))}: they are two now, and config.json says tie_word_embeddings false"
        )
    made, index = filed(base, tasks, beside, max_shard_size)
    return CheckpointPlan(made, index, config | _dtype_words(base, dtype), tuple(notes))


def plan_unmerge(
    merged: Checkpoint, files: Any, before: Checkpoint | None, dtype: str | None, max_shard_size: int | None
) -> CheckpointPlan:
    """Plan the way back: what the adapter touched comes from before, or by subtraction."""
    plan = plan_merge(merged, files, dtype, max_shard_size)
    if before is None:
        for task in plan.tasks:
            adapter = files.adapters.get(task.site)
            came = ""
            if task.kind == "saved":
                came = "a tensor that a saved module replaced"
            elif task.kind == "bias" and adapter is not None and adapter.b is not None:
                came = "a bias that a trained one replaced"
            elif task.kind == "update" and adapter is not None and adapter.m is not None:
                came = "DoRA, whose norms of before the merge are not in the merged weight"
            if came:
                raise ConfigError(
                    f"original: expected the base of before for {task.name}, got none, and {came}"
                )
        note = "by subtraction: each entry within half an ulp of W + s·BA and half an ulp of W, (merge.7)"
        return replace(plan, notes=(*plan.notes, note))
    changed = {task.name: task for task in plan.tasks if task.kind not in ("copy", "cast")}
    where = located(before, dict.fromkeys(changed, ""))
    files_back = []
    notes = []
    for file in plan.files:
        tasks = []
        for task in file.tasks:
            if task.name in changed:
                if task.name not in where:
                    notes.append(f"{task.name} is left out: the original has no such tensor")
                    continue
                source = where[task.name]
                if before.shape(source) != task.shape:
                    raise ConfigError(
                        f"original: expected {task.shape} for {task.name}, set by {merged.path}, "
                        f"got {before.shape(source)}"
                    )
                word = before.shard(source).dtype(source)
                task = replace(task, kind="original", source=source, site="", saved="", word=word)
            tasks.append(task)
        files_back.append(replace(file, tasks=tuple(tasks)))
    config = {k: before.config[k] for k in ("tie_word_embeddings",) if k in before.config}
    return replace(plan, files=tuple(files_back), config=config, notes=tuple(notes))


def _tied(base: Checkpoint) -> bool:
    """Whether input and output embedding are one tensor in this model."""
    said = base.config.get("tie_word_embeddings")
    if said is None:
        kinds = [str(kind) for kind in base.config.get("architectures") or ()]
        return HEAD not in base and any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
    return bool(said)


def _check_floats(base: Checkpoint, task: Task, site: str) -> None:
    if task.word not in NAMES:
        raise ConfigError(
            f"{site}: expected {task.name} of {base.path} in one of {', '.join(NAMES)}, got {task.word}"
        )


def _main_word(tasks: Iterable[Task]) -> str:
    """The dtype in which most of a checkpoint's floats are."""
    sizes = dict.fromkeys(NAMES, 0)
    for task in tasks:
        if task.word in sizes:
            sizes[task.word] += task.nbytes
    return max(sizes, key=lambda word: sizes[word])


def _dtype_words(base: Checkpoint, dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return {}
    held = [name for name in ("torch_dtype", "dtype") if name in base.config]
    return dict.fromkeys(held, dtype)


def size_of(size: int | str | None) -> int | None:
    """A number of bytes, from one or from words such as 5GB and 300MiB. Raises ConfigError."""
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    text = str(size).strip().upper()
    number = text.rstrip("KMGIB")
    try:
        found = int(float(number) * units[text[len(number) :].strip()])
    except (KeyError, ValueError, OverflowError):
        found = 0
    if found <= 0 or isinstance(size, bool):
        raise ConfigError(f"max_shard_size: expected bytes above 0, or such as 5GB or 300MiB, got {size!r}")
    return found


# ---- files -------------------------------------------------------------------------------------------------


def _written(
    base: Checkpoint,
    plan: CheckpointPlan,
    out: Path,
    job: Job,
    executor: Executor | None,
    progress: Progress | None,
    dry_run: bool,
    resume: bool,
    jobs: int | None,
    apart: tuple[Path, ...],
) -> Outcome:
    """Make all files in a workplace, or only tell what they would be."""
    check_apart(out, base.path, *apart)
    if jobs is not None and (isinstance(jobs, bool) or jobs < 1):
        raise ConfigError(f"jobs: expected at least 1, got {jobs!r}")
    changed = tuple(task.name for task in plan.tasks if task.kind != "copy")
    others = other_files(base)
    place = Workplace(out, plan.digest(job._replace(file=plan.files[0]), facts(base, *apart)), resume=resume)
    sizes = {file.name: file.nbytes for file in plan.files} | {
        path.name: path.stat().st_size for path in others
    }
    outcome = Outcome(out, sizes, changed, plan.notes, 0, len(plan.tasks), dry=dry_run)
    if dry_run:
        return outcome
    with place:
        resumed = tuple(file.name for file in plan.files if file.name in place.finished)
        left = [job._replace(file=f, folder=str(place.folder)) for f in plan.files if f.name not in resumed]
        count = _Count(progress, plan.nbytes, sum(f.nbytes for f in plan.files if f.name in resumed))
        if executor is None:
            with one_thread_each():
                _here(left, place, count, jobs or os.cpu_count() or 1)
        else:
            _elsewhere(left, place, count, executor)
        for path in others:
            shutil.copyfile(path, place.folder / path.name)
        if plan.index is not None:
            (place.folder / (index_name(base))).write_text(plan.index_text(), encoding="utf-8")
        if plan.config:
            _write_config(base, plan, place.folder / "config.json")
        sizes = {path.name: path.stat().st_size for path in sorted(place.folder.iterdir())}
    return replace(outcome, files=sizes, resumed=resumed)


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


def _here(left: list[Job], place: Workplace, count: _Count, threads: int) -> None:
    for job in left:
        place.done(make_file(job._replace(threads=threads), count))


def _elsewhere(left: list[Job], place: Workplace, count: _Count, executor: Executor) -> None:
    """A task for each file; after an error or an interrupt no further one is begun."""
    futures: dict[Future[str], Job] = {executor.submit(make_file, job): job for job in left}
    try:
        for future in as_completed(futures):
            place.done(future.result())
            count(futures[future].file.nbytes)
    finally:
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()


def facts(base: Checkpoint, *more: Path) -> list[tuple[str, int, int]]:
    """What tells whether files are still the same: their names, sizes, and times of change."""
    paths = [*base.files]
    for place in more:
        paths += sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else [place]
    stats = [(path, path.stat()) for path in paths]
    return [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


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


def _write_config(base: Checkpoint, plan: CheckpointPlan, path: Path) -> None:
    if base.config:
        text = json.dumps({**base.config, **plan.config}, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
