"""Seconds of a run's step: products of its shapes, timed on this machine.  (training.11)  specs/training.md."""

import statistics
import time
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ..fast.gemm import engine
from ..models.records import Model, Trained
from .step import parameters
from .work import RUN, Shape, Work, linears, shapes_of, sizes

MOST = 4096  # rows of a matrix that are timed
BUDGET = 0.3  # seconds that products are timed
GENERAL = 2.0  # times as long as the planned pass the general one is over arrays
TABLES = "embed", ".wte.", ".wpe.", "shared."  # parts of the names of what stands below the first block


def seconds_of(work: Work, tokens: float, labels: float) -> float:
    """Seconds of one step: products at the rates of this machine now, passes over arrays.  (training.11)"""
    model, s, workers = work.model, sizes(work.model), work.workers
    each = max(8.0, work.mean * work.batch / workers)  # rows of a worker, which the planned pass takes in runs
    shapes, words = products(model), (s["V"], s["d"])
    times = product_seconds({*shapes, *([words] if work.words else [])}, round(min(RUN, each)), workers)
    below = _first(work.trained, s["L"]) / max(s["L"], 1)
    forward, gx = forwards(below, again=work.passes.checkpoint), 1 - below
    blocks = sum(times[shape] for shape in shapes)
    head = 2 * times[words] * labels if work.words else 0.0
    rate = sum(2 * prod(shape) for shape in shapes) / max(blocks, 1e-12)  # operations a second, of all workers
    share = (2 * forward + 5 * gx) / 7  # of attention's products
    attention = 7 * 2 * s["d"] * 0.6 * _mean_keys(work.lengths) * s["L"] * tokens * share / (0.5 * rate)
    P = sum(prod(value.shape) for value in parameters(work.trained).values())
    dropped = sum(a.A.shape[1] for a in work.trained.adapters.values() if a.A is not None and _dropped(work))
    lora = 6 * P * tokens / (0.4 * rate) + 4e-9 * dropped * tokens / workers
    ups = 2 if model.family in ("llama", "moe") or model.config.get("is_gated_act") else 1
    passes = (13 * s["d"] + 8 * ups * s["ff"] + 5 * s["H"] * work.mean / 2) * (forward + 2 * gx) / 3
    elements = 1e-9 * passes * s["L"] * tokens * (1 if work.passes.planned else GENERAL) / workers
    at_once = min(RUN, each) if work.passes.planned else each
    sweeps = (forward + gx) * tokens / at_once / workers  # of each worker, for its rows at a time
    return (
        blocks * tokens * (forward + gx)
        + head
        + attention
        + lora
        + elements
        + 25e-9 * P
        + sweeps * decode_seconds(model)
    )


def forwards(below: float, *, again: bool) -> float:
    """How often the blocks go forward: once, and again those that have a backward, where they are recomputed.

    below : the share of the blocks below all that trains

    >>> forwards(0.75, again=False), forwards(0.75, again=True), forwards(0.0, again=True)
    (1.0, 1.25, 2.0)
    """
    return 1 + (1 - below) * again


def products(model: Model) -> list[Shape]:
    """The matrices of the blocks that a token is multiplied with: of experts as many as it is sent to."""
    experts = [shape[1:] for name, shape in shapes_of(model).items() if len(shape) == 3 and ".experts." in name]
    return [*linears(model).values(), *experts * int(model.config.get("num_experts_per_tok") or 0)]


def decode_seconds(model: Model) -> float:
    """Seconds in which a base in few bits is written out once: the largest matrix is, and timed; else 0."""
    codes = getattr(model.weights, "codes", {})
    if not codes:
        return 0.0
    weights: Any = model.weights
    size = {name: prod(weights.shape(name)) for name in codes}
    name = max(size, key=lambda each: size[each])
    out, times = np.empty(weights.shape(name), "float32"), []
    for _ in range(3):
        start = time.perf_counter()
        weights.into(name, out)
        times.append(time.perf_counter() - start)
    return float(statistics.median(times) * sum(size.values()) / size[name])


def _dropped(work: Work) -> bool:
    return any(site.p for site in work.passes.sites.values())


def _mean_keys(lengths: Sequence[int]) -> float:
    """Keys that a token's query is multiplied with, before causality halves them: Σ T²/Σ T."""
    return sum(T * T for T in lengths) / max(sum(lengths), 1)


def _first(trained: Trained, L: int) -> int:
    """The first block that something trains in: 0 where tables do, L where heads and last norms alone do."""
    names = [*trained.adapters, *trained.saved]
    outside = [0 if any(table in name for table in TABLES) else L for name in names]
    numbers = [
        next((int(part) for part in name.split(".") if part.isdecimal()), else_)
        for name, else_ in zip(names, outside, strict=True)
    ]
    return min(numbers, default=L)


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
            took, began = list[float](), time.perf_counter()
            while not took or time.perf_counter() - began < each:
                start = time.perf_counter()
                multiply(x, W.T, out, 1.0, 0.0)
                took.append(time.perf_counter() - start)
            found.append(statistics.median(took) / rows * n / some)
        return found

    order = sorted(shapes)
    timed = in_threads(times, [order] * workers)
    return {shape: sum(found[i] for found in timed) / workers**2 for i, shape in enumerate(order)}
