"""lorax-np unmerge: an adapter taken out of a checkpoint again."""

import argparse
from functools import partial

from .common import Parsers
from .streaming import options, run_streamed


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    unmerge = commands.add_parser(
        "unmerge",
        help="take an adapter out of a checkpoint again",
        description="Write the base again: what the adapter touched is copied from the original, or, without "
        "it, had by subtraction, each entry within half an ulp of W + s·BA and half an ulp of W.",
    )
    unmerge.add_argument("merged", metavar="MERGED", help="a merged checkpoint")
    unmerge.add_argument("adapter", metavar="ADAPTER", help="the PEFT directory that was merged")
    unmerge.add_argument("dest", metavar="DEST", help="a directory that is not there yet, or empty")
    unmerge.add_argument("--original", metavar="BASE", help="the base of before: nothing is lost then")
    options(unmerge)
    unmerge.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Unmerge, and print what was done."""
    from ..stream.merge import unmerge_checkpoint

    work = partial(unmerge_checkpoint, arguments.merged, arguments.adapter, arguments.dest)
    return run_streamed(partial(work, original=arguments.original), arguments, "unmerge")
