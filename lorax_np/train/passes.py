"""Who computes losses and gradients: a pass planned for speed where there is one, else the general one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from ..backend import Array, HostArray, on_device, to_host
from ..config import Site
from ..errors import ConfigError, DtypeError, ShapeError
from ..models import tasks
from ..models.quantised import let_go
from ..models.records import Batch, Dropout, Model, Trained
from ..models.shared import added_up, chosen, dealt, in_shares, sharers
from ..text.scoring import outputs_by_example
from ..tree import leaves
from .config import TrainConfig

DEFAULT = TrainConfig()
Found = TypeVar("Found")


class Passes:
    """The two functions that a run needs of a model on a task; nothing they are given is written to.

    what : the pass that was chosen, and why no other, in words
    workers : threads that share a micro-batch's sequences; one where the base is in few bits and nothing else
        is asked for, and where arrays live on a GPU
    on_device : whether they do
    """

    def __init__(
        self,
        model: Model,
        sites: Mapping[str, Site],
        trained: Trained,
        *,
        task: str,
        config: TrainConfig = DEFAULT,
        tokens: Mapping[str, Sequence[int]] | None = None,
        checkpoint: bool | None = None,
    ) -> None:
        """Choose: the plan of a family is asked first, and what it refuses the general pass computes.

        config : its engine and workers are read, and its grad_checkpoint where checkpoint is None
        tokens : which rows of embeddings train, by plan, where some do
        """
        self.model, self.sites, self.task, self.config, self.tokens = model, sites, task, config, tokens
        self.checkpoint = config.grad_checkpoint == "on" if checkpoint is None else checkpoint
        self.workers = config.workers
        if self.workers == "auto" and hasattr(model.weights, "codes"):
            self.workers = 1  # each more has a layer written out, and its own rows, where memory is what counts
        trains: Any = next(iter(leaves(trained).values()), None)
        self.on_device = on_device(model.weights[next(iter(model.weights))] if trains is None else trains)
        if self.on_device:
            self.workers = 1
        tasks.head_of(model, task)
        self._plan: Any = None
        self.what = f"general pass, engine {config.engine}"
        if config.engine == "fast" and task == "CAUSAL_LM" and model.family == "llama":
            self._choose(trained)

    def _choose(self, trained: Trained) -> None:
        from ..fast.llama import llama_plan

        model, adapters, workers = self.model, cast(Any, trained.adapters), self.workers
        try:
            self._plan = llama_plan(
                model.weights,
                model.config,
                adapters,
                self.sites,
                dict(trained.saved),
                workers=workers,
                checkpoint=self.checkpoint,
            )
            self.what = f"planned Llama pass, {'on a device' if self.on_device else f'workers {workers}'}"
        except (ConfigError, DtypeError, ShapeError) as refused:
            self.what = f"general pass, engine fast, since {refused}"

    @property
    def planned(self) -> bool:
        """Whether a plan computes it."""
        return self._plan is not None

    @property
    def copied(self) -> bool:
        """Whether a plan has the base in a form of its own; on a device it reads it as it is."""
        return self.planned and not self.on_device

    def threads(self, sequences: int) -> int:
        """How many threads share a micro-batch of so many sequences."""
        return sharers(self.task, self.workers, sequences)

    def recompute(self) -> None:
        """From now on keep only what enters blocks, and compute the rest of them again."""
        self.checkpoint = True
        if self.planned:
            self._plan.checkpoint = True
        self.what += ", blocks computed again in the backward"

    def settle(self) -> None:
        """Let go of the base's tensors, where a plan has them in its own form."""
        if self.copied:
            let_go(self.model.weights)

    def gradients(
        self, trained: Trained, batch: Batch, *, n: int, dropout: Dropout | None
    ) -> tuple[Array | float, Trained]:
        """The loss of a micro-batch, divided by n, and its gradients, as models/tasks.py has them."""
        if self._plan is not None:
            tasks.check_for(self.model, batch, labels=True)
            rows = batch.ids, batch.starts, batch.index, batch.labels
            adapters: Any = trained.adapters
            loss, found, _ = self._plan.loss_and_gradients(adapters, {}, *rows, n=n, dropout=dropout)
            return loss, Trained(found, {})

        def compute(part: Batch) -> tuple[Array, Trained]:
            return tasks.loss_and_gradients(
                self.model,
                self.sites,
                trained,
                part,
                task=self.task,
                n=n,
                dropout=dropout,
                engine=self.config.engine,
                checkpoint=self.checkpoint,
                tokens=self.tokens,
            )

        return added_up(in_shares(compute, batch, task=self.task, workers=self.workers))

    def loss(self, trained: Trained, batch: Batch, *, n: int) -> float:
        """The loss alone, without dropout."""
        if self._plan is not None:
            tasks.check_for(self.model, batch, labels=True)
            adapters: Any = trained.adapters
            rows = batch.ids, batch.starts, batch.index, batch.labels
            return float(self._plan.loss(adapters, {}, *rows, n=n))

        def compute(part: Batch) -> float:
            args = self.model, self.sites, trained, part
            found: Any = tasks.loss(*args, task=self.task, n=n, engine=self.config.engine, tokens=self.tokens)
            return float(found)

        return sum(in_shares(compute, batch, task=self.task, workers=self.workers))

    def judged(self, trained: Trained, batch: Batch, *, n: int) -> tuple[float, list[HostArray]]:
        """The loss, and of each example what the task's head gives, of one forward without dropout."""

        def compute(part: Batch) -> tuple[float, list[HostArray]]:
            args = self.model, self.sites, trained, part
            found = tasks.judged(*args, task=self.task, n=n, engine=self.config.engine, tokens=self.tokens)
            value: Any = found[0]
            return float(value), list(outputs_by_example(self.task, part, to_host(found[1])))

        found = self._in_order(compute, batch)
        return sum(value for value, _ in found[0]), found[1]

    def likeliest(self, trained: Trained, batch: Batch) -> list[HostArray]:
        """The likeliest token at each row of a decoder, by its texts, without dropout."""

        def compute(part: Batch) -> tuple[None, list[HostArray]]:
            found = []
            for place in range(len(part.index)):  # a text at a time: there may be no room for all logits
                args = self.model, self.sites, trained, chosen(part, [place], self.task)
                z = tasks.outputs(*args, task=self.task, engine=self.config.engine, tokens=self.tokens)
                found.append(to_host(z).argmax(axis=1))
            return None, found

        return self._in_order(compute, batch)[1]

    def _in_order(
        self, compute: Callable[[Batch], tuple[Found, list[HostArray]]], batch: Batch
    ) -> tuple[list[tuple[Found, list[HostArray]]], list[HostArray]]:
        """What compute gives of each worker's sequences, and the arrays of all in the batch's order."""
        how: Any = {"task": self.task, "workers": self.workers}
        places, found = dealt(batch, **how), in_shares(compute, batch, **how)
        if len(found) == 1:
            return found, found[0][1]
        order = np.argsort(np.concatenate(places))
        arrays = [each for _, arrays in found for each in arrays]
        return found, [arrays[i] for i in order]
