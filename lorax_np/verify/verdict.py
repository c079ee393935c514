"""verify: a subject, a profile, and the report on it."""

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import ConfigError
from .batteries import suited
from .batteries.grades import graded
from .batteries.schedule import infer_schedule
from .batteries.tensors import Absent, Crash, chosen, layered
from .cases import PROFILES
from .conventions import Spec, spec_of, stated
from .report import Check, Report
from .subjects import load
from .subjects.declared import declared

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
    file that is damaged or holds no such tensor, ConfigError for a subject whose spec is no Spec, or for a
    profile of bfloat16 without ml_dtypes.
    """
    choices = (
        ("profile", profile, tuple(PROFILES)),
        ("level", level, LEVELS),
        ("isolation", isolation, ISOLATION),
    )
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    _know(profile)
    start = time.perf_counter()
    title = title or (subject if isinstance(subject, str) else type(subject).__name__)
    with opened(subject, isolation) as found:
        judged = declared(found, conventions)
        spec = spec_of(judged)
        report = Report(title, profile, seed, stated(spec) if layered(judged) else "")
        _judge(judged, report, level, weights, case, progress)
        if weights is None and report.count("fail") + report.count("crash"):
            from .diagnosis.diagnose import diagnose
            from .diagnosis.recognise import recognise

            report.cause = diagnose(judged, report.checks, profile, name=title, seed=seed)
            with np.errstate(all="ignore"):
                other = recognise(found, profile, spec)
            if other is not None and other != spec:
                report.cause = replace(report.cause, other=other.differences(spec))
    report.seconds = time.perf_counter() - start
    return report


def _know(profile: str) -> None:
    """Let NumPy know bfloat16 by its name, where the profile's arrays are of it."""
    if PROFILES[profile] == "bfloat16":
        try:
            importlib.import_module("ml_dtypes")
        except ImportError:
            wanted = f"the package ml_dtypes for {profile}"
            raise ConfigError(f"profile: expected {wanted}, got none; pip install 'lorax-np[bf16]'") from None


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
    batteries = suited(profile, case.partition("/")[0], layered=layered(subject))
    if not layered(subject) and not case:
        reason = "the subject has neither run nor forward"
        report.checks.append(Check("layer", "layer", "", "a linear layer, all of it", "not run", note=reason))
    if weights is not None:
        from .batteries.weights import battery_weights

        batteries = {"weights": battery_weights(weights, report)}
    failed = 0
    with np.errstate(all="ignore"):  # what is not finite is judged, not warned of
        for name, battery in batteries.items():
            for checks in battery(subject, profile, seed, level, case):
                judged = [check for check in checks if chosen(check.id, case)]
                report.checks += judged
                failed += sum(check.verdict in ("fail", "crash") for check in judged)
                if progress is not None:
                    progress(name, len(report.checks), failed)
        report.notes += graded(report.checks, profile)
        if layered(subject) and weights is None and not case and PROFILES[profile] in ("float16", "bfloat16"):
            with suppress(Absent, Crash):  # which the batteries have said
                report.notes.append(f"y in 16 bits, by its bits: {infer_schedule(subject, profile, seed)}")
