"""The command line: lorax-np verify, lorax-np info.  Exit codes: 0 pass, 1 fail, 2 nothing judged, 3 crash.

Besides, as shells have it: 130 when interrupted, 141 when whoever reads the output went away.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from . import BackendError, ConfigError, DtypeError, FormatError, ShapeError, __version__, backend_info

if TYPE_CHECKING:
    from .verify import Report

BAD_USAGE, CRASHED, INTERRUPTED, UNREAD = 2, 3, 130, 141
ENGINES = "reference", "fast"  # the subjects that compute where they are told to
EXTRAS = {  # module: (extra, what it adds)
    "ml_dtypes": ("bf16", "bfloat16 as a storage dtype"),
    "mkl": ("mkl", "MKL behind the products of lx.fast"),
    "torch": ("peft", "with peft, PEFT's layers as a subject"),
    "peft": ("peft", "with torch, PEFT's layers as a subject"),
    "jax": ("jax", "JAX functions as subjects"),
    "hypothesis": ("test", "the property tests"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every refusal is one line on standard error."""
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
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return UNREAD
    except (ConfigError, FormatError, BackendError, ShapeError, DtypeError, OSError) as error:
        print(f"lorax-np: {error}", file=sys.stderr)
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
        help="reference (the default: the engine itself), fast, peft, or module:attribute of yours",
    )
    verify.add_argument(
        "--profile",
        choices=("fp64", "fp32", "tf32", "bf16", "fp16", "bf16-pure", "tf32-rz", "bf16-rz"),
        help="what the subject computes in (default: fp64, then fp32)",
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
    verify.add_argument(
        "--convention",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="judge under another convention: dora, dropout, norm_gradient, schedule, or the layout of W, A, B",
    )
    verify.add_argument("--seed", type=_seed, default=0, help="of every draw (default: 0)")
    verify.add_argument(
        "--json", metavar="FILE", help="write the report as JSON; - for standard output, without a table"
    )
    verify.add_argument("--backend", choices=("numpy", "cupy", "auto"), help="where reference or fast computes")
    verify.add_argument("--html", metavar="FILE", help="write the report as one page for a browser")
    verify.add_argument("--junit", metavar="FILE", help="write the report as JUnit XML")
    verify.add_argument("--markdown", metavar="FILE", help="write the report for a pull request")
    verify.add_argument(
        "--isolation", choices=("process", "none"), default="process", help="where module:attribute runs"
    )
    verify.add_argument(
        "--mutants", action="store_true", help="judge the harness: every known fault, every check"
    )
    verify.add_argument("--quiet", action="store_true", help="print the verdict alone")
    verify.set_defaults(run=_verify)

    vectors = commands.add_parser("vectors", help="write the golden vectors into a folder, or check them")
    vectors.add_argument("directory", metavar="DIR")
    vectors.add_argument("--check", action="store_true", help="check the folder instead of writing it")
    vectors.add_argument("--seed", type=_seed, default=0, help="of every draw (default: 0)")
    vectors.set_defaults(run=_vectors)

    info = commands.add_parser("info", help="versions, backend and why, BLAS, what each extra would add")
    info.add_argument("--json", action="store_true", help="print as JSON")
    info.set_defaults(run=_info)
    return parser


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 10**18 - 1, got {text!r}")
    return int(text)


# ---- verify ------------------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    from .verify.pages.digest import write_text
    from .verify.pages.html import html
    from .verify.pages.junit import junit
    from .verify.pages.markdown import to_markdown
    from .verify.report import SCHEMA, to_text

    if arguments.backend and arguments.subject not in ENGINES:
        raise ConfigError(f"--backend: expected the subject reference or fast, got {arguments.subject}")
    for name in ("json", "html", "junit", "markdown"):
        path = Path(getattr(arguments, name) or "-")
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise ConfigError(f"--{name}: expected a file in a folder that is there, got {path}")
    if arguments.mutants:
        return _mutants(arguments)
    aside = redirect_stdout(sys.stderr) if arguments.json == "-" else nullcontext()
    with aside:  # what the subject itself prints is no part of the JSON
        reports = _judged(arguments)
    if not reports:
        return CRASHED
    if arguments.html:
        write_text(html(reports), arguments.html)
    if arguments.junit:
        write_text(junit(reports), arguments.junit)
    if arguments.markdown:
        write_text(to_markdown(reports), arguments.markdown)
    if arguments.json:
        text = to_text({"schema": SCHEMA, "reports": [report.to_dict() for report in reports]}) + "\n"
        print(text, end="") if arguments.json == "-" else write_text(text, arguments.json)
    codes = [report.exit_code for report in reports]
    return max(codes, key=(0, 2, 1, 3).index)


def _judged(arguments: argparse.Namespace) -> "list[Report]":
    """A report for each profile, printed as it comes; none where the subject's module crashed."""
    from . import verify as harness
    from .backend import namespace
    from .verify.batteries.tensors import in_one_line
    from .verify.conventions import Spec, changed, spec_of
    from .verify.verdict import opened

    changed(arguments.convention, Spec())  # refused before anything is loaded
    try:
        xp = namespace(arguments.backend) if arguments.subject in ENGINES else None
    except BackendError as error:
        raise BackendError(str(error).replace("xp:", "--backend:", 1)) from None
    reports: list[Report] = []
    with ExitStack() as stack:
        try:
            subject = stack.enter_context(opened(arguments.subject, arguments.isolation, xp))
        except harness.subjects.NoSubject as error:
            raise ConfigError(str(error)) from None
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises while it is imported
            print(f"lorax-np: {arguments.subject} crashed on import: {in_one_line(error)}", file=sys.stderr)
            return []
        spec = changed(arguments.convention, spec_of(subject)) if arguments.convention else None
        profiles = [arguments.profile] if arguments.profile else ["fp64", "fp32"]
        for profile in profiles:
            progress = _Progress(profile, quiet=arguments.quiet)
            report = harness.verify(
                subject,
                profile,
                arguments.level,
                conventions=spec,
                weights=arguments.weights,
                seed=arguments.seed,
                case=arguments.case,
                title=arguments.subject,
                progress=progress,
            )
            progress.done()
            reports.append(report)
            if arguments.json != "-":
                text = str(report)
                gap = "\n" * (profile != profiles[-1])
                print(text.rpartition("\n\n")[2] if arguments.quiet else text + gap)
    return reports


def _mutants(arguments: argparse.Namespace) -> int:
    """The harness judged by its own measure: every known fault against every check."""
    from .verify import verify
    from .verify.mutants.matrix import kill_matrix
    from .verify.pages.digest import write_text
    from .verify.pages.html import html

    profile = arguments.profile or "fp32"
    progress = _Progress(profile, quiet=arguments.quiet)
    matrix = kill_matrix(profile=profile, progress=lambda fault, done, total: progress("mutants", done, 0))
    progress.done()
    print(matrix.summary() if arguments.quiet else matrix)
    if arguments.html:
        write_text(html([verify("reference", profile, "quick")], matrix), arguments.html)
    return 0 if all(matrix.killers(fault) for fault in matrix.faults) else 1


class _Progress:
    """A line that counts on a terminal; elsewhere a plain line when a battery ends."""

    def __init__(self, profile: str, *, quiet: bool) -> None:
        self.profile, self.quiet, self.terminal = profile, quiet, sys.stderr.isatty()
        self.battery, self.text, self.shown = "", "", 0.0

    def __call__(self, battery: str, checks: int, failures: int) -> None:
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


# ---- vectors -----------------------------------------------------------------------------------------------


def _vectors(arguments: argparse.Namespace) -> int:
    from .verify.vectors.directory import vectors

    progress = _Progress("vectors", quiet=False)
    code, lines = vectors(
        arguments.directory,
        arguments.check,
        arguments.seed,
        lambda file, done, total: progress("files", done, 0),
    )
    progress.done()
    print(*lines, sep="\n")
    return code


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
