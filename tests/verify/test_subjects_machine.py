"""Subjects of machine code: a shared library on guarded memory, and programs that read and write files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.verify import subjects
from lorax_np.verify.batteries.tensors import answer, judge_case, with_truth
from lorax_np.verify.bounds.worst import bounds
from lorax_np.verify.cases import MIDDLE, PROFILES, SMALL, UNIT, grid
from lorax_np.verify.conventions import Spec
from lorax_np.verify.isolate import isolated
from lorax_np.verify.subjects.shared_library import PLACES, Fence
from lorax_np.verify.truths import exact, truth

HERE = Path(__file__).parent / "subjects"


def plain_grid(battery, shapes, profile, level):
    """The grid's layers without DoRA."""
    return (case for case in grid(battery, shapes, profile, Spec(), 0, level) if case.m is None)


CASES = list(plain_grid("exact", SMALL, "fp32", "full"))
COVERED = [case for case in CASES if case.bB is None]
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="pages are protected by mprotect")


def judged(subject, cases=COVERED, profile="fp32"):
    """Every tensor of some cases against the definition, in float64, and the worst-case bounds."""
    for case in cases:
        want = {"y": truth.dense(case), **truth.gradients(case)}
        yield from judge_case(subject, "exact", case, want, with_truth(case, UNIT[PROFILES[profile]]))


def verdicts(checks):
    return {check.verdict for check in checks}


def notes(checks):
    return {check.note for check in checks if check.note}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Compile lora.c with some options, once each."""
    made = {}

    def build(*options):
        if options not in made:
            made[options] = tmp_path_factory.mktemp("built") / "liblora.so"
            command = [
                "gcc",
                "-shared",
                "-fPIC",
                "-w",
                *options,
                str(HERE / "lora.c"),
                "-o",
                str(made[options]),
            ]
            subprocess.run(command, check=True)
        return made[options]

    return build


# ---- shared libraries --------------------------------------------------------------------------------------


@needs_gcc
@pytest.mark.parametrize("options", [("-O0",), ("-O3", "-ffast-math", "-march=native")], ids="".join)
def test_a_right_library_passes(built, options):
    subject = subjects.ctypes(built(*options))
    checks = [
        *judged(subject),
        *judged(subject, [c for c in plain_grid("m", MIDDLE, "fp32", "quick") if c.bB is None]),
    ]
    assert verdicts(checks) == {"pass"}, notes(checks)
    assert {check.tensor for check in checks} == {"y", "x", "A", "B", "b"}
    assert verdicts(judged(subject, [case for case in CASES if case.bB is not None])) == {"not run"}
    report = lx.verify.verify(isolated(subject), level="quick", case="exact/lora")
    assert notes(report.checks) == {"lora_fwd takes no bB"}


@needs_gcc
def test_a_library_in_double_precision(built):
    subject = subjects.ctypes(built("-O2", "-DREAL=double"), dtype="float64")
    cases = [case for case in plain_grid("exact", SMALL, "fp64", "quick") if case.bB is None]
    assert verdicts(judged(subject, cases, "fp64")) == {"pass"}
    assert notes(judged(subject)) == {"the library computes in float64"}


@needs_gcc
@POSIX
@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        (1, {"StrayWrite: lora_fwd wrote past the end of y", "Died: run: SIGSEGV, segmentation fault"}),
        (2, {"Died: run: SIGSEGV, segmentation fault"}),
        (3, {"StrayWrite: lora_fwd wrote into W"}),
        pytest.param(
            4,
            {"StrayWrite: lora_fwd wrote before z", "Died: run: SIGSEGV, segmentation fault"},
            marks=pytest.mark.thorough,
        ),
        pytest.param(5, {"Died: run: SIGSEGV, segmentation fault"}, marks=pytest.mark.thorough),
        pytest.param(7, {"StrayWrite: lora_bwd wrote into gy"}, marks=pytest.mark.thorough),
    ],
)
def test_stray_reads_and_writes_are_caught(built, flaw, says):
    subject = isolated(subjects.ctypes(built("-O0", f"-DFLAW={flaw}")))
    checks = list(judged(subject, COVERED[:6]))
    subject.close()
    found = {check.note for check in checks if check.verdict == "crash"}
    assert found == says, notes(checks)


@needs_gcc
def test_a_gradient_that_is_not_a_number(built):
    checks = list(judged(subjects.ctypes(built("-O0", "-DFLAW=6")), COVERED[:2]))
    assert {check.tensor for check in checks if check.verdict == "fail"} == {"A"}


@needs_gcc
def test_what_is_asked_of_a_library(built, tmp_path):
    path = built("-O0")
    for given, says in (
        ({"order": "N d_in x x"}, "^order: expected names once each, of A, B, "),
        ({"bwd_order": "N k"}, "^bwd_order: expected names once each, of A, B, "),
        ({"dtype": "float16"}, "^dtype: expected one of float32, float64, got 'float16'$"),
    ):
        with pytest.raises(lx.ConfigError, match=says):
            subjects.ctypes(path, **given)
    with pytest.raises(LookupError, match=r"^path: expected a shared library, got "):
        subjects.ctypes(tmp_path / "nothing.so")
    missing = subjects.ctypes(path, fwd="lora_forward")
    assert notes(judged(missing, COVERED[:1])) == {
        "LookupError: expected a function lora_forward in liblora.so, got none"
    }


@pytest.mark.skipif(shutil.which("rustc") is None, reason="needs rustc")
def test_a_library_in_rust(tmp_path):
    path = tmp_path / "liblora_rs.so"
    subprocess.run(
        ["rustc", "-O", "--crate-name", "lora_rs", str(HERE / "lora.rs"), "-o", str(path)], check=True
    )
    subject = subjects.ctypes(
        path,
        order="N d_in d_out r s x W A B y z",
        bwd_order="N d_in d_out r s x W A B z gy gx gA gB",
        dtype="float64",
    )
    checks = list(judged(subject, plain_grid("exact", SMALL, "fp64", "full"), "fp64"))
    assert verdicts(checks) == {"pass", "not run"}
    assert {check.tensor for check in checks if check.verdict == "pass"} == {"y", "x", "A", "B"}
    assert notes(checks) == {f"lora_fwd takes no {name}" for name in ("b", "bB", "mask")}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(5, 7), (1024, 3), (0, 4), (3,)])
def test_a_fence_holds_its_array(place, shape):
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    fence = Fence(value, place)
    assert fence.array.ctypes.data == fence.address or not value.size
    assert np.array_equal(fence.array, value)
    assert fence.damage(written=False) == ""
    if value.size:
        fence.array[0] = -1
        assert fence.damage(written=False) == "into"
        assert fence.damage(written=True) == ""
    for where, part in (("before", fence._before), ("past the end of", fence._after)):
        if part.size:
            part[-1] ^= 1
            assert fence.damage(written=True) == where
            part[-1] ^= 1


# ---- programs ----------------------------------------------------------------------------------------------


@needs_node
def test_a_program_in_javascript():
    subject = subjects.command(["node", HERE / "lora.js"])
    checks = list(
        judged(subject, [*CASES[:4], *CASES[-4:], next(grid("m", MIDDLE, "fp32", Spec(), 3, "quick"))])
    )
    assert verdicts(checks) == {"pass"}, notes(checks)
    assert {check.tensor for check in checks} == {"y", "x", "A", "B", "b", "bB"}
    exactly = judge_case(subject, "exact", CASES[1], exact.truth(CASES[1]), bounds(CASES[1], UNIT["float32"]))
    assert {check.tensor: check.verdict for check in exactly}["W"] == "pass"
    dora = next(case for case in grid("exact", SMALL, "fp32", Spec(), 0, "quick") if case.m is not None)
    assert notes(judged(subject, [dora])) == {"DoRA is not covered"}


PROGRAMS = {  # what a program does with its two paths: what is said of it
    "import time; time.sleep(60)": "TimeoutError: the program did not end within 1 s, killed",
    "sys.exit(3)": "RuntimeError: the program ended with exit code 3",
    "sys.exit('no such kernel')": "RuntimeError: the program ended with exit code 1: no such kernel",
    "import os; os.abort()": "RuntimeError: the program was ended by signal SIGABRT",
    "pass": "FileNotFoundError: out.safetensors: expected the program to write it, got none",
    "open(back, 'wb').write(b'12345')": "ValueError: out.safetensors: expected at least 10 bytes",
    "open(back, 'wb').write(open(there, 'rb').read()[:-1])": "ValueError: out.safetensors: 'x': data_offsets: ",
    "import shutil; shutil.copy(there, back)": "ValueError: out.safetensors: expected names of y, gx, ",
    "import os; os.mkdir(back)": "ValueError: out.safetensors: expected a safetensors file, got a directory",
    "print('x' * 10**6); sys.stderr.write('y' * 10**6); sys.exit(77)": "yyyyyyyyyy",
    "import subprocess; subprocess.Popen(['sleep', '60']); sys.exit(2)": "RuntimeError: the program ended",
}


@pytest.mark.parametrize("does", PROGRAMS)
def test_a_program_that_does_not_get_there(does):
    if "sleep" in does and shutil.which("sleep") is None:
        pytest.skip("needs sleep")
    code = f"import sys; there, back = sys.argv[1:]; {does}"
    subject = subjects.command(
        [sys.executable, "-S", "-c", code], timeout=1.0 if "time.sleep" in does else 60.0
    )
    (check,) = judged(subject, COVERED[:1])
    assert check.verdict == ("not run" if "77" in does else "crash")
    assert check.note.startswith(PROGRAMS[does])
    assert "\n" not in check.note
    assert len(check.note) < 250


def test_what_a_program_reads(tmp_path):
    """The file, tensor by tensor, and the numbers that are in no tensor."""
    kept = tmp_path / "kept.safetensors"
    code = f"import shutil, sys; shutil.copy(sys.argv[1], {str(kept)!r}); sys.exit(77)"
    case = CASES[-1]
    with pytest.raises(NotImplementedError, match=r"^the program does not cover this case$"):
        subjects.command([sys.executable, "-S", "-c", code]).run(case, case.gy)
    file = lx.open_safetensors(kept)
    assert file.names == tuple(sorted(case.arrays()))
    assert all(np.array_equal(file[name], value) for name, value in case.arrays().items())
    assert int.from_bytes(kept.read_bytes()[:8], "little") % 8 == 0
    given = json.loads(file.metadata["case"])
    assert given["schema"] == "lorax_np.command/1"
    assert given["scaling"] == case.scaling
    assert given["wanted"] == [f"g{name}" for name in case.wanted]


def test_what_is_asked_of_a_program():
    with pytest.raises(LookupError, match=r"^argv: expected a program that can be run, got no-such-program$"):
        subjects.command(["no-such-program"])
    for argv in ([], "node lora.js"):
        with pytest.raises(
            lx.ConfigError, match=r"^argv: expected a list of a program and its arguments, got "
        ):
            subjects.command(argv)
    with pytest.raises(lx.ConfigError, match=r"^dtype: expected float32 or float64, got 'int8'$"):
        subjects.command([sys.executable], dtype="int8")
    double = subjects.command([sys.executable], dtype="float64")
    assert notes(judged(double, COVERED[:1])) == {"the program computes in float64"}
    assert answer(subjects.reference(), COVERED[0])
