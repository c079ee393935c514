"""lorax-np vectors: write the golden vectors, or check them."""

import argparse

from .common import Parsers, Progress, seed


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    vectors = commands.add_parser("vectors", help="write the golden vectors into a folder, or check them")
    vectors.add_argument("directory", metavar="DIR")
    vectors.add_argument("--check", action="store_true", help="check the folder instead of writing it")
    vectors.add_argument("--seed", type=seed, default=0, help="of every draw (default: 0)")
    vectors.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write or check a folder."""
    from ..verify.vectors.directory import vectors

    progress = Progress("vectors", quiet=False)
    code, lines = vectors(
        arguments.directory,
        arguments.check,
        arguments.seed,
        lambda file, done, total: progress("files", done, 0),
    )
    progress.done()
    print(*lines, sep="\n")
    return code
