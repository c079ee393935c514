"""TrainConfig: how a run goes, in the names of mlx-lm and PEFT; frozen, checked when made, no arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import ceil
from typing import Any, Self

from ..errors import ConfigError
from ..kinds import FLAG, Kind, content, finite, nearest, or_none, problem, read, refuse, whole, word
from ..parallel import REDUCTIONS
from ..text.batches import Feed
from ..text.examples import Example

COUNT = Kind("an int of at least 1 (and below 2**63)", lambda v: whole(v) and v > 0)
NATURAL = Kind("an int of at least 0 (and below 2**63)", whole)
POSITIVE = Kind("a finite number above 0", lambda v: finite(v) and v > 0)
NOT_NEGATIVE = Kind("a finite number of at least 0", lambda v: finite(v) and v >= 0)
SMALLEST, LARGEST = 2.0**-126, 2.0**128 - 2.0**104  # of float32, in which steps are computed
STEP = Kind(f"a number from {SMALLEST:.2g} to {LARGEST:.2g}", lambda v: finite(v) and SMALLEST <= v <= LARGEST)
DECAY = Kind(f"0, or {STEP.wanted}", lambda v: finite(v) and (v == 0 or STEP.fits(v)))
SHARE = Kind("a number 0 <= x < 1", lambda v: finite(v) and 0 <= v < 1)
AUTO = "auto"
WORKERS = Kind("auto, or an int of at least 1", lambda v: v == AUTO or COUNT.fits(v), (AUTO,))
SCHEDULES = "constant", "linear", "cosine"
OPTIMIZERS = "adamw", "sgd", "lora-fa"
ENGINES = "fast", "reference"
ON = word("auto", "on", "off")


def _field(default: Any, kind: Kind, about: str) -> Any:
    """Declare a field: its default, its kind, and a line for who reads --help."""
    kind = or_none(kind) if default is None else kind
    return field(default=default, metadata={"kind": kind, "about": about})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run goes: how long, how fast, how much at a time, and how often it says so.

    One optimiser step takes batch_size · grad_accumulation_steps sequences on each rank. Neither iters nor
    epochs means one epoch. Every field has its name in lorax-np train, with hyphens.

    Raises ConfigError, one line that names every field at fault, what was wanted, and what came.

    >>> TrainConfig(iters=100, learning_rate=1e-4).warm(steps=100)
    10
    >>> TrainConfig(engine="quick")
    Traceback (most recent call last):
    lorax_np.errors.ConfigError: engine: expected one of fast, reference, got 'quick'
    """

    iters: int | None = _field(None, COUNT, "optimiser steps")
    epochs: float | None = _field(None, POSITIVE, "passes over the data, instead of iters")
    batch_size: int = _field(4, COUNT, "sequences of a micro-batch, on each rank")
    grad_accumulation_steps: int = _field(1, COUNT, "micro-batches of a step, on each rank")
    max_tokens: int | None = _field(None, COUNT, "tokens of a micro-batch at most, instead of batch_size")
    max_seq_length: int = _field(1024, COUNT, "tokens of a sequence at most; longer ones are cut")

    learning_rate: float = _field(2e-4, STEP, "the highest one, after warm-up")
    lr_schedule: str = _field("cosine", word(*SCHEDULES), "how the rate falls after warm-up")
    warmup: int | None = _field(None, NATURAL, "steps over which the rate rises from 0 (20, or a tenth)")
    optimizer: str = _field("adamw", word(*OPTIMIZERS), "the update; lora-fa holds A")
    weight_decay: float = _field(0.0, DECAY, "of matrices; magnitudes and biases have none")
    max_grad_norm: float = _field(1.0, NOT_NEGATIVE, "clip gradients to this norm; 0 does not")
    loraplus_lr_ratio: float | None = _field(None, STEP, "LoRA+: the rate of B over that of A")
    loraplus_lr_embedding: float | None = _field(None, STEP, "LoRA+: the rate of embeddings' factors")
    momentum: float = _field(0.0, SHARE, "of sgd")
    beta1: float = _field(0.9, SHARE, "of adamw")
    beta2: float = _field(0.999, SHARE, "of adamw")
    eps: float = _field(1e-8, STEP, "of adamw")

    loss_mean: str = _field("token", word("token", "sequence"), "what a step's loss is a mean over")
    engine: str = _field("fast", word(*ENGINES), "which functions compute the passes")
    grad_checkpoint: str = _field("auto", ON, "keep only the blocks' inputs, and compute the rest again")
    workers: int | str = _field(AUTO, WORKERS, "threads that share a micro-batch's sequences")
    reduction: str = _field("ordered", word(*REDUCTIONS), "how gradients are added over ranks")

    steps_per_report: int = _field(10, COUNT, "steps between two lines")
    steps_per_eval: int = _field(100, COUNT, "steps between two evaluations")
    eval_rows: int = _field(200, COUNT, "rows that one evaluation reads at most")
    save_every: int = _field(100, COUNT, "steps between two saves")
    shuffle: bool = _field(True, FLAG, "whether each epoch has an order of its own")
    seed: int = _field(0, NATURAL, "of starts, order and dropout")

    def __post_init__(self) -> None:
        given = {f.name: (f.metadata["kind"], getattr(self, f.name)) for f in fields(self)}
        values, problems = read(given)
        if values.get("iters") is not None and values.get("epochs") is not None:
            problems.append(problem("epochs", "None beside iters", values["epochs"]))
        if values.get("loss_mean") == "sequence" and values.get("max_tokens") is not None:
            problems.append(problem("max_tokens", "None beside loss_mean='sequence'", values["max_tokens"]))
        if values.get("momentum") and values.get("optimizer") != "sgd":
            problems.append(problem("momentum", f"0.0 beside optimizer={self.optimizer!r}", self.momentum))
        refuse(problems)
        for name, value in values.items():
            object.__setattr__(self, name, float(value) if _decimal(name) and value is not None else value)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Return the config that a mapping of fields says. Raises ConfigError, naming the nearest field.

        >>> TrainConfig.from_dict({"iter": 3})
        Traceback (most recent call last):
        lorax_np.errors.ConfigError: iter: expected a field of TrainConfig, got 3 (did you mean 'iters'?)
        """
        known = {f.name for f in fields(cls)}
        refuse(
            [
                problem(name, "a field of TrainConfig", value) + nearest(name, known)
                for name, value in content("TrainConfig", d).items()
                if name not in known
            ]
        )
        return cls(**d)

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name, as JSON has them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def feed(self, examples: Sequence[Example], task: str, *, ranks: int = 1) -> Feed:
        """The micro-batches of all ranks, step by step; rank k takes every R-th of a step's, from the k-th on.

        So R ranks together have the micro-batches of one that accumulates R times as many, in the same order; a
        mean over sequences is of micro-batches of one.        (training.5)
        """
        each, turns = self.batch_size, self.grad_accumulation_steps * ranks
        if self.loss_mean == "sequence":
            each, turns = 1, each * turns
        return Feed(
            examples,
            task,
            batch_size=each,
            accumulation=turns,
            seed=self.seed,
            shuffle=self.shuffle,
            max_tokens=self.max_tokens,
        )

    def steps(self, feed: Feed) -> int:
        """How many steps the whole run takes."""
        if self.iters is not None:
            return self.iters
        whole, part = divmod(1.0 if self.epochs is None else self.epochs, 1.0)
        if feed.max_tokens is None:  # as many in each
            return max(1, ceil(int(whole) * feed.steps() + part * feed.steps()))
        return max(1, ceil(sum(map(feed.steps, range(int(whole)))) + part * feed.steps(int(whole))))

    def warm(self, steps: int) -> int:
        """How many steps of a run warm up: 20 where nothing is said, or a tenth of the run if that is less.

        Raises ConfigError where that is more than the run.
        """
        found = min(20, steps // 10) if self.warmup is None else self.warmup
        if found > steps:
            raise ConfigError(f"warmup: expected 0 to {steps}, the steps of the run, got {found}")
        return found


def _decimal(name: str) -> bool:
    """Whether a field is a float, which may have come as an int."""
    return "float" in str(TrainConfig.__dataclass_fields__[name].type)
