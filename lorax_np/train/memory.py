"""Bytes at the height of a run's step, counted before it is begun.  (training.10)  specs/training.md."""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

from ..backend import free_bytes
from ..errors import ConfigError
from ..fast.cpu_dora import FEATURES
from ..fast.llama.head import CHUNK as HEAD
from ..models.records import Dropout, Model, Trained
from ..models.tasks import kept_numbers
from .step import parameters
from .work import RUN, Work, is_table, linears, shapes_of, sizes

FLOAT = 4  # bytes
PROGRAMS = 85_000_000  # bytes of Python, NumPy, the tokenizer and the rows


def memory_of(work: Work, *, checkpoint: bool | None = None) -> dict[str, int]:
    """Bytes at the height of a step, by what they are for.  (training.10)"""
    model, config = work.model, work.passes.config
    P = sum(prod(value.shape) for value in parameters(work.trained).values())
    again = work.passes.checkpoint if checkpoint is None else checkpoint
    rows = max(work.mean * work.batch, max(work.lengths))
    found = {"base": base_bytes(work)}
    if not work.passes.on_device:
        found = {"programs": PROGRAMS, **found}
    workers = work.workers
    if work.passes.planned:
        there = work.passes.on_device
        each = rows if there else min(max(RUN, max(work.lengths)), rows / workers)
        found["activations"] = round(workers * each * _planned_row(model, work.trained, again or there, again))
        found["logits"] = workers * min(HEAD, round(each)) * sizes(model)["V"] * FLOAT
        sums = 0 if there else workers
    else:
        found["activations"] = round(_general(work, round(rows), again))
        if work.words:
            found["logits"] = 2 * workers * min(HEAD, round(rows / workers)) * sizes(model)["V"] * FLOAT
        sums = workers if workers > 1 else 0
    found["adapters"] = P * FLOAT  # as they were given
    found["gradients"] = (sums + 2 + (work.turns > 1)) * P * FLOAT  # by name, and flat; those so far
    found["optimiser"] = (3 if config.optimizer == "adamw" else 6) * P * FLOAT
    if config.optimizer == "sgd":
        found["optimiser"] = (4 if config.momentum else 2) * P * FLOAT
    return found


def base_bytes(work: Work, bits: float | None = None) -> int:
    """Bytes of the base in use: every tensor once, though it have two names; of a plan, A and B beside them.

    bits : of a number of the blocks' matrices, were they held in few bits; None as they are
    """
    shapes, weights = shapes_of(work.model), work.model.weights
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
    if work.passes.copied:
        parts = [part for a in work.trained.adapters.values() for part in (a.A, a.B)]
        found += FLOAT * sum(prod(part.shape) for part in parts if part is not None)
    return found


def _planned_row(model: Model, trained: Trained, remade: bool, again: bool) -> float:
    """Bytes that the planned pass of a Llama has for one row: kept by each layer, and used by each in turn.

    remade, again : whether masks are made again in the backward, and whether whole layers are computed again
    """
    config, s = model.config, sizes(model)
    D = int(config["head_dim"])
    dq, dk = s["H"] * D, int(config["num_key_value_heads"]) * D
    ranks = sum(0 if a.A is None else a.A.shape[0] for a in trained.adapters.values()) / s["L"]
    kept = s["d"] + 2 * dq + s["H"] + 2 * dk + 2 * s["ff"] + 2 + ranks  # but the input
    used = 2 * s["d"] + 5 * s["ff"] + 2 * (s["d"] + dq) + 2 * ranks
    masks = sum(0 if a.A is None else a.A.shape[1] for a in trained.adapters.values()) / 8
    layers = kept + s["L"] * s["d"] if again else s["L"] * (kept + s["d"])
    return float(FLOAT * (layers + used) + (0 if remade else masks))


def _general(work: Work, rows: int, again: bool) -> float:
    config, s = work.passes.config, sizes(work.model)
    args = work.model, work.passes.sites, work.trained, rows
    try:
        found = kept_numbers(*args, dropout=Dropout(0, 0), engine=config.engine, checkpoint=again)
    except ConfigError:  # a family that nobody has counted: about as many as a block of its sizes keeps
        found = rows * s["L"] * (s["d"] if again else 12 * s["d"] + 3 * s["ff"])
    used = 10 * s["d"] + 8 * s["ff"]  # of a row, and what threads keep for reuse; as measured
    return float(FLOAT * (found + rows * used + _dora(work, rows, again)))


def _dora(work: Work, rows: int, again: bool) -> float:
    """Numbers that DoRA has besides in lx.fast: WAᵀ of each norm, and where gy∘k goes back through W."""
    sites = [
        (a.A.shape, a.B.shape[0])
        for name, a in work.trained.adapters.items()
        if a.m is not None and a.A is not None and a.B is not None and not is_table(name)
    ]
    if not sites or work.passes.config.engine != "fast":
        return 0.0
    norms = sum(r * d_out for (r, _), d_out in sites) / (sizes(work.model)["L"] if again else 1)
    pieces = [d_in + (d_out if d_out <= 2 * FEATURES else FEATURES) for (_, d_in), d_out in sites]
    return work.workers * norms + rows * max(pieces)


def available(trained: Trained) -> int:
    """Bytes that a process may still have where it trains; 0 where the system does not tell."""
    for value in parameters(trained).values():
        if (there := free_bytes(value)) is not None:
            return there
    about = Path("/proc/meminfo")
    if about.is_file():
        lines = dict(line.split(":", 1) for line in about.read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    return prod(os.sysconf(name) for name in names) if all(n in os.sysconf_names for n in names) else 0
