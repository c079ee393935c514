"""What a run will take, in time and memory, before it is begun.  Counts and rates: specs/training.md."""

import os
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError
from ..fast.gemm import engine
from ..models.records import Dropout, Model, Trained
from ..models.tasks import kept_numbers
from ..text.examples import Example
from .passes import Passes
from .step import parameters

Shape = tuple[int, ...]
FLOAT = 4  # bytes
MOST = 4096  # rows of a matrix that are timed
PROGRAMS = 130_000_000  # bytes of Python, NumPy, the tokenizer and the rows
BUDGET = 0.3  # seconds that products are timed
SHARE = 0.6  # of the free memory, beyond which blocks are computed again
RUN = 512  # rows that a worker of the planned pass has at once
HEAD = 256  # rows of logits that are there at once
BITS = {"int8": 8.0, "nf4": 4.5}  # of a number, its share of the scales included
NAMES: Mapping[str, tuple[str, ...]] = {  # of sizes, in the families' configs
    "L": ("num_hidden_layers", "n_layer", "num_layers"),
    "d": ("hidden_size", "n_embd", "d_model"),
    "ff": ("intermediate_size", "n_inner", "d_ff"),
    "H": ("num_attention_heads", "n_head", "num_heads"),
    "V": ("vocab_size",),
}


class Estimate(NamedTuple):
    """What one step takes, and what is in memory at its height.

    tokens, labels : of one step of one rank;  seconds : of one step
    parts : bytes, by what they are for
    """

    tokens: float
    labels: float
    seconds: float
    parts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


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


def work_of(passes: Passes, trained: Trained, examples: Sequence[Example]) -> Work:
    """What a run's steps are made of."""
    config, lengths = passes.config, [example.tokens for example in examples]
    batch = float(config.batch_size)
    if config.max_tokens is not None:
        batch = max(1.0, config.max_tokens / float(np.mean(lengths)))
    kept = [example.kept for example in examples]
    return Work(passes.model, trained, passes, lengths, kept, batch, config.grad_accumulation_steps)


def estimated(work: Work) -> Estimate:
    """Return the estimate of a run, for which products of its shapes are timed."""
    tokens = work.mean * work.batch * work.turns
    labels = float(np.mean(work.labels)) * work.batch * work.turns
    return Estimate(tokens, labels, seconds_of(work, tokens, labels), memory_of(work))


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
        for name, shape in _shapes(model).items()
        if len(shape) == 2
        and V not in shape
        and "embed" not in name
        and any(part.isdecimal() for part in name.split("."))
    }


# ---- memory ------------------------------------------------------------------------------------------------


def memory_of(work: Work, *, checkpoint: bool | None = None) -> dict[str, int]:
    """Bytes at the height of a step, by what they are for.  (training.10)"""
    model, P = work.model, sum(prod(value.shape) for value in parameters(work.trained).values())
    again = work.passes.checkpoint if checkpoint is None else checkpoint
    rows = max(work.mean * work.batch, max(work.lengths))
    found = {"programs": PROGRAMS, "base": _base(work)}
    if work.passes.planned:
        workers = worker_count(work.passes.workers, max(1, round(work.batch)))
        each = min(max(RUN, max(work.lengths)), rows / workers)
        found["activations"] = round(workers * each * _planned_row(model, work.trained, again))
        found["logits"] = workers * min(HEAD, round(each)) * sizes(model)["V"] * FLOAT
        sums = workers + 1
    else:
        found["activations"] = round(_general(work, round(rows), again))
        found["logits"] = 2 * min(HEAD, round(rows)) * sizes(model)["V"] * FLOAT
        sums = 1
    found["adapters"] = P * FLOAT
    found["gradients"] = (sums + 3) * P * FLOAT
    found["optimiser"] = (2 if work.passes.config.optimizer == "sgd" else 6) * P * FLOAT
    return found


def _base(work: Work, bits: float | None = None) -> int:
    """Bytes of the base in use: every tensor once, though it have two names; of a plan, B beside them.

    bits : of a number of the blocks' matrices, were they held in few bits; None as they are
    """
    shapes, weights = _shapes(work.model), work.model.weights
    if work.model.config.get("tied"):
        shapes.pop("lm_head.weight", None)
    codes: Mapping[str, object] = getattr(weights, "codes", {})
    matrices = linears(work.model)
    few = codes if bits is None else matrices
    layers = max(1, sizes(work.model)["L"])
    found = sum(FLOAT * prod(shape) for name, shape in shapes.items() if name not in few)
    if few:  # and one layer is there as it is multiplied with
        found += sum(FLOAT * prod(shape) for shape in matrices.values()) // layers
        size = sum(prod(shape) for shape in matrices.values())
        found += int(getattr(weights, "nbytes", 0)) if bits is None else round(bits / 8 * size)
    if work.passes.planned:
        pairs = [(a.A, a.B) for a in work.trained.adapters.values()]
        found += FLOAT * sum(A.shape[0] * B.shape[0] for A, B in pairs if A is not None and B is not None)
    return found


def _shapes(model: Model) -> dict[str, Shape]:
    tell = getattr(model.weights, "shape", None)
    return {name: tuple(tell(name) if callable(tell) else model.weights[name].shape) for name in model.weights}


def _planned_row(model: Model, trained: Trained, again: bool) -> float:
    """Bytes that the planned pass of a Llama has for one row: kept by each layer, and used by each in turn."""
    config, s = model.config, sizes(model)
    D = int(config["head_dim"])
    dq, dk = s["H"] * D, int(config["num_key_value_heads"]) * D
    ranks = sum(0 if a.A is None else a.A.shape[0] for a in trained.adapters.values()) / s["L"]
    kept = s["d"] + 2 * dq + s["H"] + 2 * dk + 2 * s["ff"] + 2 + ranks  # but the input
    used = 2 * s["d"] + 5 * s["ff"] + 2 * (s["d"] + dq) + 2 * ranks
    masks = sum(0 if a.A is None else a.A.shape[1] for a in trained.adapters.values()) / 8
    layers = kept + s["L"] * s["d"] if again else s["L"] * (kept + s["d"])
    return float(FLOAT * (layers + used) + (0 if again else masks))


def _general(work: Work, rows: int, again: bool) -> float:
    config = work.passes.config
    args = work.model, work.passes.sites, work.trained, rows
    try:
        found = kept_numbers(*args, dropout=Dropout(0, 0), engine=config.engine, checkpoint=again)
    except ConfigError:  # a family that nobody has counted: about as many as a block of its sizes keeps
        s = sizes(work.model)
        found = rows * s["L"] * (s["d"] if again else 12 * s["d"] + 3 * s["ff"])
    return FLOAT * (found + 8.0 * rows * max(sizes(work.model)["ff"], 1))


def available() -> int:
    """Bytes that a process may still have; 0 where the system does not tell."""
    about = Path("/proc/meminfo")
    if about.is_file():
        lines = dict(line.split(":", 1) for line in about.read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    return prod(os.sysconf(name) for name in names) if all(n in os.sysconf_names for n in names) else 0


# ---- time --------------------------------------------------------------------------------------------------


def seconds_of(work: Work, tokens: float, labels: float) -> float:
    """Seconds of one step: products at the rates of this machine now, passes over arrays.  (training.11)"""
    model, s = work.model, sizes(work.model)
    workers = worker_count(work.passes.workers, max(1, round(work.batch))) if work.passes.planned else 1
    rows = max(8, round(min(RUN, work.mean * work.batch / workers)))
    shapes = list(linears(model).values())
    times = product_seconds({*shapes, (s["V"], s["d"])}, rows, workers)
    first, again = _first(work.trained, s["L"]), work.passes.checkpoint
    below = first / max(s["L"], 1)
    frozen = sum(times[shape] for shape in shapes) * tokens * ((1 + again) * 1 + (1 - below))
    head = 2 * times[s["V"], s["d"]] * labels if work.passes.task == "CAUSAL_LM" else 0.0
    flops = sum(2 * prod(shape) for shape in shapes)
    rate = flops / max(sum(times[shape] for shape in shapes), 1e-12)  # operations a second, of all workers
    share = (1 - below) * 5 / 7 + 2 / 7 * (1 + again)
    attention = 7 * 2 * s["d"] * 0.6 * _mean_keys(work.lengths) * s["L"] * tokens * share / (0.5 * rate)
    P = sum(prod(value.shape) for value in parameters(work.trained).values())
    dropped = sum(a.A.shape[1] for a in work.trained.adapters.values() if a.A is not None and _dropped(work))
    lora = 6 * P * tokens / (0.4 * rate) + 4e-9 * dropped * tokens / workers
    passes = 13 * s["d"] + 16 * s["ff"] + 5 * s["H"] * work.mean / 2
    elements = 1e-9 * passes * s["L"] * tokens * (1 if work.passes.planned else 2) / workers
    return frozen + head + attention + lora + elements + 25e-9 * P


def _dropped(work: Work) -> bool:
    return any(site.p for site in work.passes.sites.values())


def _mean_keys(lengths: Sequence[int]) -> float:
    """Keys that a token's query is multiplied with, before causality halves them: Σ T²/Σ T."""
    return sum(T * T for T in lengths) / max(sum(lengths), 1)


def _first(trained: Trained, L: int) -> int:
    """The first block that something trains in; 0 where something trains outside of blocks."""
    names = [*trained.adapters, *trained.saved]
    numbers = [next((int(p) for p in name.split(".") if p.isdecimal()), 0) for name in names]
    return min(numbers, default=L)


def worker_count(workers: int | str, sequences: int) -> int:
    """How many threads the planned pass has."""
    from ..fast.llama.threads import worker_count as counted

    return counted(workers, sequences)


def product_seconds(shapes: set[Shape], rows: int, workers: int) -> dict[Shape, float]:
    """Seconds a row of x Wᵀ for W of each shape, with so many at work at once; timed for a third of a second.

    Of a W with more than 4096 rows so many are timed.
    """
    from ..fast.llama.threads import in_threads

    multiply, each = engine().multiply, BUDGET / max(len(shapes), 1)

    def times(_: int, given: list[Shape]) -> list[float]:
        found = []
        for n, k in given:
            some = min(n, MOST)
            x, W, out = (np.ones(shape, "float32") for shape in ((rows, k), (some, k), (rows, some)))
            best, began = float("inf"), time.perf_counter()
            while best == float("inf") or time.perf_counter() - began < each:
                start = time.perf_counter()
                multiply(x, W.T, out, 1.0, 0.0)
                best = min(best, time.perf_counter() - start)
            found.append(best / rows * n / some)
        return found

    order = sorted(shapes)
    timed = in_threads(times, [order] * workers)
    return {shape: sum(found[i] for found in timed) / workers**2 for i, shape in enumerate(order)}


# ---- what would change it ----------------------------------------------------------------------------------


def decide(work: Work) -> bool:
    """Have blocks computed again in the backward where the estimate is past 60 % of the free memory.

    And where the base is in few bits, which is chosen to save memory. Only where grad_checkpoint is auto.
    Returns whether it was decided so.
    """
    if work.passes.config.grad_checkpoint != "auto" or work.passes.checkpoint:
        return False
    free, coded = available(), hasattr(work.passes.model.weights, "codes")
    if not coded and (not free or sum(memory_of(work).values()) <= SHARE * free):
        return False
    work.passes.recompute()
    return True


def alternatives(work: Work) -> list[tuple[str, int]]:
    """What else there is, and the bytes that it would take."""
    now = sum(memory_of(work).values())
    found = []
    if not work.passes.checkpoint:
        found.append(("--grad-checkpoint on", sum(memory_of(work, checkpoint=True).values())))
    if work.batch > 1:
        found.append(("--batch-size 1", sum(memory_of(work._replace(batch=1.0)).values())))
    if not getattr(work.model.weights, "codes", {}):
        for way, bits in BITS.items():
            found.append((f"--quantize {way}", now - _base(work) + _base(work, bits)))
    return found
