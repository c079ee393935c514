"""The worker: python -m lorax_np.verify.isolate module:attribute loads a subject and answers requests on stdin.

What the subject prints, from Python or from machine code, goes to stderr; its own input is empty.
"""

import atexit
import faulthandler
import functools
import importlib
import mmap
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np

from ..conventions import Spec
from ..subjects import NoSubject, load
from .frames import Answer, answer_bytes, arrays_of, exactly, read_request, room

KNOWN = ("run", "forward", "backward", "init", "merge", "unmerge")  # asked for even where dir() hides them
MOST_NAMES = 500
CHILD_SECONDS = 0.5  # for which a forked child may be on its way out of a call


class _Watch:
    """Knows whether a child that the subject forked came back out of a call, as a second worker would."""

    def __init__(self, answers: int) -> None:
        self.pid, self.forks, self.page = os.getpid(), 0, mmap.mmap(-1, mmap.PAGESIZE)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                after_in_parent=self._count, after_in_child=functools.partial(self._leave, answers)
            )

    def _count(self) -> None:
        self.forks += 1

    def _leave(self, answers: int) -> None:
        with suppress(OSError):
            os.close(answers)

    def child_ends(self) -> None:
        """End here, if this is a child; the page, which it shares with the worker, says that it came."""
        if os.getpid() != self.pid:
            self.page[0] = 1
            os._exit(0)

    def came_back(self, forks: int) -> bool:
        """Whether a child came back, now or in an earlier call; waits for those of this call."""
        until = time.monotonic() + CHILD_SECONDS
        while self.forks > forks and not self.page[0] and time.monotonic() < until and _a_child_lives():
            time.sleep(0.002)
        return bool(self.page[0])


def _a_child_lives() -> bool:
    """Whether this process has children and none has ended; nobody's exit status is taken."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def main(arguments: list[str]) -> None:
    """Load arguments[0], a name, or - for a pickled object in the first request; then serve."""
    loader, xp_name, timeout = (*arguments, "", "60")[:3]
    requests, answers = os.dup(0), os.dup(1)  # not inherited by the subject's own programs
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    faulthandler.enable()
    watch = _Watch(answers)

    def read(n: int) -> bytes:
        return exactly(lambda m: os.read(requests, m), n)

    def write(parts: list[bytes]) -> None:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(answers, view) :]

    subject: list[Any] = []

    def hello() -> list[bytes]:
        if loader == "-":
            subject.append(read_request(read)[0])
        else:
            subject.append(load(loader, importlib.import_module(xp_name) if xp_name else None))
        return answer_bytes(Answer("hello", more=_offer(subject[0])), room(0))

    write(_guarded(watch, hello, float(timeout)))
    while subject:
        try:
            (method, given, seconds), limit = read_request(read)
        except EOFError:
            _leave()
        write(_guarded(watch, functools.partial(_call, subject[0], method, given, limit), seconds))


def _leave() -> NoReturn:
    """End as an interpreter does, without its slow taking apart of modules and its wait for threads."""
    atexit._run_exitfuncs()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _call(subject: Any, method: str, given: tuple[Any, ...], limit: int) -> list[bytes]:
    before = {name: value.copy() for name, value in arrays_of(given).items()}
    with np.errstate(all="ignore"):  # what is not finite is judged, not warned of
        value = getattr(subject, method)(*given)
    after = arrays_of(given).items()
    written = {name: now for name, now in after if now.tobytes() != before[name].tobytes()}
    return answer_bytes(Answer("answer", value=value, written=written), limit)


def _guarded(watch: _Watch, act: Callable[[], list[bytes]], seconds: float) -> list[bytes]:
    """What an act of the subject's comes to; past its seconds the process ends, and says where it was."""
    forks = watch.forks
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        parts = act()
    except NotImplementedError as error:
        parts = answer_bytes(Answer("absent", text=_text(error)), 0)
    except (Exception, SystemExit) as error:
        state = "refused" if isinstance(error, NoSubject) else "raised"
        parts = answer_bytes(Answer(state, type(error).__name__, _text(error)), 0)
    finally:
        watch.child_ends()
        faulthandler.cancel_dump_traceback_later()
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    if watch.came_back(forks):
        text = "the subject forked, and the child came back out of the call"
        return answer_bytes(Answer("raised", "Forked", text), 0)
    return parts


def _text(error: BaseException) -> str:
    try:
        return (str(error).strip().splitlines() or [""])[0]
    except Exception:  # an exception that cannot say what it is
        return ""


def _offer(subject: Any) -> dict[str, Any]:
    """The public methods of a subject, and its spec."""
    names = [name for name in dir(subject) if name.isidentifier() and not name.startswith("_")]
    methods = []
    for name in dict.fromkeys((*KNOWN, *names[:MOST_NAMES])):
        with suppress(Exception):
            if callable(getattr(subject, name, None)):
                methods.append(name)
    spec = getattr(subject, "spec", None) or Spec()
    fields = asdict(spec) if isinstance(spec, Spec) else None
    return {
        "methods": methods,
        "spec": fields,
        "spec_type": type(spec).__name__,
        "name": type(subject).__name__,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
