"""Subjects that harm their own process, each in one way; the layer behind is the engine's, and right."""

import ctypes
import os
import sys
import threading
import time

import numpy as np

import lorax_np as lx

try:
    import fcntl
except ImportError:  # where there is no fork either
    fcntl = None

RIGHT = lx.verify.subjects.reference()


class Right:
    spec = lx.verify.Spec(norm_gradient=(False, True), strided=True)
    init, merge = RIGHT.init, RIGHT.merge

    def run(self, case, gy):
        self.act(case)
        return self.after(case, *RIGHT.run(case, gy))

    def act(self, case):
        """Happens before the answer."""

    def after(self, case, y, g):
        return y, g


class Segfault(Right):
    def act(self, case):
        ctypes.string_at(8)


class SegfaultOnce(Right):
    def act(self, case):
        if case.id.endswith("/2"):
            ctypes.string_at(8)


class Aborts(Right):
    def act(self, case):
        os.abort()


class Leaves(Right):
    def act(self, case):
        os._exit(0)


class Exits(Right):
    def act(self, case):
        sys.exit("enough")


class Loops(Right):
    def act(self, case):
        while True:
            pass


class Sleeps(Right):
    def act(self, case):
        ctypes.CDLL(None).sleep(60)


class Raises(Right):
    def act(self, case):
        raise ZeroDivisionError("of the subject's own\nin two lines")


class NotHere(Right):
    def act(self, case):
        if case.m is not None:
            raise NotImplementedError("no DoRA here")


class NaN(Right):
    def after(self, case, y, g):
        return y, {**g, "A": np.full_like(g["A"], np.nan)}


class Shape(Right):
    def after(self, case, y, g):
        return y, {**g, "A": g["A"].T.copy()}


class Dtype(Right):
    def after(self, case, y, g):
        return y, {**g, "B": g["B"].astype(np.float16)}


class NoArray(Right):
    def after(self, case, y, g):
        return y, {**g, "A": {1, 2}}


class NoPair(Right):
    def after(self, case, y, g):
        return y, g, None


class Writes(Right):
    def after(self, case, y, g):
        case.A[0] = 7
        return y, g


class Prints(Right):
    def act(self, case):
        print("lxn1", "to Python's output")
        sys.stderr.write("to the other one\n")
        os.write(1, b"lxn1 to the system's output\n" * 5000)


class PrintsInAThread(Right):
    def act(self, case):
        threading.Thread(target=print, args=("from a thread",)).start()


class Asks(Right):
    def act(self, case):
        if sys.stdin.read():
            raise ValueError("there was something to read")


class Huge(Right):
    def after(self, case, y, g):
        return np.zeros((3000, 3000), y.dtype), g


class HugeView(Right):
    def after(self, case, y, g):
        return np.broadcast_to(y.dtype.type(0), (10**9, 10**6)), g


class Forks(Right):
    def act(self, case):
        os.fork()


class ForksAndFails(Right):
    def act(self, case):
        if os.fork() == 0:
            raise ValueError("in the child")


class ForksWell(Right):
    def act(self, case):
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)


class LeavesAChild(Right):
    def act(self, case):
        if os.fork() == 0:
            held = open(os.environ.get("HELD_BY_A_CHILD", os.devnull), "w")  # noqa: PTH123, SIM115
            fcntl.flock(held, fcntl.LOCK_SH)
            time.sleep(600)
            os._exit(0)


class Closes(Right):
    def act(self, case):
        os.closerange(0, 64)


class Garbage(Right):
    def act(self, case):
        for fd in range(3, 64):
            try:
                os.write(fd, b"\x80\x05cos\nsystem\n" * 10)
            except OSError:
                continue


class Forged(Right):
    """Writes an answer of its own, whose header is no answer."""

    def act(self, case):
        for text in (
            b'{"arrays": [["O", [1]]], "written": {}, "value": {"array": 0}}',
            b"[" * 5000,
            b'{"arrays":0}',
        ):
            head = b"lxn1" + len(text).to_bytes(4, "little") + (8).to_bytes(8, "little")
            for fd in range(3, 64):
                try:
                    os.write(fd, head + text + bytes(8))
                except OSError:
                    continue


class Promised(Right):
    """Writes the head of an answer that would fill the memory."""

    def act(self, case):
        for fd in range(3, 64):
            try:
                os.write(fd, b"lxn1" + (2).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") + b"{}")
            except OSError:
                continue


class NoSpec(Right):
    spec = "detached"


class Constructs(Right):
    def __init__(self):
        ctypes.string_at(8)
