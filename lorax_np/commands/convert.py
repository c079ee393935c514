"""lorax-np convert: an adapter from one program's files into another's."""

import argparse
import json

from .common import Parsers

FORMATS = ("peft", "mlx", "loralib", "kohya", "torchtune", "gguf")


def flags(text: str) -> list[bool]:
    """An argument's kind: 1,0,1."""
    words = text.split(",")
    if not words or set(words) - {"0", "1"}:
        raise argparse.ArgumentTypeError(f"expected zeros and ones between commas, got {text!r}")
    return [word == "1" for word in words]


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    convert = commands.add_parser(
        "convert", help="an adapter from and to PEFT, mlx-lm, loralib, kohya, torchtune, GGUF"
    )
    convert.add_argument("source", metavar="SOURCE", help="an adapter's directory or file")
    convert.add_argument("dest", metavar="DEST", help="where it goes: a new directory, or a file")
    convert.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    convert.add_argument("--from", dest="source_format", choices=FORMATS, help="instead of detecting it")
    convert.add_argument("--base", metavar="CHECKPOINT", help="the base: its names, shapes and config are read")
    convert.add_argument("--alpha", type=float, help="α, where the source does not say it (loralib)")
    convert.add_argument("--names", metavar="JSON", help="kohya's names -> dotted names, instead of a base")
    convert.add_argument("--prefix", help="kohya's word for the part of the model (default: lora_unet)")
    convert.add_argument("--enable-lora", type=flags, metavar="1,0,1", help="parts of loralib's MergedLinear")
    convert.add_argument("--fold", action="store_true", help="allow B to be rounded where one scaling must do")
    convert.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    convert.add_argument("--json", action="store_true", help="print as JSON")
    convert.add_argument("--quiet", action="store_true", help="print nothing")
    convert.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was done."""
    from pathlib import Path

    from ..io.checkpoint import read_json
    from ..io.convert import convert

    done = convert(
        arguments.source,
        arguments.to,
        arguments.dest,
        source_format=arguments.source_format,
        base=arguments.base,
        alpha=arguments.alpha,
        names=read_json(Path(arguments.names)) if arguments.names else None,
        prefix=arguments.prefix,
        enable_lora=arguments.enable_lora,
        fold=arguments.fold,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        found = done._asdict() | {"files": [str(path) for path in done.files], "dry_run": arguments.dry_run}
        print(json.dumps(found, indent=1, ensure_ascii=False))
    elif not arguments.quiet:
        verb = "would write" if arguments.dry_run else "wrote"
        print(f"{done.source_format} -> {done.target_format}: {done.sites} sites")
        for path in done.files:
            print(f"{verb} {path}")
        for note in done.notes:
            print(f"note: {note}")
    return 0
