"""What a save holds beside arrays, and a run put where a save stands.  See specs/training.md."""

import json
from collections.abc import Mapping
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..backend import FLOATS, Array, all_finite, dtype_name, from_host, held_bytes, to_host
from ..errors import ConfigError, FormatError
from ..kinds import finite, refuse, shown, whole
from ..optim import check_state
from ..parallel import broadcast_bytes
from ..text.batches import Position
from ..tree import Leaves
from .checks import data_digest
from .state import ABOUT, TENSORS, load_state
from .step import Outcome, parameters

if TYPE_CHECKING:
    from .run import Run

MASKS = "philox4x64-10 by sequence"  # the version of dropout masks: a run goes on with those that it began with
FREE = "iters", "epochs", "steps_per_report", "steps_per_eval", "eval_rows", "save_every", "workers"


class Counters(NamedTuple):
    """What a run counts: over all of it, and since its last report.

    nll : Σ loss·labels since the last report;  bad : steps in a row that were not finite
    """

    all_tokens: int = 0
    all_labels: int = 0
    all_seconds: float = 0.0
    skipped: int = 0
    bad: int = 0
    nll: float = 0.0
    labels: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    norm: float = 0.0

    def plus(self, step: Outcome, lr: float, seconds: float) -> "Counters":
        """After one step more."""
        found = self._replace(
            all_tokens=self.all_tokens + step.tokens,
            all_seconds=self.all_seconds + seconds,
            tokens=self.tokens + step.tokens,
            seconds=self.seconds + seconds,
            lr=lr,
        )
        if not step.applied:
            return found._replace(skipped=self.skipped + 1, bad=self.bad + 1)
        return found._replace(
            all_labels=self.all_labels + step.labels,
            bad=0,
            nll=self.nll + step.loss * step.labels,
            labels=self.labels + step.labels,
            norm=step.norm,
        )

    def told(self, like: Array) -> tuple[dict[str, Any], "Counters"]:
        """What a report says, and the counters after it.  (training.8)

        like : an array of what trains: the memory told is that of where it lives
        """
        seconds = max(self.seconds, 1e-9)
        found = {
            "loss": self.nll / self.labels if self.labels else None,
            "lr": self.lr,
            "grad_norm": self.norm,
            "labels": self.labels,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / seconds,
            "labels_per_second": self.labels / seconds,
            "seconds": self.all_seconds,
            "skipped": self.skipped,
            "peak_bytes": peak_bytes(like),
        }
        return found, self._replace(nll=0.0, labels=0, tokens=0, seconds=0.0)


def peak_bytes(like: Array) -> int:
    """The most memory that this process has had where `like` lives; 0 where the system does not tell."""
    if (there := held_bytes(like)) is not None:
        return there
    try:
        resource = import_module("resource")
    except ImportError:
        return 0
    unit = 1 if import_module("sys").platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def version() -> str:
    """This library's version."""
    return str(import_module(__name__.partition(".")[0]).__version__)


# ---- saved -------------------------------------------------------------------------------------------------


def tensors_of(run: "Run") -> Leaves:
    """All arrays of a run's state, by name."""
    found = {f"p.{name}": value for name, value in parameters(run.trained).items()}
    return found | {f"o.{name}": value for name, value in run.held.state.items() if hasattr(value, "shape")}


def about(run: "Run") -> dict[str, Any]:
    """All of a run's state that is no array, and what it has to be the same as."""
    return {
        "step": run.step,
        "position": run.position._asdict(),
        "counters": run.counters._asdict(),
        "optimizer": {name: value for name, value in run.held.state.items() if not hasattr(value, "shape")},
        "before": {name: value for name, value in run.before.items() if isfinite(value)},
        "after": {name: value for name, value in run.after.items() if isfinite(value)},
        "config": run.config.to_dict(),
        "task": run.task,
        "base": run.base,
        "data": data_digest(run.data),
        "ranks": run.ranks.size,
        "masks": MASKS,
        "version": version(),
    }


# ---- restored ----------------------------------------------------------------------------------------------


def restore(run: "Run", folder: Path | None) -> None:
    """Put a run where the last save in a folder stands; folder is read by rank 0 and None elsewhere.

    Raises FormatError for a save that is damaged or of other arrays; ConfigError where the run differs from the
    one that was saved, by the names of what differs.
    """
    content, arrays = b"", Leaves()
    if folder is not None:
        saved = load_state(folder)
        where = folder / f"step-{saved.step}"
        _check_same(run, saved.about, where / ABOUT)
        arrays = _checked(run, saved.tensors, saved.about, where)
        content = json.dumps(saved.about).encode()
    known = json.loads(broadcast_bytes(run.ranks, content))
    wanted = tensors_of(run)
    for name, value in wanted.items():
        here = np.array(arrays[name]) if folder is not None else np.zeros(value.shape, dtype_name(value))
        wanted[name] = from_host(run.ranks.broadcast(here.reshape(-1)).reshape(here.shape), value)
    run.held.put(_under("p.", wanted), {**_under("o.", wanted), **known["optimizer"]})
    run.step, run.position = known["step"], Position(**known["position"])
    if run.step > run.steps:
        name = "epochs" if run.config.iters is None else "iters"
        raise ConfigError(f"{name}: expected at least {run.step}, the steps that are done, got {run.steps}")
    run.counters = Counters(**known["counters"])
    run.before, run.after = known["before"], known["after"]


def _under(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _checked(run: "Run", tensors: Mapping[str, Any], known: Mapping[str, Any], where: Path) -> Leaves:
    """The arrays of a save, once they are those of this run."""
    try:
        check_state(_under("p.", tensors), parameters(run.trained))
        check_state({**_under("o.", tensors), **known["optimizer"]}, run.held.state)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    for name, value in tensors.items():
        if dtype_name(value) in FLOATS and not all_finite(value):
            raise FormatError(f"{where / TENSORS}: {name}: expected finite numbers, got NaN or infinity")
    return {name: to_host(value) for name, value in tensors.items()}


def _check_same(run: "Run", known: Mapping[str, Any], where: Path) -> None:
    """Whatever has to be the same for the run to go on as if nothing had happened."""
    for name in ("position", "counters", "optimizer", "before", "after", "config"):
        if not isinstance(known.get(name), dict):
            raise FormatError(f"{where}: {name}: expected a JSON object, got {shown(known.get(name))}")
    counts, at = known["counters"], known["position"]
    if not set(counts) <= set(Counters._fields) or not all(map(finite, counts.values())):
        raise FormatError(f"{where}: counters: expected numbers by known names, got {shown(counts)}")
    if set(at) != set(Position._fields) or not all(map(whole, at.values())) or at["used"] >= len(run.data):
        wanted = f"an epoch, and used below {len(run.data)}, the rows"
        raise FormatError(f"{where}: position: expected {wanted}, got {shown(at)}")
    problems = []
    for name, here in (
        ("task", run.task),
        ("base", run.base),
        ("data", data_digest(run.data)),
        ("masks", MASKS),
    ):
        if known.get(name) != here:
            problems.append(f"{name}: expected {known.get(name)}, that of the run to resume, got {here}")
    for name, value in run.config.to_dict().items():
        if name not in FREE and known["config"].get(name) != value:
            problems.append(f"{name}: expected {known['config'].get(name)!r}, as the run began, got {value!r}")
    refuse(problems)
