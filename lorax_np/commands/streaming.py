"""What the commands on whole checkpoints share: progress in bytes or numbers, and the last lines."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

EVERY = 5.0  # seconds between two lines where there is no terminal


class Rate:
    """How far the work is, how fast, how long it will take: one line on a terminal, some lines elsewhere."""

    def __init__(self, word: str, unit: str, scale: float, *, quiet: bool) -> None:
        """Say nothing yet; unit is what `scale` of what is counted are called."""
        self.word, self.unit, self.scale, self.quiet = word, unit, scale, quiet
        self.terminal = sys.stderr.isatty()
        self.begun = self.shown = time.monotonic()
        self.first = -1

    def __call__(self, done: int, total: int) -> None:
        """Count on."""
        now = time.monotonic()
        if self.first < 0:
            self.first, self.begun = done, now  # what was there before this run is no measure of its speed
        if self.quiet or now - self.shown < (0.1 if self.terminal else EVERY):
            return
        self.shown = now
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        left = f", {_clock((total - done) / rate)} left" if rate > 0 else ""
        digits = 0 if total > 100 * self.scale else 1
        so_far, all_of_it, a_second = (f"{x / self.scale:.{digits}f}" for x in (done, total, rate))
        share = f"{self.word} {100 * done / max(total, 1):3.0f} %"
        text = f"{share}, {so_far} of {all_of_it} {self.unit}, {a_second} {self.unit}/s{left}"
        if self.terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def done(self) -> None:
        """Leave a terminal's line empty."""
        if self.terminal and not self.quiet:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02}"
    )


def size(count: int) -> str:
    """Bytes in words, in powers of 1000."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def options(parser: argparse.ArgumentParser, *, files: bool = True) -> None:
    """Declare what the commands share; files: whether new files of a checkpoint are all that is made."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on where the same work was when it was interrupted (default)",
    )
    if files:
        parser.add_argument("--jobs", type=int, metavar="N", help="threads (default: one a core)")
        parser.add_argument(
            "--dtype", choices=("float64", "float32", "float16", "bfloat16"), help="of every tensor of floats"
        )
        parser.add_argument(
            "--max-shard-size", metavar="SIZE", help="such as 5GB; without it the files stay as they are"
        )
        parser.add_argument(
            "--residual-base",
            action="store_true",
            help="the checkpoint is what the adapter's start left; one of lorax-np init's says so itself",
        )


def run_streamed(work: Callable[..., Any], arguments: argparse.Namespace, verb: str) -> int:
    """Do work on a checkpoint's files as options say, its progress shown, and print what was done."""
    progress = Rate(verb, "MB", 1e6, quiet=arguments.quiet or arguments.json)
    names = "dry_run", "resume", "dtype", "max_shard_size", "jobs", "residual_base"
    try:
        found = work(progress=progress, **{name: getattr(arguments, name) for name in names})
    finally:
        progress.done()
    return _told(found, arguments, verb)


def _told(found: Any, arguments: argparse.Namespace, verb: str) -> int:
    """Print what was done: as JSON, or in a few lines, the last of which is the command that comes next."""
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
        return 0
    if arguments.quiet:
        return 0
    tensors = f"{len(found.changed)} of {found.tensors} tensors"
    for note in found.notes:
        print(f"note: {note}")
    if found.dry:
        for name, count in found.files.items():
            print(f"{size(count):>12}  {name}")
        print(f"would {verb} {found.sites} sites, {tensors}, into {found.out}")
        return 0
    went_on = f", {size(found.kept)} of them from before" if found.kept else ""
    files = f"{len(found.files)} files{went_on}, {size(found.nbytes)} in {found.seconds:.1f} s"
    print(f"{verb}d {found.sites} sites, {tensors}: {files}, at {found.out}")
    print(f"next: lorax-np inspect {arguments.dest}")
    return 0
