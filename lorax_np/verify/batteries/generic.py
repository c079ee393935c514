"""The battery at generic points: every entry within eight deviations of its own roundings, and no drift.

The truth is the equations of layers/plain.py in float64, which the batteries `exact` and `complex` prove; y
comes from the dense definition. What an error common to all entries of a tensor amounts to is measured below
the noise of each.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..bounds.sigma import THRESHOLD, tolerance
from ..bounds.slope import counted, redrawn, slopes
from ..cases import MIDDLE, Case, HostArray, grid
from ..conventions import spec_of
from ..precision import PRECISIONS
from ..report import Check
from ..truths import truth
from .tensors import Absent, Crash, answer, chosen, judge_answer

SHAPES = (*MIDDLE, (65, 63, 8, (31,)))  # the last wide enough for a common error of a thousandth in 16 bits


def battery_generic(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Layers of every kind: each entry by its own deviation, each tensor by what its entries share."""
    precision = PRECISIONS[profile]
    for case in grid("generic", SHAPES, profile, spec_of(subject), seed + 7, level):
        if chosen(case.id, only):
            want = truth.derived(case)
            got, checks = judge_answer(subject, "generic", case, want, tolerance(case, precision))
            yield [*checks, *_shared(subject, case, profile, got, want, checks)]


def _shared(
    subject: Any,
    case: Case,
    profile: str,
    got: dict[str, HostArray],
    want: dict[str, HostArray],
    checks: list[Check],
) -> Iterator[Check]:
    """A check more for each tensor that passed entry by entry: a relative error that all its entries share.

    One that is past the threshold counts where it is found again, on the same layer at other numbers.
    """
    fine = {check.tensor for check in checks if check.verdict == "pass"}
    wide = {name: got[name].astype(np.float64) for name in got if name in fine}
    for name, (found, z) in slopes(case, PRECISIONS[profile], wide, want).items():
        far = abs(z) if abs(z) <= THRESHOLD else counted(z, _again(subject, case, profile, name, z))
        share = far / THRESHOLD
        note = f"all entries share a relative error of {found:.2g}" if share > 1 else ""
        verdict: Any = "fail" if share > 1 else "pass"
        yield Check(f"{case.id}/{name}-slope", "slope", case.kind, name, verdict, ratio=share, note=note)


def _again(subject: Any, case: Case, profile: str, name: str, z: float) -> float:
    """The z of a tensor's slope on the same layer at other numbers; z itself where there is no answer."""
    other = redrawn(case)
    try:
        value = answer(subject, other)[name].astype(np.float64)
    except (Absent, Crash, KeyError):
        return z
    return slopes(other, PRECISIONS[profile], {name: value}, truth.derived(other))[name][1]
