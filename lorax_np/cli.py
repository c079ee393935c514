"""The command line: lorax-np verify, lorax-np info.  Exit codes: 0 pass, 1 fail, 2 nothing judged, 3 crash."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import BackendError, ConfigError, DtypeError, FormatError, ShapeError, __version__, backend_info

if TYPE_CHECKING:
    from .verify import Report

BAD_USAGE, CRASHED, INTERRUPTED = 2, 3, 130
EXTRAS = {  # module: (extra, what it adds)
    "ml_dtypes": ("bf16", "bfloat16 as a storage dtype"),
    "torch": ("peft", "with peft, PEFT's layers as a subject"),
    "peft": ("peft", "with torch, PEFT's layers as a subject"),
    "hypothesis": ("test", "the property tests"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every refusal is one line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nlorax-np: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, FormatError, BackendError, ShapeError, DtypeError, LookupError, OSError) as error:
        text = error.args[0] if isinstance(error, LookupError) and error.args else error
        print(f"lorax-np: {text}", file=sys.stderr)
        return BAD_USAGE


def _parser() -> argparse.ArgumentParser:
    about = "LoRA proved by hand, and a judge for other implementations."
    parser = argparse.ArgumentParser(prog="lorax-np", description=about)
    parser.add_argument("--version", action="version", version=f"lorax-np {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    verify = commands.add_parser(
        "verify",
        help="judge an implementation, or let the engine prove itself",
        description="Judge an implementation of a LoRA linear layer, tensor by tensor: within what its own "
        "roundings explain. Exit codes: 0 pass, 1 fail, 2 nothing judged or bad usage, 3 the subject crashed.",
    )
    verify.add_argument(
        "subject",
        nargs="?",
        default="reference",
        metavar="SUBJECT",
        help="reference (the default: the engine itself), peft, or module:attribute of yours",
    )
    verify.add_argument(
        "--profile", choices=("fp64", "fp32"), help="the dtype to compute in (default: both, one by one)"
    )
    verify.add_argument(
        "--level", choices=("quick", "full"), default="full", help="quick judges a third of the layers"
    )
    verify.add_argument(
        "--weights",
        metavar="FILE[:TENSOR]",
        help="judge on the linear weights of a safetensors file, or on one",
    )
    verify.add_argument(
        "--case", metavar="ID", default="", help="only the checks on this path, as a report prints it"
    )
    verify.add_argument("--seed", type=_seed, default=0, help="of every draw (default: 0)")
    verify.add_argument(
        "--json", metavar="FILE", help="write the report as JSON; - for standard output, without a table"
    )
    verify.add_argument("--backend", choices=("numpy", "cupy", "auto"), help="where the reference computes")
    verify.add_argument("--quiet", action="store_true", help="print the verdict alone")
    verify.set_defaults(run=_verify)

    info = commands.add_parser("info", help="versions, backend and why, BLAS, what each extra would add")
    info.add_argument("--json", action="store_true", help="print as JSON")
    info.set_defaults(run=_info)
    return parser


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


# ---- verify ------------------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    from . import verify as harness
    from .backend import namespace
    from .verify.report import SCHEMA, write_json

    if arguments.backend and arguments.subject != "reference":
        raise ConfigError(f"--backend: expected the subject reference beside it, got {arguments.subject}")
    if arguments.json and arguments.json != "-" and not Path(arguments.json).resolve().parent.is_dir():
        raise ConfigError(f"--json: expected a file in a folder that is there, got {arguments.json}")
    xp = namespace(arguments.backend) if arguments.backend else None
    try:
        subject = harness.subjects.load(arguments.subject, xp)
    except LookupError:
        raise
    except Exception as error:  # whatever a stranger's module raises while it is imported
        print(
            f"lorax-np: {arguments.subject} crashed on import: {type(error).__name__}: {error}",
            file=sys.stderr,
        )
        return CRASHED

    reports: list[Report] = []
    for profile in [arguments.profile] if arguments.profile else ["fp64", "fp32"]:
        progress = _Progress(profile, quiet=arguments.quiet)
        report = harness.verify(
            subject,
            profile,
            arguments.level,
            weights=arguments.weights,
            seed=arguments.seed,
            case=arguments.case,
            progress=progress,
        )
        progress.done()
        report.subject = arguments.subject
        reports.append(report)
        if arguments.json != "-":
            text = str(report)
            print(text.rpartition("\n")[2] if arguments.quiet else text + "\n" * (profile == "fp64"))
    if arguments.json:
        data = {"schema": SCHEMA, "reports": [report.to_dict() for report in reports]}
        if arguments.json == "-":
            print(json.dumps(data, indent=1))
        else:
            write_json(data, arguments.json)
    codes = [report.exit_code for report in reports]
    return max(codes, key=(0, 2, 1, 3).index)


class _Progress:
    """A line that counts on a terminal; elsewhere a plain line when a battery ends."""

    def __init__(self, profile: str, *, quiet: bool) -> None:
        self.profile, self.quiet, self.terminal = profile, quiet, sys.stderr.isatty()
        self.battery, self.text, self.shown = "", "", 0.0

    def __call__(self, battery: str, checks: int, failures: int) -> None:
        if battery != self.battery:
            self._line()
            self.battery = battery
        self.text = f"{self.profile} {battery}: {checks} checks" + (f", {failures} failed" if failures else "")
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


# ---- info --------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError, version

    found = {"lorax_np": __version__, **backend_info()}
    extras = {}
    for module, (extra, adds) in EXTRAS.items():
        try:
            extras[module] = version(module)
        except PackageNotFoundError:
            extras[module] = f"absent; pip install 'lorax-np[{extra}]' adds {adds}"
    if arguments.json:
        print(json.dumps({**found, "extras": extras}, indent=1))
        return 0
    for name, value in found.items():
        print(f"{name:<12}{value}")
    print("\noptional")
    for name, value in extras.items():
        print(f"{name:<12}{value}")
    return 0
