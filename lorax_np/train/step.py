"""One optimiser step, whole: count, forward, loss, backward, sum, clip, update.  See specs/training.md."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from ..backend import Array, cast, compute_dtype, dtype_name, namespace_of, on_device, quiet, to_host
from ..config import Site
from ..errors import ConfigError
from ..models.records import Batch, Dropout, Trained
from ..models.tasks import count
from ..optim import (
    Inverses,
    State,
    adamw_start,
    adamw_step,
    clip_into,
    lora_fa_gradients,
    lora_fa_inverses,
    sgd_start,
    sgd_step,
)
from ..parallel import Alone, Communicator, counted, summed
from ..tree import Layout, Leaves, flatten, layout, leaves, unflatten, with_leaves
from .config import TrainConfig
from .passes import Passes

Rates = tuple[Mapping[str, float], Mapping[str, float]]  # the learning rate and the decay of each parameter


class Outcome(NamedTuple):
    """What a step found, over all ranks.

    loss : the mean over the step's labels;  norm : of the gradient, before it is clipped
    labels : how many labels count;  tokens : rows that the models computed
    applied : whether the parameters were updated; they are not where loss or norm is not finite
    """

    loss: float
    norm: float
    labels: int
    tokens: int
    applied: bool


def train_step(
    passes: Passes,
    trained: Trained,
    state: State,
    batches: Sequence[Batch],
    *,
    step: int,
    rates: Rates,
    ranks: Communicator = Alone(),  # noqa: B008 - it holds nothing
) -> tuple[Trained, State, Outcome]:
    """One step over this rank's micro-batches; every rank brings equally many, of no sequence perhaps.

    step : counted from 0; the masks depend on it
    Returns what trains, the optimiser's state, and the outcome; nothing is written to.
    Raises ConfigError where no label counts. Source: specs/training.md.
    """
    g, outcome = gradient(passes, trained, batches, step=step, ranks=ranks)
    if not outcome.applied:
        return trained, state, outcome
    params = parameters(trained)
    grads = unflatten(g, layout(params))
    new, state = update(params, grads, state, rates, passes.config, passes.sites)
    return with_parameters(trained, new), state, outcome


def gradient(
    passes: Passes, trained: Trained, batches: Sequence[Batch], *, step: int, ranks: Communicator
) -> tuple[Array, Outcome]:
    """The step's gradient g : (P,), summed and clipped, in the parameters' order; and what the step found.

    The outcome says whether it is to be applied. Arguments and errors as train_step's.
    """
    config, params = passes.config, parameters(trained)
    kept = [count(passes.task, batch.labels, batch.starts) for batch in batches]
    rows = sum(map(rows_of, batches))
    labels, filled, tokens = counted(ranks, sum(kept), sum(n > 0 for n in kept), rows)  # (training.1)
    if labels == 0:
        raise ConfigError(f"step {step + 1}: expected a label that counts in its rows, got none")

    def part(batch: Batch, mine: int) -> Array:
        if mine == 0:
            return packed({}, 0.0, params)
        n = labels if config.loss_mean == "token" else mine * filled  # (training.2), (training.4)
        loss, found = passes.gradients(trained, batch, n=n, dropout=Dropout(config.seed, step))
        return packed(parameters(found), loss, params)

    with quiet():  # what is not finite is seen below
        total = summed(ranks, map(part, batches, kept), reduction=config.reduction)  # (training.3)
    g = total[:-1]
    N = clip_into(stepping(g, layout(params), config), config.max_grad_norm or None)
    loss, norm = read_together(total[-1:], N)
    return g, Outcome(loss, norm, labels, tokens, applied=isfinite(loss) and isfinite(norm))


def stepping(g: Array, where: Layout, config: TrainConfig) -> Leaves:
    """Those that the optimiser steps with, as views: LoRA-FA holds every A, whose gradients then count nowhere.

    On a device all of them are one array: a kernel for each would take longer to start than to run.
    """
    if config.optimizer != "lora-fa" and on_device(g):
        return {"": g}
    gradients = unflatten(g, where)
    if config.optimizer != "lora-fa":
        return gradients
    return {name: g for name, g in gradients.items() if not name.startswith("adapters.") or name[-2:] != ".A"}


def update(
    params: Leaves,
    gradients: Leaves,
    state: State,
    rates: Rates,
    config: TrainConfig,
    sites: Mapping[str, Site],
    inverses: Inverses | None = None,
) -> tuple[Leaves, State]:
    """The optimiser's step: new parameters and a new state; inverses as inverses_of gives them, or anew."""
    lr, decay = rates
    if config.optimizer == "sgd":
        return sgd_step(params, gradients, state, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "lora-fa":
        scaling, ranks = _numbers(sites)
        gradients = lora_fa_gradients(params, gradients, scaling, ranks=ranks, inverses=inverses)
    betas = config.beta1, config.beta2
    return adamw_step(params, gradients, state, lr=lr, betas=betas, eps=config.eps, weight_decay=decay)


def inverses_of(params: Mapping[str, Array], config: TrainConfig, sites: Mapping[str, Site]) -> Inverses | None:
    """What LoRA-FA makes of every A, which it holds; None for other optimisers. They are read on the host."""
    if config.optimizer != "lora-fa":
        return None
    scaling, ranks = _numbers(sites)
    return lora_fa_inverses(params, scaling, ranks=ranks)


def _numbers(sites: Mapping[str, Site]) -> tuple[dict[str, float], dict[str, int]]:
    """s by site, and r of one expert where there are several."""
    scaling = {f"adapters.{name}": site.scaling for name, site in sites.items()}
    return scaling, {f"adapters.{name}": site.r for name, site in sites.items() if site.kind == "experts"}


def start(trained: Trained, config: TrainConfig) -> State:
    """The optimiser's state before its first step."""
    begin = sgd_start if config.optimizer == "sgd" else adamw_start
    return begin(parameters(trained))


# ---- what trains, by name ----------------------------------------------------------------------------------


def parameters(trained: Trained) -> Leaves:
    """All arrays that train, by dotted name: adapters.SITE.A, saved.NAME.

    >>> import numpy as np
    >>> list(parameters(Trained({}, {"head.weight": np.ones(2)})))
    ['saved.head.weight']
    """
    return leaves(trained)


def with_parameters(trained: Trained, new: Mapping[str, Array]) -> Trained:
    """The same record with other arrays. Raises ConfigError for other names."""
    return with_leaves(trained, new)


def widened(trained: Trained) -> Trained:
    """The same in one dtype that can be stepped: float64 where all of it is, else float32.

    What is stored in fewer bits trains in float32: steps below half of its last bit would be lost in it.
    """
    params = parameters(trained)
    wide = params and all(dtype_name(value) == "float64" for value in params.values())
    dtype = "float64" if wide else "float32"
    return with_parameters(trained, {name: cast(value, dtype) for name, value in params.items()})


def packed(gradients: Mapping[str, Array], loss: Array | float, params: Leaves) -> Array:
    """Gradients in the order of the parameters, zeros where there is none, and the loss behind: (P + 1,)."""
    xp, one = namespace_of(**params), next(iter(params.values()))
    filled = {name: gradients[name] if name in gradients else xp.zeros_like(p) for name, p in params.items()}
    last = xp.zeros_like(xp.reshape(one, (-1,))[:1]) + (
        loss if isinstance(loss, float) else cast(loss, compute_dtype(one))
    )
    return flatten({**filled, "loss": last})


def read_together(*values: Array) -> list[float]:
    """Numbers, each of them an array (1,), brought to the host at once: the one time that a step waits."""
    both = namespace_of(value=values[0]).concat([cast(value, "float64") for value in values])
    found: list[float] = to_host(both).tolist()
    return found


def number(value: Any) -> float:
    """A number that stands alone in an array, or is one, read on the host."""
    return float(value)


def rows_of(batch: Batch) -> int:
    """Rows that a model computes for a micro-batch, the decoder's too."""
    return batch.starts[-1] + (0 if batch.decoder_starts is None else batch.decoder_starts[-1])
