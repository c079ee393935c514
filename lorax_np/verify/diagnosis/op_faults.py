"""Which known fault of an op a subject has: the one whose answers are the subject's own, on every case drawn.

Each planted fault of the ops that were refused is asked in float64; its answers may be off from the subject's
by what roundings explain of the right op's, in proportion where they are larger.  (diagnosis.5)
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from ..batteries.op_case import LAYOUTS, Named, OpCase, draw, offered
from ..batteries.ops import both_bounds, op_answer
from ..batteries.tensors import Absent, Crash
from ..cases import PROFILES, HostArray
from ..truths import ops as definitions

ROOM = 4.0  # bounds are of right equations; a fault's are as long, and as its numbers are larger
Seen = tuple[OpCase, Named, Named, Named]  # a case, what came, the truth and its bounds


def op_names(subject: Any, ops: Iterable[str], profile: str) -> list[tuple[str, float]]:
    """Ids of the known faults that answer as the subject does, nearest first, and how near, in bounds."""
    from ..mutants import CATALOGUE  # which imports subjects, as this is imported by what judges them

    found = []
    for op in ops:
        seen = _seen(subject, op, profile)
        for id, fault in CATALOGUE.items() if seen else ():
            if fault.kind == "op" and op in offered(planted := fault.subject()):
                away = max(_away(planted, *one) for one in seen)
                if away <= 1:
                    found.append((id, ROOM * away))
    return sorted(found, key=lambda one: one[1])


def _seen(subject: Any, op: str, profile: str) -> list[Seen]:
    """What a subject answers on a case of each layout that it covers."""
    found = []
    for layout in LAYOUTS[op]:
        case = draw(op, layout, PROFILES[profile], (0, 94))
        try:
            got = op_answer(subject, case)
        except Absent:
            continue
        except Crash:
            return []
        found.append((case, got, definitions.truth(case), both_bounds(case)))
    return found if any(_wrong(*one) for one in found) else []


def _wrong(case: OpCase, got: Named, right: Named, bound: Named) -> bool:
    """Whether some tensor is not right; where all are, what a fault changes was not asked."""
    alike = (
        v.shape == right[n].shape and bool((np.abs(v - right[n]) <= bound[n]).all()) for n, v in got.items()
    )
    return not all(alike)


def _away(planted: Any, case: OpCase, got: Named, right: Named, bound: Named) -> float:
    """How far a fault's answer is from the subject's, in shares of the room; infinite where forms differ."""
    wide = {name: v.astype(np.float64) if v.dtype.kind == "f" else v for name, v in case.at.items()}
    with np.errstate(all="ignore"):
        theirs = op_answer(planted, replace(case, at=wide, gy=case.gy.astype(np.float64)))
        return max((_far(got[n], theirs[n], right[n], bound[n]) for n in got if n in theirs), default=0.0)


def _far(got: HostArray, theirs: HostArray, right: HostArray, bound: HostArray) -> float:
    if got.shape != theirs.shape:
        return float("inf")
    size, usual = (float(np.sqrt(np.mean(v * v))) if v.size else 0.0 for v in (theirs, right))
    grown = max(1.0, size / usual if usual and np.isfinite(size) else 1.0)
    least = 4 * np.finfo(got.dtype).eps * np.max(np.abs(theirs), initial=0)  # of what should be 0 exactly
    room = ROOM * np.full(
        got.shape, max(grown * np.max(bound, initial=0), least if np.isfinite(least) else 0.0)
    )
    error, both = np.abs(got.astype(np.float64) - theirs), ~np.isfinite(got) & ~np.isfinite(theirs)
    share = np.divide(error, room, out=np.where(error > 0, np.inf, 0.0), where=room > 0)
    return float(np.max(np.where(both, 0.0, np.where(np.isnan(share), np.inf, share)), initial=0.0))
