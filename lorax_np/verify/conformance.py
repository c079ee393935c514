"""Conformance as an assertion: one line in anybody's test suite."""

from pathlib import Path
from typing import Any

import numpy as np

from .batteries.tensors import GRADIENTS, by_name, judge, with_truth
from .bounds.worst import bounds
from .cases import UNIT, Case
from .conventions import Spec
from .report import Check, Report
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
) -> Report:
    """Judge a subject as verify does, and raise AssertionError with the report where it did not pass.

    Nothing judged is no pass: a subject that covers no case is refused too. Returns the report otherwise.
    """
    __tracebackhide__ = True
    report = verify(subject, profile, level, conventions, weights, seed=seed, case=case)
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


def describe(check: Check) -> str:
    """One check in one line: its id, where it is worst, what came there, what was wanted."""
    at = f" at {list(check.at)}" if check.at is not None else ""
    values = "" if check.got is None else f": got {check.got:.9g}, want {check.want:.9g}"
    times = "" if check.ratio is None else f", {check.ratio:.2g} × the bound"
    note = f"  {check.note}" if check.note else ""
    law = f"  {check.tensor}" if " " in check.tensor else ""
    return f"{check.id}{law}{at}{values}{times}{note}"
