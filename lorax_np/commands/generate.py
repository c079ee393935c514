"""lorax-np generate: a text that a model writes, with an adapter beside it or without."""

import argparse
import json
import sys
from pathlib import Path

from .common import Parsers, seed
from .train import HELD, Strict

ABOUT = (
    "Write on after a prompt, or answer it where the model has a chat template. The adapter stays beside the "
    "base. Without --temp the likeliest token is taken each time; with it, the same seed gives the same text."
)


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "generate", help="a text that a model writes", description=ABOUT, allow_abbrev=False
    )
    parser.__class__ = Strict
    parser.add_argument("--model", metavar="PATH", required=True, help="a Hugging Face directory or a .gguf")
    parser.add_argument("--adapter-path", metavar="DIR", help="an adapter for it, PEFT's or ours")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what the model reads; - for standard input")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the same from a file in UTF-8")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the prompt is a message to be answered (default: where the model's files have a template)",
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--temp", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the likeliest, up to P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="of the K likeliest; 0 for all")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument(
        "--quantize", choices=HELD, default=HELD[0], help="how the base is held (default: none)"
    )
    parser.add_argument("--backend", choices=("numpy", "cupy", "auto"), help="where it is computed")
    parser.add_argument(
        "--json", nargs="?", const="-", choices=("-",), help="print text and figures as JSON instead"
    )
    parser.add_argument("--quiet", action="store_true", help="print the text alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write, and say how fast it went."""
    from .. import ConfigError, Sampling, generate, load_model
    from ..backend import namespace
    from ..generation.decoders import writer_of
    from ..models.adapted import held, with_adapter
    from ..text.tokenizer import load_tokenizer

    if arguments.json and arguments.stream:
        raise ConfigError("--stream: expected none beside --json, which is printed whole, got both")
    how = Sampling(arguments.temp, arguments.top_k, arguments.top_p, arguments.seed)
    prompt = prompt_of(arguments)
    model = load_model(arguments.model, dtype="float32", xp=namespace(arguments.backend, who="--backend"))
    beside = with_adapter(model, arguments.adapter_path, writer_of(model).task)
    if beside.note and not arguments.quiet:
        print(f"note: {beside.note}", file=sys.stderr, flush=True)
    if arguments.quantize != HELD[0]:
        beside = held(beside, arguments.quantize)
    tokenizer = load_tokenizer(arguments.model, vocab_size=model.config.get("vocab_size"))
    found = generate(
        beside.model,
        tokenizer,
        prompt,
        sites=beside.sites,
        trained=beside.trained,
        tokens=beside.tokens,
        sampling=how,
        most=arguments.max_tokens,
        chat=arguments.chat,
        on_text=(lambda piece: print(piece, end="", flush=True)) if arguments.stream else None,
    )
    if arguments.json:
        print(json.dumps({**found._asdict(), "tokens_per_second": found.rate}))
        return 0
    print("" if arguments.stream else found.text, flush=True)
    if not arguments.quiet:
        print(
            f"{found.prompt} tokens read in {found.reading:.2f} s, {len(found.ids)} written in "
            f"{found.writing:.2f} s ({found.rate:.1f} tok/s); ended by {found.ended}",
            file=sys.stderr,
        )
    return 0


def prompt_of(arguments: argparse.Namespace) -> str:
    """The prompt: as given, of a file, or of standard input. Raises FormatError for bytes that are no UTF-8."""
    from .. import FormatError

    if arguments.prompt is not None and arguments.prompt != "-":
        return str(arguments.prompt)
    where = arguments.prompt_file or "standard input"
    raw = sys.stdin.buffer.read() if arguments.prompt else Path(arguments.prompt_file).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: expected text in UTF-8, got another byte at {error.start}") from None
