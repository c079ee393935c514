"""Files of rows as examples, with a report of what was cut, repeated, or left unlabelled.  specs/data.md."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import ConfigError
from ..io.safetensors import show
from .causal import causal_example
from .examples import DOUBLED, Example, Settings
from .heads import class_example, pair_example, tag_example, written_example
from .labels import Labels, labels_of
from .questions import question_examples
from .rows import Row, Rows, data_files, read_rows, task_name
from .tokenizer import Tokenizer

HALF = 0.5  # a larger share of repeated rows is a warning


class Report(NamedTuple):
    """What became of a file's rows."""

    name: str
    task: str
    rows: int
    examples: int
    tokens: int  # that the model computes, a decoder's apart
    labelled: int  # labels that count
    unlabelled: tuple[str, ...]  # rows without one
    repeated: int  # rows equal to an earlier one
    ignored: tuple[str, ...]  # keys that no format has
    counts: Counter[str]

    def lines(self) -> list[str]:
        """What a person should know, a line each; warnings begin with the word."""
        share = f" ({self.labelled / self.tokens:.1%})" if self.task in ("CAUSAL_LM", "TOKEN_CLS") else ""
        found = [f"{self.name}: {self.rows} rows, {self.examples} examples, {self.tokens} tokens"]
        found[0] += f", {self.labelled} labels{share}"
        for what, n in sorted(self.counts.items()):
            if n:
                found.append(f"{'warning: ' if what.startswith(DOUBLED) else ''}{self.name}: {what}: {n}")
        if self.ignored:
            found.append(f"{self.name}: keys not read: {', '.join(map(show, self.ignored[:8]))}")
        if self.repeated > HALF * self.rows:
            found.append(f"warning: {self.name}: {self.repeated} of {self.rows} rows repeat an earlier one")
        if self.unlabelled:
            first = ", ".join(self.unlabelled[:3])
            found.append(f"warning: {self.name}: {len(self.unlabelled)} rows without a label, first {first}")
        return found


class Data(NamedTuple):
    """The examples of one file, the classes their labels stand for, and the report."""

    examples: tuple[Example, ...]
    labels: Labels | None
    report: Report


def load_data(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    task: str,
    settings: Settings | None = None,
    labels: Labels | None = None,
) -> dict[str, Data]:
    """Read a .jsonl file, or a directory of train.jsonl, valid.jsonl and test.jsonl, as examples by split.

    task     : causal-lm, seq-cls, token-cls, question-ans, seq2seq-lm, feature-extraction; or PEFT's name
    settings : lengths and masks; the defaults of Settings
    labels   : the classes of a model that has a head already; else they are those of the training rows

    Raises FormatError, one line with file and line, for a row that cannot be learned from; ConfigError for
    settings and tasks that have no meaning. Source: specs/data.md.
    """
    task, settings = task_name(task), (settings or Settings()).checked()
    files = {split: read_rows(file, task) for split, file in data_files(path).items()}
    key = {"SEQ_CLS": "label", "TOKEN_CLS": "tags"}.get(task)
    if key is None:
        labels = None
    elif labels is None:
        labels = labels_of(files["train"].rows, key)
    return {
        split: encode_rows(rows, tokenizer, task=task, settings=settings, labels=labels)
        for split, rows in files.items()
    }


def encode_rows(
    rows: Rows, tokenizer: Tokenizer, *, task: str, settings: Settings, labels: Labels | None
) -> Data:
    """Examples of rows read before."""
    counts: Counter[str] = Counter()
    encode = _encoder(task, tokenizer, settings, labels, counts)
    examples = [example for row in rows.rows for example in encode(row)]
    return Data(tuple(examples), labels, _report(rows, task, examples, counts))


def _encoder(
    task: str, tokenizer: Tokenizer, settings: Settings, labels: Labels | None, counts: Counter[str]
) -> Callable[[Row], Sequence[Example]]:
    """What makes examples of a row, by task."""
    if task == "QUESTION_ANS":
        return lambda row: question_examples(row, tokenizer, settings, counts)
    plain = {"CAUSAL_LM": causal_example, "SEQ_2_SEQ_LM": written_example, "FEATURE_EXTRACTION": pair_example}
    if task in plain:
        return lambda row: [plain[task](row, tokenizer, settings, counts)]
    if labels is None:
        raise ConfigError(f"labels: expected the classes of {task}, got none")
    classes, known = {"SEQ_CLS": class_example, "TOKEN_CLS": tag_example}[task], labels
    return lambda row: [classes(row, tokenizer, settings, known, counts)]


def _report(rows: Rows, task: str, examples: Sequence[Example], counts: Counter[str]) -> Report:
    seen: set[str] = {json.dumps(row.fields, sort_keys=True) for row in rows.rows}
    return Report(
        rows.path.name,
        task,
        len(rows.rows),
        len(examples),
        sum(example.tokens for example in examples),
        sum(example.kept for example in examples),
        tuple(example.where for example in examples if not example.kept),
        len(rows.rows) - len(seen),
        rows.ignored,
        counts,
    )
