"""A report as text for a terminal, in 80 columns."""

from collections.abc import Iterable

from ... import __version__, backend_info
from ..lines import WIDTH, continued, fold, many, middle
from ..report import TENSORS, Check, Report, Verdict, describe, named
from .digest import WORDS, command

SHOWN = 8  # failing checks printed one by one; all are in the JSON


def text(report: Report) -> str:
    """The table, failures, what was not judged, the diagnosis, the verdict last; in 80 columns."""
    parts = (_head(report), _table(report), _lists(report), _failures(report), _unjudged(report))
    lines = [line for part in parts for line in part]
    above = [part for line in lines for part in fold(line)]
    return "\n".join([*above, "", *summary(report)])


def summary(report: Report) -> list[str]:
    """The table's last lines: the diagnosis, its cause first, how to see it again, and the verdict."""
    said = _diagnosed(report)
    lines = [*said, "", _verdict(report)] if said else [_verdict(report)]
    return [part for line in lines for part in fold(line)]


def _head(report: Report) -> list[str]:
    info = backend_info()
    return [
        f"{report.subject} in {report.profile}, judged by lorax_np {__version__}, seed {report.seed}",
        f"NumPy {info['numpy']}, {info['blas']}, Python {info['python']}",
        *report.conventions.splitlines(),
    ]


def _table(report: Report) -> list[str]:
    """A row for each battery, and for each kind where one was refused: the largest error ÷ bound."""
    mine = [check for check in report.checks if check.tensor in TENSORS]
    columns = [t for t in TENSORS if any(check.tensor == t for check in mine)]
    wide = WIDTH - 7 * len(columns)
    head = "".join(["largest error ÷ bound".ljust(wide), *(f"{named(t):>7}" for t in columns)])
    lines = ["", head] if mine else []
    for battery in dict.fromkeys(check.battery for check in mine):
        of_it = [check for check in mine if check.battery == battery]
        cases = len({check.id.rpartition("/")[0] for check in of_it})
        lines.append(_row(f"{battery}, {cases} layers", of_it, columns, wide))
        if battery == "weights" or _mixed(of_it):
            for kind in dict.fromkeys(check.kind for check in of_it):
                label = kind if len(kind) < wide - 2 else f"…{kind[4 - wide :]}"
                lines.append(_row(f"  {label}", [c for c in of_it if c.kind == kind], columns, wide))
    return lines


def _lists(report: Report) -> list[str]:
    """A line for each battery of laws, and for each law that is broken or was not asked."""
    lines: list[str] = []
    rest = [check for check in report.checks if check.tensor not in TENSORS]
    for battery in dict.fromkeys(check.battery for check in rest):
        mine = [check for check in rest if check.battery == battery]
        laws = dict.fromkeys(check.tensor for check in mine)
        label = f"{battery}, {many(len(mine), 'check')} of {many(len(laws), 'law')}"
        lines.append(f"{label:<{WIDTH - 8}}{_cell(mine):>8}")
        for law in laws if {check.verdict for check in mine} != {"crash"} else ():
            of_it = [check for check in mine if check.tensor == law]
            if any(check.verdict != "pass" for check in of_it):
                lines.append(f"  {law:<{WIDTH - 10}}{_cell(of_it):>8}")
    notes = [line for note in report.notes for line in note.splitlines()]
    return (["", *lines] if lines else []) + (["", *notes] if notes else [])


def _failures(report: Report) -> list[str]:
    """One check of each tensor of a battery that was refused; of exceptions, one of each."""
    bad = [check for check in report.checks if check.verdict in ("fail", "crash")]
    unlike: dict[tuple[str, ...], Check] = {}
    for check in bad:
        key = (check.note,) if check.verdict == "crash" else (check.battery, check.tensor)
        unlike.setdefault(key, check)
    shown = list(unlike.values())[:SHOWN]
    lines = [""] if bad else []
    lines += [f"{check.verdict.upper()}  {describe(check)}" for check in shown]
    return [*lines, f"... and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else lines


def _unjudged(report: Report) -> list[str]:
    reasons = dict.fromkeys(c.note for c in report.checks if c.verdict in ("not run", "vacuous"))
    lines = [line for reason in reasons for line in ("", f"not judged: {reason}")]
    return lines + (["", f"never judged: {', '.join(map(named, report.unjudged))}"] if report.unjudged else [])


def _diagnosed(report: Report) -> list[str]:
    """The cause first, then the tensors, and the line to see it again last."""
    said = [f"diagnosis: {line}" for line in report.diagnosis]
    if report.cause is not None:
        said = [*report.cause.said(), *said, *report.cause.again()]
    bad = next((check for check in report.checks if check.verdict in ("fail", "crash")), None)
    if bad is not None and (report.cause is None or not report.cause.reproduce):
        said += continued(f"reproduce: {command(report, bad)}")
    return said


def _verdict(report: Report) -> str:
    """One line: what did not occur is left out, and the name is cut where there is no room for it."""
    word = WORDS[report.exit_code]
    said: tuple[tuple[Verdict, str], ...] = (("pass", "pass"), ("fail", "fail"), ("vacuous", "vacuous"))
    said += (("not run", "not run"), ("crash", "crashed"))
    always = ("pass", "fail") if report.exit_code != 2 else ()
    counts = [f"{n} {name}" for verdict, name in said if (n := report.count(verdict)) or verdict in always]
    head, tail = f"  {report.profile}  ", f"{', '.join(counts) or 'none'}  {report.seconds:.1f} s"
    total = f"{len(report.checks)} checks: "
    if len(word + report.subject + head + total + tail) + 2 > WIDTH:
        total = ""
    rest = head + total + tail
    return f"{word}  {middle(report.subject, max(WIDTH - len(word) - 2 - len(rest), 8))}{rest}"


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
