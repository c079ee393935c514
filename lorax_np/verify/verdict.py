"""verify: a subject, a profile, and the report on it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .batteries import suited
from .batteries.tensors import chosen, spec_of
from .cases import PROFILES
from .report import Report
from .subjects import Spec, load

LEVELS = ("quick", "full")
ISOLATION = ("process", "none")
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
    isolation: Literal["process", "none"] = "process",
    title: str = "",
    progress: Progress | None = None,
) -> Report:
    """Judge an implementation of a LoRA linear layer, and return the report.

    subject : any object with forward(case) and backward(case, gy), or run(case, gy); or a name: reference,
              fast, peft, module:attribute.  specs/verify.md says what it is given and what it returns
    profile : fp64, fp32, tf32, bf16, fp16, ...: what the subject computes in, by its name in PRECISIONS
    level : full, or quick for a third of the layers
    conventions : a Spec that stands in for the subject's own
    weights : a safetensors file, or FILE:TENSOR, whose linear weights stand in for drawn ones
    seed : of every draw;  case : only the checks whose id begins with these path segments
    isolation : "process" judges a subject named as module:attribute in a process of its own, so that a crash is
                a verdict; objects are judged where they are, and with "none" all are
    title : what the report calls the subject; its own name unless given

    A tensor passes where its error is within the bound that its own roundings explain, entry by entry
    (specs/verify.md); nothing is tuned. What a subject lacks is reported as not run, never as passed.
    Raises ValueError for an unknown profile or level, LookupError for an unknown subject, FormatError for a
    file that is damaged or holds no such tensor, ConfigError for a subject whose spec is no Spec.
    """
    choices = (
        ("profile", profile, tuple(PROFILES)),
        ("level", level, LEVELS),
        ("isolation", isolation, ISOLATION),
    )
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    start = time.perf_counter()
    title = title or (subject if isinstance(subject, str) else type(subject).__name__)
    with opened(subject, isolation) as found:
        if conventions is not None:
            found = _Declared(found, conventions)
        report = Report(title, profile, seed, _conventions(spec_of(found)))
        _judge(found, report, level, weights, case, progress)
        if weights is None and report.count("fail") + report.count("crash"):
            from .diagnosis.diagnose import diagnose

            report.cause = diagnose(found, report.checks, profile, name=title, seed=seed)
    report.seconds = time.perf_counter() - start
    return report


@contextmanager
def opened(subject: Any, isolation: str = "process", xp: Any = None) -> Iterator[Any]:
    """The subject as it is judged: found by its name, and in a process of its own where that is asked for."""
    named = isinstance(subject, str)
    apart = isolation == "process" and (":" in subject if named else getattr(subject, "native", False))
    if not apart:
        yield load(subject, xp) if named else subject
        return
    from .isolate import isolated

    found = isolated(subject)
    try:
        yield found.ready()
    finally:
        found.close()


def _judge(
    subject: Any, report: Report, level: str, weights: str | Path | None, case: str, progress: Progress | None
) -> None:
    """Fill a report with the checks of every battery that suits its profile."""
    profile, seed = report.profile, report.seed
    batteries = suited(profile, case.partition("/")[0])
    if weights is not None:
        from .batteries.weights import battery_weights

        batteries = {"weights": battery_weights(weights, report)}
    with np.errstate(all="ignore"):  # what is not finite is judged, not warned of
        for name, battery in batteries.items():
            for checks in battery(subject, profile, seed, level, case):
                report.checks.extend(check for check in checks if chosen(check.id, case))
                if progress is not None:
                    progress(name, len(report.checks), report.count("fail") + report.count("crash"))


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
