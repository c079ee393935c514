"""The plan of a model's training pass, and its two functions.  specs/training_speed.md."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np

from ...backend import HostArray, dtype_name, to_host
from ...config import Site
from ...errors import ConfigError, ShapeError
from ...params import Adapter
from . import groups as grouped
from .branches import Gradients
from .groups import Group
from .passes import Layers, Worker
from .room import Run, fresh
from .shape import GROUPS, SITES, check_names, read_shape, refuse
from .threads import blas_threads, shares, worker_count
from .weights import Frozen, Weights, products_of

ROWS = 512  # rows that a worker has at once, about: products are as quick as with more, and memory is bounded


def llama_plan(
    weights: Mapping[str, Any],
    config: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    sites: Mapping[str, Site],
    saved: Mapping[str, Any] | None = None,
    *,
    workers: int | str = "auto",
    checkpoint: bool = False,
) -> "LlamaPlan":
    """Prepare what is frozen of a Llama for training its adapters, on the CPU.

    weights : arrays by Hugging Face name; with a method into(name, out) they are asked for layer by layer
    config : of config.json
    adapters, sites : by dotted name; values of adapters are read in each step alone, shapes and parts here
    saved : what else trains; anything there is refused
    workers : threads, each with whole sequences and a BLAS of one thread; "auto" for one a core
    checkpoint : whether to keep the residual stream alone, and do each layer's forward again in the backward

    Raises ConfigError for what the plan does not compute: the general pass does. DtypeError, ShapeError.
    """
    return LlamaPlan(weights, config, adapters, sites, saved or {}, workers=workers, checkpoint=checkpoint)


class LlamaPlan:
    """A model's planned pass; made by llama_plan. One step at a time: its arrays are used again."""

    def __init__(
        self,
        weights: Mapping[str, Any],
        config: Mapping[str, Any],
        adapters: Mapping[str, Adapter],
        sites: Mapping[str, Site],
        saved: Mapping[str, Any],
        *,
        workers: int | str,
        checkpoint: bool,
    ) -> None:
        """As llama_plan."""
        self.shape, self.workers, self.checkpoint = read_shape(config), workers, checkpoint
        check_names(self.shape, weights)
        for name in saved:
            refuse(name, "nothing beside adapters to train", "a whole array")
        self.sites = dict(sites)
        self.parts = {site: parts_of(adapter) for site, adapter in adapters.items()}
        dtype = _dtype(adapters)
        ranks = {site: _rank(adapter) for site, adapter in adapters.items()}
        products = [products_of(self.shape, i, ranks) for i in range(self.shape.layers)]
        known = {site for layer in products for product in layer.values() for site in product.sites}
        for site in adapters:
            if site not in known:
                refuse(site, f"one of {', '.join(SITES)} of a layer", "an adapter there")
            if site not in sites:
                raise ConfigError(f"sites: expected {site}, set by adapters, got none")
        self.weights = Weights(weights, self.shape, products, dtype)
        self.groups = [
            {
                name: grouped.group_of(product, i, sites, adapters, self.weights)
                for name, product in layer.items()
            }
            for i, layer in enumerate(products)
        ]
        adapted = [i for i, layer in enumerate(self.groups) if any(g.branches for g in layer.values())]
        self.first = min(adapted, default=self.shape.layers)
        self._team: list[Worker] = []
        self._sums: list[list[dict[str, Gradients]]] = []
        self._pool: ThreadPoolExecutor | None = None

    # ---- the two functions ---------------------------------------------------------------------------------

    def loss_and_gradients(
        self,
        adapters: Mapping[str, Adapter],
        saved: Mapping[str, Any] | None,
        ids: Any,
        starts: Sequence[int],
        index: Sequence[int],
        labels: Any,
        *,
        n: int,
        dropout: tuple[int, int] | None = None,
    ) -> tuple[float, dict[str, Adapter], dict[str, HostArray]]:
        """Loss Σ −log p(label)/n over rows with a label, and the gradients by every adapter.

        ids, labels : (N,)  token of each row, and the token to be predicted there; −100 for none
        starts : (S + 1,)   where each sequence begins, and N;  index : (S,) its number in the whole step
        n : labels that count in the whole step
        dropout : (seed, step), or None for no dropout

        Returns the loss, gradients in records as the adapters', fresh arrays; and nothing for `saved`.
        """
        loss = self._step(adapters, saved, ids, starts, index, labels, n, dropout, gradients=True)
        return loss, self._collected(adapters), {}

    def loss(
        self,
        adapters: Mapping[str, Adapter],
        saved: Mapping[str, Any] | None,
        ids: Any,
        starts: Sequence[int],
        index: Sequence[int],
        labels: Any,
        *,
        n: int,
    ) -> float:
        """The loss alone, without dropout; arguments as loss_and_gradients."""
        return self._step(adapters, saved, ids, starts, index, labels, n, None, gradients=False)

    # ---- one step ------------------------------------------------------------------------------------------

    def _step(
        self,
        adapters: Mapping[str, Adapter],
        saved: Mapping[str, Any] | None,
        ids: Any,
        starts: Sequence[int],
        index: Sequence[int],
        labels: Any,
        n: int,
        dropout: tuple[int, int] | None,
        *,
        gradients: bool,
    ) -> float:
        self._check(adapters, saved, n)
        ids, labels, bounds, index = _batch(ids, starts, index, labels, self.shape.V)
        lengths = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        if self.shape.layers and not sum(lengths):
            return 0.0
        count = worker_count(self.workers, len(lengths))
        self._hire(count, gradients)
        at = self._layers(adapters)
        self._done = [False] * count

        def work(who: int, runs: list[list[int]]) -> float:
            total = 0.0
            with np.errstate(all="ignore"):
                for number, places in enumerate(runs):
                    rows = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in places])
                    run = Run([lengths[i] for i in places], [index[i] for i in places], dropout)
                    worker = self._team[who]
                    if gradients:
                        more = (self._sums[who], number == 0)
                        total += worker.loss_and_gradients(at, ids[rows], labels[rows], run, n, *more)
                    else:
                        total += worker.loss(at, ids[rows], labels[rows], run, n)
                    self._done[who] = True
            return total

        given = shares(lengths, count, ROWS)
        with blas_threads(count):
            if count == 1:
                return work(0, given[0])
            if self._pool is None:
                self._pool = ThreadPoolExecutor(64, "lorax_np")
            waiting = [self._pool.submit(copy_context().run, work, who, runs) for who, runs in enumerate(given)]
            return sum([each.result() for each in waiting])

    def _check(self, adapters: Mapping[str, Adapter], saved: Mapping[str, Any] | None, n: int) -> None:
        for name in saved or ():
            refuse(name, "nothing beside adapters to train", "a whole array")
        found = {site: parts_of(adapter) for site, adapter in adapters.items()}
        if found != self.parts:
            wrong = next(iter(dict(found.items() ^ self.parts.items())))
            raise ShapeError(f"{wrong}: expected adapters of the parts and shapes that the plan was made for")
        if isinstance(n, bool) or n < 1:
            raise ConfigError(f"n: expected at least one label that counts, got {n}")

    def _hire(self, count: int, gradients: bool) -> None:
        """Workers, and where their gradients go."""
        while len(self._team) < count:
            self._team.append(Worker(self.weights.dtype))
        while gradients and len(self._sums) < count:
            self._sums.append([{name: _zeros(g) for name, g in layer.items()} for layer in self.groups])

    def _layers(self, adapters: Mapping[str, Adapter]) -> Layers:
        """What workers read: the step's adapters put in place, at once or as each layer is written out."""
        for layer in self.groups:
            for group in layer.values():
                grouped.fill(group, adapters)

        def ready(i: int, buffers: dict[str, HostArray] | None) -> dict[str, Frozen]:
            found = dict(self.weights.layer(i, buffers))
            for name, group in self.groups[i].items():
                if group.branches:
                    grouped.place(group, found[name])
                    found[name] = Frozen(found[name].W, grouped.biases(group, found[name], adapters))
            return found

        frozen = ready
        if not self.weights.by_layer:
            placed = [ready(i, None) for i in range(self.shape.layers)]

            def frozen(i: int, buffers: dict[str, HostArray] | None) -> dict[str, Frozen]:
                return placed[i]

        more = (self.weights.last_norm, self.first, self.checkpoint)
        return Layers(self.shape, self.groups, frozen, self.weights.E, self.weights.head, *more)

    def _collected(self, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """The workers' gradients added up in their order, as records."""
        found = {}
        for i, layer in enumerate(self.groups):
            for name, group in layer.items():
                if group.branches:
                    found |= grouped.records(
                        group,
                        [sums[i][name] for sums, done in zip(self._sums, self._done, strict=False) if done],
                    )
        return {site: found[site] for site in adapters}


def parts_of(adapter: Adapter) -> tuple[Any, ...]:
    """Shapes of an adapter's parts, None where absent."""
    parts = (adapter.A, adapter.B, adapter.m, adapter.b, adapter.bB)
    return tuple(None if part is None else tuple(part.shape) for part in parts)


def _rank(adapter: Adapter) -> int:
    return 0 if adapter.A is None else int(adapter.A.shape[0])


def _dtype(adapters: Mapping[str, Adapter]) -> str:
    """float32 or float64, as the adapters are."""
    found = {dtype_name(part) for a in adapters.values() for part in (a.A, a.B, a.b, a.bB) if part is not None}
    if len(found) > 1 or not found <= {"float32", "float64"}:
        refuse("adapters", "float32 or float64 throughout", ", ".join(sorted(found)))
    return found.pop() if found else "float32"


def _zeros(group: Group) -> Gradients:
    dtype = group.A.dtype
    B = [np.empty((b.rows.stop - b.rows.start, b.r), dtype) for b in group.branches]
    biased = any({"b", "bB"} & set(branch.trained) for branch in group.branches)
    return Gradients(fresh(group.A.shape, dtype), B, np.empty(group.product.n, dtype) if biased else None)


def _batch(
    ids: Any, starts: Any, index: Any, labels: Any, V: int
) -> tuple[HostArray, HostArray, list[int], list[int]]:
    """The batch on the host, checked."""
    ids, labels = np.asarray(to_host(ids)), np.asarray(to_host(labels))
    bounds, numbers = [int(at) for at in starts], [int(i) for i in index]
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise ShapeError(f"labels: expected {ids.shape}, set by ids, got {labels.shape}")
    if not bounds or bounds[0] != 0 or bounds[-1] != len(ids) or sorted(bounds) != bounds:
        raise ShapeError(f"starts: expected bounds from 0 to {len(ids)}, set by ids, got {bounds[:8]}")
    if len(numbers) != len(bounds) - 1:
        raise ShapeError(f"index: expected {len(bounds) - 1} numbers, set by starts, got {len(numbers)}")
    for name, values, least in (("ids", ids, 0), ("labels", labels[labels != -100], 0)):
        if len(values) and not (least <= int(values.min()) and int(values.max()) < V):
            raise ConfigError(f"{name}: expected tokens below {V}, got {values.min()} to {values.max()}")
    return ids, labels, bounds, numbers
