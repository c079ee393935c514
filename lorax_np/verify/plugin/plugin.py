"""Checks as pytest's tests: one item for each, under the id that the report gives it.

    pytest --pyargs lorax_np.verify --lorax-np-subject my_kernel:subject --lorax-np-report report.json

The subject is judged once, before collection: ids are known then, and workers of pytest-xdist are sent the
verdicts. What is not run and what is vacuous is skipped with its reason; a run that judged nothing fails.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ... import ConfigError, FormatError
from ..cases import PROFILES, SMALL, Case, grid
from ..conformance import describe
from ..conventions import Spec
from ..report import Check, Report
from ..verdict import LEVELS, verify

HOME = Path(__file__).parents[1] / "conformance.py"  # the file under which the items are collected
INPUT = "lorax_np_checks"  # under which a worker of pytest-xdist finds the verdicts


class Conformance:
    """The plugin of a run that judges a subject."""

    def __init__(self, config: pytest.Config) -> None:
        """Read the options. Raises pytest.UsageError where one makes no sense."""
        self.subject, self.profile, self.level, self.case, self.report_to = (
            config.getoption(f"lorax_np_{name}") for name in ("subject", "profile", "level", "case", "report")
        )
        self.xfails = _ids(config.getoption("lorax_np_xfails"))
        if self.report_to and not Path(self.report_to).absolute().parent.is_dir():
            raise pytest.UsageError(
                f"--lorax-np-report: expected a file in a folder that exists, got {self.report_to}"
            )
        worker = getattr(config, "workerinput", None)
        self.is_worker = worker is not None
        self.checks = [_check(row) for row in json.loads(worker[INPUT])] if worker else []
        self.report: Report | None = None
        self.judged: set[str] = set()
        self.nothing = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Judge the subject, in the one process that collects or that controls those which do."""
        if self.is_worker:
            return
        try:
            self.report = verify(self.subject, self.profile, self.level, case=self.case or "")
        except (LookupError, ValueError, ConfigError, FormatError) as error:
            raise pytest.UsageError(f"lorax-np: {error}") from error
        self.checks = self.report.checks
        if self.report_to:
            self.report.to_json(self.report_to)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Send the verdicts to a worker of pytest-xdist."""
        node.workerinput[INPUT] = json.dumps([asdict(check) for check in self.checks])

    def pytest_report_header(self) -> str:
        """What is judged, at the top of pytest's output."""
        return f"lorax-np: {self.subject} in {self.profile}, {self.level}"

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> "CheckFile | None":
        """One file of the harness stands for all checks."""
        if file_path != HOME:
            return None
        found: CheckFile = CheckFile.from_parent(parent, path=file_path)
        found.conformance = self
        return found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember what was judged: passed or failed, expected or not."""
        failed_as_expected = report.outcome == "skipped" and hasattr(report, "wasxfail")
        if report.when == "call" and (report.outcome != "skipped" or failed_as_expected):
            self.judged.add(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail a run that judged nothing."""
        name = f"{HOME.name}::"
        if self.is_worker or session.config.option.collectonly or any(name in nodeid for nodeid in self.judged):
            return
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        why = "no check was collected: is --pyargs lorax_np.verify among the arguments?"
        if self.report is not None and not (self.report.count("pass") + self.report.count("fail")):
            why = "every check is vacuous or not run"
        self.nothing = f"lorax-np: nothing was judged; {why}"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The harness's own verdict, below pytest's."""
        if self.report is not None:
            terminalreporter.section("lorax-np")
            lines = str(self.report).splitlines()
            wanted = ("diagnosis:", "reproduce:", "PASS", "FAIL  " + self.report.subject, "NOTHING", "CRASHED")
            for line in (line for line in lines if line.startswith(wanted)):
                terminalreporter.write_line(line)
        if self.nothing:
            terminalreporter.write_line(self.nothing, red=True)


class CheckFile(pytest.File):
    """All checks of the run."""

    conformance: Conformance

    def collect(self) -> Iterator["CheckItem"]:
        """One item for each check; an id that is expected to fail and is no check's fails by itself."""
        mine, left = self.conformance, dict(self.conformance.xfails)
        for check in mine.checks:
            item: CheckItem = CheckItem.from_parent(self, name=check.id)
            item.check = check
            reason = left.pop(check.id, None)
            if reason is not None:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
            yield item
        part = mine.level != "full" or bool(mine.case)  # other checks exist, which this run leaves out
        for id in left:
            item = CheckItem.from_parent(self, name=id)
            note = f"--lorax-np-xfails: no check has this id{' in this part of them' * part}"
            item.check = Check(id, "", "", "", "not run" if part else "fail", note=note)
            yield item


class CheckItem(pytest.Item):
    """One check, already judged."""

    check: Check

    def runtest(self) -> None:
        """Come out as the check did."""
        if self.check.verdict in ("vacuous", "not run"):
            pytest.skip(f"{self.check.verdict}: {self.check.note}")
        if self.check.verdict != "pass":
            raise Judged(f"{self.check.verdict.upper()}  {describe(self.check)}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The check in one line, without a traceback through pytest; anything else as usual."""
        return str(excinfo.value) if isinstance(excinfo.value, Judged) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        """Where it is, for people."""
        return self.path, None, self.check.id


class Judged(Exception):
    """A check that did not pass."""


def _option(config: pytest.Config, name: str) -> str:
    value, known = config.getoption(f"lorax_np_{name}"), {"profile": tuple(PROFILES), "level": LEVELS}[name]
    if value not in known:
        raise pytest.UsageError(f"--lorax-np-{name}: expected one of {', '.join(known)}, got {value!r}")
    return str(value)


def _ids(path: str | None) -> dict[str, str]:
    """The ids of a file, each with what its line says after a #."""
    if path is None:
        return {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise pytest.UsageError(f"--lorax-np-xfails: expected a text file, got {path}: {error}") from error
    parts = (line.partition("#") for line in lines)
    return {id.strip(): why.strip() or f"in {path}" for id, _, why in parts if id.strip()}


def _check(row: dict[str, Any]) -> Check:
    """A check from JSON, where a tuple has become a list."""
    row = {field.name: row[field.name] for field in fields(Check)}
    return Check(**(row | {"at": None if row["at"] is None else tuple(row["at"])}))


# ---- the fixture -------------------------------------------------------------------------------------------


@cache
def _cases(profile: str, level: str) -> dict[str, Case]:
    with np.errstate(all="ignore"):
        return {
            case.id: case for case in grid("exact", SMALL, profile, Spec(norm_gradient=(False, True)), 0, level)
        }


def case_ids(config: pytest.Config) -> list[str]:
    """Ids of the layers that lorax_np_case runs through: the small ones of the battery exact."""
    return list(_cases(_option(config, "profile"), _option(config, "level")))


def case_of(config: pytest.Config, id: str) -> Case:
    """The layer of an id."""
    return _cases(_option(config, "profile"), _option(config, "level"))[id].copy()
