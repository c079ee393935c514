"""What every form of a report shares: worst cases, tables, commands, harmless text, whole files."""

import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple

from ..lines import flat, many, visible
from ..report import RIGHT, TENSORS, Check, Report, Verdict

Reports = Report | Sequence[Report]
WORDS = {0: "PASS", 1: "FAIL", 2: "NOTHING JUDGED", 3: "CRASHED"}  # by exit code
SEVERITY = (0, 2, 1, 3)  # exit codes, the gravest last
WORST_FIRST: tuple[Verdict, ...] = ("crash", "fail", "vacuous", "not run", "pass")
CUT = 600  # letters of a subject's text that a page for people shows


class Cell(NamedTuple):
    """Some checks as one: the worst verdict, the largest error ÷ bound, how many, and how many were refused."""

    verdict: Verdict
    ratio: float | None
    total: int
    wrong: int


class Table(NamedTuple):
    """One battery: a row for each kind of layer, a cell or None for each tensor."""

    battery: str
    layers: int
    tensors: list[str]
    rows: list[tuple[str, list[Cell | None]]]


class Explained(NamedTuple):
    """A title for the cause, the explanations accepted, and what is said where there are none."""

    title: str
    names: tuple[Any, ...]
    said: str


def listed(reports: Reports) -> list[Report]:
    """One report or several, as a list that is not empty."""
    found = [reports] if isinstance(reports, Report) else list(reports)
    if not found:
        raise ValueError("reports: expected a Report or a sequence of them, got none")
    return found


def gravest(reports: Reports) -> int:
    """The exit code of several reports together: 3 before 1 before 2 before 0."""
    return max((report.exit_code for report in listed(reports)), key=SEVERITY.index)


def worst(checks: Iterable[Check]) -> Cell | None:
    """Some checks as one cell; None where there are none."""
    found = list(checks)
    if not found:
        return None
    verdicts = {check.verdict for check in found}
    ratios = [check.ratio for check in found if check.ratio is not None]
    refused = sum(check.verdict in ("fail", "crash") for check in found)
    return Cell(next(v for v in WORST_FIRST if v in verdicts), max(ratios, default=None), len(found), refused)


def grouped(checks: Iterable[Check]) -> dict[tuple[str, str, str], list[Check]]:
    """Checks by battery, kind and tensor, in the order of their first appearance."""
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.battery, check.kind, check.tensor), []).append(check)
    return groups


def tables(report: Report, *, by_kind: bool = True) -> list[Table]:
    """A table for each battery that judges tensors; without by_kind all its layers are one row."""
    found = []
    tensor_checks = [check for check in report.checks if check.tensor in TENSORS]
    groups = grouped(tensor_checks)
    for battery in dict.fromkeys(check.battery for check in tensor_checks):
        mine = {key[1:]: checks for key, checks in groups.items() if key[0] == battery}
        tensors = [tensor for tensor in TENSORS if any(key[1] == tensor for key in mine)]
        kinds = list(dict.fromkeys(kind for kind, _ in mine))
        layers = len({check.id.rpartition("/")[0] for checks in mine.values() for check in checks})
        rows = [(kind, [worst(mine.get((kind, tensor), ())) for tensor in tensors]) for kind in kinds]
        if not by_kind:
            one = [
                worst(check for kind in kinds for check in mine.get((kind, tensor), ())) for tensor in tensors
            ]
            rows = [(battery, one)]
        found.append(Table(battery, layers, tensors, rows))
    return found


def laws(report: Report) -> list[tuple[str, str, Cell]]:
    """Battery, law and outcome of what is no single tensor's."""
    rest: dict[tuple[str, str], list[Check]] = {}
    for check in report.checks:
        if check.tensor not in TENSORS:
            rest.setdefault((check.battery, check.tensor), []).append(check)
    return [(*key, cell) for key, checks in rest.items() if (cell := worst(checks))]


def refused(report: Report) -> list[Check]:
    """The checks that failed or crashed."""
    return [check for check in report.checks if check.verdict in ("fail", "crash")]


def not_judged(report: Report) -> dict[tuple[str, str], int]:
    """How often each (verdict, reason) kept a check from being judged."""
    found: dict[tuple[str, str], int] = {}
    for check in report.checks:
        if check.verdict in ("not run", "vacuous"):
            found[check.verdict, check.note] = found.get((check.verdict, check.note), 0) + 1
    return found


def heading(tensor: str, battery: str = "") -> str:
    """What a column is called: y, the gradient by a tensor, or a merged tensor."""
    if tensor == "y" or tensor not in TENSORS:
        return tensor
    return f"{tensor}′" if battery == "merge" else f"g{tensor}"


def counts(report: Report) -> str:
    """How the checks came out, in words, those that did not occur left out."""
    said: tuple[tuple[Verdict, str], ...] = (
        ("crash", "crashed"),
        ("fail", "failed"),
        ("pass", "passed"),
        ("vacuous", "vacuous"),
        ("not run", "not run"),
    )
    parts = [f"{report.count(verdict)} {word}" for verdict, word in said if report.count(verdict)]
    return f"{many(len(report.checks))}: {', '.join(parts)}" if parts else "no checks"


def command(report: Report, check: Check) -> str:
    """The command that judges one check's layer again."""
    return again(report.subject, report.profile, report.seed, check)


def again(subject: str, profile: str, seed: int, check: Check) -> str:
    """The command that judges a check's layer again, to be pasted into a shell."""
    words = ["lorax-np", "verify", subject, "--profile", profile]
    if seed:
        words += ["--seed", str(seed)]
    if check.battery == "weights":
        words += ["--weights", "FILE"]
    case = check.id.rpartition("/")[0] if check.tensor in TENSORS else check.id
    return " ".join(shlex.quote(flat(word)) for word in [*words, "--case", case])


def explained(cause: Any) -> Explained:
    """What a diagnosis accepts as the cause, told apart from what it cannot name."""
    names = tuple(name for name in cause.names if RIGHT not in name.ids)
    if names:
        return Explained("Cause" if len(names) == 1 else "Causes that explain it, the nearest first", names, "")
    if cause.names:
        hidden = ", ".join(id for name in cause.names for id in name.ids if id != RIGHT)
        said = f"{many(cause.asked, 'single layer')} came out right in {cause.profile}"
        said += f"; roundings hide {hidden}." if hidden else "."
        return Explained("Not seen in single calls", (), said)
    if cause.branch.part == "crash":
        return Explained("It raised an exception", (), "")
    near = cause.nearest
    said = f"Nearest is {near[0]}, which explains {near[1]:.0%} of the wrong entries." if near else ""
    return Explained("None of the known faults", (), said)


def environment(report: Report) -> dict[str, str]:
    """The versions that a verdict was reached with."""
    said = replace(report, checks=[]).to_dict()["environment"]
    return {str(name): str(value) for name, value in said.items()}


# ---- text and numbers --------------------------------------------------------------------------------------


def short(text: str, limit: int = CUT) -> str:
    """The visible text, cut in the middle where it is longer than limit, and by how many letters."""
    text = visible(text)
    if len(text) <= limit:
        return text
    half = (limit - 40) // 2
    return f"{text[:half]} … {len(text) - 2 * half} letters left out … {text[-half:]}"


def number(value: float | None) -> str:
    """Nine digits of an entry, enough to tell two float32 numbers apart."""
    return "–" if value is None else f"{value:.9g}"


def share(ratio: float) -> str:
    """An error ÷ bound in at most five letters."""
    if isnan(ratio):
        return "NaN"
    if not isfinite(ratio):
        return "∞"
    if ratio < 100:
        return f"{ratio:.3f}" if ratio <= 1 else f"{ratio:.1f}"
    return f"{ratio:.0e}".replace("e+0", "e").replace("e+", "e")


def by_size(check: Check) -> float:
    """A key that puts the largest error first; what has no size, such as a wrong shape, comes before it."""
    return -inf if check.ratio is None or isnan(check.ratio) else -check.ratio


# ---- files -------------------------------------------------------------------------------------------------


def report_schema() -> dict[str, Any]:
    """The JSON Schema of what to_dict and the command line's --json write."""
    data: dict[str, Any] = json.loads(
        Path(__file__).with_name("report_schema.json").read_text(encoding="utf-8")
    )
    return data


def write_text(text: str, path: str | Path) -> None:
    """Write text to a file that appears whole or not at all; a device or a pipe takes it as it is."""
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
