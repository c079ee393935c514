"""A whole checkpoint merged with an adapter directory, or an adapter taken out of one again.

Tensor by tensor, rows by rows, in bounded memory; what the adapter does not touch is copied by bytes. What is
computed: specs/merge.md. How, and what is promised of memory, rounding and interruption: specs/checkpoints.md.
"""

import os
import time
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from ..io.checkpoint import open_checkpoint
from .fitted import fitted
from .merge_plans import plan_merge, plan_unmerge
from .written import How, Outcome, Progress, Sources, written

PathLike = str | os.PathLike[str]


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
    residual_base: bool = False,
) -> Outcome:
    """Write the checkpoint that computes what a base and an adapter compute together, without dropout.

    base    : what open_checkpoint takes
    adapter : a PEFT directory
    out     : a folder that is not there, or empty
    executor : where files are made, each as a task of its own: any of concurrent.futures, of processes or of
        MPI too; None makes one file after another, each by several threads
    progress : called with the bytes written so far and the bytes of all
    dry_run : write nothing, and tell what would be written
    resume  : after an interrupt, go on after the files that the same work has finished, and within the one
        that it had begun
    dtype   : of every tensor of floats; None keeps each one's own
    max_shard_size : bytes of tensors a file, a number or such as "5GB"; None keeps the base's files
    jobs    : threads; None takes one a core
    residual_base : the base is what the adapter's start left of the original; one that init_checkpoint wrote
        says so itself

    The numbers are those of lorax_np.merge, to the bit: W + s·BA in float64, rounded once. Biases, embeddings,
    convolutions, experts and Conv1D are merged in place, what modules_to_save brings replaces what was there,
    and every other file of the directory is copied. Where input and output embedding are one tensor and the
    adapter changes one of them, they become two, and the notes say so.

    Raises ConfigError where adapter and base do not fit, where a row has no direction under DoRA, where a
    result is not finite, and where out is in use; FormatError for files that are damaged, and for a trained
    bias where the model has no slot for one; ShapeError; the system's OSError. After an error nothing is left;
    after an interrupt what is finished and recorded waits beside out in `.NAME.part`.
    Source: specs/checkpoints.md.
    """
    start = time.perf_counter()
    base, adapter, out = Path(base), Path(adapter), Path(out)
    checkpoint, sources = open_checkpoint(base), Sources(base, adapter, residual=residual_base)
    files = fitted(sources.adapter, sources.base, sources.mark, sources.residual)
    plan = plan_merge(checkpoint, files, dtype, size_of(max_shard_size))
    how = How(executor, progress, dry_run, resume, jobs)
    found = written(checkpoint, plan, out, sources, how)
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
    residual_base: bool = False,
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
    checkpoint, sources = (
        open_checkpoint(merged),
        Sources(merged, adapter, first, sign=-1.0, residual=residual_base),
    )
    before = None if first is None else open_checkpoint(first)
    files = fitted(sources.adapter, sources.base, sources.mark, sources.residual)
    plan = plan_unmerge(checkpoint, files, before, dtype, size_of(max_shard_size))
    how = How(executor, progress, dry_run, resume, jobs)
    found = written(checkpoint, plan, out, sources, how)
    return replace(found, sites=len(files.sites), seconds=time.perf_counter() - start)


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
