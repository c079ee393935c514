"""lorax-np evaluate: how good a model is on rows of text, with an adapter beside it or without."""

import argparse
import json
import sys
import time
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Parsers
from .train import HELD, LABELS_FILE, Strict, choice

if TYPE_CHECKING:
    from ..models.adapted import Adapted
    from ..text.data import Data
    from ..text.labels import Labels
    from ..text.tokenizer import Tokenizer

SPLITS = "test", "valid", "train"  # of a directory the first that there is
ABOUT = (
    "Compute the loss and the scores of a task over rows of text. Of a directory that is test.jsonl, else "
    "valid.jsonl, else train.jsonl; formats and scores are those of lorax-np train."
)


def add(commands: Parsers) -> None:
    """Declare the command and its arguments."""
    from ..text.rows import TASKS

    parser = commands.add_parser(
        "evaluate", help="the loss and the scores of a model", description=ABOUT, allow_abbrev=False
    )
    parser.__class__ = Strict
    parser.add_argument("--model", metavar="PATH", required=True, help="a Hugging Face directory or a .gguf")
    parser.add_argument("--adapter-path", metavar="DIR", help="an adapter for it, PEFT's or ours")
    parser.add_argument("--data", metavar="PATH", required=True, help="a .jsonl file, or a directory of splits")
    parser.add_argument("--split", choices=SPLITS, help="which file of a directory")
    tasks = f"what is computed: {choice(tuple(TASKS))} (default: causal-lm)"
    parser.add_argument("--task", default="causal-lm", metavar="TASK", help=tasks)
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences (default: 4)")
    parser.add_argument(
        "--max-seq-length",
        type=int,
        metavar="N",
        help="longer ones are cut (default: 1024, or the model's positions)",
    )
    parser.add_argument(
        "--mask-prompt",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether prompts carry no labels (default)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows alone")
    parser.add_argument(
        "--quantize", choices=HELD, default=HELD[0], help="how the base is held (default: none)"
    )
    parser.add_argument("--backend", choices=("numpy", "cupy", "auto"), help="where it is computed")
    parser.add_argument("--json", nargs="?", const="-", choices=("-",), help="print figures as JSON instead")
    parser.add_argument("--quiet", action="store_true", help="no lines but the table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compute and print. Exit code 1 where the loss is not finite."""
    from .. import ConfigError, evaluate, load_model
    from ..backend import namespace
    from ..models.adapted import held, with_adapter
    from ..text.examples import SHORTEST
    from ..text.rows import task_name
    from ..text.tokenizer import load_tokenizer
    from ..train.checks import check_pairs, check_start

    task = task_name(arguments.task)
    for name, least in (("limit", 1), ("batch_size", 1), ("max_seq_length", SHORTEST)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    file = data_file(Path(arguments.data), arguments.split)
    model = load_model(arguments.model, dtype="float32", xp=namespace(arguments.backend, who="--backend"))
    beside = with_adapter(model, arguments.adapter_path, task)
    if beside.note and not arguments.quiet:
        print(f"note: {beside.note}", file=sys.stderr, flush=True)
    if arguments.quantize != HELD[0]:
        beside = held(beside, arguments.quantize)
    tokenizer = load_tokenizer(arguments.model, vocab_size=model.config.get("vocab_size"))
    data = read(arguments, file, beside, tokenizer, task)
    for line in () if arguments.quiet else data.report.lines():
        print(line, file=sys.stderr, flush=True)
    check_start(beside.model, beside.trained, data.examples, task)
    check_pairs(data.examples, task, batch_size=arguments.batch_size)
    counting = _counting(beside, task, len(data.examples), quiet=arguments.quiet)
    began = time.perf_counter()
    metrics = evaluate(
        *(beside.model, beside.sites, beside.trained, data.examples, task),
        labels=data.labels,
        batch_size=arguments.batch_size,
        passes=counting,
    )
    counting.done()
    _print(arguments, file, task, data, metrics, time.perf_counter() - began)
    return 0 if isfinite(metrics["loss"]) else 1


def data_file(given: Path, split: str | None) -> Path:
    """The file of rows: as given, or of a directory the split that is asked for, or the first there is."""
    from .. import ConfigError, FormatError
    from ..text.rows import data_files

    if not given.is_dir():
        if split is not None:
            raise ConfigError(f"--split: expected none for a file, got {split}")
        return data_files(given)["train"]
    names = [f"{name}.jsonl" for name in (SPLITS if split is None else (split,))]
    for name in names:
        if (given / name).is_file():
            return given / name
    came = ", ".join(sorted(file.name for file in given.glob("*.jsonl"))[:5]) or "no .jsonl file"
    raise FormatError(f"{given}: expected {' or '.join(names)} in the directory, got {came}")


def read(
    arguments: argparse.Namespace, file: Path, beside: "Adapted", tokenizer: "Tokenizer", task: str
) -> "Data":
    """The rows as examples. Errors name file and line."""
    from ..models.families import FAMILIES
    from ..text.data import encode_rows
    from ..text.examples import Settings
    from ..text.rows import read_rows
    from ..train.checks import longest_text

    config = beside.model.config
    longest = arguments.max_seq_length or min(1024, longest_text(beside.model) or 1024)
    how = Settings(
        longest,
        mask_prompt=arguments.mask_prompt,
        stride=min(128, longest // 2),
        typed=None if FAMILIES[beside.model.family].types else False,
        decoder_start=config.get("decoder_start_token_id"),
    )
    rows = read_rows(file, task)
    if arguments.limit is not None:
        rows = rows._replace(rows=rows.rows[: arguments.limit])
    labels = classes(beside, arguments.adapter_path, task)
    return encode_rows(rows, tokenizer, task=task, settings=how, labels=labels)


def classes(beside: "Adapted", adapter: str | None, task: str) -> "Labels | None":
    """The classes of a task that has some: as training left them beside the adapter, else of config.json.

    Where nobody names them they are numbered. Raises ConfigError where names and outputs differ in number.
    """
    from .. import ConfigError
    from ..io.checkpoint import read_json
    from ..text.labels import Labels, labels_of_config

    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    rows, file = outputs(beside, task), Path(adapter or "", LABELS_FILE)
    if adapter is not None and file.is_file():
        where, found = str(file), labels_of_config(read_json(file))
    else:
        where, found = "id2label", labels_of_config(beside.model.config)
        if found is not None and found.count != rows and adapter is not None:
            found = None  # the base's own, of a head that the adapter's stands for
    if found is None:
        numbered = tuple(f"LABEL_{i}" for i in range(rows))
        return Labels("regression" if rows == 1 else "single", numbered)
    if found.count != rows:
        raise ConfigError(f"{where}: expected {rows} classes, the outputs of the head, got {found.count}")
    return found


def outputs(beside: "Adapted", task: str) -> int:
    """How many outputs the head of a task has."""
    from ..models.tasks import head_of

    shapes = head_of(beside.model, task).shapes(beside.model.config, 1)
    name = next(name for name, shape in shapes.items() if shape[0] == 1)
    weight = beside.trained.saved.get(name)
    return int((beside.model.weights[name] if weight is None else weight).shape[0])


def _counting(beside: "Adapted", task: str, total: int, *, quiet: bool) -> Any:
    """Passes that say on a terminal how far they are."""
    from ..train.passes import Passes
    from .common import Progress

    progress = Progress("evaluate", quiet=quiet or not sys.stderr.isatty())

    class Counting(Passes):
        """Counts the rows of batches whose loss it has computed."""

        rows = 0

        def loss(self, trained: Any, batch: Any, *, n: int) -> float:
            """As Passes.loss."""
            found = super().loss(trained, batch, n=n)
            self.count(batch)
            return found

        def judged(self, trained: Any, batch: Any, *, n: int) -> Any:
            """As Passes.judged."""
            found = super().judged(trained, batch, n=n)
            self.count(batch)
            return found

        def count(self, batch: Any) -> None:
            """The rows of a batch are done."""
            self.rows += len(batch.index) // (2 if task == "FEATURE_EXTRACTION" else 1)
            progress(f"rows of {total}", self.rows, 0)

        def done(self) -> None:
            """Leave the line empty."""
            progress.done()

    return Counting(beside.model, beside.sites, beside.trained, task=task, tokens=beside.tokens)


def _print(
    arguments: argparse.Namespace, file: Path, task: str, data: "Data", metrics: Any, seconds: float
) -> None:
    """The table, or the same as JSON, where numbers that are not finite are null."""
    speed = {"tokens": data.report.tokens, "seconds": seconds}
    speed["tokens_per_second"] = data.report.tokens / seconds
    if arguments.json:
        shown = {name: value if isfinite(value) else None for name, value in metrics.items()}
        about = {"model": arguments.model, "adapter": arguments.adapter_path, "data": str(file), "task": task}
        print(json.dumps({**about, "metrics": shown, **speed}))
        return
    table = {name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in metrics.items()}
    table |= {"tokens": str(speed["tokens"]), "seconds": f"{seconds:.2f}"}
    table["tokens/s"] = f"{speed['tokens_per_second']:.0f}"
    wide = max(map(len, table))
    print(f"{task} on {file}")
    for name, value in table.items():
        print(f"{name:<{wide}}  {value}")
