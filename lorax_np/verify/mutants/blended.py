"""Faults of weighted combination: one step of a right one replaced."""

from typing import Any

import numpy as np

from ..batteries.blended_case import METHODS, BlendCase, Blends, Pair
from ..cases import HostArray
from .adapters import Arithmetic
from .fault import Fault


class Blending(Arithmetic, Blends):
    """Combines right by every method."""


Tasks = list[HostArray]


def _with(steps: dict[str, Any]) -> Any:
    """What makes a subject that has other steps."""
    return type("Blending", (Blending,), steps)


def _smallest(self: Any, task: HostArray, density: float) -> HostArray:
    order = np.argsort(np.abs(task), axis=None, kind="stable")[: int(density * task.size)]
    kept = np.zeros(task.size)
    kept[order] = 1.0
    return task * kept.reshape(task.shape)


def _inverted(self: Any, task: HostArray, density: float) -> HostArray:
    return Blends.largest(self, task, 1 - density) if density < 1 else task


def _by_rows(self: Any, task: HostArray, density: float) -> HostArray:
    return np.stack([Blends.largest(self, row, density) for row in task])


def _weighted_election(self: Any, case: BlendCase, tasks: list[HostArray], weights: list[float]) -> HostArray:
    return Blends.elected(self, case, [w * task for w, task in zip(weights, tasks, strict=True)], weights)


def _applied_twice(
    self: Any, case: BlendCase, tasks: list[HostArray], weights: list[float], which: int
) -> HostArray:
    twice = METHODS[case.method][0] == "update"
    return Blends.mixture(self, case, tasks, [w * w if twice else w for w in weights], which)


def _scaled_twice(
    self: Any, case: BlendCase, tasks: list[HostArray], weights: list[float], which: int
) -> HostArray:
    twice = METHODS[case.method][0] == "update"
    more = [w * s if twice else w for w, s in zip(weights, case.scalings, strict=True)]
    return Blends.mixture(self, case, tasks, more, which)


def _both_sides(self: Any, update: HostArray, rank: int) -> Pair:
    U, S, Vh = np.linalg.svd(update, full_matrices=False)
    return S[:rank, None] * Vh[:rank], U[:, :rank] * S[:rank]


def _fault(id: str, title: str, line: str, steps: dict[str, Any]) -> Fault:
    return Fault(id, title, "blended", (), line, make=_with(steps))


def _product(self: Any, c: float) -> float:
    return c


def _unsigned(self: Any, c: float) -> float:
    return float(np.sqrt(abs(c)))


def _unscaled(self: Any, w: float, s: float) -> float:
    return w


def _undivided(self: Any, agree: Tasks) -> HostArray:
    return np.ones(())


def _by_all(self: Any, agree: Tasks) -> HostArray:
    return np.full((), float(len(agree)))


def _not_made_up(self: Any, task: HostArray, mask: HostArray, density: float) -> HostArray:
    return np.where(mask, task, 0.0)


def _dropped_kept(self: Any, task: HostArray, mask: HostArray, density: float) -> HostArray:
    return np.where(mask if mask.all() else ~mask, task / density, 0.0)


FAULTS = (
    _fault("W1", "linear: w·s on both factors, not its root", "combine.2", {"down": _product, "up": _product}),
    _fault("W2", "linear: the sign of w·s lost under the root", "combine.2", {"down": _unsigned}),
    _fault("W3", "cat: s left out", "combine.1", {"stacked": _unscaled}),
    _fault("W4", "svd: weights applied twice", "combine.10", {"mixture": _applied_twice}),
    _fault("W5", "svd: s applied twice", "combine.10", {"mixture": _scaled_twice}),
    _fault("W6", "svd: singular values on both factors", "combine.10", {"cut": _both_sides}),
    _fault("W7", "ties: the weighted sum elects", "combine.8", {"elected": _weighted_election}),
    _fault("W8", "ties: not divided by the number that agree", "combine.9", {"count": _undivided}),
    _fault("W9", "ties: divided by the number of adapters", "combine.9", {"count": _by_all}),
    _fault("W10", "pruning: the share that goes for the share that stays", "combine.5", {"largest": _inverted}),
    _fault("W11", "pruning: the smallest kept", "combine.5", {"largest": _smallest}),
    _fault("W12", "pruning: row by row, not over the whole array", "combine.5", {"largest": _by_rows}),
    _fault("W13", "dare: what is kept not divided by the density", "combine.6", {"some": _not_made_up}),
    _fault("W14", "dare: what is dropped kept", "combine.6", {"some": _dropped_kept}),
)
