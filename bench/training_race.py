"""A race of engines of training: each in its own process, two steps at a time, in turn, behind a gate."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .machine import Gate
from .training_gpu import library
from .training_models import (
    Batch,
    batches,
    kind,
    minilm_ids,
    next_tokens,
    smollm2_ids,
    smollm2_or_drawn_ids,
)
from .training_rows import Row, Told
from .turns import ROOT, THREADS

TURN = 2  # steps
OURS = "ours", "mkl", "minilm", "minilm mkl", "cupy"
PEFT, GEMM = ("peft", "minilm peft", "peft gpu"), ("gemm", "gemm mkl")


class Process:
    """An engine at work in a process of its own."""

    def __init__(self, engine: str, how: dict[str, Any]) -> None:
        """how : arguments of its open."""
        env = {k: v for k, v in os.environ.items() if k not in THREADS}  # all cores, whoever set otherwise
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, closed with the process
        self.child = subprocess.Popen(
            [sys.executable, "-m", "bench.training_worker", engine],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        try:
            self.about = self.ask("open", **{"checkpoint": False, **how})["engine"]
        except RuntimeError:
            self.close()
            raise

    def ask(self, do: str, **how: Any) -> dict[str, Any]:
        """The answer to a command. RuntimeError where there is none."""
        with suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps({"do": do, **how}) + "\n")
            self.child.stdin.flush()
        line = self.child.stdout.readline()
        answer = json.loads(line) if line else {"failed": f"the process ended ({self.child.wait()})"}
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.child.stdin.close()
        try:
            self.child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.errors.close()


@dataclass
class Found:
    """What one engine did in one row.

    peak : bytes of memory at most: resident, or held by the pool of a device;  used : of a pool, in use at most
    said : what else the engine says once its steps are done
    """

    engine: str
    about: str
    tokens: int
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    peak: int = 0
    used: int = 0
    said: str = ""

    @property
    def rate(self) -> float:
        """Tokens a second, of the median of the last half of its steps."""
        return self.tokens / statistics.median(self.seconds[len(self.seconds) // 2 :])

    @property
    def best(self) -> float:
        """Tokens a second of its quickest step."""
        return self.tokens / min(self.seconds)

    def line(self) -> str:
        """What a person reads of it."""
        rate = f"{self.rate:7.1f} tok/s   best {self.best:7.1f}   peak {self.peak / 1e9:5.2f} GB"
        used = f" ({self.used / 1e9:.2f} used)" if self.used else ""
        said = f"   {self.said}" if self.said else ""
        return f"{self.engine:<10}{rate}{used}   last loss {self.losses[-1]:.4f}{said}"


def race(row: Row, steps: int, gate: Gate, told: Told) -> None:
    """The engines of a row in turn; what they did goes into `told` as it comes. NoDevice where it needs one."""
    if row.device:
        library()
    count = row.steps or steps
    live, found = dict[str, Process](), list[Found]()
    try:
        given = text_of(row, count)
        start(row, live, told)
        found += [Found(each, live[each].about, sum(row.lengths)) for each in row.engines if each in live]
        for at in range(0, count, TURN):
            for each in found:
                load = gate.wait()
                say(f"{told.name}: step {at + 1} of {count}, {each.engine}")
                for batch in given[at : at + TURN]:
                    answer = live[each.engine].ask("step", **batch)
                    each.seconds.append(answer["seconds"])
                    each.losses.append(answer["loss"])
                    each.load.append(load)
        for each in found:
            answer = live[each.engine].ask("peak")
            each.peak, each.used, each.said = answer["bytes"], answer.get("used", 0), answer.get("said", "")
        if row.steps and len(found) == len(row.engines):
            told.figures |= apart(*(trained(live[engine]) for engine in row.engines[:2]))
    finally:
        for process in live.values():
            process.close()
        say("")
        found = [each for each in found if each.seconds]
        told.details = [{**asdict(each), "rate": each.rate, "best": each.best} for each in found]
        told.lines = [each.line() for each in found]
        told.figures = figures(row, found) | told.figures


def start(row: Row, live: dict[str, Process], told: Told) -> None:
    """Open the row's engines at once, since much of it is imports; those that do not open are refused."""

    def opened(engine: str) -> None:
        try:
            live[engine] = Process(engine, {**row.how, "workers": row.how.get("workers", "auto")})
        except RuntimeError as error:
            told.refused[engine] = str(error)

    with ThreadPoolExecutor() as pool:
        list(pool.map(opened, row.engines))


def text_of(row: Row, count: int) -> list[Batch]:
    """So many steps of text, in the tokens of the row's model. RuntimeError where there is no model."""
    if "minilm peft" in row.engines:
        return batches(minilm_ids(), row.lengths, count, kind)
    ids = smollm2_or_drawn_ids() if row.device else smollm2_ids()
    return batches(ids, row.lengths, count, next_tokens)


def trained(process: Process) -> np.ndarray:
    """Everything that an engine has trained, one behind another."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapters.npy"
        process.ask("adapters", path=str(path))
        found: np.ndarray = np.load(path)
        return found


def apart(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How far two engines' adapters are from one another."""
    return {"adapters, by norm": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))}


def figures(row: Row, found: list[Found]) -> dict[str, float]:
    """What a race is judged by."""
    ours, peft, products = ([each for each in found if each.engine in names] for names in (OURS, PEFT, GEMM))
    result = dict[str, float]()
    for a, b in zip(ours, peft, strict=False):
        result["ours / peft"] = a.rate / b.rate
        result["best ours / best peft"] = a.best / b.best
        if a.peak and b.peak:  # neither is known of a race that broke off
            result["memory"] = a.peak / b.peak
        if row.steps:
            result["curve"] = max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=False))
    if ours and "bits" in row.how:
        result["GB"] = ours[0].peak / 1e9
    if ours and products:
        result["ours / gemm"] = ours[0].rate / products[0].rate
    return result


def say(what: str) -> None:
    """A line that the next one replaces, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)
