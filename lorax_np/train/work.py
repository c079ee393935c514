"""What a run's steps are made of, as far as an estimate of them asks.  specs/training.md."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..models.records import Model, Trained
from ..models.t5_block import READ, WRITE
from ..text.examples import Example
from .passes import Passes
from .step import parameters

Shape = tuple[int, ...]
RUN = 512  # rows that a worker of the planned pass has at once
CAUSAL = 0.6  # of the keys that blocks of causal scores are computed with
DECODERS = "llama", "moe", "gpt2"  # families that hide what comes later
TABLES = "embed", ".wte.", ".wpe.", "shared."  # parts of the names of what stands below the first block
MEMORY = re.compile(r"\.EncDecAttention\.[kv]\b")  # modules of the decoder that are given what is read
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
    written: Sequence[int] = ()  # of the same rows, tokens of the decoder, where there is one

    @property
    def mean(self) -> float:
        """Tokens of a row, the decoder's apart."""
        return float(np.mean(self.lengths))

    @property
    def all(self) -> float:
        """Tokens of a row, the decoder's too."""
        return self.mean + sum(self.written) / len(self.lengths)

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
    written = [len(example.decoder) for example in examples if example.decoder is not None]
    return Work(passes.model, trained, passes, lengths, kept, batch, config.grad_accumulation_steps, written)


class Stack(NamedTuple):
    """Blocks through which the same tokens go, as far as an estimate asks.

    tokens : of a step
    L : blocks;  halves : of each, attentions and the perceptron
    keys : that a token's query is multiplied with, in all attentions of a block
    forward, gx : how often a block goes forward, and has a gradient, on average over the blocks
    """

    tokens: float
    L: int
    halves: int
    keys: float
    forward: float
    gx: float

    @property
    def attended(self) -> float:
        """Queries times keys times attention's products, two forward and five back."""
        return self.tokens * self.L * self.keys * (2 * self.forward + 5 * self.gx)


def stacks_of(work: Work, tokens: float) -> dict[str, Stack]:
    """The stacks by how the names of their blocks begin: one, "", or T5's that reads and that writes.

    tokens : of a step, the decoder's too
    """
    L, names, again = sizes(work.model)["L"], list(parameters(work.trained)), work.passes.checkpoint
    read, written = work.lengths, work.written
    keys = mean_keys(read, read)
    if not written:
        seen = CAUSAL if work.model.family in DECODERS else 1.0
        return {"": Stack(tokens, L, 2, keys * seen, *often(first_trained(names, L), L, again))}
    lower = [name for name in names if f".{READ}." in name or is_table(name)]
    first, upper = first_trained(lower, L), int(work.model.config["num_decoder_layers"])
    above, mine = 0 if lower else first_trained(names, upper), tokens * work.mean / work.all
    both = CAUSAL * mean_keys(written, written) + mean_keys(written, read)
    return {
        READ: Stack(mine, L, 2, keys, *often(first, L, again)),
        WRITE: Stack(tokens - mine, upper, 3, both, *often(above, upper, again)),
    }


def often(first: int, L: int, again: bool) -> tuple[float, float]:
    """How often L blocks go forward, those that have a backward again where they are recomputed; and these.

    first : the first block that has a backward

    >>> often(3, 4, again=False), often(3, 4, again=True), often(0, 4, again=True)
    ((1.0, 0.25), (1.25, 0.25), (2.0, 1.0))
    """
    gx = 1 - first / max(L, 1)
    return 1 + gx * again, gx


def stack_of(name: str) -> str:
    """Whose block a module of T5 is in; "" of any other family."""
    return next((stack for stack in (READ, WRITE) if f"{stack}.block." in name), "")


def fed_by(name: str) -> str:
    """Whose tokens a module is given: those that are read, where it makes keys and values of them."""
    return READ if MEMORY.search(name) else stack_of(name)


def mean_keys(lengths: Sequence[int], keys: Sequence[int]) -> float:
    """Keys that a token's query is multiplied with, before causality hides some: Σ TK/Σ T.

    >>> mean_keys([1, 3], [1, 3]), mean_keys([1, 1], [2, 4])
    (2.5, 3.0)
    """
    return sum(T * K for T, K in zip(lengths, keys, strict=True)) / max(sum(lengths), 1)


def is_table(name: str) -> bool:
    """Whether a module stands below the first block."""
    return any(table in name for table in TABLES)


def first_trained(names: Sequence[str], L: int) -> int:
    """The first block that something trains in: 0 where tables do, L where heads and last norms alone do."""
    outside = [0 if is_table(name) else L for name in names]
    numbers = [
        next((int(part) for part in name.split(".") if part.isdecimal()), else_)
        for name, else_ in zip(names, outside, strict=True)
    ]
    return min(numbers, default=L)


def queries(model: Model) -> int:
    """Numbers of a token's queries in all heads of a block: d, where heads have no width of their own."""
    s, config = sizes(model), model.config
    D = next((int(config[name]) for name in ("head_dim", "d_kv") if config.get(name)), 0)
    return s["H"] * D if D else s["d"]


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
        and not any(table in name for table in ("embed", "relative_attention_bias"))
        and any(part.isdecimal() for part in name.split("."))
    }


def shapes_of(model: Model) -> dict[str, Shape]:
    """The shapes of a model's tensors by name; none in few bits is written out for it."""
    tell = getattr(model.weights, "shape", None)
    return {name: tuple(tell(name) if callable(tell) else model.weights[name].shape) for name in model.weights}
