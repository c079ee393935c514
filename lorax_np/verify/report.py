"""What was judged and how it came out: the checks, and the report that people and programs read."""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from .. import __version__, backend_info
from .lines import WIDTH, continued, fold, many, middle

Verdict = Literal["pass", "fail", "vacuous", "not run", "crash"]
TENSORS = ("y", "x", "A", "B", "m", "b", "bB", "W")
SCHEMA = "lorax_np.verify/1"
TRUTHS = (
    "lattice",
    "generic",
    "exact",
    "complex",
    "merge",
    "grades",
    "weights",
)  # which hold a tensor against what it is
RIGHT = "CORRECT"  # among the ids of an explanation: the right layer itself
SHOWN = 8  # failing checks printed one by one; all are in the JSON


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
            name = " and ".join(f"merged {tensor}" if merge else _name(tensor) for merge in sorted(merges))
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
        parts = (self._head(), self._table(), self._lists(), self._failures(), self._unjudged())
        lines = [line for part in parts for line in part]
        above = [part for line in lines for part in fold(line)]
        return "\n".join([*above, "", *self.summary()])

    def summary(self) -> list[str]:
        """The table's last lines: the diagnosis, its cause first, how to see it again, and the verdict."""
        said = self._diagnosed()
        lines = [*said, "", self._verdict()] if said else [self._verdict()]
        return [part for line in lines for part in fold(line)]

    def _head(self) -> list[str]:
        info = backend_info()
        return [
            f"{self.subject} in {self.profile}, judged by lorax_np {__version__}, seed {self.seed}",
            f"NumPy {info['numpy']}, {info['blas']}, Python {info['python']}",
            *self.conventions.splitlines(),
        ]

    def _table(self) -> list[str]:
        """A row for each battery, and for each kind where one was refused: the largest error ÷ bound."""
        mine = [check for check in self.checks if check.tensor in TENSORS]
        columns = [t for t in TENSORS if any(check.tensor == t for check in mine)]
        wide = WIDTH - 7 * len(columns)
        lines = (
            ["", "".join(["largest error ÷ bound".ljust(wide), *(f"{_name(t):>7}" for t in columns)])]
            if mine
            else []
        )
        for battery in dict.fromkeys(check.battery for check in mine):
            of_it = [check for check in mine if check.battery == battery]
            cases = len({check.id.rpartition("/")[0] for check in of_it})
            lines.append(_row(f"{battery}, {cases} layers", of_it, columns, wide))
            if battery == "weights" or _mixed(of_it):
                for kind in dict.fromkeys(check.kind for check in of_it):
                    label = kind if len(kind) < wide - 2 else f"…{kind[4 - wide :]}"
                    lines.append(_row(f"  {label}", [c for c in of_it if c.kind == kind], columns, wide))
        return lines

    def _lists(self) -> list[str]:
        """A line for each battery of laws, and for each law that is broken or was not asked."""
        lines: list[str] = []
        rest = [check for check in self.checks if check.tensor not in TENSORS]
        for battery in dict.fromkeys(check.battery for check in rest):
            mine = [check for check in rest if check.battery == battery]
            laws = dict.fromkeys(check.tensor for check in mine)
            label = f"{battery}, {many(len(mine), 'check')} of {many(len(laws), 'law')}"
            lines.append(f"{label:<{WIDTH - 8}}{_cell(mine):>8}")
            for law in laws if {check.verdict for check in mine} != {"crash"} else ():
                of_it = [check for check in mine if check.tensor == law]
                if any(check.verdict != "pass" for check in of_it):
                    lines.append(f"  {law:<{WIDTH - 10}}{_cell(of_it):>8}")
        notes = [line for note in self.notes for line in note.splitlines()]
        return (["", *lines] if lines else []) + (["", *notes] if notes else [])

    def _failures(self) -> list[str]:
        """One check of each tensor of a battery that was refused; of exceptions, one of each."""
        bad = [check for check in self.checks if check.verdict in ("fail", "crash")]
        unlike: dict[tuple[str, ...], Check] = {}
        for check in bad:
            key = (check.note,) if check.verdict == "crash" else (check.battery, check.tensor)
            unlike.setdefault(key, check)
        shown = list(unlike.values())[:SHOWN]
        lines = [""] if bad else []
        lines += [f"{check.verdict.upper()}  {describe(check)}" for check in shown]
        return [*lines, f"... and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else lines

    def _unjudged(self) -> list[str]:
        reasons = dict.fromkeys(c.note for c in self.checks if c.verdict in ("not run", "vacuous"))
        lines = [line for reason in reasons for line in ("", f"not judged: {reason}")]
        return lines + (["", f"never judged: {', '.join(map(_name, self.unjudged))}"] if self.unjudged else [])

    def _diagnosed(self) -> list[str]:
        """The cause first, then the tensors, and the line to see it again last."""
        said = [f"diagnosis: {line}" for line in self.diagnosis]
        if self.cause is not None:
            said = [*self.cause.said(), *said, *self.cause.again()]
        bad = next((check for check in self.checks if check.verdict in ("fail", "crash")), None)
        if bad is not None and (self.cause is None or not self.cause.reproduce):
            from .pages.digest import command

            said += continued(f"reproduce: {command(self, bad)}")
        return said

    def _verdict(self) -> str:
        """One line: what did not occur is left out, and the name is cut where there is no room for it."""
        word = {0: "PASS", 1: "FAIL", 2: "NOTHING JUDGED", 3: "CRASHED"}[self.exit_code]
        said: tuple[tuple[Verdict, str], ...] = (("pass", "pass"), ("fail", "fail"), ("vacuous", "vacuous"))
        said += (("not run", "not run"), ("crash", "crashed"))
        always = ("pass", "fail") if self.exit_code != 2 else ()
        counts = [f"{n} {name}" for verdict, name in said if (n := self.count(verdict)) or verdict in always]
        head, tail = f"  {self.profile}  ", f"{', '.join(counts) or 'none'}  {self.seconds:.1f} s"
        total = f"{len(self.checks)} checks: "
        if len(word + self.subject + head + total + tail) + 2 > WIDTH:
            total = ""
        rest = head + total + tail
        return f"{word}  {middle(self.subject, max(WIDTH - len(word) - 2 - len(rest), 8))}{rest}"


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


def _name(tensor: str) -> str:
    return tensor if tensor == "y" else f"g{tensor}"


def _mixed(checks: list[Check]) -> bool:
    """Whether some kinds of layer tell more than all: something was refused, and not everything crashed."""
    verdicts = {check.verdict for check in checks}
    return bool(verdicts & {"fail", "crash"}) and verdicts != {"crash"}


def _row(label: str, checks: list[Check], columns: list[str], wide: int) -> str:
    cells = (_cell(check for check in checks if check.tensor == tensor) for tensor in columns)
    return "".join([label.ljust(wide), *(f"{cell:>7}" for cell in cells)])


def _cell(checks: Iterable[Check]) -> str:
    """The worst of some checks in six characters."""
    checks = list(checks)
    if not checks:
        return "·"
    for verdict in ("crash", "fail", "vacuous", "not run"):
        hit = [check for check in checks if check.verdict == verdict]
        if hit and verdict == "fail":
            return "FAIL"
        if hit:
            return {"crash": "CRASH", "vacuous": "void", "not run": "notrun"}[verdict]
    ratios = [check.ratio for check in checks if check.ratio is not None]
    return f"{max(ratios):.3f}" if ratios else "ok" if any(c.tensor not in TENSORS for c in checks) else "="


def to_text(data: Any) -> str:
    """Data as JSON that every reader takes: there is no NaN and no infinity in it."""
    return json.dumps(data, indent=1, allow_nan=False)


def write_json(data: Any, path: str | Path) -> None:
    """Write data as JSON to a file that appears whole or not at all; a device or a pipe takes it as it is."""
    path, text = Path(path), to_text(data) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _finite(value: Any) -> Any:
    """Null for what JSON cannot hold; the note of such a check says what it was."""
    return None if isinstance(value, float) and not isfinite(value) else value
