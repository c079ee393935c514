"""One engine in a process of its own: it reads commands as JSON lines and answers each with one.

What the engine needs is imported once; each case then has a child of that process for itself, whose memory is
as the import left it and goes when the case is over.

    open {engine, case, folder}    arrays from the folder; answers with versions, or why it cannot run
    results {folder}               what it computes, written there
    time {seconds, least}          seconds of each step
    memory                         bytes resident above parameters and inputs, at most, within three steps
    saved                          bytes kept between forward and backward beside x and the parameters
    end                            the case is over
"""

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from . import cases, engines

LONG = 2.0  # seconds: where a step takes longer, waking up is no part of it that counts, and one is enough
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Worker:
    """The state between commands: one engine over one case."""

    engine: engines.Engine

    def open(self, engine: str, kind: str, case: list[Any], folder: str) -> dict[str, Any]:
        self.name, self.case = engine, cases.KINDS[kind](*case)
        arrays = cases.read(Path(folder))
        arrays.pop("Vh", None)  # the answer
        self.engine = engines.make(engine, self.case, arrays)
        module = sys.modules[type(self.engine).__module__]
        return {"versions": getattr(module, "VERSIONS", {}), "pid": os.getpid()}

    def results(self, folder: str) -> dict[str, Any]:
        cases.write(Path(folder), self.engine.results())
        return {}

    def time(self, seconds: float, least: int) -> dict[str, Any]:
        count, wait = getattr(self.engine, "burst", 1), getattr(self.engine, "wait", lambda: None)

        def burst() -> float:
            start = time.perf_counter()
            for _ in range(count):
                self.engine.step()
            wait()
            return (time.perf_counter() - start) / count

        first = burst()  # wakes threads and fills caches after the others' turns
        if first > LONG:
            return {"seconds": [first]}
        took: list[float] = []
        while len(took) < least or count * sum(took) < seconds:
            took.append(burst())
        return {"seconds": took}

    def memory(self) -> dict[str, Any]:
        peak = getattr(self.engine, "peak", None)
        if peak is not None:
            return {"bytes": peak(), "how": "the device's pool"}
        gc.collect()
        before = _resident("VmRSS")
        with _Peak() as seen:
            for _ in range(3):
                self.engine.step()
        return {"bytes": seen.bytes - before, "how": seen.how}

    def warm(self) -> dict[str, Any]:
        """One step, so that threads, libraries, kernels and room of BLAS are there before memory is measured.

        What the engine keeps for its next step is let go of, so that this step's arrays count as well.
        """
        self.engine.step()
        getattr(self.engine, "release", lambda: None)()
        return {}

    def saved(self) -> dict[str, Any]:
        return {"bytes": self.engine.saved()}


class _Peak:
    """The most memory that is resident while this context holds: the kernel's mark, else sampled."""

    def __enter__(self) -> "_Peak":
        self.bytes, self.done = 0, threading.Event()
        try:
            CLEAR.write_text("5")
            self.how = "the kernel's high-water mark"
        except OSError:
            self.how = "sampled every millisecond"
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.001):
            self.bytes = max(self.bytes, _resident("VmRSS"))

    def __exit__(self, *_: object) -> None:
        if self.how.startswith("sampled"):
            self.done.set()
            self.thread.join()
        else:
            self.bytes = _resident("VmHWM")


def _resident(word: str) -> int:
    if not STATUS.exists():
        raise engines.Unavailable("memory is read from /proc, which this system does not have")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{word}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Answer commands until whoever asks closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides when to stop
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "end":  # of a case that did not live to hear it
            say({})
            continue
        with suppress(engines.Unavailable):  # the child says so
            engines.load(command["engine"])
        child = os.fork()
        if not child:
            serve(line, say)
            sys.stderr.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say({"failed": f"its process ended with status {status}"} if status else {})


def serve(line: str, say: Callable[[dict[str, Any]], None]) -> None:
    """One case, from its open to its end."""
    worker = Worker()
    while line:
        command = json.loads(line)
        do = command.pop("do")
        if do == "end":
            return
        try:
            answer = getattr(worker, do)(**command)
        except (engines.Unavailable, NotImplementedError) as error:
            answer = {"unavailable": str(error)}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"failed": f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"}
        say(answer)
        line = sys.stdin.readline()


if __name__ == "__main__":
    main()
