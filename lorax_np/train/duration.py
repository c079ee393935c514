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
from .work import RUN, Shape, Work, linears, sizes, worker_count

MOST = 4096  # rows of a matrix that are timed
BUDGET = 0.3  # seconds that products are timed


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
    sweeps = (1 + (1 - below) * (1 + again)) * tokens / rows / workers  # of each worker, for its rows at a time
    return frozen + head + attention + lora + elements + 25e-9 * P + sweeps * decode_seconds(model)


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
    """The first block that something trains in; 0 where something trains outside of blocks."""
    names = [*trained.adapters, *trained.saved]
    numbers = [next((int(p) for p in name.split(".") if p.isdecimal()), 0) for name in names]
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
