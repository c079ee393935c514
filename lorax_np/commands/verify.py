"""lorax-np verify: judge an implementation, or let the engine prove itself."""

import argparse
import sys
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from .. import BackendError, ConfigError
from .common import Parsers, Progress, seed

if TYPE_CHECKING:
    from ..verify import Report

CRASHED = 3
ENGINES = "reference", "fast"  # the subjects that compute where they are told to


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
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
    verify.add_argument("--seed", type=seed, default=0, help="of every draw (default: 0)")
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
    verify.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Judge, and write the reports that were asked for."""
    from ..verify.pages.digest import write_text
    from ..verify.pages.html import html
    from ..verify.pages.junit import junit
    from ..verify.pages.markdown import to_markdown
    from ..verify.report import SCHEMA, to_text

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
    from .. import verify as harness
    from ..backend import namespace
    from ..verify.batteries.tensors import in_one_line
    from ..verify.conventions import Spec, changed, spec_of
    from ..verify.verdict import opened

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
            progress = Progress(profile, quiet=arguments.quiet)
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
    from ..verify import verify
    from ..verify.mutants.matrix import kill_matrix
    from ..verify.pages.digest import write_text
    from ..verify.pages.html import html

    profile = arguments.profile or "fp32"
    progress = Progress(profile, quiet=arguments.quiet)
    matrix = kill_matrix(profile=profile, progress=lambda fault, done, total: progress("mutants", done, 0))
    progress.done()
    print(matrix.summary() if arguments.quiet else matrix)
    if arguments.html:
        write_text(html([verify("reference", profile, "quick")], matrix), arguments.html)
    return 0 if all(matrix.killers(fault) for fault in matrix.faults) else 1
