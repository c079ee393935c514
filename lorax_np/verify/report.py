"""What was judged and how it came out: the checks, and the report that people and programs read."""

import json
import platform
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from .. import __version__, backend_info

Verdict = Literal["pass", "fail", "vacuous", "not run", "crash"]
TENSORS = ("y", "x", "A", "B", "m", "b", "bB", "W")
SCHEMA = "lorax_np.verify/1"
# Batteries that hold a tensor against what it is.
TRUTHS = ("lattice", "generic", "exact", "complex", "merge", "grades", "weights")
RIGHT = "CORRECT"  # among the ids of an explanation: the right layer itself


@dataclass(frozen=True)
class Check:
    """One tensor of one case, judged.

    id : battery/kind/number/tensor, stable between runs;  ratio : largest error ÷ its bound, 1 or less passes
    at, got, want : where the error is largest, what came there, and the truth;  note : anything else
    map : error ÷ bound over the tensor's two axes, where it failed, at most 64 × 64
    grade : how good what passed is, in words, where more than one way is right
    """

    id: str
    battery: str
    kind: str
    tensor: str
    verdict: Verdict
    ratio: float | None = None
    at: tuple[int, ...] | None = None
    got: float | None = None
    want: float | None = None
    note: str = ""
    map: tuple[tuple[float, ...], ...] | None = None
    grade: str = ""


@dataclass
class Report:
    """The verdict on one subject in one profile. str(report) is the table."""

    subject: str
    profile: str
    seed: int
    conventions: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # lines for a person: skipped tensors, a spectrum
    seconds: float = 0.0
    cause: Any = None  # a Diagnosis, where something was refused

    def count(self, verdict: Verdict) -> int:
        """How many checks came out so."""
        return sum(check.verdict == verdict for check in self.checks)

    @property
    def unjudged(self) -> list[str]:
        """The tensors that checks asked for and none judged: whatever the verdict is, it is not on these."""
        judged = {check.tensor for check in self.checks if check.verdict in ("pass", "fail", "crash")}
        asked = {check.tensor for check in self.checks if check.verdict in ("not run", "vacuous")}
        return [tensor for tensor in TENSORS if tensor in asked - judged]

    @property
    def passed(self) -> bool:
        """Whether something was judged and nothing judged failed."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 nothing judged, 3 the subject crashed."""
        if self.count("crash"):
            return 3
        if self.count("fail"):
            return 1
        return 0 if self.count("pass") else 2

    @property
    def diagnosis(self) -> list[str]:
        """The tensors that are wrong, a line each, and the kinds of layer that alone show it."""
        lines = []
        held = [check for check in self.checks if check.battery in TRUTHS]
        for tensor in TENSORS:
            mine = [check for check in held if check.tensor == tensor and check.verdict in ("pass", "fail")]
            bad = [check for check in mine if check.verdict == "fail"]
            if not bad:
                continue
            merges = {check.battery in ("merge", "grades") for check in bad}
            name = " and ".join(f"merged {tensor}" if merge else named(tensor) for merge in sorted(merges))
            kinds = {check.kind for check in bad}
            good = {check.kind for check in mine} - kinds
            where = f"in {len(bad)} of {len(mine)} checks"
            if good:
                where += f"; only in: {'; '.join(sorted(kinds))}"
            lines.append(f"{name} is wrong {where}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, schema lorax_np.verify/1."""
        verdicts = ("pass", "fail", "vacuous", "not run", "crash")
        return {
            "schema": SCHEMA,
            "subject": self.subject,
            "profile": self.profile,
            "seed": self.seed,
            "conventions": self.conventions,
            "passed": self.passed,
            "exit_code": self.exit_code,
            "counts": {verdict: self.count(verdict) for verdict in verdicts},  # type: ignore[arg-type]
            "never_judged": self.unjudged,
            "diagnosis": self.diagnosis,
            "cause": None if self.cause is None else self.cause.to_dict(),
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
            "environment": {"lorax_np": __version__, "platform": platform.platform(), **backend_info()},
            "checks": [{name: _finite(value) for name, value in vars(check).items()} for check in self.checks],
        }

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON, beside the path first and then over it."""
        write_json(self.to_dict(), path)

    def to_junit(self, path: str | Path) -> None:
        """Write the report as JUnit XML."""
        from .pages.junit import to_junit

        to_junit(self, path)

    def to_html(self, path: str | Path, matrix: Any = None) -> None:
        """Write the report as one self-contained HTML page, with a kill matrix if one is given."""
        from .pages.html import to_html

        to_html(self, path, matrix)

    def to_markdown(self) -> str:
        """The report as Markdown for a pull request."""
        from .pages.markdown import to_markdown

        return to_markdown(self)

    def to_badge(self) -> dict[str, Any]:
        """The verdict as a badge endpoint has it."""
        from .pages.markdown import to_badge

        return to_badge(self)

    def __str__(self) -> str:
        """The table, failures, what was not judged, the diagnosis, the verdict last; in 80 columns."""
        from .pages.text import text

        return text(self)

    def summary(self) -> list[str]:
        """The table's last lines: the diagnosis, its cause first, how to see it again, and the verdict."""
        from .pages.text import summary

        return summary(self)


def describe(check: Check) -> str:
    """One check in one line: its id, where it is worst, what came there, what was wanted."""
    at = f" at {list(check.at)}" if check.at is not None else ""
    values = "" if check.got is None else f": got {check.got:.9g}, want {check.want:.9g}"
    times = (
        "" if check.ratio is None else f", {check.ratio:.2g} × the bound".replace("e+0", "e").replace("e+", "e")
    )
    note = f"  {check.note}" if check.note else ""
    law = f"  {check.tensor}" if " " in check.tensor else ""
    return f"{check.id}{law}{at}{values}{times}{note}"


def named(tensor: str) -> str:
    """A tensor as it is spoken of: y, or the gradient."""
    return tensor if tensor == "y" else f"g{tensor}"


def to_text(data: Any) -> str:
    """Data as JSON that every reader takes: there is no NaN and no infinity in it."""
    return json.dumps(data, indent=1, allow_nan=False)


def write_json(data: Any, path: str | Path) -> None:
    """Write data as JSON to a file that appears whole or not at all; a device or a pipe takes it as it is."""
    from .pages.digest import write_text

    write_text(to_text(data) + "\n", path)


def _finite(value: Any) -> Any:
    """Null for what JSON cannot hold; the note of such a check says what it was."""
    return None if isinstance(value, float) and not isfinite(value) else value
