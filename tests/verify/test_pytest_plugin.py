"""The pytest plugin as other projects meet it: pytest in a process of its own, found by its entry point."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorax_np as lx
from lorax_np.verify.layers.plain import Plain

ROOT = Path(lx.__file__).parents[1]
SUBJECTS = """
import numpy as np
from lorax_np.verify.layers.plain import Plain

from lorax_np.verify.mutants import CATALOGUE

right = Plain()
D5 = CATALOGUE["D5"].subject()
wrong = Plain({"gA": lambda t: 0 * (t.gz.T @ t.xd)})
class Nothing:
    def forward(self, case):
        raise NotImplementedError("no layer yet")
    backward = forward
class Crashes(Nothing):
    def forward(self, case):
        raise RuntimeError("no kernel")
"""
JUDGE = "--pyargs", "lorax_np.verify", "--lorax-np-level", "quick", "--lorax-np-case", "exact/lora"


@pytest.fixture
def project(tmp_path):
    """Return pytest in an empty project, beside an installed plugin: (exit code, output)."""
    installed = tmp_path / "site" / "lorax_np_plugin-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lorax-np-plugin\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[pytest11]\nlorax_np = _lorax_np_pytest\n")
    entry = ROOT / "lorax_np" / "verify" / "plugin" / "entry.py"
    (tmp_path / "site" / "_lorax_np_pytest.py").write_text(entry.read_text())  # where a wheel has it
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (folder / "kernels.py").write_text(SUBJECTS)

    def run(*arguments, files=None, editable="checkout"):
        root = ROOT
        if editable == "link":
            root = tmp_path / "link"
            root.symlink_to(ROOT, target_is_directory=True)
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        path = os.pathsep.join(map(str, (root, tmp_path / "site")))
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
        environment.pop("PYTEST_ADDOPTS", None)
        others = "-p", "no:anyio", "-p", "no:hypothesispytest"  # which take as long as pytest itself to start
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *others, "-rA", *arguments]
        found = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        return found.returncode, found.stdout + found.stderr

    run.folder = folder
    return run


def outcomes(text):
    """Check id -> PASSED, FAILED, XFAIL."""
    return {id: word for word, id in re.findall(r"(?m)^(PASSED|FAILED|XFAIL) \S*conformance\.py::(\S+)", text)}


def test_one_item_for_each_check(project):
    code, text = project(*JUDGE, "--lorax-np-subject", "kernels:wrong", "--lorax-np-report", "report.json")
    assert code == 1, text
    found = outcomes(text)
    report = json.loads((project.folder / "report.json").read_text())
    assert {c["id"]: {"pass": "PASSED", "fail": "FAILED"}[c["verdict"]] for c in report["checks"]} == found
    bad = [id for id, word in found.items() if word == "FAILED"]
    assert bad
    assert {id.split("/")[-1] for id in bad} == {"A"}
    assert re.search(r"(?m)^FAIL  exact/lora/\d+/A at \[.*\]: got 0, want ", text)
    assert "lorax-np: kernels:wrong in fp32, quick" in text
    assert "diagnosis: gA is wrong in" in text
    assert "Traceback" not in text


@pytest.mark.thorough
def test_what_is_right_passes_and_can_be_chosen(project):
    code, text = project(*JUDGE, "--lorax-np-subject", "kernels:right", "-k", "exact/lora/1")
    assert code == 0, text
    found = outcomes(text)
    assert set(found.values()) == {"PASSED"}
    assert all(id.startswith("exact/lora/1") for id in found)


@pytest.mark.parametrize(
    ("target", "more", "linked"),
    [
        ("lorax_np.verify", (), True),
        pytest.param("lorax_np.verify", ("--rootdir=/",), False, marks=pytest.mark.thorough),
        pytest.param("lorax_np.verify.conformance", (), False, marks=pytest.mark.thorough),
        pytest.param("lorax_np.verify.conformance", ("-n", "2"), True, marks=pytest.mark.thorough),
        pytest.param("lorax_np.verify.conformance", ("-k", "lora/1"), False, marks=pytest.mark.thorough),
    ],
)
def test_an_editable_install_is_judged_from_any_folder(project, target, more, linked):
    """The package lies outside of pytest's root, as a checkout does: what that makes of ids is no matter."""
    if more[:1] == ("-n",) and not importlib.util.find_spec("xdist"):
        pytest.skip("pytest-xdist is not installed")
    arguments = ["--pyargs", target, *JUDGE[2:], "--lorax-np-subject", "kernels:right", *more]
    code, text = project(*arguments, editable="link" if linked else "checkout")
    assert code == 0, text
    assert "nothing was judged" not in text
    assert re.search(r"(?m)^=+ \d+ passed", text), text
    assert re.search(r"(?m)^PASS  kernels:right  fp32  \d+ checks: ", text)


def test_one_check_can_be_asked_for_by_its_id(project):
    subject = "--lorax-np-subject", "kernels:right", "--lorax-np-level", "quick", "--lorax-np-case", "lattice"
    code, text = project(*subject, "--pyargs", "lorax_np.verify.conformance::lattice/lora/3/A")
    assert code == 0, text
    assert re.search(r"(?m)^=+ 1 passed", text), text
    assert "nothing was judged" not in text


def test_the_terminal_names_the_cause(project):
    more = "--lorax-np-case", "lattice", "--lorax-np-subject", "kernels:D5"
    code, text = project("--pyargs", "lorax_np.verify", *JUDGE[2:4], *more)
    assert code == 1
    part = text[text.index("= lorax-np =") :]
    order = (
        "cause: D5",
        "compare: ",
        "diagnosis: gx",
        "reproduce: lorax-np verify kernels:D5",
        "FAIL  kernels:D5",
    )
    at = [re.search(rf"(?m)^{said}", part).start() for said in order]
    assert at == sorted(at)


def test_known_failures_are_expected_and_strictly_so(project):
    wrong = Plain({"gA": lambda t: 0 * (t.gz.T @ t.xd)})
    report = lx.verify.verify(wrong, level="quick", case="exact/lora")
    failing = [check.id for check in report.checks if check.verdict == "fail"]
    listed = "".join(f"{id}  # gA is not done\n" for id in failing)
    known = "--lorax-np-subject", "kernels:wrong", "--lorax-np-xfails", "known.txt"
    code, text = project(*JUDGE, *known, files={"known.txt": f"# known\n\n{listed}"})
    assert code == 0, text
    assert {id for id, word in outcomes(text).items() if word == "XFAIL"} == set(failing)
    good = next(id for id, word in outcomes(text).items() if word == "PASSED")
    code, text = project(*JUDGE, *known, files={"known.txt": f"{listed}{good}\nexact/lora/no-such\n"})
    assert code == 1, text
    assert {id for id, word in outcomes(text).items() if word == "FAILED"} == {good}
    assert "XPASS(strict)" in text
    assert "no check has this id in this part of them" in text


def test_nothing_judged_fails(project):
    code, text = project(*JUDGE, "--lorax-np-subject", "kernels:Nothing")
    assert code == 1, text
    assert "not run: no layer yet" in text
    assert "lorax-np: nothing was judged; every check is vacuous or not run" in text
    mine = {"test_mine.py": "def test_mine():\n    pass\n"}
    code, text = project(
        "--lorax-np-level", "quick", "--lorax-np-subject", "kernels:right", "test_mine.py", files=mine
    )
    assert code == 1, text
    assert "no check was collected: is --pyargs lorax_np.verify among the arguments?" in text


def test_a_crash_fails(project):
    code, text = project(*JUDGE, "--lorax-np-subject", "kernels:Crashes")
    assert code == 1
    assert re.search(r"(?m)^CRASH  exact/lora/\d+/y  RuntimeError: no kernel", text), text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lorax-np-subject", "kernels:none"], "expected 'none' in module kernels, got none"),
        pytest.param(
            ["--lorax-np-subject", "kernels:right", "--lorax-np-xfails", "no.txt"],
            "--lorax-np-xfails: expected",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            ["--lorax-np-subject", "kernels:right", "--lorax-np-report", "no/r.json"],
            "--lorax-np-report: expected",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_bad_usage_is_said_in_one_line(project, arguments, says):
    code, text = project("--pyargs", "lorax_np.verify", *arguments)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert re.search(rf"(?m)^ERROR: .*{re.escape(says)}", text), text
    assert "Traceback" not in text


@pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="pytest-xdist is not installed")
def test_workers_share_one_judgement(project):
    """The subject counts its calls: two workers, one judgement."""
    counting = SUBJECTS + (
        "class Counts(Plain):\n"
        "    def run(self, case, gy):\n"
        "        with open('calls.txt', 'a') as file:\n"
        "            file.write('.')\n"
        "        return super().run(case, gy)\n"
    )
    subject = "--lorax-np-subject", "kernels:Counts", "-n", "2"
    code, text = project(*JUDGE, *subject, files={"kernels.py": counting})
    assert code == 0, text
    report = lx.verify.verify(Plain(), level="quick", case="exact/lora")
    assert outcomes(text) == {check.id: "PASSED" for check in report.checks}
    layers = {check.id.rpartition("/")[0] for check in report.checks}
    assert len((project.folder / "calls.txt").read_text()) == len(layers)


def test_the_fixture_runs_a_test_once_for_each_kind(project):
    text = """
from lorax_np.verify.conformance import assert_case
from lorax_np.verify.layers.plain import run

def test_right(lorax_np_case):
    assert_case(lorax_np_case, *run(lorax_np_case, lorax_np_case.gy))

def test_wrong(lorax_np_case):
    assert_case(lorax_np_case, *run(lorax_np_case, 2 * lorax_np_case.gy))
"""
    code, text = project("test_mine.py", "--lorax-np-level", "quick", files={"test_mine.py": text})
    assert code == 1
    assert len(re.findall(r"(?m)^PASSED test_mine.py::test_right\[exact/", text)) >= 12
    assert len(re.findall(r"(?m)^FAILED test_mine.py::test_wrong\[exact/", text)) >= 12
    assert "FAILED test_mine.py::test_right" not in text
    assert {"lora", "lora-dropout", "dora", "dora-full-norm"} <= set(
        re.findall(r"test_right\[exact/([\w-]+)/", text)
    )


def test_without_a_subject_nothing_is_loaded(project):
    mine = """
import sys

def test_mine():
    assert "_lorax_np_pytest" in sys.modules
    assert not {"numpy", "lorax_np", "hypothesis"} & set(sys.modules)
"""
    code, text = project("test_mine.py", files={"test_mine.py": mine})
    assert code == 0, text
    code, text = project("--pyargs", "lorax_np.verify", "--collect-only")
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED, text
