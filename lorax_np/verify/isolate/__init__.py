"""A subject in a process of its own, so that a crash, an exit or an endless loop is a verdict and not the end.

The worker (python -m lorax_np.verify.isolate) is started at once and asked for what it holds when that is first
needed; one worker serves all calls, and another takes its place where it died.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ... import ConfigError
from .. import subjects
from ..cases import HostArray
from ..conventions import Spec
from .frames import Answer, Damaged, arrays_of, exactly, read_answer, request_bytes, room
from .processes import ended, kill

BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
BOOT += f"from {__name__}.__main__ import main; main(sys.argv[1:])"
PACKAGE = f"{Path(__file__).parents[2]}{os.sep}"
GRACE = 5.0  # seconds past the time limit after which a worker that does not end itself is killed
BIRTH = 60.0  # seconds that an interpreter and this package may take to start, on a machine with much to do
LIVES = 8  # workers that a subject may use up; an endless loop takes LIVES / 2
KEPT = 1 << 14  # bytes of the subject's own output
PLACE = re.compile(r'File "([^"]*)", line (\d+) in (\S+)')


class Died(Exception):
    """The worker's process ended in a call: by a signal, by an exit, or by silence."""


class Hung(Exception):
    """No answer within the time limit; the worker was killed."""


class Garbled(Exception):
    """What came from the worker is no answer."""


class GaveUp(Exception):
    """The subject used up its workers."""


class Isolated:
    """A subject elsewhere: the same methods, called through a pipe.

    Its methods return NumPy arrays and raise what the subject raised, by name; NotImplementedError as itself;
    Died, Hung, Garbled or GaveUp where the process came to harm. An array that the subject wrote to is changed
    in the caller's hands too, so that checks of that see it. printed holds the end of what it wrote to its
    standard output and error.
    """

    def __init__(
        self, loader: Any, xp: ModuleType | None = None, timeout: float = 60.0, loading: float = 60.0
    ) -> None:
        """loader : a name for subjects.load, or an object that can be pickled;  the rest as for isolated."""
        for name, value in (("timeout", timeout), ("loading", loading)):
            if not value > 0:
                raise ValueError(f"{name}: expected seconds above 0, got {value}")
        self._loader, self._timeout, self._loading = loader, float(timeout), float(loading)
        self._lives, self._last = float(LIVES), ""
        self._xp = "" if xp is None else xp.__name__
        self._object = b""
        if not isinstance(loader, str):
            try:
                self._object = request_bytes(loader)
            except Exception as error:  # each class refuses in its own way
                name = type(loader).__name__
                raise ConfigError(
                    f"subject: expected a name or an object that can be pickled, got {name}: {error}"
                ) from None
        self._hello: dict[str, Any] | None = None  # of the first worker; the others are asked the same
        self._printed = b""
        self._start()

    def _start(self) -> None:
        self._waiting = True
        name = self._loader if isinstance(self._loader, str) else "-"
        self._worker = _Worker([name, self._xp, str(self._loading)])
        self._end = weakref.finalize(self, self._worker.end)
        if self._object:
            self._worker.send(self._object)

    def close(self) -> None:
        """End the worker, and whatever it started."""
        self._end()

    def ready(self) -> "Isolated":
        """Wait until the subject is loaded.

        Raises NoSubject where there is none of that name, and what loading it raised or did to its process.
        """
        if self._waiting:
            if not self._end.alive:
                raise GaveUp(f"not loaded again after what came before: {self._last}")
            answer = self._answer("loading", room(0), self._loading, BIRTH)
            if answer.state != "hello":
                self._last = f"{answer.kind}: {answer.text}"
                self._lives = 0
                self.close()
                refused = answer.state == "refused"
                raise (subjects.NoSubject if refused else _named(answer.kind))(answer.text)
            self._waiting, self._hello = False, self._hello or answer.more
        return self

    @property
    def printed(self) -> str:
        """The end of the subject's own output so far."""
        return (self._printed + self._worker.output())[-KEPT:].decode("utf-8", "replace")

    @property
    def spec(self) -> Spec:
        """What the subject declares of itself. Raises ConfigError where that is no Spec."""
        hello = self._offered()
        if hello["spec"] is None:
            raise ConfigError(f"spec: expected a lorax_np.verify.Spec, got {hello['spec_type']}")
        fields: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in hello["spec"].items()}
        return Spec(**fields)

    def _offered(self) -> dict[str, Any]:
        if self._hello is None:
            self.ready()
        return self._hello or {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._offered()["methods"]:
            raise AttributeError(f"the subject has no {name}")
        return partial(self._call, name)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._lives <= 0:
            raise GaveUp(f"not asked again after what came before: {self._last}")
        if not self._end.alive:  # the last worker died, or was closed
            self._printed = (self._printed + self._worker.output())[-KEPT:]
            self._start()
            self.ready()
        request = request_bytes((method, arguments, self._timeout))
        self._worker.send(request)
        answer = self._answer(method, room(len(request)), self._timeout, GRACE)
        theirs = arrays_of(arguments)
        for name, value in answer.written.items():
            _write(theirs.get(name), value)
        if answer.state == "absent":
            raise NotImplementedError(answer.text)
        if answer.state == "raised":
            raise _named(answer.kind)(answer.text)
        return answer.value

    def _answer(self, what: str, limit: int, timeout: float, grace: float) -> Answer:
        """The worker's next answer; where none comes, what became of the worker."""
        start = time.monotonic()
        came = self._worker.receive(limit, timeout + grace)
        if isinstance(came, Answer):
            return came
        seconds = time.monotonic() - start
        code, output = self._end() or 0, self._worker.output().decode("utf-8", "replace")
        place = _place(output)
        if isinstance(came, Damaged):
            error: Exception = Garbled(f"{what}: {came}")
        elif came is None or (code == 1 and seconds > 0.9 * timeout and "Timeout (" in output):
            error = Hung(f"{what}: no answer within {timeout:g} s, killed{place}")
        elif code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            error = Died(f"{what}: {name}, {(signal.strsignal(-code) or 'a signal').lower()}{place}")
        else:
            error = Died(f"{what}: the process ended with exit code {code}{place}")
        self._lives -= LIVES / 2 if isinstance(error, Hung) else 1
        self._last = f"{type(error).__name__}: {error}"
        raise error


class _Worker:
    """A process, the pipe to it, and two threads that read what comes from it."""

    def __init__(self, arguments: list[str]) -> None:
        path = [entry or os.getcwd() for entry in sys.path]  # noqa: PTH109
        command = [sys.executable, "-P", "-c", BOOT, json.dumps(path), *arguments]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, **pipes, bufsize=0, start_new_session=True)
        self._answers: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        self._limit, self._tail = room(0), b""
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._drain)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        try:
            while True:
                self._answers.put(read_answer(partial(exactly, self._process.stdout.read), lambda: self._limit))  # type: ignore[union-attr]
        except (Damaged, EOFError, OSError, ValueError) as error:
            self._answers.put(error)

    def _drain(self) -> None:
        with suppress(OSError, ValueError):
            while part := self._process.stderr.read(1 << 16):  # type: ignore[union-attr]
                self._tail = (self._tail + part)[-KEPT:]

    def send(self, request: bytes) -> None:
        """Hand over a request; a worker that is gone says so when its answer is asked for."""
        with suppress(BrokenPipeError):
            view = memoryview(request)
            while view:
                view = view[self._process.stdin.write(view) :]  # type: ignore[union-attr]

    def receive(self, limit: int, seconds: float) -> Answer | BaseException | None:
        """The next answer, or the reason why none can come; None where none came in time."""
        self._limit = limit
        try:
            return self._answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def output(self) -> bytes:
        """The end of what the worker's process printed."""
        return self._tail

    def end(self) -> int:
        """End the process and those it started, and return its exit code."""
        process = self._process
        if process.returncode is not None:
            return process.returncode
        process.stdin.close()  # type: ignore[union-attr]
        ended(process, GRACE / 10)
        code = kill(process)
        for thread in self._threads:
            thread.join(1.0)
        if not any(thread.is_alive() for thread in self._threads):
            process.stdout.close()  # type: ignore[union-attr]
            process.stderr.close()  # type: ignore[union-attr]
        return code


def _named(kind: str) -> type[Exception]:
    """An exception type of the name that the subject's own had."""
    return type(kind if kind.isidentifier() else "Error", (Exception,), {})


def _place(output: str) -> str:
    """Where Python was, by the traceback that a dying process printed: the first line outside this package."""
    for file, line, function in PLACE.findall(output):
        name = re.split(r"[\\/]", file)[-1]
        if not file.startswith((PACKAGE, "<")):
            return f", in {name} line {line}, {function}"
    return ""


def _write(array: HostArray | None, value: Any) -> None:
    """Do to the caller's array what the subject did to its copy."""
    if array is not None and isinstance(value, np.ndarray) and array.shape == value.shape:
        with suppress(ValueError):  # a read-only one stays as it is
            array[...] = value


def isolated(
    loader: Any, xp: ModuleType | None = None, timeout: float = 60.0, loading: float = 60.0
) -> Isolated:
    """Start a subject in a process of its own, and return it without waiting.

    loader : a name for subjects.load (reference, module:attribute, ...), or an object that can be pickled
    xp : the array library of the reference
    timeout, loading : seconds that a call may take, and loading the subject
    Raises ConfigError for an object that cannot be pickled. ready() waits, and raises what loading raised.
    """
    return Isolated(loader, xp, timeout, loading)
