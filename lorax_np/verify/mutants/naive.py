"""Two tests that most projects write, as they write them: what they let through is why there is a harness.

Neither is used to judge anything. `close_at_start` compares a layer with a right one where training begins,
B = 0, under the loss Σy, within 1e-3. `differences` compares its gradients with central differences of its own
forward, at the step 1e-6 and within the tolerances that are usual for it in float64.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..batteries.tensors import Absent, Crash, answer
from ..cases import Case, HostArray, draw
from ..layers.plain import Plain

STEP, ABSOLUTE, RELATIVE = 1e-6, 1e-5, 1e-3
KINDS = ("lora, dropout", "dora full norm, dropout")


@lru_cache
def _points() -> dict[str, tuple[Case, ...]]:
    """The layers at the start and at a generic point, in float64."""
    shapes = ((2, 3, 2, (2,)), (3, 2, 3, (2,)))
    generic = tuple(
        draw("", kind, shape, "float64", (i, 71), alpha=5.3, bias="trained")
        for i, (kind, shape) in enumerate(zip(KINDS, shapes, strict=True))
    )
    return {"start": tuple(_at_start(case) for case in generic), "generic": generic}


def _at_start(case: Case) -> Case:
    m = None if case.m is None else np.sqrt(np.sum(case.W * case.W, axis=1))
    return replace(case, B=np.zeros_like(case.B), m=m, gy=np.ones_like(case.gy))


def close_at_start(subject: Any) -> str:
    """K where the test refuses the subject, E where it crashes, else a dot."""
    for case in _points()["start"]:
        want, got = answer(Plain(), case), _answer(subject, case)
        if got is None:
            return "E"
        if not all(np.allclose(got[n], want[n], RELATIVE, RELATIVE) for n in ("y", *case.wanted) if n in got):
            return "K"
    return "."


def differences(subject: Any, point: str) -> str:
    """K where central differences of its own forward refuse the subject, E where it crashes, else a dot."""
    for case in _points()[point]:
        got = _answer(subject, case)
        if got is None:
            return "E"
        for name in case.wanted:
            if name not in got:
                return "K"
            slopes = np.array([_slope(subject, case, name, at) for at in _places(getattr(case, name))])
            if not np.allclose(got[name].ravel(), slopes, RELATIVE, ABSOLUTE):
                return "K"
    return "."


def _answer(subject: Any, case: Case) -> dict[str, HostArray] | None:
    try:
        return answer(subject, case)
    except (Absent, Crash):
        return None


def _places(value: HostArray) -> Iterator[tuple[int, ...]]:
    yield from np.ndindex(value.shape)


def _slope(subject: Any, case: Case, name: str, at: tuple[int, ...]) -> float:
    """The central difference of Σ gy∘y in one entry."""
    ends = []
    for step in (STEP, -STEP):
        value = getattr(case, name).copy()
        value[at] += step
        got = _answer(subject, replace(case, **{name: value}))
        ends.append(np.nan if got is None else float(np.sum(case.gy * got["y"])))
    return (ends[0] - ends[1]) / (2 * STEP)
