"""Changed steps that are no faults: the same function evaluated otherwise, which no check may refuse.

That they are the same is shown on exact data, where every order of evaluation gives the same bits.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..batteries.lattice import lattice_cases
from ..cases import Case, HostArray
from ..layers import plain
from .fault import Fault

EQUIVALENT: dict[str, Fault] = {
    fault.id: fault
    for fault in (
        Fault(
            "E1",
            "gA and gB from the gradient of the dense update",
            "gradient",
            (),
            "lora.15",
            {
                "gA": lambda t: t.s * (t.B.T @ (t.Gk.T @ t.xd)),
                "gB": lambda t: t.s * ((t.Gk.T @ t.xd) @ t.A.T),
            },
        ),
        Fault(
            "E2",
            "the update as x times the dense s·BA",
            "forward",
            (),
            "lora.11",
            {"u": lambda t: t.xd @ (t.B @ t.A).T, "P": lambda t: (t.W @ t.xd.T).T},
        ),
        Fault(
            "E3",
            "s multiplied into B, once for forward and backward",
            "forward",
            (),
            "lora.4",
            {
                "u": lambda t: t.z @ (t.s * t.B).T,
                "Q": lambda t: t.u + (0 if t.bB is None else t.s * t.bB),
                "gu": lambda t: t.Gk,
                "gz": lambda t: t.gu @ (t.s * t.B),
                "gB": lambda t: t.s * (t.gu.T @ t.z),
                "gbB": lambda t: t.s * t.gu.sum(axis=0),
            },
        ),
        Fault(
            "E4",
            "the base product under k, as k∘(P + Q) less P",
            "dora",
            (),
            "dora.7",
            {"y": lambda t: t.y0 + t.bias + (t.Q if t.m is None else t.k * (t.P + t.Q) - t.P)},
        ),
        Fault(
            "E5",
            "both masked terms of gx added before the mask is applied",
            "dropout",
            (),
            "dora.14",
            {
                "gx_lora": lambda t: _unmasked(t) * t.back,
                "gx_dora": lambda t: 0,
            },
        ),
        Fault(
            "E6",
            "tokens summed from the last to the first",
            "gradient",
            (),
            "lora.8",
            {"gA": lambda t: t.gz[::-1].T @ t.xd[::-1], "gB": lambda t: t.gu[::-1].T @ t.z[::-1]},
        ),
    )
}


def _unmasked(t: Any) -> HostArray:
    return np.asarray(t.gz @ t.A + (0 if t.m is None else (t.G * (t.k - 1)) @ t.W))


def exact_cases(count: int) -> Iterator[Case]:
    """That many layers in float64 on which every order of evaluation is exact, of every kind in turn."""
    seed = given = 0
    while given < count:
        for case in lattice_cases(seed)[: count - given]:
            wide: Any = {name: value.astype(np.float64) for name, value in case.arrays().items()}
            yield replace(case, **wide)
            given += 1
        seed += 1


def first_differences(faults: Collection[Fault], count: int = 1000) -> dict[str, str | None]:
    """For each fault where its steps give other bits than the right ones, None where on no exact layer."""
    found: dict[str, str | None] = {fault.id: None for fault in faults}
    for case in exact_cases(count):
        want = _answer(case, None)
        for fault in faults:
            if found[fault.id] is None:
                got = _answer(case, fault)
                wrong = (name for name in want if not np.array_equal(got[name], want[name]))
                found[fault.id] = next((f"{case.id}/{name}" for name in wrong), None)
    return found


def _answer(case: Case, fault: Fault | None) -> dict[str, HostArray]:
    y, g = plain.run(case, case.gy, None if fault is None else fault.steps)
    return {"y": y, **g}
