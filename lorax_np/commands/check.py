"""lorax-np check: audit an adapter directory without loading the model."""

import argparse
import json
from pathlib import Path

from .common import Parsers, Progress


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    check = commands.add_parser(
        "check",
        help="audit an adapter directory without loading the model",
        description="Look over a PEFT adapter directory: config, keys, shapes and numbers; with the base also "
        "its names and shapes, rows without direction under DoRA, and what a merge into 16 bits loses. Exit "
        "codes: 0 nothing found, 1 an error or a warning, 2 nothing that could be judged.",
    )
    check.add_argument(
        "directory", metavar="DIR", help="with adapter_config.json and adapter_model.safetensors"
    )
    check.add_argument("--base", metavar="PATH", help="the base checkpoint: a directory, a file, or a GGUF")
    check.add_argument("--json", metavar="FILE", help="write what was found as JSON; - for standard output")
    check.add_argument("--quiet", action="store_true", help="print the verdict alone")
    check.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Audit, print, and write JSON where it was asked for."""
    from ..audit import audit
    from ..io.checkpoint import open_checkpoint
    from ..verify.pages.digest import write_text

    base = open_checkpoint(arguments.base) if arguments.base else None
    progress = Progress("check", quiet=arguments.quiet or base is None)
    found = audit(
        Path(arguments.directory),
        base,
        progress=lambda done, total, name: progress("sites", done + 1, 0),
    )
    progress.done()
    if arguments.json:
        text = json.dumps(found.to_dict(), indent=1) + "\n"
        print(text, end="") if arguments.json == "-" else write_text(text, arguments.json)
    if arguments.json != "-":
        print(str(found).rpartition("\n")[2] if arguments.quiet else found)
    return 0 if found.passed else 1
