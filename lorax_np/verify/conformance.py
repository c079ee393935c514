"""Conformance as an assertion: one line in anybody's test suite."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from .batteries.tensors import GRADIENTS, by_name, judge, with_truth
from .bounds.worst import bounds
from .cases import UNIT, Case
from .conventions import Spec
from .report import Check, Report, describe
from .truths import exact, truth
from .verdict import verify

SMALL = 80  # numbers in a layer, up to which 640-bit arithmetic takes a tenth of a second or less


def assert_conforms(
    subject: Any,
    profile: str = "fp32",
    level: str = "full",
    conventions: Spec | None = None,
    weights: str | Path | None = None,
    *,
    seed: int = 0,
    case: str = "",
    isolation: Literal["process", "none"] = "process",
) -> Report:
    """Judge a subject as verify does, and raise AssertionError with the report where it did not pass.

    The arguments are verify's own, with its defaults. Nothing judged is no pass: a subject that covers no case
    is refused too. Returns the report otherwise; raises what verify raises.
    """
    __tracebackhide__ = True
    report = verify(subject, profile, level, conventions, weights, seed=seed, case=case, isolation=isolation)
    if not report.passed:
        raise AssertionError(f"the subject does not conform\n{report}")
    return report


def assert_case(case: Case, y: Any, gradients: dict[str, Any]) -> list[Check]:
    """Judge one answer to one case, and raise AssertionError naming each tensor that is wrong.

    case : from the fixture lorax_np_case or from strategies.lora_cases
    y, gradients : as a subject gives them, in any library's arrays; gradients by name, as case.wanted has them

    A gradient that case.wanted names and gradients lacks is wrong here. Layers of a few dozen numbers are held
    against 640-bit arithmetic, larger ones against the definition and the equations in float64. Returns the
    checks otherwise, the vacuous ones among them.
    """
    __tracebackhide__ = True
    got = by_name("y", {"y": y}, ("y",)) | by_name("gradients", gradients, GRADIENTS)
    dtype = case.x.dtype.name
    u = UNIT[dtype]
    if sum(value.size for value in case.arrays().values()) <= SMALL:
        want, bound = exact.truth(case), bounds(case, u)
    else:
        want, bound = truth.derived(case), with_truth(case, u)
    checks = [
        judge(case.id, "case", case.kind, name, got.get(name), np.asarray(want[name]), bound[name], dtype)
        for name in want
        if name in ("y", *case.wanted) or name in got
    ]
    wrong = [check for check in checks if check.verdict in ("fail", "not run")]
    if wrong:
        raise AssertionError("\n".join(f"FAIL  {describe(check)}" for check in wrong))
    return checks
