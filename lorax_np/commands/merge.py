"""lorax-np merge: a checkpoint and an adapter, made one checkpoint."""

import argparse
from functools import partial

from .common import Parsers
from .streaming import options, run_streamed


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    merge = commands.add_parser(
        "merge",
        aliases=["fuse"],
        help="fold an adapter into a checkpoint, in bounded memory",
        description="Write the checkpoint that computes what base and adapter compute together. Each number "
        "is W + s·BA rounded once. DEST appears when it is whole; an interrupted merge goes on where it was.",
    )
    merge.add_argument("base", metavar="BASE", help="a checkpoint: a directory, a .safetensors or a .gguf file")
    merge.add_argument("adapter", metavar="ADAPTER", help="a PEFT directory")
    merge.add_argument("dest", metavar="DEST", help="a directory that is not there yet, or empty")
    options(merge)
    merge.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Merge, and print what was done."""
    from ..stream.merge import merge_checkpoint

    work = partial(merge_checkpoint, arguments.base, arguments.adapter, arguments.dest)
    return run_streamed(work, arguments, "merge")
