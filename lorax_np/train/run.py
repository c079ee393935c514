"""What changes as a run goes, and what is due when: steps, reports, evaluations, saves.  specs/training.md."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from ..backend import from_host, quiet, to_host
from ..config import LoraConfig, Site
from ..errors import ConfigError
from ..models.records import Dropout, Trained
from ..optim import Group, group_rates, groups, schedule
from ..parallel import Communicator, counted, same_everywhere
from ..text.batches import Position, Step
from ..text.examples import Example
from ..text.labels import Labels
from ..tree import flatten, layout, unflatten
from .checks import (
    check_labels,
    check_pairs,
    check_rows,
    check_saved,
    check_start,
    check_steps,
    fingerprint,
    first_bad,
    told,
)
from .config import TrainConfig
from .evaluate import Metrics, evaluate
from .held import Held
from .log import Log, with_lines
from .output import BAD, METRICS, STATE, check_free, check_unfinished, write_adapter, write_card, write_curve
from .passes import Passes
from .resume import Counters, about, restore, tensors_of
from .state import latest_step, save_state, tidy
from .step import Outcome, parameters
from .stopping import Stop

COMPARED = 100  # steps between two comparisons of the ranks' parameters
BAD_STEPS = 3  # in a row, that end a run
DONE, INTERRUPTED, NOT_FINITE = "done", "interrupted", "not finite"

Callback = Callable[[Mapping[str, Any]], Any]


class Result(NamedTuple):
    """What a run came to.

    before, after : figures of the evaluations before the first step and after the last; empty where not made
    ended : "done"; "interrupted", by a signal or a callback; "not finite", after three such steps in a row
    """

    trained: Trained
    step: int
    before: Metrics
    after: Metrics
    ended: str


class Run:
    """What changes as a run goes, and what it consults."""

    def __init__(
        self,
        passes: Passes,
        given: Trained,
        data: Sequence[Example],
        ranks: Communicator,
        callbacks: Sequence[Callback],
        *,
        dry: bool = False,
    ) -> None:
        """Check everything that can be wrong, and stand before the first step, which a dry run never takes."""
        self.passes, self.data, self.ranks, self.callbacks = passes, data, ranks, callbacks
        self.model, self.sites, self.task, self.config = passes.model, passes.sites, passes.task, passes.config
        self.feed = self.config.feed(data, self.task, ranks=ranks.size)
        self.steps = self.config.steps(self.feed)
        self.warmup = self.config.warm(self.steps)
        self.initial = given
        if not parameters(given):
            raise ConfigError("adapters: expected something that trains, got nothing")
        self.held = Held(given, self.config, self.sites)
        self.groups = groups_of(self.trained, self.config, self.sites)
        hold = not (passes.copied or dry)  # else it is read as it is
        check_start(self.model, self.trained, data, self.task, hold=hold)
        size, mean = self.config.batch_size, self.config.loss_mean
        check_pairs(data, self.task, batch_size=size, loss_mean=mean)
        check_steps(self.feed, self.steps)
        self.base = fingerprint(self.model, hold=hold)
        if not same_everywhere(ranks, bytes.fromhex(self.base)):
            raise ConfigError("model: expected the same base on every rank, got others")
        passes.settle()
        self.step, self.position, self.counters = 0, Position(), Counters()
        self.begun = False  # whether it goes on from a save
        self.before: Metrics = {}
        self.after: Metrics = {}
        self.ended, self.wanted = "", False
        self.valid: Sequence[Example] = ()
        self.labels: Labels | None = None
        self.tables: Mapping[str, Mapping[str, Any]] = {}
        self.out: Path | None = None
        self.lora: LoraConfig | None = None
        self.log: Log | None = None

    @property
    def trained(self) -> Trained:
        """What trains, as it is now."""
        return self.held.trained

    # ---- beginning and end ---------------------------------------------------------------------------------

    def open(self, out: Path | None, lora: LoraConfig | None, *, resume: bool) -> None:
        """Take a directory to write to, and stand where its last save does, if that is asked for."""
        if out is not None and lora is None:
            raise ConfigError("lora: expected the adapters' config, by which out is written, got None")
        if resume and out is None:
            raise ConfigError("out: expected the directory of the run to resume, got None")
        self.lora = lora
        place = out if self.ranks.rank == 0 else None  # the others write nothing
        there = place is not None and latest_step(place / STATE) is not None
        self.begun = resume and counted(self.ranks, int(there))[0] > 0
        if self.begun:
            restore(self, None if place is None else place / STATE)
        elif place is not None and not resume:
            check_free(place, self.model.path)
        elif place is not None:
            check_unfinished(place)
        if place is not None:
            tidy(place / STATE)
            self._adapter(place)  # after a save it may not have been written; what cannot be is refused now
        self._same_parameters(broadcast=True)
        if place is not None:
            self.out, after = place, self.step if self.begun else None
            self.log = Log(place / METRICS, after=after)
            if (place / BAD).exists():
                Log(place / BAD, after=after).close()
        event = "resume" if self.begun else "start"
        self.tell({"event": event, "step": self.step, **self.facts()}, write=not self.begun)

    def judged_on(self, valid: Sequence[Example], labels: Labels | None) -> None:
        """Take the rows to evaluate on, which may be none, and their classes' names. Raises ConfigError."""
        check_rows(self.model, valid)
        check_labels("valid", valid[: self.config.eval_rows], self.task)
        self.valid, self.labels = valid, labels

    def facts(self) -> dict[str, Any]:
        """What a run is, for its first line."""
        numbers = sum(group.size for group in self.groups)
        return {
            "steps": self.steps,
            "task": self.task,
            "rows": len(self.data),
            "ranks": self.ranks.size,
            "trainable": numbers,
            "pass": self.passes.what,
            "config": self.config.to_dict(),
        }

    def close(self) -> Result:
        """Write what is written once, and say how it ended."""
        self.ended = self.ended or DONE
        if self.out is not None and self.lora is not None:
            write_curve(self.out)
            write_card(self.out, self)
        self.tell({"event": "end", "step": self.step, "ended": self.ended}, write=False)
        return Result(self.trained, self.step, self.before, self.after, self.ended)

    # ---- one step, and what is due after it ----------------------------------------------------------------

    def advance(self) -> None:
        """One step; where it is not finite, it is passed over."""
        began, work = time.perf_counter(), self.feed.step(self.position)
        batches = work.batches[self.ranks.rank :: self.ranks.size]
        factor = schedule(self.config.lr_schedule, self.step, self.steps, self.warmup)
        rates = group_rates(self.groups, factor)
        with quiet():  # what runs away is seen in the next step, and before a save
            outcome = self.held.step(self.passes, batches, step=self.step, rates=rates, ranks=self.ranks)
        self.step, self.position = self.step + 1, work.next
        self.counters = self.counters.plus(
            outcome, self.config.learning_rate * factor, time.perf_counter() - began
        )
        if not outcome.applied:
            self._not_finite(work, outcome)

    def look_around(self, stop: Stop) -> None:
        """Report, evaluate, compare and save, where that is due, or asked for."""
        last, every = self.step == self.steps, self.config
        if last or self.step % every.steps_per_report == 0:
            self.report()
        if self.counters.bad == BAD_STEPS:
            self.ended = NOT_FINITE
        if not self.ended and (last or (self.valid and self.step % every.steps_per_eval == 0)):
            self.after = self.evaluated()
        if self.step % COMPARED == 0:
            self._same_parameters()
        asked = counted(self.ranks, int(stop.asked or self.wanted))[0] > 0
        if asked and not self.ended and not last:
            self.ended = INTERRUPTED
        if last or self.ended or self.step % every.save_every == 0:
            self.save()

    def report(self) -> None:
        """One line of what happened since the last."""
        found, self.counters = self.counters.told(next(iter(parameters(self.trained).values())))
        epoch = self.position.epoch + self.position.used / len(self.data)
        self.tell({"event": "train", "step": self.step, "steps": self.steps, "epoch": epoch, **found})

    def evaluated(self) -> Metrics:
        """Figures on the valid rows, or on the first of the data, by rank 0 while the others wait."""
        if self.ranks.rank != 0:
            return {}
        rows = (self.valid or self.data)[: self.config.eval_rows]
        found = evaluate(
            self.model,
            self.sites,
            self.trained,
            rows,
            self.task,
            labels=self.labels,
            batch_size=self.config.batch_size,
            passes=self.passes,
        )
        on = "valid" if self.valid else "data"
        self.tell({"event": "eval", "step": self.step, "on": on, **found})
        return found

    def save(self) -> None:
        """The state first, then the adapter, which the state could write again."""
        if self.out is None or self.log is None:
            return
        check_saved(self.trained, self.step, latest_step(self.out / STATE))
        self.log.sync()
        save_state(self.out / STATE, self.step, tensors_of(self), about(self))
        self._adapter(self.out)
        self.tell({"event": "save", "step": self.step}, write=False)

    def tell(self, record: Mapping[str, Any], *, write: bool = True) -> None:
        """Write a line and call back, on rank 0."""
        if self.ranks.rank != 0:
            return
        record = {name: _plain(value) for name, value in record.items()}
        if write and self.log is not None:
            self.log.write(record)
        for callback in self.callbacks:
            self.wanted = callback(record) is True or self.wanted

    # ---- inside --------------------------------------------------------------------------------------------

    def _adapter(self, out: Path) -> None:
        if self.lora is not None:
            write_adapter(out, self.model, self.lora, self.sites, self.trained, self.initial)

    def _same_parameters(self, *, broadcast: bool = False) -> None:
        """Give every rank rank 0's parameters; or raise ConfigError where one has others."""
        if self.ranks.size == 1:
            return
        params = parameters(self.trained)
        flat = to_host(flatten(params))
        if broadcast:
            flat = from_host(self.ranks.broadcast(flat), next(iter(params.values())))
            self.held.put(unflatten(flat, layout(params)))
        elif not same_everywhere(self.ranks, hashlib.sha256(flat.tobytes()).digest()):
            raise ConfigError(f"step {self.step}: expected the same parameters on every rank, got others")

    def _not_finite(self, work: Step, outcome: Outcome) -> None:
        """Say where, and keep the batch."""
        if self.ranks.rank != 0:
            return
        where = first_bad(self.passes, self.trained, work.batches, Dropout(self.config.seed, self.step - 1))
        found = {"loss": outcome.loss, "grad_norm": outcome.norm}
        came = ", ".join(f"{name} {value}" for name, value in found.items() if not isfinite(value))
        rows = [self.data[i] for i in work.examples]
        self.tell(
            {"event": "bad", "step": self.step, "first": where, "came": came, "rows": [e.where for e in rows]}
        )
        if self.out is not None:
            with_lines(self.out / BAD, [{"step": self.step, "first": where, **told(e)} for e in rows])


def groups_of(trained: Trained, config: TrainConfig, sites: Mapping[str, Site]) -> list[Group]:
    """What shares a learning rate and a decay."""
    embeddings = [f"adapters.{name}" for name, site in sites.items() if site.kind == "embedding"]
    return groups(
        parameters(trained),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        loraplus_lr_ratio=config.loraplus_lr_ratio or 1.0,
        embedding_lr=config.loraplus_lr_embedding,
        embeddings=embeddings if config.loraplus_lr_embedding else (),
    )


def _plain(value: Any) -> Any:
    """A value as JSON has it, which has no NaN and no infinity."""
    return None if isinstance(value, float) and not isfinite(value) else value
