"""Seconds of a run's step: products of its shapes, timed on this machine.  (training.11)  specs/training.md."""

import statistics
import time
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from ..fast.gemm import gemm
from ..models.records import Model
from .step import parameters
from .work import RUN, Shape, Stack, Work, fed_by, linears, queries, shapes_of, sizes, stack_of, stacks_of

MOST = 4096  # rows of a matrix that are timed
BUDGET = 0.3  # seconds that products are timed
GENERAL = 2.0  # times as long as the planned pass the general one is over arrays


def seconds_of(work: Work, tokens: float, labels: float) -> float:
    """Seconds of one step: products at the rates of this machine now, passes over arrays.  (training.11)

    tokens : of the step, the decoder's too
    """
    s, workers, stacks = sizes(work.model), work.workers, stacks_of(work, tokens)
    each = max(8.0, work.mean * work.batch / workers)  # rows of a worker, which the planned pass takes in runs
    shapes, words = products(work.model), (s["V"], s["d"])
    wanted = {shape for _, shape in shapes} | ({words} if work.words else set())
    times = product_seconds(wanted, round(min(RUN, each)), workers)
    given = [(shape, stacks[fed_by(name)].tokens, stacks[stack_of(name)]) for name, shape in shapes]
    blocks = sum(times[shape] * rows * (at.forward + at.gx) for shape, rows, at in given)
    head = 2 * times[words] * labels if work.words else 0.0
    once = max(sum(times[shape] * rows for shape, rows, _ in given), 1e-12)
    rate = sum(2 * prod(shape) * rows for shape, rows, _ in given) / once  # operations a second, of all workers
    all_heads = queries(work.model)
    attention = sum(2 * all_heads * at.attended / (0.5 * rate) for at in stacks.values())
    P = sum(prod(value.shape) for value in parameters(work.trained).values())
    at_once = min(RUN, each) if work.passes.planned else each
    rows = tokens * work.mean / work.all
    sweeps = max(at.forward + at.gx for at in stacks.values()) * rows / at_once / workers  # of each worker
    updates = _low_rank(work, stacks, rate) + 25e-9 * P
    return blocks + head + attention + _elements(work, stacks) + updates + sweeps * decode_seconds(work.model)


def _elements(work: Work, stacks: Mapping[str, Stack]) -> float:
    """Seconds of passes over arrays in blocks, a third of them forward."""
    model, s = work.model, sizes(work.model)
    ups = 2 if model.family in ("llama", "moe") or model.config.get("is_gated_act") else 1
    found = 0.0
    for at in stacks.values():
        passes = 6.5 * at.halves * s["d"] + 8 * ups * s["ff"] + 5 * s["H"] * at.keys
        found += passes * (at.forward + 2 * at.gx) / 3 * at.L * at.tokens
    return 1e-9 * found * (1 if work.passes.planned else GENERAL) / work.workers


def _low_rank(work: Work, stacks: Mapping[str, Stack], rate: float) -> float:
    """Seconds of what trains, multiplied with the tokens that it is given, and of inputs dropped."""
    found, drops = 0.0, any(site.p for site in work.passes.sites.values())
    *_, last = stacks.values()  # which heads stand above
    for name, value in parameters(work.trained).items():
        rows = stacks.get(fed_by(name), last).tokens
        found += 6 * prod(value.shape) * rows / (0.4 * rate)
        if drops and name.startswith("adapters.") and name.endswith(".A"):
            found += 4e-9 * value.shape[1] * rows / work.workers
    return found


def products(model: Model) -> list[tuple[str, Shape]]:
    """The matrices of the blocks that a token is multiplied with: of experts as many as it is sent to."""
    experts = [
        (name, shape[1:]) for name, shape in shapes_of(model).items() if len(shape) == 3 and ".experts." in name
    ]
    return [*linears(model).items(), *experts * int(model.config.get("num_experts_per_tok") or 0)]


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


def product_seconds(shapes: set[Shape], rows: int, workers: int) -> dict[Shape, float]:
    """Seconds a row of x Wᵀ for W of each shape, with so many at work at once; timed for a third of a second.

    Of a W with more than 4096 rows so many are timed.
    """
    from ..fast.llama.threads import in_threads

    each = BUDGET / max(len(shapes), 1)

    def times(_: int, given: list[Shape]) -> list[float]:
        found = []
        for n, k in given:
            some = min(n, MOST)
            x, W, out = (np.ones(shape, "float32") for shape in ((rows, k), (some, k), (rows, some)))
            took, began = list[float](), time.perf_counter()
            while not took or time.perf_counter() - began < each:
                start = time.perf_counter()
                gemm(x, W.T, out)
                took.append(time.perf_counter() - start)
            found.append(statistics.median(took) / rows * n / some)
        return found

    order = sorted(shapes)
    timed = in_threads(times, [order] * workers)
    return {shape: sum(found[i] for found in timed) / workers**2 for i, shape in enumerate(order)}
