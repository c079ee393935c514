"""Whatever a subject does to its process is a verdict that says so, and never the end of the judge."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from often import one_in

import lorax_np as lx
from lorax_np.verify import isolate
from lorax_np.verify.batteries.tensors import answer
from lorax_np.verify.cases import MIDDLE, SMALL, Case, grid
from lorax_np.verify.conventions import Spec, spec_of
from lorax_np.verify.isolate import Died, GaveUp, Hung, frames, isolated

HERE = Path(__file__).parent / "subjects"
POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
CASES = list(grid("exact", SMALL, "fp32", Spec(norm_gradient=(False, True)), 0, "quick"))[::4]
CASE = CASES[0]


@pytest.fixture(autouse=True)
def among_the_misbehaving(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def start():
    """Start a subject of misbehaving.py, and end it with the test."""
    started = []

    def begin(name, timeout=30.0, loading=60.0):
        started.append(
            isolated(f"misbehaving:{name}" if ":" not in name else name, timeout=timeout, loading=loading)
        )
        return started[-1]

    yield begin
    for subject in started:
        subject.close()


def ask(subject, case=CASE):
    return subject.run(case, case.gy)


def test_a_right_subject_gives_the_same_through_the_pipe(start):
    subject, right = start("Right"), lx.verify.subjects.reference()
    assert subject.spec == right.spec
    for case in [*CASES, *grid("complex", MIDDLE, "fp64", Spec(norm_gradient=(True,)), 0, "quick")]:
        got, want = answer(subject, case), answer(right, case)
        assert {name: v.tobytes() for name, v in got.items()} == {name: v.tobytes() for name, v in want.items()}
        assert all(got[name].dtype == v.dtype and got[name].shape == v.shape for name, v in want.items())
    assert hasattr(subject, "init")
    assert not hasattr(subject, "backward")
    config = lx.LoraConfig(r=2, use_dora=True)
    W = CASE.W
    assert subject.init(W, config, 3).keys() == right.init(W, config, 3).keys()


def test_the_whole_harness_runs_through_the_pipe(start):
    subject = start("Right")
    for battery in ("merge", "conduct", "start", "exact/lora/1"):
        report = lx.verify.verify(subject, level="quick", case=battery)
        assert report.passed, str(report)
        assert report.count("crash") == report.count("fail") == report.count("not run") == 0


SAID = {  # what it does: what is said of it
    "Segfault": r"Died: run: SIGSEGV, segmentation fault, in (misbehaving|__init__)\.py line \d+, \w+$",
    "Aborts": r"Died: run: SIGABRT, aborted, in misbehaving\.py line \d+, act$",
    "Leaves": r"Died: run: the process ended with exit code 0$",
    "Exits": r"SystemExit: enough$",
    "Loops": r"Hung: run: no answer within 0\.5 s, killed, in misbehaving\.py line \d+, act$",
    "Sleeps": r"Hung: run: no answer within 0\.5 s, killed, in misbehaving\.py line \d+, act$",
    "Raises": r"ZeroDivisionError: of the subject's own$",
    "Huge": r"Excess: an array of shape \(3000, 3000\), 36000000 bytes or more; at most \d+ are taken$",
    "HugeView": r"Excess: an array of shape \(1000000000, 1000000\), 4000000000000000 bytes or more; at",
    "Forks": r"Forked: the subject forked, and the child came back out of the call$",
    "ForksAndFails": r"Forked: the subject forked, and the child came back out of the call$",
    "Closes": r"(Died|OSError): ",
    "Garbage": r"Garbled: run: expected an answer, got b'",
    "Forged": r"Garbled: run: the answer is garbled: ",
    "Promised": r"Garbled: run: expected at most \d+ bytes, got an answer of 2 and 1152921504606846976$",
}
ALWAYS = "Segfault", "Loops", "Huge", "Forks", "Forged"  # one of each kind; the others are thorough


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.thorough) for name in SAID]
)
@POSIX
def test_what_it_does_is_said(start, name, monkeypatch):
    monkeypatch.setattr(isolate, "LIVES", 2)  # each is a process to start
    subject = start(name, timeout=0.5 if name in ("Loops", "Sleeps") else 30.0)
    subject.ready()
    report = lx.verify.verify(subject, level="quick", case="exact/lora/1")
    assert report.exit_code == 3
    assert {check.verdict for check in report.checks} == {"crash"}
    notes = {check.note for check in report.checks}
    assert any(re.match(SAID[name], note) for note in notes), notes


@pytest.mark.parametrize(
    ("name", "tensor", "note"),
    [
        ("NaN", "A", "not finite: nan"),
        ("Shape", "A", "expected shape"),
        ("Dtype", "B", "expected dtype float32, got float16"),
    ],
)
def test_wrong_arrays_arrive_as_they_are(start, name, tensor, note):
    report = lx.verify.verify(start(name), level="quick", case="exact/lora/1")
    assert report.exit_code == 1
    bad = [check for check in report.checks if check.verdict != "pass"]
    assert {check.tensor for check in bad} == {tensor}
    assert all(note in check.note for check in bad)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("NoArray", "backward: expected an array as A, got set"),
        ("NoPair", "run: expected y and a dict of gradients, got tuple"),
    ],
)
def test_what_is_no_array_is_named(start, name, note):
    (check,) = lx.verify.verify(start(name), level="quick", case="exact/lora/1").checks
    assert (check.verdict, check.note) == ("crash", note)


def test_what_it_does_not_cover_is_not_run(start):
    subject = start("NotHere")
    assert lx.verify.verify(subject, level="quick", case="exact/lora/1").passed
    report = lx.verify.verify(subject, level="quick", case="exact/dora/1")
    assert {(check.verdict, check.note) for check in report.checks} == {("not run", "no DoRA here")}


def test_writing_to_its_inputs_is_seen(start):
    report = lx.verify.verify(start("Writes"), level="quick", case="conduct")
    bad = {check.tensor: check.note for check in report.checks if check.verdict != "pass"}
    assert bad["nothing that is given is written to"] == "written to: A"
    said = bad["strided, transposed, offset and repeated arrays"]
    assert said == "ValueError: assignment destination is read-only"


@pytest.mark.parametrize("name", one_in(3, ["Prints", "PrintsInAThread", "LeavesAChild", "ForksWell", "Asks"]))
@POSIX
def test_the_harmless_passes(start, name):
    subject = start(name)
    want = lx.verify.subjects.reference().run(CASE, CASE.gy)
    for _ in range(2):
        assert ask(subject)[0].tobytes() == want[0].tobytes()
    if name.startswith("Prints"):
        words = "to the system's output" if name == "Prints" else "from a thread"
        for _ in range(500):  # a thread prints when it comes to it
            if words in subject.printed:
                break
            time.sleep(0.01)
        assert words in subject.printed
        assert len(subject.printed) <= 1 << 14


@POSIX
def test_children_end_with_their_subject(start, monkeypatch, tmp_path):
    import fcntl

    monkeypatch.setenv("HELD_BY_A_CHILD", str(tmp_path / "held"))
    subject = start("LeavesAChild")
    ask(subject)
    with (tmp_path / "held").open("w") as held:
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        subject.close()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.01)
    raise AssertionError("the child lives on")


@POSIX
def test_another_worker_takes_over_and_not_forever(start, monkeypatch):
    monkeypatch.setattr(isolate, "LIVES", 2)
    subject = start("SegfaultOnce")
    one = replace(CASE, id="exact/2")
    for _ in range(2):
        ask(subject)
        with pytest.raises(Died, match="SIGSEGV"):
            ask(subject, one)
    with pytest.raises(GaveUp, match="not asked again after what came before: Died: run: SIGSEGV"):
        ask(subject)
    assert hasattr(subject, "run")
    assert spec_of(subject).strided


@POSIX
def test_an_endless_loop_is_waited_for_twice(start):
    subject = start("Loops", timeout=0.3)
    for _ in range(2):
        with pytest.raises(Hung, match=r"no answer within 0\.3 s"):
            ask(subject)
    with pytest.raises(GaveUp):
        ask(subject)


def test_loading(start, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raises_on_import.py").write_text("raise RuntimeError('on import')")
    (tmp_path / "loops_on_import.py").write_text("while True: pass")
    (tmp_path / "exits_on_import.py").write_text("import sys; sys.exit(3)")
    for name, kind, says in (
        ("no_such_module:Subject", lx.verify.subjects.NoSubject, "expected a module that can be imported"),
        ("misbehaving:Nobody", lx.verify.subjects.NoSubject, "expected 'Nobody' in module misbehaving"),
        ("raises_on_import:x", Exception, "on import"),
        ("exits_on_import:x", Exception, "3"),
        ("loops_on_import:x", Hung, r"loading: no answer within 1 s, killed, in loops_on_import.py line 1"),
    ):
        with pytest.raises(kind, match=says) as caught:
            start(name, loading=1.0 if name.startswith("loops") else 60.0).ready()
        assert caught.type.__name__ in ("NoSubject", "RuntimeError", "SystemExit", "Hung")


@POSIX
def test_a_constructor_that_dies(start):
    subject = start("Constructs")
    with pytest.raises(Died, match="loading: SIGSEGV"):
        subject.ready()
    with pytest.raises(GaveUp, match="not loaded again after what came before: Died: loading: SIGSEGV"):
        hasattr(subject, "run")


def test_a_spec_that_is_none(start):
    with pytest.raises(lx.ConfigError, match=r"^spec: expected a lorax_np.verify.Spec, got str$"):
        spec_of(start("NoSpec"))


def test_objects_go_over_by_pickling(start):
    import misbehaving

    subject = isolated(misbehaving.Right())
    assert set(answer(subject, CASE)) == set(answer(start("Right"), CASE))
    subject.close()
    with pytest.raises(
        lx.ConfigError, match=r"^subject: expected a name or an object that can be pickled, got"
    ):
        isolated(lambda: None)
    with pytest.raises(ValueError, match=r"^timeout: expected seconds above 0, got 0$"):
        isolated("reference", timeout=0)


def test_layouts_survive_the_pipe():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    still = values[:, ::2]
    still.flags.writeable = False
    views = [values[::-1, ::-2], values.T, np.broadcast_to(values[0], (3, 6)), values[:0, ::-1], still, values]
    stream = frames.request_bytes(views)
    back, limit = frames.read_request(lambda n, parts=[stream]: parts.append(parts[-1][n:]) or parts[-2][:n])
    assert limit > len(stream)
    for got, want in zip(back, views, strict=True):
        assert got.tolist() == want.tolist()
        assert got.strides == want.strides or not want.size
        assert got.flags.writeable == want.flags.writeable


def test_the_worker_has_an_entry_of_its_own():
    """A head of nothing behind a greeting: the module's own command line."""
    command = [sys.executable, "-P", "-m", "lorax_np.verify.isolate", "reference"]
    done = subprocess.run(
        command,
        input=b"",
        capture_output=True,
        timeout=60,
        cwd=Path(lx.__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(lx.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(frames.MARK)
    assert b'"hello"' in done.stdout


def test_a_judge_that_is_killed_takes_its_worker_along(tmp_path):
    """The worker's input ends, and with it the worker."""
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("the system has no SIGKILL")
    code = (
        "from lorax_np.verify.isolate import isolated; s = isolated('reference').ready(); "
        "print(s._worker._process.pid, flush=True); import time; time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(lx.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env) as judge:
        worker = int(judge.stdout.readline())
        judge.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_case_class_is_whole():
    assert isinstance(CASE, Case)
    assert set(frames.arrays_of((CASE, CASE.gy))) == {*(f"0.{name}" for name in CASE.arrays()), "1"}
