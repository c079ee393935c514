"""What several commands share: progress, and kinds of arguments."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    Parsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Parsers = argparse.Action


def seed(text: str) -> int:
    """An argument's kind: an integer from 0 to 10**18 - 1."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 10**18 - 1, got {text!r}")
    return int(text)


class Progress:
    """A line that counts on a terminal; elsewhere a plain line when a battery ends."""

    def __init__(self, profile: str, *, quiet: bool) -> None:
        """Say nothing yet; `profile` begins each line."""
        self.profile, self.quiet, self.terminal = profile, quiet, sys.stderr.isatty()
        self.battery, self.text, self.shown = "", "", 0.0

    def __call__(self, battery: str, checks: int, failures: int) -> None:
        """Count on, and close the line of the battery before."""
        if battery != self.battery:
            self._line()
            self.battery = battery
        self.text = f"{self.profile} {battery}: {checks}" + (f", {failures} failed" if failures else "")
        now = time.monotonic()
        if self.terminal and not self.quiet and now - self.shown > 0.1:
            print(f"\r\033[K{self.text}", end="", file=sys.stderr, flush=True)
            self.shown = now

    def _line(self) -> None:
        if self.text and not self.quiet and not self.terminal:
            print(self.text, file=sys.stderr)

    def done(self) -> None:
        """Leave a terminal's line empty, for the table."""
        self._line()
        if self.terminal and not self.quiet:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
