"""The plan of a model's training pass, and its two functions.  specs/training_speed.md."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...backend import HostArray
from ...config import Site
from ...errors import ConfigError
from ...params import Adapter
from . import groups as grouped
from .batch import Batch, batch_of
from .branches import Sums
from .checks import check_parts, checked, lies_on_device, nothing_beside
from .groups import Group
from .head import Head
from .passes import Buffers, Model, Worker
from .room import Run, fresh
from .threads import in_threads, shares, worker_count
from .weights import Frozen, Weights

if TYPE_CHECKING:
    from ..device import DeviceLlama


def llama_plan(
    weights: Mapping[str, Any],
    config: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    sites: Mapping[str, Site],
    saved: Mapping[str, Any] | None = None,
    *,
    workers: int | str = "auto",
    checkpoint: bool = False,
    rows: int = 512,
) -> "LlamaPlan | DeviceLlama":
    """Prepare what is frozen of a Llama for training its adapters, where its weights lie.

    weights : arrays by their names in a Hugging Face checkpoint; copied here, stacked. With a method
              into(name, out), which writes one matrix out, the matrices are asked for layer by layer instead.
              On a device they are read where they lie, and have to be of the dtype computed in
    config : of its config.json, or a Model's; model_type llama, mistral, or qwen2
    adapters, sites : by dotted name, for any of the seven linear layers of any layers. Only parts, shapes and
              dtype are read here, values in each step. All float32 or all float64, which is computed in
    saved : what trains beside adapters; anything there is refused
    workers : threads, each with whole sequences and a BLAS of one thread; "auto" for one a core. On a device
              there is none
    checkpoint : keep only the residual stream, and do each layer's forward again in the backward: the same bits
    rows : about how many tokens a worker has at once, whole sequences, the rest one after another: what is kept
           grows with them; with fewer, products are slower (by 8 % at 256). On a device all are there at once

    Raises ConfigError for whatever the plan does not compute, such as DoRA: the general pass does. ShapeError
    and DtypeError where weights or adapters do not fit the config. Source: specs/training_speed.md.

    >>> import numpy as np
    >>> from lorax_np.fast.llama.shape import NORMS, SITES
    >>> sizes = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> wide = {"mlp.gate_proj": (6, 4), "mlp.up_proj": (6, 4), "mlp.down_proj": (4, 6)}
    >>> weights = {f"model.layers.0.{site}.weight": np.ones(wide.get(site, (4, 4))) for site in SITES}
    >>> weights |= {f"model.layers.0.{norm}.weight": np.ones(4) for norm in NORMS}
    >>> weights |= {"model.norm.weight": np.ones(4), "model.embed_tokens.weight": np.ones((5, 4))}
    >>> plan = llama_plan(weights, {**sizes, "vocab_size": 5, "tie_word_embeddings": True}, {}, {})
    >>> loss = plan.loss({}, {}, [1, 2, 3], [0, 3], [0], [2, 3, -100], n=2)
    >>> bool(abs(loss - np.log(5)) < 1e-12)
    True
    """
    if lies_on_device(weights):
        from ..device import DeviceLlama

        return DeviceLlama(weights, config, adapters, sites, saved or {}, checkpoint=checkpoint)
    how: Any = {"workers": workers, "checkpoint": checkpoint, "rows": rows}
    return LlamaPlan(weights, config, adapters, sites, saved or {}, **how)


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
        rows: int,
    ) -> None:
        """As llama_plan."""
        self.shape, products, self._parts, dtype = checked(weights, config, adapters, sites, saved)
        self.workers, self.checkpoint, self.rows = workers, checkpoint, rows
        worker_count(workers, 1)
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ConfigError(f"rows: expected a number of at least 1, got {rows!r}")
        self.weights = Weights(weights, self.shape, products, dtype)
        self.groups = [
            {
                name: grouped.group_of(product, self.weights.fold(i, name), sites, adapters, self.weights)
                for name, product in layer.items()
            }
            for i, layer in enumerate(products)
        ]
        adapted = [i for i, layer in enumerate(self.groups) if any(g.branches for g in layer.values())]
        self.first = min(adapted, default=self.shape.layers)
        self._team: list[Worker] = []
        self._sums: dict[int, list[dict[str, Sums]]] = {}  # of each worker

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

        ids, labels : (N,) integers  the token of each row, and the token to be predicted there, −100 for none
        starts : (S + 1,)            first row of each sequence, and N
        index : (S,)                 its number in the whole step, on which its masks depend
        n : labels that count in the whole step
        dropout : (seed, step), or None for no dropout. The mask of a site on a sequence of T rows is
                  dropout_mask((T, d_in), p, seed, step, site_key(site), c3=index)

        Returns the loss; gradients in records as the adapters', fresh arrays; and {} for `saved`.
        The bits depend on the arguments and the number of workers alone.
        Raises ConfigError and ShapeError for a batch or adapters that do not fit.
        """
        batch = batch_of(ids, starts, index, labels, n, self.shape.V)
        model, used = self._model(adapters, saved), list[int]()

        def work(who: int, runs: list[Run]) -> float:
            total, worker = 0.0, self._team[who]
            if who not in self._sums:
                self._sums[who] = [{name: _room(g) for name, g in layer.items()} for layer in self.groups]
            for run in runs:
                rows = batch.rows(run)
                where = (model, batch.ids[rows], batch.labels[rows], run, n, self._sums[who])
                total += worker.loss_and_gradients(*where, fresh=who not in used)
                used.append(who)
            return total

        loss = self._shared(batch, dropout, work)
        return loss, self._collected(adapters, sorted(set(used))), {}

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
        batch = batch_of(ids, starts, index, labels, n, self.shape.V)
        model = self._model(adapters, saved)

        def work(who: int, runs: list[Run]) -> float:
            total = 0.0
            for run in runs:
                rows = batch.rows(run)
                total += self._team[who].loss(model, batch.ids[rows], batch.labels[rows], run, n)
            return total

        return self._shared(batch, None, work)

    # ---- parts of a step -------------------------------------------------------------------------------------

    def _shared(self, batch: Batch, dropout: tuple[int, int] | None, work: Any) -> float:
        """Σ work(who, runs), by workers in threads."""
        lengths = [b - a for a, b in pairwise(batch.bounds)]
        count = worker_count(self.workers, len(lengths))
        while len(self._team) < count:
            self._team.append(Worker(self.weights.dtype))
        runs = [
            [
                Run(places, [lengths[i] for i in places], [batch.numbers[i] for i in places], dropout)
                for places in mine
            ]
            for mine in shares(lengths, count, self.rows)
        ]
        return float(sum(in_threads(work, runs)))

    def _model(self, adapters: Mapping[str, Adapter], saved: Mapping[str, Any] | None) -> Model:
        """What workers read: the step's adapters put in place, now or as each layer is written out."""
        nothing_beside(saved or {})
        check_parts(adapters, self._parts)
        for layer in self.groups:
            for group in layer.values():
                grouped.fill(group, adapters)

        def placed(i: int, buffers: Buffers | None) -> dict[str, Frozen]:
            found = self.weights.layer(i, buffers)
            return {
                name: grouped.placed(group, found[name], adapters) for name, group in self.groups[i].items()
            }

        there = [] if self.weights.by_layer else [placed(i, None) for i in range(self.shape.layers)]

        def frozen(i: int, buffers: Buffers) -> dict[str, Frozen]:
            return there[i] if there else placed(i, buffers)

        head = Head(self.weights.last_norm, self.weights.head, self.shape.eps)
        return Model(self.shape, self.groups, frozen, self.weights.E, head, self.first, self.checkpoint)

    def _collected(self, adapters: Mapping[str, Adapter], used: list[int]) -> dict[str, Adapter]:
        """The workers' gradients added up in their order; zeros where nobody had a row."""
        found: dict[str, Adapter] = {}
        for i, layer in enumerate(self.groups):
            for name, group in layer.items():
                if group.branches:
                    sums = [self._sums[who][i][name] for who in used] or [_room(group, zero=True)]
                    found |= grouped.records(group, sums)
        return {site: found[site] for site in adapters}


def _room(group: Group, *, zero: bool = False) -> Sums:
    """Where a group's gradients are added up."""
    dtype, n = group.A.dtype.name, group.product.n
    shapes = [(branch.rows.stop - branch.rows.start, branch.r) for branch in group.branches]
    found = Sums(
        fresh(group.A.shape, dtype),
        [fresh(shape, dtype) for shape in shapes],
        fresh((n,), dtype) if group.biased else None,
    )
    for array in (found.A, *found.B, *([] if found.b is None else [found.b])):
        if zero:
            array[...] = 0
    return found
