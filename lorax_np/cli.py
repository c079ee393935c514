"""The command line: commands/ has one file for each.  Exit codes: 0 pass, 1 fail, 2 nothing judged, 3 crash.

Besides, as shells have it: 130 when interrupted, 141 when whoever reads the output went away.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from io import StringIO, TextIOWrapper

from . import BackendError, ConfigError, DtypeError, FormatError, ShapeError, __version__
from .commands import COMMANDS

BAD_USAGE, INTERRUPTED, UNREAD = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every refusal is one line on standard error."""
    sys.stdout = sys.stdout or StringIO()  # closed by whoever started this
    sys.stderr = sys.stderr or StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        print("\nlorax-np: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough; that is no verdict
        for stream in (sys.stdout, sys.stderr):
            if not isinstance(stream, StringIO):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return UNREAD
    except (ConfigError, FormatError, BackendError, ShapeError, DtypeError, OSError, MemoryError) as error:
        print(f"lorax-np: {_line(error)}", file=sys.stderr)
        return BAD_USAGE


def _line(error: Exception) -> str:
    """What is said of an error; the system's own names no file where standard output has no room."""
    if isinstance(error, MemoryError):
        return f"expected memory for it, got: {error or 'none'}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        return f"expected room for what is written, got: {error.strerror}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    about = "LoRA proved by hand, and a judge for other implementations."
    parser = argparse.ArgumentParser(prog="lorax-np", description=about)
    parser.add_argument("--version", action="version", version=f"lorax-np {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
