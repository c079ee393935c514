"""What a 16-bit layer rounds on the way to y: told from bits that no order of evaluation changes.

y0 = xWᵀ has 8 bits at most, so that rounding it costs nothing. z and the update have more, and float32 sums are
exact. What is left are the roundings to 16 bits, of z or not, of the update or not: each choice gives bits
of its own.  Derivation: specs/conventions.md.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ... import LoraConfig
from ..cases import Case, HostArray
from ..conventions import SCHEDULES, spec_of
from ..precision import PRECISIONS
from ..report import Check
from ..subjects.declared import declared
from .lattice import cast
from .tensors import Absent, Crash, Unlike, answer, chosen, refusal

LAW = "y is rounded as declared"


def schedule_case(dtype: str, seed: int = 0) -> tuple[Case, dict[str, HostArray]]:
    """A layer in a 16-bit dtype, and y under each schedule of SCHEDULES, which all differ."""
    rng = np.random.default_rng((seed, 61))

    def whole(most: int, *size: int) -> HostArray:
        return np.asarray(rng.integers(1, most + 1, size) * rng.choice((-1.0, 1.0), size))

    x, A, B = whole(127, 24, 11), whole(15, 4, 11), whole(7, 9, 4)
    W = np.zeros((9, 11))
    W[np.arange(9), np.arange(9)] = rng.choice((-1.0, 1.0), 9)  # y0 is x again, of 7 bits
    config = LoraConfig(r=4, lora_alpha=8.0)  # s = 2 costs no bit, wherever it is applied
    case = cast(Case("schedule/lora/0", "lora", config, x / 64, W, A, B, np.ones((24, 9))), dtype)
    wide = cast(case, "float64")

    def narrow(value: HostArray) -> HostArray:
        return value.astype(np.float32).astype(case.x.dtype).astype(np.float64)

    z, y0, found = wide.x @ wide.A.T, wide.x @ wide.W.T, {}
    for name in SCHEDULES:
        kept = narrow(z) if "z" in name else z  # (conventions.8)
        update = 2 * kept @ wide.B.T
        found[name] = narrow(y0 + (narrow(update) if name.startswith("round") else update))  # (conventions.9)
    return case, found


def infer_schedule(subject: Any, profile: str, seed: int = 0) -> str:
    """The schedule whose bits a subject's y has, or "none that has a name".

    Raises Crash and Absent as the subject does.
    """
    case, known = schedule_case(PRECISIONS[profile].dtype, seed)
    y = answer(declared(subject), case).get("y")
    if y is None or y.shape != case.gy.shape or y.dtype != case.gy.dtype:
        raise Unlike(f"y: expected {case.gy.dtype} {case.gy.shape}, got {None if y is None else y.dtype}")
    got = y.astype(np.float64)
    return next((name for name, want in known.items() if np.array_equal(got, want)), "none that has a name")


def battery_schedule(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """The schedule that a subject declares against the one that it has."""
    spec, id = spec_of(subject), "schedule/lora/0"
    if PRECISIONS[profile].dtype not in ("float16", "bfloat16") or not spec.schedule or not chosen(id, only):
        return
    try:
        found = infer_schedule(subject, profile, seed)
    except (Absent, Crash) as error:
        yield [Check(id, "schedule", "lora", LAW, refusal(error), note=str(error))]
        return
    wrong = "" if found == spec.schedule else f"declared {spec.schedule}, found {found}"
    yield [Check(id, "schedule", "lora", LAW, "fail" if wrong else "pass", note=wrong)]
