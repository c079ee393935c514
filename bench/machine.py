"""The machine: what it is, and whether it is quiet enough to time anything."""

import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lorax_np as lx

STAT, CPUINFO, MEMINFO = Path("/proc/stat"), Path("/proc/cpuinfo"), Path("/proc/meminfo")
PACKAGES = (
    "numpy",
    "scipy",
    "mkl",
    "ml_dtypes",
    "torch",
    "transformers",
    "peft",
    "triton",
    "cupy-cuda12x",
    "cupy-cuda13x",
)
QUIET = 0.12  # of one core's time may go to others
LOOK = 0.15  # seconds


class Gate:
    """Waits until nobody else computes. Its patience is for the whole run; then all may pass, which it says."""

    def __init__(self, patience: float = 900.0) -> None:
        """patience : seconds of waiting, all turns together."""
        self.left, self.loud, self.turns = patience, 0, 0
        self.known = STAT.exists()

    def wait(self) -> float:
        """Wait for quiet; return the cores that others kept busy in the last look, or NaN where none knows."""
        self.turns += 1
        if not self.known:
            return float("nan")
        while True:
            busy = _busy(LOOK)
            if busy <= QUIET:
                return busy
            if self.left <= 0:
                self.loud += 1
                return busy
            time.sleep(LOOK)
            self.left -= 2 * LOOK

    def note(self) -> str:
        """What a reader of the figures should know of the machine's quiet."""
        if not self.known:
            return "nobody looked whether the machine was quiet: this system has no /proc/stat"
        if self.loud:
            return (
                f"NOT QUIET: {self.loud} of {self.turns} turns ran beside other work, patience having run out"
            )
        return f"quiet before each of {self.turns} turns"


def _busy(seconds: float) -> float:
    """Cores that were busy over a stretch of time in which this process slept; stolen time counts."""

    def ticks() -> tuple[int, int]:
        values = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    share = 1 - (idle_after - idle) / max(total_after - total, 1)
    return share * (os.cpu_count() or 1)


def about(gate: Gate, versions: dict[str, str]) -> dict[str, Any]:
    """Everything that figures depend on and that can be known."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _line(MEMINFO, "MemTotal"),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "quiet": gate.note(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in PACKAGES if _version(name)} | versions,
        "backend": lx.backend_info(),
    }


def _cpu() -> str:
    return _line(CPUINFO, "model name") or platform.processor() or platform.machine()


def _line(file: Path, word: str) -> str:
    if not file.exists():
        return ""
    for line in file.read_text().splitlines():
        if line.startswith(word):
            return line.partition(":")[2].strip()
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
