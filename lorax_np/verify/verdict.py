"""verify: a subject, a profile, and the report on it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .batteries import battery_complex, battery_exact, battery_merge, chosen, spec_of
from .cases import PROFILES
from .laws import battery_protocol, battery_start
from .report import Check, Report
from .subjects import Spec, load

LEVELS = ("quick", "full")
Battery = Callable[[Any, str, int, str, str], Iterator[list[Check]]]
BATTERIES: dict[str, Battery] = {
    "exact": battery_exact,
    "complex": battery_complex,
    "merge": battery_merge,
    "protocol": battery_protocol,
    "start": battery_start,
}
Progress = Callable[[str, int, int], None]  # battery, checks so far, failures so far


def verify(
    subject: Any,
    profile: str = "fp32",
    level: str = "full",
    conventions: Spec | None = None,
    weights: str | Path | None = None,
    *,
    seed: int = 0,
    case: str = "",
    progress: Progress | None = None,
) -> Report:
    """Judge an implementation of a LoRA linear layer, and return the report.

    subject : any object with forward(case) and backward(case, gy), or run(case, gy); or a name: reference,
              peft, module:attribute.  specs/verify.md says what it is given and what it returns
    profile : fp32 or fp64, the dtype that the subject computes in
    level : full, or quick for a third of the layers
    conventions : a Spec that stands in for the subject's own
    weights : a safetensors file, or FILE:TENSOR, whose linear weights stand in for drawn ones
    seed : of every draw;  case : only the checks whose id begins with these path segments

    A tensor passes where its error is within the bound that its own roundings explain, entry by entry
    (specs/verify.md); nothing is tuned. What a subject lacks is reported as not run, never as passed.
    Raises ValueError for an unknown profile or level, LookupError for an unknown subject, FormatError for a
    file that is damaged or holds no such tensor, ConfigError for a subject whose spec is no Spec.
    """
    for name, value, known in (("profile", profile, tuple(PROFILES)), ("level", level, LEVELS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    title = subject if isinstance(subject, str) else type(subject).__name__
    if isinstance(subject, str):
        subject = load(subject)
    if conventions is not None:
        subject = _Declared(subject, conventions)
    start = time.perf_counter()
    report = Report(title, profile, seed, _conventions(spec_of(subject)))
    batteries = BATTERIES
    if weights is not None:
        from .weights import battery_weights

        batteries = {"weights": battery_weights(weights, report)}
    with np.errstate(all="ignore"):  # what is not finite is judged, not warned of
        for name, battery in batteries.items():
            for checks in battery(subject, profile, seed, level, case):
                report.checks.extend(check for check in checks if chosen(check.id, case))
                if progress is not None:
                    progress(name, len(report.checks), report.count("fail") + report.count("crash"))
    report.seconds = time.perf_counter() - start
    return report


class _Declared:
    """A subject whose conventions are declared by whoever judges it."""

    def __init__(self, subject: Any, spec: Spec) -> None:
        self._subject, self.spec = subject, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)


def _conventions(spec: Spec) -> str:
    norms = {(False,): "constant", (True,): "differentiated", (False, True): "constant, and differentiated"}
    return (
        "y = xWᵀ + b + s(xd AᵀBᵀ + bB), s = α/r or α/√r, xd = x∘mask of 0 and 1/(1 − p)\n"
        "DoRA: y = xWᵀ + b + (k − 1)∘(xd Wᵀ) + k∘(s·xd AᵀBᵀ), k = m/‖W + sBA‖ by rows,\n"
        f"its norm {norms.get(tuple(sorted(spec.norm_gradient)), 'not judged')} in backward"
    )
