"""The command line, but for what verify judges (verify/test_verify.py): info, refusals, pipes, imports."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from often import one_in

import lorax_np as lx
from lorax_np.cli import main

ROOT = Path(lx.__file__).parents[1]
PIPES = os.name == "posix"


def run(*command, **more):
    """Run Python on the given arguments, with this checkout's package, and every warning an error."""
    environment = {name: value for name, value in os.environ.items() if name != "LORAX_NP_BACKEND"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **more.pop("env", {})}
    settings = {"env": environment, "capture_output": True, "encoding": "utf-8", "timeout": 60}
    return subprocess.run([sys.executable, *command], **{**settings, **more})


def cli(*arguments, **more):
    return run("-m", "lorax_np", *arguments, **more)


def refusal(found, code=2):
    """The one line on standard error of a run that printed nothing else."""
    assert found.returncode == code
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert found.stderr.startswith("lorax-np: ")
    return found.stderr


# ---- info, version, usage ----------------------------------------------------------------------------------


def test_info_says_what_is_here_and_why(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines if line and line != "optional")
    assert found["lorax_np"] == lx.__version__
    assert {name: found[name] for name in lx.backend_info()} == lx.backend_info()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    for module in ("ml_dtypes", "torch", "peft", "jax", "matplotlib", "mpi4py", "hypothesis"):
        there = find_spec(module) is not None
        assert re.fullmatch(
            r"\d+\.\d\S*" if there else r"absent; pip install 'lorax-np\[\w+\]' adds .+", found[module]
        )


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in lx.backend_info()} == lx.backend_info()
    named = {
        "ml_dtypes",
        "mkl",
        "torch",
        "peft",
        "jax",
        "matplotlib",
        "mpi4py",
        "tokenizers",
        "PyYAML",
        "jinja2",
        "hypothesis",
    }
    assert set(found["extras"]) == named


def test_info_names_an_unknown_backend_and_goes_on():
    found = cli("info", "--json", env={"LORAX_NP_BACKEND": "torch"})
    assert found.returncode == 0
    data = json.loads(found.stdout)
    assert data["backend"] == "none"
    assert data["why"] == "LORAX_NP_BACKEND: expected one of numpy, cupy, auto, got 'torch'"


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lorax-np {lx.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["prove"], "invalid choice: 'prove'"),
        (["verify", "--profile", "fp8"], "argument --profile: invalid choice: 'fp8'"),
        (["verify", "--level", "half"], "argument --level: invalid choice: 'half'"),
        (["verify", "--backend", "torch"], "argument --backend: invalid choice: 'torch'"),
        (["verify", "--isolation", "thread"], "argument --isolation: invalid choice: 'thread'"),
        (["verify", "--weights"], "argument --weights: expected one argument"),
        (["verify", "--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_bad_usage_is_code_2_and_says_how(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: lorax-np")
    assert says in err


@pytest.mark.parametrize(
    "arguments",
    one_in(3, [["verify", "--case", "merge", "--level", "quick", "--quiet"], ["info"], ["verify", "nope"]]),
    ids=" ".join,
)
def test_the_module_is_the_entry_point(arguments):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, name = scripts["lorax-np"].partition(":")
    one = cli(*arguments)
    other = run("-c", f"import sys; from {module} import {name}; sys.exit({name}())", *arguments)
    timeless = [re.sub(r"\d+\.\d s", "", found.stdout) for found in (one, other)]
    assert timeless[0] == timeless[1]
    assert (one.returncode, one.stderr) == (other.returncode, other.stderr)


# ---- refusals: one line, no traceback ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "says"),
    one_in(
        2,
        [
            ("nope", "SUBJECT: expected reference, fast, peft or module:attribute, got 'nope'"),
            ("nope:x", "SUBJECT: expected a module that can be imported, got 'nope:x': No module named 'nope'"),
            ("os:nothing", "SUBJECT: expected 'nothing' in module os, got none"),
            ("os:sep", "SUBJECT: expected methods forward and backward, or run, got str"),
            ("os:path", "SUBJECT: expected methods forward and backward, or run, got module"),
            (
                "os:getcwd",
                "SUBJECT: expected methods forward and backward, or run, got builtin_function_or_method",
            ),
            ("os:", "SUBJECT: expected reference, fast, peft or module:attribute, got 'os:'"),
            (":x", "SUBJECT: expected reference, fast, peft or module:attribute, got ':x'"),
            ("..os:x", "SUBJECT: expected reference, fast, peft or module:attribute, got '..os:x'"),
            (
                "./kernel.py:x",
                "SUBJECT: expected reference, fast, peft or module:attribute, got './kernel.py:x'",
            ),
            ("", "SUBJECT: expected reference, fast, peft or module:attribute, got ''"),
        ],
    ),
)
def test_a_subject_that_is_none(subject, says, capsys):
    assert main(["verify", subject]) == 2
    assert capsys.readouterr() == ("", f"lorax-np: {says}\n")


RAISES = {  # what a module holds: what is said of it
    "raise ValueError('two\\nlines')": "ValueError: two",
    "raise KeyError('HOME')": "KeyError: 'HOME'",
    "import sys; sys.exit(0)": "SystemExit: 0",
    "x = (": "SyntaxError: '(' was never closed",
    "from lorax_np import ConfigError; raise ConfigError('mine')": "ConfigError: mine",
    "class x:\n    def __init__(self): raise LookupError('made')": "LookupError: made",
}
CRASHES = [(source, isolation) for source in RAISES for isolation in ("process", "none")]
SHOWN = CRASHES[0], CRASHES[5], CRASHES[10]  # the others are thorough


@pytest.mark.parametrize(
    ("source", "isolation"),
    [one if one in SHOWN else pytest.param(*one, marks=pytest.mark.thorough) for one in CRASHES],
)
def test_a_module_that_raises_on_import_is_a_crash(source, isolation, tmp_path):
    (tmp_path / "kernel.py").write_text(source)
    line = refusal(cli("verify", "kernel:x", "--isolation", isolation, cwd=tmp_path), code=3)
    assert line.startswith(f"lorax-np: kernel:x crashed on import: {RAISES[source]}")


def test_a_module_that_ends_its_process_on_import_is_a_crash(tmp_path):
    (tmp_path / "kernel.py").write_text("import os; os._exit(0)")
    line = refusal(cli("verify", "kernel:x", cwd=tmp_path), code=3)
    assert line.startswith("lorax-np: kernel:x crashed on import: Died: loading: ")
    assert "the process ended with exit code 0" in line


def test_a_module_that_lacks_a_module_of_its_own_says_which(tmp_path):
    (tmp_path / "kernel.py").write_text("import no_such_library")
    assert "No module named 'no_such_library'" in refusal(cli("verify", "kernel:x", cwd=tmp_path))


def test_an_unknown_backend_in_the_environment():
    line = refusal(cli("verify", env={"LORAX_NP_BACKEND": "torch"}))
    assert line == "lorax-np: LORAX_NP_BACKEND: expected one of numpy, cupy, auto, got 'torch'\n"


def test_cupy_where_there_is_none():
    if find_spec("cupy") is not None:
        pytest.skip("CuPy is installed")
    line = refusal(cli("verify", "--backend", "cupy"))
    assert line.startswith("lorax-np: --backend: expected a working cupy, got: CuPy cannot be imported")
    assert "pip install 'lorax-np[cupy12]'" in line
    line = refusal(cli("verify", env={"LORAX_NP_BACKEND": "cupy"}))
    assert line.startswith("lorax-np: LORAX_NP_BACKEND: expected a working cupy, got: CuPy cannot be imported")
    found = cli("verify", "--backend", "auto", "--case", "exact/lora/0", "--quiet")
    assert found.returncode == 0
    assert re.fullmatch(r"lorax_np: \S+=auto uses numpy: CuPy cannot be imported .*\n", found.stderr)


def test_a_backend_is_for_the_engines_own_layers(capsys):
    assert main(["verify", "peft", "--backend", "numpy"]) == 2
    assert capsys.readouterr().err == "lorax-np: --backend: expected the subject reference or fast, got peft\n"


# ---- streams -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PIPES, reason="closed pipes are POSIX's")
@pytest.mark.parametrize(
    ("arguments", "both"),
    [
        pytest.param(["info"], False, marks=pytest.mark.thorough),
        pytest.param(["info"], True, marks=pytest.mark.thorough),
        (["verify", "--case", "exact/lora"], False),
        pytest.param(["verify", "--case", "exact/lora"], True, marks=pytest.mark.thorough),
    ],
)
def test_a_reader_that_went_away_is_no_traceback_and_no_pass(arguments, both, tmp_path):
    """As before `head`, which has left by the time the table comes; 141 is what a shell says of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    errors = (tmp_path / "errors").open("w+")
    with errors:
        found = cli(*arguments, capture_output=False, stdout=write, stderr=write if both else errors)
        os.close(write)
        errors.seek(0)
        assert all(re.fullmatch(r"fp\d\d exact: \d+\n", line) for line in errors)
    assert found.returncode == 141


@pytest.mark.skipif(not PIPES, reason="needs a shell")
def test_into_head():
    command = f"{sys.executable} -m lorax_np info | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"lorax_np    {lx.__version__}\n"


def test_a_terminal_without_greek_letters():
    """On an ASCII stream the table comes with question marks, not with a UnicodeEncodeError."""
    found = cli("verify", "--case", "exact/lora/0", "--profile", "fp32", env={"PYTHONIOENCODING": "ascii"})
    assert found.returncode == 0
    assert "y = xW? + b + Q, Q = s((x?mask)A?B? + bB)" in found.stdout


@pytest.mark.skipif(not PIPES, reason="closes a descriptor")
def test_without_a_standard_output():
    found = cli("info", preexec_fn=lambda: os.close(1), capture_output=False, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr) == (0, "")


# ---- what an import costs ----------------------------------------------------------------------------------


def test_importing_the_engine_loads_numpy_alone():
    heavy = ["torch", "scipy", "cupy", "peft", "ml_dtypes", "hypothesis", "safetensors", "jax"]
    heavy += [
        "argparse",
        "unittest",
        "doctest",
        "multiprocessing",
        "subprocess",
        "asyncio",
        "importlib.metadata",
    ]
    code = "import sys, numpy; before = set(sys.modules); import lorax_np; print(*set(sys.modules) - before)"
    loaded = set(run("-c", code).stdout.split())
    assert "lorax_np.layer" in loaded
    assert not [name for name in loaded if name in heavy or name.partition(".")[0] in heavy]
    assert not [name for name in loaded if name.startswith("lorax_np.verify") or name == "lorax_np.cli"]


def test_importing_the_harness_loads_no_torch():
    code = "import sys, lorax_np as lx; lx.verify.verify; print(*sys.modules)"
    loaded = set(run("-c", code).stdout.split())
    assert "lorax_np.verify.verdict" in loaded
    assert not {"torch", "peft", "scipy", "cupy", "hypothesis"} & {name.partition(".")[0] for name in loaded}


def test_importing_is_quick():
    """Best of five on a processor, beyond what NumPy itself takes; the first may have to compile."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def seconds(code):
        best = float("inf")
        for _ in range(5):
            before = os.times()
            assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
            after = os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            best = min(best, spent)
        return best

    bare, numpy, ours = seconds("pass"), seconds("import numpy"), seconds("import lorax_np")
    print(f"import lorax_np: {ours - bare:.3f} s, of which {numpy - bare:.3f} s are NumPy's")
    assert ours - numpy < 0.2
