"""Engines in turn: each in its own process, judged first, then timed A B C A B C, behind a quiet machine."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import cases
from .cases import AnyCase, Arrays, Case
from .engines import ENGINES
from .judging import Judge, judge_of
from .machine import Gate

ROOT = Path(__file__).parents[1]
THREADS = "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}

Say = Callable[[str], None]


@dataclass
class Row:
    """One engine, one case, one measure: a value for each round, in order."""

    table: str
    case: str
    engine: str
    measure: str  # step, peak, saved, angle
    unit: str  # ms, MB, sine
    values: list[float]
    load: list[float] = field(default_factory=list)  # cores that others kept busy just before each value
    fields: dict[str, Any] = field(default_factory=dict)  # of the case

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)


@dataclass
class Refused:
    """An engine that was not timed: wrong, missing here, or broken."""

    table: str
    case: str
    engine: str
    how: str  # wrong, unavailable, failed
    why: str


@dataclass
class Found:
    """What a run has so far: it is printed and written as it stands when the run is interrupted."""

    rows: list[Row] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def of(self, table: str, measure: str = "step") -> list[Row]:
        """The rows of one table."""
        return [row for row in self.rows if (row.table, row.measure) == (table, measure)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rows": [{**asdict(row), "median": row.median} for row in self.rows],
            "refused": [asdict(row) for row in self.refused],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Found":
        """What to_dict wrote."""
        rows = [{k: v for k, v in row.items() if k != "median"} for row in record["rows"]]
        return cls([Row(**row) for row in rows], [Refused(**row) for row in record["refused"]])


class Broken(Exception):
    """An engine that cannot go on; how and why."""

    def __init__(self, how: str, why: str) -> None:
        """how : unavailable, failed or wrong."""
        super().__init__(why)
        self.how = how


class Process:
    """One worker: commands out, answers in. It serves case after case."""

    def __init__(self, *, threads: int = 0, returned: bool = False) -> None:
        """returned : whether freed memory goes back to the system at once, as a measure of memory needs."""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        env |= {name: str(threads) for name in THREADS} if threads else {}
        env |= RETURNED if returned else {}
        self.case = 0  # process id of the child that serves the case at hand
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, closed with the process
        self.child = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def send(self, do: str, **how: Any) -> None:
        """Ask for something; receive() waits for the answer."""
        try:
            self.child.stdin.write(json.dumps({"do": do, **how}) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # receive() says why

    def receive(self) -> dict[str, Any]:
        """The next answer. Broken where the engine cannot do what was asked."""
        line = self.child.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no word"])[-1]
            raise Broken("failed", f"the process ended ({self.child.wait()}): {last}")
        answer: dict[str, Any] = json.loads(line)
        for how in ("unavailable", "failed"):
            if how in answer:
                raise Broken(how, answer[how])
        return answer

    def ask(self, do: str, **how: Any) -> dict[str, Any]:
        """Send and receive."""
        self.send(do, **how)
        return self.receive()

    def end(self) -> None:
        """The case is over; the process lives on, for the next, unless the case broke it."""
        with suppress(Broken, ValueError):  # an interruption may have cut an answer in two
            self.ask("end")

    def close(self) -> None:
        """End the process, kindly first."""
        try:
            self.child.stdin.close()
            self.child.wait(timeout=5)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.errors.close()


class Workers:
    """The processes of a run, one for each engine and number of threads, started when they are first needed."""

    def __init__(self) -> None:
        """Nobody yet."""
        self.started: dict[tuple[str, int, bool], Process] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started.values():
            process.close()

    def of(self, engine: str, threads: int, *, returned: bool) -> Process:
        """The process of an engine; a new one where there is none, or the last one ended."""
        key = engine, threads, returned
        if key in self.started and self.started[key].child.poll() is not None:
            self.started.pop(key).close()
        if key not in self.started:
            self.started[key] = Process(threads=threads, returned=returned)
        return self.started[key]


@contextmanager
def opened(
    workers: Workers,
    table: str,
    case: AnyCase,
    names: Sequence[str],
    arrays: Arrays,
    found: Found,
    *,
    returned: bool = False,
) -> Iterator[dict[str, Process]]:
    """The processes of those engines that can run a case, their arrays loaded."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorax_np_bench_")))
        cases.write(folder, arrays)
        live: dict[str, Process] = {}
        for name in names:
            process = workers.of(name, case.threads, returned=returned)
            stack.callback(process.end)
            process.send("open", engine=name, kind=type(case).__name__, case=list(case), folder=str(folder))
            live[name] = process
        for name, process in list(live.items()):
            with refusing(table, case, name, found) as tried:
                answer = process.receive()
                process.case, found.versions = answer["pid"], found.versions | answer["versions"]
            if tried:
                del live[name]
        yield live


@contextmanager
def refusing(table: str, case: AnyCase, engine: str, found: Found) -> Iterator[list[Refused]]:
    """Turn what goes wrong with one engine into a row of its own; the list says whether something did."""
    tried: list[Refused] = []
    try:
        yield tried
    except Broken as error:
        tried.append(Refused(table, case.label, engine, error.how, str(error)))
        found.refused.extend(tried)


# ---- time --------------------------------------------------------------------------------------------------


def race(
    workers: Workers,
    table: str,
    case: AnyCase,
    names: Sequence[str],
    found: Found,
    gate: Gate,
    *,
    rounds: int,
    seconds: float,
    say: Say,
) -> None:
    """Judge each engine on a case, then time the right ones in turn; rows go into `found` as they come."""
    say("arrays, and the truth in float64")
    arrays = cases.draw(case)
    judged = judge_of(case, arrays)
    with opened(workers, table, case, names, arrays, found) as live:
        for name in list(live):
            say(f"judging {name}")
            with refusing(table, case, name, found) as tried:
                check(name, live[name], judged, table, case, found)
            if tried:
                live.pop(name)
        del judged
        rows = {name: Row(table, case.label, name, "step", "ms", [], [], case._asdict()) for name in live}
        found.rows.extend(rows.values())
        try:
            for turn in range(rounds):
                for name, process in list(live.items()):
                    load = gate.wait()
                    say(f"round {turn + 1} of {rounds}, {name}")
                    with refusing(table, case, name, found) as tried:
                        took = process.ask("time", seconds=seconds, least=3)["seconds"]
                        rows[name].values.append(1e3 * statistics.median(took))
                        rows[name].load.append(load)
                    if tried:
                        live.pop(name)
        finally:
            found.rows[:] = [row for row in found.rows if row.values]


def check(name: str, process: Process, judge: Judge, table: str, case: AnyCase, found: Found) -> None:
    """Broken where an engine's results are wrong. The products alone have none to judge."""
    with tempfile.TemporaryDirectory(prefix="lorax_np_bench_") as folder:
        process.ask("results", folder=folder)
        got = cases.read(Path(folder))
    if not got and ENGINES[name].maker in ("Base", "Copy"):
        return
    faults, figures = judge(name, got)
    if faults:
        raise Broken("wrong", "; ".join(faults))
    for measure, value in figures.items():
        found.rows.append(Row(table, case.label, name, measure, "sine", [value], [], case._asdict()))


# ---- memory ------------------------------------------------------------------------------------------------


def weigh(workers: Workers, table: str, case: Case, names: Sequence[str], found: Found, *, say: Say) -> None:
    """Peak memory of a step above parameters and inputs, and what is kept between its halves; one at a time."""
    arrays = cases.draw(case)
    for name in names:
        say(name)
        with opened(workers, table, case, (name,), arrays, found, returned=True) as live:
            for process in live.values():
                with refusing(table, case, name, found):
                    process.ask("warm")
                    answers = {"peak": process.ask("memory"), "saved": process.ask("saved")}
                    for measure, answer in answers.items():
                        values = [answer["bytes"] / 1e6]
                        found.rows.append(
                            Row(table, case.label, name, measure, "MB", values, [], case._asdict())
                        )
