"""A report as JUnit XML, which GitHub's, GitLab's and Jenkins' readers share.  Format: specs/reports.md."""

from pathlib import Path
from xml.etree import ElementTree as xml

from ..lines import visible
from ..report import Check, Report
from .digest import Reports, command, environment, listed, number, share, short, write_text

LONGEST = 4000  # letters of one note: readers keep such a file in memory


def to_junit(reports: Reports, path: str | Path) -> None:
    """Write one report, or several, as JUnit XML."""
    write_text(junit(reports), path)


def junit(reports: Reports) -> str:
    """The JUnit XML of one report, or of several: a test suite for each battery, a test case for each check."""
    found = listed(reports)
    root = xml.Element("testsuites", name="lorax_np")
    for report in found:
        for battery in dict.fromkeys(check.battery for check in report.checks):
            root.append(_suite(report, battery, alone=len(found) == 1))
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    root.set("time", f"{sum(report.seconds for report in found):.3f}")
    xml.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(root, encoding="unicode") + "\n"


def _suite(report: Report, battery: str, *, alone: bool) -> xml.Element:
    """One battery; its names carry the profile where the file holds several reports."""
    mine = [check for check in report.checks if check.battery == battery]
    profile = "" if alone else f"{report.profile}."
    suite = xml.Element("testsuite", name=visible(f"{profile}{battery}"), tests=str(len(mine)))
    suite.set("failures", str(sum(check.verdict == "fail" for check in mine)))
    suite.set("errors", str(sum(check.verdict == "crash" for check in mine)))
    suite.set("skipped", str(sum(check.verdict in ("not run", "vacuous") for check in mine)))
    properties = xml.SubElement(suite, "properties")
    said = {"subject": report.subject, "profile": report.profile, "seed": str(report.seed)}
    for name, value in {**said, "conventions": report.conventions, **environment(report)}.items():
        xml.SubElement(properties, "property", name=visible(name), value=short(value, LONGEST))
    if report.cause is not None and any(check.verdict in ("fail", "crash") for check in mine):
        lines = "\n".join(short(line, LONGEST) for line in report.cause.lines())
        xml.SubElement(properties, "property", name="cause", value=lines)
    for check in mine:
        classname = short(f"lorax_np.{profile}{battery}.{check.kind}", LONGEST)
        case = xml.SubElement(suite, "testcase", classname=classname, name=short(check.id, LONGEST))
        _outcome(report, check, case)
    return suite


def _outcome(report: Report, check: Check, case: xml.Element) -> None:
    """What a test case holds: nothing where the check passed."""
    note = short(check.note, LONGEST)
    if check.verdict in ("not run", "vacuous"):
        xml.SubElement(case, "skipped", message=f"{check.verdict}: {note}")
        return
    if check.verdict == "pass":
        return
    size = "" if check.ratio is None else f"error {share(check.ratio)} × the bound"
    at = "" if check.at is None else f"at {list(check.at)}"
    values = "" if check.got is None else f"got {number(check.got)}, want {number(check.want)}"
    message = " ".join(filter(None, (short(check.tensor), size, at))) + (f": {note}" if note else "")
    lines = (f"{check.verdict}: {short(check.id, LONGEST)}", " ".join(filter(None, (size, at))), values, note)
    tag = "error" if check.verdict == "crash" else "failure"
    outcome = xml.SubElement(case, tag, message=message, type=f"lorax_np.{check.verdict}")
    outcome.text = "\n".join([*filter(None, lines), f"reproduce: {command(report, check)}"])
