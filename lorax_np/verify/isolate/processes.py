"""Ending a process and everything that it started. Both leave alone whatever is not theirs."""

import os
import signal
import subprocess
import time
from contextlib import suppress

STEP = 0.002  # seconds between two looks


def ended(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Wait for a process to end, and say whether it did; its number stays its own until it is killed below."""
    if not hasattr(os, "waitid"):
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.returncode is not None
    until = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            return False
        time.sleep(STEP)
    return True


def kill(process: "subprocess.Popen[bytes]") -> int:
    """End a process that leads a session, with the members of it, and return its exit code."""
    if process.returncode is None:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    return process.wait()
