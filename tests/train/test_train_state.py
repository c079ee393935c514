"""State on the disk is whole at every moment; a run that goes on is the run that was never interrupted."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dying import dying
from killed_run import compare
from often import once_each, one_in
from small_run import examples, model, settings, started

from lorax_np.errors import ConfigError, FormatError
from lorax_np.train import output, train
from lorax_np.train import state as saves
from lorax_np.train.log import Log, records
from lorax_np.train.state import latest_step, load_state, save_state
from lorax_np.train.step import parameters


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """What takes the longest of a short run."""
    monkeypatch.setattr(output, "picture", lambda rows: None)


ARRAYS = {"p.a": np.arange(3, dtype="float32"), "o.m": np.ones((2, 2))}
FIGURES = "event", "step", "epoch", "loss", "lr", "grad_norm", "labels", "tokens", "perplexity", "skipped"


# ---- saves -------------------------------------------------------------------------------------------------


def test_saves_are_read_back_and_the_last_two_stay(tmp_path):
    assert latest_step(tmp_path) is None
    with pytest.raises(FormatError, match="expected a save to go on from, got none"):
        load_state(tmp_path)
    about = {"step": 0, "third": 1 / 3}
    for step in (0, 5, 7):
        save_state(tmp_path, step, ARRAYS, {**about, "step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-5", "step-7"]
    found = load_state(tmp_path)
    assert found.step == 7
    assert found.about["third"] == 1 / 3
    assert {name: value.tolist() for name, value in found.tensors.items()} == {
        name: value.tolist() for name, value in ARRAYS.items()
    }
    before = (tmp_path / "step-7" / "state.json").stat().st_mtime_ns
    save_state(tmp_path, 7, {}, about)  # already there
    assert (tmp_path / "step-7" / "state.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("moment", ["write_safetensors", "write_whole", "sync_folder"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, moment):
    """Whatever fails, the last save is whole, nothing unfinished stays, and one line says so."""
    save_state(tmp_path, 5, ARRAYS, {"step": 5})
    monkeypatch.setattr(saves, moment, full)
    with pytest.raises(OSError, match="step-9: expected room for a save, got: No space left on device; step 5"):
        save_state(tmp_path, 9, ARRAYS, {"step": 9})
    monkeypatch.undo()
    assert load_state(tmp_path).step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-5"]
    save_state(tmp_path, 9, ARRAYS, {"step": 9})
    assert load_state(tmp_path).step == 9


def test_at_every_call_a_whole_save_is_there(tmp_path):
    """Killed at the k-th call that changes the disk, for every k: the last save or the new one is whole."""
    for k in range(1, 100):
        folder = tmp_path / f"{k}"
        for step in (3, 5):
            save_state(folder, step, {"p.a": np.full(3, step)}, {"step": step})
        with dying(k) as killed:
            save_state(folder, 7, {"p.a": np.full(3, 7)}, {"step": 7})
        found = load_state(folder)
        assert found.step in ((5, 7) if killed else (7,))
        assert found.tensors["p.a"].tolist() == [found.step] * 3
        save_state(folder, 9, {"p.a": np.full(3, 9)}, {"step": 9})
        assert load_state(folder).step == 9
        assert not list(folder.glob("*.tmp"))
        if not killed:
            break
    assert 12 < k < 99  # so many calls there are


def full(*arguments, **more):
    raise OSError(28, "No space left on device")


def test_what_a_killed_process_leaves_is_not_read(tmp_path):
    save_state(tmp_path, 5, ARRAYS, {"step": 5})
    (tmp_path / "step-6.tmp").mkdir()
    (tmp_path / "step-6").mkdir()  # renamed, but never said to be the latest
    (tmp_path / ".latest.tmp").write_text("step-6")
    assert load_state(tmp_path).step == 5
    save_state(tmp_path, 6, ARRAYS, {"step": 6})
    assert load_state(tmp_path).step == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-5", "step-6"]


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        ("latest", "../../elsewhere\n", "expected one line step-N"),
        ("latest", "step-6\n", "expected the directory step-6"),
        ("step-5/state.json", '{"step": 4}', "step: expected 5, got 4"),
        ("step-5/state.json", "{", "expected a JSON object"),
        ("step-5/tensors.safetensors", "short", "tensors.safetensors"),
    ],
)
def test_damaged_saves_are_refused(tmp_path, file, content, wanted):
    save_state(tmp_path, 5, ARRAYS, {"step": 5})
    (tmp_path / file).write_text(content)
    with pytest.raises(FormatError, match=wanted):
        load_state(tmp_path)


def test_lines_are_cut_where_a_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    for step in (0, 2, 4):
        log.write({"step": step, "loss": 0.1 * step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    log = Log(path, after=2)
    log.write({"step": 3})
    log.close()
    assert records(path) == [{"step": 0, "loss": 0.0}, {"step": 2, "loss": 0.2}, {"step": 3}]
    assert path.read_text().count("\n") == 3


# ---- runs that go on ---------------------------------------------------------------------------------------


def run(out, *, stop=None, resume=False, rows=None, base=None, seed=0, **more):
    """A run in a directory, ended after a step where that is asked for."""
    found, adapters, sites, lora = started(seed)
    ends = [] if stop is None else [lambda record: record["event"] == "train" and record["step"] >= stop]
    more = {"steps_per_report": 1, **more}
    return train(
        base or found,
        adapters,
        rows or examples(),
        settings(**more),
        sites=sites,
        lora=lora,
        out=out,
        resume=resume,
        callbacks=ends,
    )


def figures(out):
    return [{name: r[name] for name in FIGURES if name in r} for r in records(out / "metrics.jsonl")]


@pytest.mark.parametrize(("optimizer", "at"), once_each(["adamw", "sgd"], [4, 1]))
def test_a_run_that_was_ended_goes_on_bit_for_bit(tmp_path, optimizer, at):
    more = {"optimizer": optimizer, "momentum": 0.5 if optimizer == "sgd" else 0.0, "save_every": 3}
    whole = run(tmp_path / "whole", **more)
    first = run(tmp_path / "parts", stop=at, **more)
    assert (first.ended, first.step, first.after) == ("interrupted", at, {})
    rest = run(tmp_path / "parts", resume=True, **more)
    assert (rest.ended, rest.step, rest.before) == ("done", 6, whole.before)
    assert rest.after == whole.after
    for name, value in parameters(whole.trained).items():
        assert np.array_equal(parameters(rest.trained)[name], value), name
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    for file in ("adapter_model.safetensors", "state/step-6/tensors.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    again = run(tmp_path / "parts", resume=True, **more)  # nothing is left to do
    assert (again.ended, again.after) == ("done", whole.after)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_a_longer_run_goes_on_after_a_shorter_one(tmp_path):
    run(tmp_path / "run")
    found = run(tmp_path / "run", resume=True, iters=8)
    assert found.step == 8
    assert [r["step"] for r in records(tmp_path / "run" / "metrics.jsonl") if r["event"] == "train"] == [
        *range(1, 9)
    ]


def test_what_is_not_the_same_run_is_refused(tmp_path):
    run(tmp_path / "run", stop=2)
    wanted = r"learning_rate: expected 0.01, as the run began, got 0.02"
    with pytest.raises(ConfigError, match=wanted):
        run(tmp_path / "run", resume=True, learning_rate=0.02)
    with pytest.raises(ConfigError, match=r"data: expected \w+, that of the run to resume, got"):
        run(tmp_path / "run", resume=True, rows=examples(seed=2))
    with pytest.raises(ConfigError, match=r"base: expected \w+, that of the run"):
        run(tmp_path / "run", resume=True, base=model(seed=3))
    with pytest.raises(FormatError, match="expected a new directory, or resume, got one with state in it"):
        run(tmp_path / "run")
    path = tmp_path / "run" / "state" / "step-2" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "masks": "others"}))
    with pytest.raises(ConfigError, match="masks: expected others"):
        run(tmp_path / "run", resume=True)


def test_arrays_of_another_run_are_refused(tmp_path):
    run(tmp_path / "run", stop=2)
    base, adapters, sites, lora = started()
    smaller = {name: replace(a, A=a.A[:2], B=a.B[:, :2]) for name, a in adapters.items()}
    config = settings(steps_per_report=1)
    with pytest.raises(FormatError, match=r"down_proj.A: expected float32 \(2, 20\), set by the parameters"):
        train(base, smaller, examples(), config, sites=sites, lora=lora, out=tmp_path / "run", resume=True)


def test_a_full_disk_is_one_line_and_the_last_save_is_whole(tmp_path, monkeypatch):
    """Files past a size cannot be written, by the system's own limit, in the middle of a run."""
    code = (
        "import resource, signal, sys; sys.path[:0] = {paths}\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from small_run import examples, settings, started\n"
        "from lorax_np.train import train\n"
        "def limit(record):\n"
        "    if record['event'] == 'train' and record['step'] == 3:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "base, adapters, sites, lora = started()\n"
        "try:\n"
        "    train(base, adapters, examples(), settings(steps_per_report=1), sites=sites, lora=lora,\n"
        "          out={out}, callbacks=[limit])\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    out = tmp_path / "run"
    code = code.format(paths=paths, out=repr(str(out)))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (
        found.stdout
        == f"{out}/state/step-4: expected room for a save, got: File too large; step 2 is saved, whole\n"
    )
    assert load_state(out / "state").step == 2
    assert run(out, resume=True).step == 6


CHILD = """
import sys; sys.path[:0] = {paths}
from small_run import examples, settings, started
from lorax_np.train import train
base, adapters, sites, lora = started()
say = lambda record: print(record["event"], record["step"], flush=True)
config = settings(iters=4000, steps_per_report=1, save_every=4000)
found = train(base, adapters, examples(), config, sites=sites, lora=lora, out={out}, callbacks=[say])
print("ended", found.ended, found.step)
"""


@pytest.mark.parametrize("number", one_in(3, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
def test_the_first_signal_ends_after_the_step(tmp_path, number):
    code = CHILD.format(
        paths=[str(Path(__file__).parents[2]), str(Path(__file__).parent)], out=repr(str(tmp_path / "run"))
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in child.stdout:
        if line.startswith("train"):
            os.kill(child.pid, number)
            break
    rest, errors = child.communicate(timeout=60)
    last = rest.splitlines()[-1].split()
    assert last[:2] == ["ended", "interrupted"]
    assert load_state(tmp_path / "run" / "state").step == int(last[2])
    assert "stopping after this step" in errors


def test_a_hang_up_that_is_ignored_stays_so(tmp_path):
    """As nohup has it: the run goes on to its end."""
    code = CHILD.format(
        paths=[str(Path(__file__).parents[2]), str(Path(__file__).parent)], out=repr(str(tmp_path / "run"))
    )
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + code.replace("4000", "6")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line == "train 2\n":
            os.kill(child.pid, signal.SIGHUP)
            break
    rest, _ = child.communicate(timeout=60)
    assert rest.splitlines()[-1] == "ended done 6"


def test_a_terminal_that_closes_ends_after_the_step(tmp_path):
    """Of which shell and system may both tell, and to which nothing more can be said."""
    code = CHILD.format(
        paths=[str(Path(__file__).parents[2]), str(Path(__file__).parent)], out=repr(str(tmp_path / "run"))
    )
    twice = (
        "import fcntl, os, signal, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "def say(record):\n"
        '    print(record["event"], record["step"], flush=True)\n'
        "    stop = getattr(signal.getsignal(signal.SIGHUP), '__self__', None)\n"
        "    if stop and stop.asked: os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    code = code.replace('say = lambda record: print(record["event"], record["step"], flush=True)', twice)
    terminal, other = pty.openpty()
    both = dict.fromkeys(("stdin", "stdout", "stderr"), other)
    child = subprocess.Popen([sys.executable, "-c", code], **both, start_new_session=True)
    os.close(other)
    said = b""
    while b"train 2" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)  # the system sends SIGHUP to whom it was the terminal of
    assert child.wait(timeout=60) == 0
    saved = load_state(tmp_path / "run" / "state").step
    assert 2 <= saved < 4000
    assert records(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == saved


def test_the_second_signal_ends_at_once(tmp_path):
    """In the middle of whatever it is, here a callback that would take a minute; the last save is whole."""
    code = CHILD.format(
        paths=[str(Path(__file__).parents[2]), str(Path(__file__).parent)], out=repr(str(tmp_path / "run"))
    )
    code = code.replace("save_every=4000", "save_every=2").replace(
        'say = lambda record: print(record["event"], record["step"], flush=True)',
        "import time\n"
        "def say(record):\n"
        '    print(record["event"], record["step"], flush=True)\n'
        '    if (record["event"], record["step"]) == ("train", 3): time.sleep(60)',
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in child.stdout:
        if line == "train 3\n":
            began = time.monotonic()
            os.kill(child.pid, signal.SIGINT)
            time.sleep(0.3)
            assert child.poll() is None  # the first one waits for the step, and for who is told of it
            os.kill(child.pid, signal.SIGINT)
            break
    _, errors = child.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert "KeyboardInterrupt" in errors
    assert load_state(tmp_path / "run" / "state").step == 2
    assert run(tmp_path / "run", resume=True, iters=4000, stop=4, save_every=2).step == 4


def killed_at(folder, k):
    """A run killed at the k-th call that changes the disk, then gone on with: whether it came so far."""
    more = {"iters": 3, "save_every": 1}
    if not (folder / "whole").exists():
        run(folder / "whole", **more)
    both = folder / f"{k}", folder / "whole"
    with dying(k) as killed:
        run(both[0], **more)
    run(both[0], resume=True, **more)
    assert figures(both[0]) == figures(both[1])
    names = [sorted(str(path.relative_to(out)) for path in out.rglob("*")) for out in both]
    assert names[0] == names[1]
    for file in ("adapter_model.safetensors", "adapter_config.json", "state/step-3/tensors.safetensors"):
        assert (both[0] / file).read_bytes() == (both[1] / file).read_bytes()
    return bool(killed)


@pytest.mark.parametrize("k", one_in(3, [26, 1, 7, 33, 59]))
def test_a_run_killed_at_a_call_ends_in_the_same_bytes(tmp_path, k):
    """Adapter, moments, figures, and the names of all files."""
    assert killed_at(tmp_path, k)


@pytest.mark.thorough
def test_a_run_killed_at_any_call_ends_in_the_same_bytes(tmp_path):
    k = 1
    while killed_at(tmp_path, k):
        k += 1
    assert k > 90  # so many calls there are


def test_runs_that_are_killed_end_in_the_same_bytes(tmp_path):
    assert compare(tmp_path, kills=1, seed=3)


@pytest.mark.thorough
def test_runs_that_are_killed_often_end_in_the_same_bytes(tmp_path):
    assert compare(tmp_path, kills=20, seed=4)
