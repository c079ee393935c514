"""A run from its first step to its last: evaluate, step, report, save.  See specs/training.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import LoraConfig, Site
from ..errors import ConfigError
from ..inject import plan
from ..models.records import Model, Trained
from ..parallel import Alone, Communicator
from ..params import AnyAdapter
from ..text.examples import Example
from ..text.labels import Labels
from .config import TrainConfig
from .estimate import decide
from .passes import Passes
from .run import Callback, Result, Run
from .step import widened
from .stopping import Stop
from .work import work_of


def train(
    model: Model,
    adapters: Mapping[str, AnyAdapter] | Trained,
    data: Sequence[Example],
    config: TrainConfig | None = None,
    *,
    sites: Mapping[str, Site] | None = None,
    task: str = "CAUSAL_LM",
    valid: Sequence[Example] = (),
    labels: Labels | None = None,
    lora: LoraConfig | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    ranks: Communicator | None = None,
    callbacks: Sequence[Callback] = (),
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    tokens: Mapping[str, Sequence[int]] | None = None,
    passes: Passes | None = None,
) -> Result:
    """Train what stands beside a model on examples, and return it; nothing that is given is written to.

    model    : load_model's, its weights those that inject returned
    adapters : inject's; or a Trained, which has more that trains
    data, valid : examples of load_data; without valid the first rows of data are evaluated
    sites    : inject's; None for those that lora means on the model
    task, labels : PEFT's task type, and the classes by name
    lora     : the config that the adapters were made by: the adapter's directory is written by it
    out      : a new directory, for the adapter, metrics.jsonl, loss.csv, README.md, and state/; or None
    resume   : go on after the last save in out, as if nothing had happened, bit for bit, or begin where there
        is none yet; the other arguments are those of the run's beginning
    ranks    : parallel.world() of a process that mpiexec started; rank 0 alone writes, evaluates and calls back
    callbacks : called with each line of metrics.jsonl as a dict; one that returns True ends the run, saved
    tables   : by heading, what README.md is to say besides
    tokens   : which rows of embeddings train, by plan, where some do
    passes   : what computes the model, made of the same; chosen anew where none is given

    The first Ctrl-C or SIGTERM ends the run after its step, saved; the second at once, the last save intact.
    Raises ConfigError, FormatError or OSError, one line, for whatever can be known before the first step.
    Source: specs/training.md.
    """
    sites = _sites(model, lora) if sites is None else sites
    given = widened(adapters if isinstance(adapters, Trained) else Trained(adapters, {}))
    if passes is None:
        passes = Passes(model, sites, given, task=task, config=config or TrainConfig(), tokens=tokens)
        if data:
            decide(work_of(passes, given, data))
    run = Run(passes, given, data, ranks or Alone(), callbacks)
    run.judged_on(valid, labels)
    run.tables = tables or {}
    run.open(None if out is None else Path(out), lora, resume=resume)
    try:
        with Stop() as stop:
            if not run.begun:
                run.before = run.evaluated()
            while run.step < run.steps and not run.ended:
                run.advance()
                run.look_around(stop)
            return run.close()
    finally:
        if run.log is not None:
            run.log.close()


def _sites(model: Model, lora: LoraConfig | None) -> Mapping[str, Site]:
    """The places of adapters, with their factors and dropout, as a config means them."""
    if lora is None:
        raise ConfigError("sites: expected inject's, or lora, the config that says them, got neither")
    return plan(model.weights, lora).sites
