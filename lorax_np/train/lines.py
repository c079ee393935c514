"""What a person reads of a run: its first lines, and one line for each thing that happens."""

from collections.abc import Callable, Mapping
from textwrap import wrap
from typing import Any

from ..backend import backend_info, namespace_of, on_device
from ..fast.gemm import engine
from ..optim import group_table
from ..text.showing import shown
from .estimate import alternatives, estimated
from .prepare import Prepared
from .run import groups_of
from .step import parameters
from .work import Work

WIDE = 80  # columns of a terminal


def first_lines(run: Prepared, *, colour: bool = False) -> list[str]:
    """Where it runs, what it learns from, what trains."""
    info, model, like = backend_info(), run.model, next(iter(parameters(run.trained).values()), None)
    here = info["backend"] if like is None else namespace_of(x=like).__name__
    found = [
        f"backend {here} ({info['why'] if here == info['backend'] else f'--backend {here}'})",
        info["cupy"] if on_device(like) else f"NumPy {info['numpy']}, BLAS {info['blas']}",
        f"model {model.path}: {model.config.get('model_type', model.family)}, {len(model.weights)} tensors",
    ]
    for split, data in run.data.items():
        found += [f"{split}: {line}" for line in data.report.lines()] if split in ("train", "valid") else []
    first = run.data["train"].examples[0]
    found += shown(first, run.tokenizer, task=run.task, labels=run.labels, colour=colour).splitlines()
    if engine().advice and not on_device(like):
        found += folded(f"note: products are by {engine().advice}")
    found += [f"note: {note}" for note in run.notes]
    found.append(str(run.plan))
    found += group_table(groups_of(run.trained, run.config, run.sites)).splitlines()
    return found + site_table(run)


def folded(line: str) -> list[str]:
    """A line as parts that a terminal has room for: what is over goes on below, two columns in."""
    return wrap(line, WIDE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def site_table(run: Prepared) -> list[str]:
    """The adapted places, those of one last name and shape in a line."""
    rows: dict[tuple[str, str, str], int] = {}
    for name, site in run.sites.items():
        adapter = run.trained.adapters[name]
        shapes = (
            "" if adapter.A is None or adapter.B is None else f"{adapter.A.shape[1]} → {adapter.B.shape[0]}"
        )
        key = name.rpartition(".")[2], shapes, f"r {site.r}, s {site.scaling:.4g}, p {site.p:.4g}"
        rows[key] = rows.get(key, 0) + 1
    table = [("site", "count", "shape", "adapter")] + [(n, str(k), s, a) for (n, s, a), k in rows.items()]
    wide = [max(len(row[i]) for row in table) for i in range(3)]
    return ["  ".join([*(cell.ljust(w) for cell, w in zip(row, wide, strict=False)), row[3]]) for row in table]


class Lines:
    """A callback that says what happens."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """say : what is done with a line."""
        self.say, self.before = say, (0, 0.0)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Say one thing."""
        event = record["event"]
        if event == "train":
            self.say(self.step_line(record))
        elif event == "eval":
            figures = [f"{name} {_figure(value)}" for name, value in record.items() if name not in PLACE]
            self.wrapped(
                f"eval at step {record['step']}, {record['rows']} rows of {record['on']}: {', '.join(figures)}"
            )
        elif event == "start":
            self.wrapped(
                f"{record['pass']}; {record['steps']} steps on {record['rows']} rows, {record['ranks']} ranks"
            )
        elif event == "resume":
            self.say(f"goes on after step {record['step']}")
        elif event == "bad":
            came = f"{record['came']}, first at {record['first']}"
            self.wrapped(f"step {record['step']} passed over: {came}; rows {', '.join(record['rows'][:4])}")

    def wrapped(self, line: str) -> None:
        """Say a line that may be longer than a terminal is wide."""
        for part in folded(line):
            self.say(part)

    def step_line(self, record: Mapping[str, Any]) -> str:
        """The line of a report: step 2/6  loss 1.8342  lr 1.9e-04  |g| 0.61  311 tok/s  1.4 GB  ETA 9s."""
        step, steps, seconds = record["step"], record["steps"], record["seconds"]
        each = (seconds - self.before[1]) / max(step - self.before[0], 1)
        if not self.before[0] and step > 0:
            each = seconds / step
        self.before = step, seconds
        loss = "no finite loss" if record["loss"] is None else f"loss {record['loss']:.4f}"
        return "  ".join(
            (
                f"step {step}/{steps}",
                loss,
                f"lr {record['lr']:.1e}",
                f"|g| {record['grad_norm']:.2f}",
                f"{record['tokens_per_second']:.0f} tok/s",
                size(record["peak_bytes"]),
                f"ETA {clock(each * (steps - step))}",
            )
        )


PLACE = "event", "step", "on", "rows", "labels", "nll per token"  # not said, or said already


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def size(count: float) -> str:
    """Bytes in words, in powers of 1000.

    >>> size(1_400_000_000), size(19_500_000), size(900)
    ('1.4 GB', '19.5 MB', '0.9 kB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def clock(seconds: float) -> str:
    """A time in words.

    >>> clock(9), clock(760), clock(7260)
    ('9s', '12m40s', '2h01m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02}m"


def estimate_lines(run: Prepared, work: Work, ranks: int) -> list[str]:
    """What the run is expected to take, and what would change it."""
    found = estimated(work)
    steps = run.config.steps(run.config.feed(run.data["train"].examples, run.task, ranks=ranks))
    tokens = ranks * found.tokens
    each, time = f"{tokens:.0f} tokens", found.seconds
    first = f"{steps} steps of {each}"
    if time is not None:
        first = (
            f"{time:.2f} s a step of {each}, {tokens / time:.0f} tok/s, {steps} steps in {clock(steps * time)}"
        )
    lines = [
        f"expected: {first}",
        f"expected memory: {size(found.nbytes)}",
        *(f"  {name:<{max(map(len, found.parts))}}  {size(n):>8}" for name, n in found.parts.items()),
    ]
    return lines + [f"with {name}: {size(nbytes)}" for name, nbytes in alternatives(work)]
