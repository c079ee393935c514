"""Faults of the update folded into the weight, and of taking it out again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from .fault import Fault, Faulty, row_norms, to_bits

Linear = dict[str, HostArray]
BF16 = 8  # significant bits


def _v(case: Case) -> HostArray:
    return np.asarray(case.W + case.scaling * case.B @ case.A)


def _scaled(case: Case, V: HostArray, n: HostArray | None = None) -> HostArray:
    """k∘V, or V where there is no magnitude."""
    return V if case.m is None else (case.m / (row_norms(_v(case)) if n is None else n))[:, None] * V


class Merged(Faulty):
    """Merges in a way of its own, unmerges right."""

    def __init__(self, weight: Callable[[Case], HostArray] | None, bias: Callable[[Case], Any] | None = None):
        """weight : W' of a case, or None for the right one;  bias : b', likewise."""
        super().__init__()
        self._weight, self._bias = weight, bias

    def merge(self, case: Case) -> Linear:
        """The merged weight and bias."""
        found = dict(super().merge(case))
        if self._weight is not None:
            found["W"] = self._weight(case)
        if self._bias is not None and "b" in found:
            found["b"] = np.asarray(self._bias(case))
        return {name: np.asarray(value, dtype=case.W.dtype) for name, value in found.items()}


class Unmerged(Faulty):
    """Merges right, unmerges in a way of its own."""

    def __init__(self, weight: Callable[[Case, HostArray | None], HostArray]) -> None:
        """weight : W of a case whose W is merged, and the norms from before the merge."""
        super().__init__()
        self._weight = weight

    def unmerge(self, case: Case, merged: Linear) -> Linear:
        """The base again."""
        n = None if case.m is None else row_norms(_v(case))
        W = self._weight(replace(case, W=merged["W"]), n)
        return super().unmerge(case, merged) | {"W": np.asarray(W, dtype=case.W.dtype)}


def _delta(case: Case) -> HostArray:
    return np.asarray(case.scaling * case.B @ case.A)


def _backed(case: Case, n: HostArray | None) -> HostArray:
    return case.W if case.m is None or n is None else (n / case.m)[:, None] * case.W


def _other_axis(case: Case, n: HostArray | None) -> HostArray:
    if case.m is None or n is None:
        return case.W - _delta(case)
    return case.W * np.resize(n / case.m, case.W.shape[1]) - _delta(case)


def _accumulated(case: Case) -> HostArray:
    """W + s·BA summed rank by rank in bfloat16."""
    V = case.W
    for i in range(case.A.shape[0]):
        V = to_bits(V + case.scaling * np.outer(case.B[:, i], case.A[i]), BF16)
    return _scaled(case, V)


def _merge(
    id: str, title: str, line: str, weight: Any, bias: Any = None, sources: tuple[str, ...] = ()
) -> Fault:
    return Fault(id, title, "merge", sources, line, make=lambda: Merged(weight, bias))


def _unmerge(id: str, title: str, line: str, weight: Any, sources: tuple[str, ...] = ()) -> Fault:
    return Fault(id, title, "merge", sources, line, make=lambda: Unmerged(weight))


FAULTS = (
    _merge(
        "M1",
        "the update merged without s",
        "merge.1",
        lambda c: _scaled(c, c.W + c.B @ c.A, row_norms(c.W + c.B @ c.A)),
        sources=("FastVideo#870",),
    ),
    _merge(
        "M2",
        "the merge accumulated in bfloat16",
        "merge.1",
        _accumulated,
        sources=("peft#1388", "openagents#9456"),
    ),
    _merge("M3", "the magnitude left out of the merge", "merge.2", _v),
    _unmerge("M4", "unmerging adds the update again", "merge.5", lambda c, n: _backed(c, n) + _delta(c)),
    _merge("M5", "the update merged twice", "merge.1", lambda c: _scaled(c, c.W + 2 * _delta(c))),
    _merge(
        "M6",
        "the update merged as (BA)ᵀ, reshaped",
        "merge.1",
        lambda c: _scaled(c, c.W + _delta(c).T.reshape(c.W.shape)),
    ),
    _merge(
        "M7",
        "the update rounded to bfloat16 before it is merged",
        "merge.1",
        lambda c: _scaled(c, c.W + to_bits(_delta(c), BF16)),
        sources=("peft#2502", "torchtune#1101", "unsloth#3091", "Qwen#1168"),
    ),
    _merge(
        "M8",
        "bB merged without s",
        "merge.3",
        None,
        lambda c: (0 if c.b is None else c.b) + (0 if c.bB is None else c.bB),
        ("peft#3741", "peft#3757"),
    ),
    _merge(
        "M9",
        "bB left out of the merge",
        "merge.3",
        None,
        lambda c: np.zeros_like(c.W[:, 0]) if c.b is None else c.b,
    ),
    _unmerge(
        "M10",
        "the magnitude divided out along the wrong axis",
        "merge.4",
        _other_axis,
        ("peft#3531", "peft#3532"),
    ),
    _merge(
        "M11",
        "the update merged into another base: one rounded to bfloat16",
        "merge.1",
        lambda c: _scaled(c, to_bits(c.W, BF16) + _delta(c)),
        sources=("unsloth-zoo#810", "litgpt#513", "mlx#1172"),
    ),
    _merge(
        "M12", "the magnitude over the norms of W alone", "merge.2", lambda c: _scaled(c, _v(c), row_norms(c.W))
    ),
    _unmerge(
        "M13",
        "the magnitude not divided out before the update is taken away",
        "merge.4",
        lambda c, n: c.W - _delta(c),
    ),
    _unmerge("M14", "the update taken away twice", "merge.5", lambda c, n: _backed(c, n) - 2 * _delta(c)),
    _merge(
        "M15",
        "the bias multiplied by the magnitude when merged",
        "merge.3",
        None,
        lambda c: (
            _scaled(c, np.eye(c.W.shape[0], dtype=c.W.dtype)).sum(axis=1) * (0 if c.b is None else c.b)
            + (0 if c.bB is None else c.scaling * c.bB)
        ),
    ),
    _unmerge(
        "M16",
        "the update taken away before the magnitude is",
        "merge.5",
        lambda c, n: c.W - _delta(c) if c.m is None or n is None else (n / c.m)[:, None] * (c.W - _delta(c)),
    ),
)
