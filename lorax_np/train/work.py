"""What a run's steps are made of, as far as an estimate of them asks.  specs/training.md."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..models.records import Model, Trained
from ..text.examples import Example
from .passes import Passes

Shape = tuple[int, ...]
RUN = 512  # rows that a worker of the planned pass has at once
NAMES: Mapping[str, tuple[str, ...]] = {  # of sizes, in the families' configs
    "L": ("num_hidden_layers", "n_layer", "num_layers"),
    "d": ("hidden_size", "n_embd", "d_model"),
    "ff": ("intermediate_size", "n_inner", "d_ff"),
    "H": ("num_attention_heads", "n_head", "num_heads"),
    "V": ("vocab_size",),
}


class Work(NamedTuple):
    """What a step is made of, as far as an estimate asks."""

    model: Model
    trained: Trained
    passes: Passes
    lengths: Sequence[int]  # tokens of the data's rows
    labels: Sequence[int]  # of the same rows
    batch: float  # sequences of a micro-batch
    turns: int  # micro-batches of a step

    @property
    def mean(self) -> float:
        """Tokens of a row."""
        return float(np.mean(self.lengths))

    @property
    def workers(self) -> int:
        """Threads that share a micro-batch."""
        return self.passes.threads(max(1, round(self.batch)))

    @property
    def words(self) -> bool:
        """Whether the head's outputs are over the vocabulary."""
        return self.passes.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def work_of(passes: Passes, trained: Trained, examples: Sequence[Example]) -> Work:
    """What a run's steps are made of."""
    config, lengths = passes.config, [example.tokens for example in examples]
    batch = float(config.batch_size)
    if config.max_tokens is not None:
        batch = max(1.0, config.max_tokens / float(np.mean(lengths)))
    kept = [example.kept for example in examples]
    return Work(passes.model, trained, passes, lengths, kept, batch, config.grad_accumulation_steps)


def sizes(model: Model) -> dict[str, int]:
    """Layers, widths, heads and vocabulary of a model, 0 where its config does not say."""
    config = model.config
    return {
        size: next((int(config[name]) for name in names if config.get(name)), 0)
        for size, names in NAMES.items()
    }


def linears(model: Model) -> dict[str, Shape]:
    """The matrices of the blocks by name, tables and heads apart."""
    V = sizes(model)["V"]
    return {
        name: shape
        for name, shape in shapes_of(model).items()
        if len(shape) == 2
        and V not in shape
        and "embed" not in name
        and any(part.isdecimal() for part in name.split("."))
    }


def shapes_of(model: Model) -> dict[str, Shape]:
    """The shapes of a model's tensors by name; none in few bits is written out for it."""
    tell = getattr(model.weights, "shape", None)
    return {name: tuple(tell(name) if callable(tell) else model.weights[name].shape) for name in model.weights}
