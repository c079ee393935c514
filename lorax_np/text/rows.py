"""Rows of JSONL files, a stranger's: each value is checked, and what is wrong is named by file and line.

Formats by task: specs/data.md.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..io.gguf_header import refuse
from ..io.safetensors import show

TASKS = {  # as the command line has them: as PEFT has them
    "causal-lm": "CAUSAL_LM",
    "seq-cls": "SEQ_CLS",
    "token-cls": "TOKEN_CLS",
    "question-ans": "QUESTION_ANS",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "feature-extraction": "FEATURE_EXTRACTION",
}
FORMATS: dict[
    str, tuple[tuple[str, ...], ...]
] = {  # the keys of a row; where one has all of another's, it is meant
    "CAUSAL_LM": (("text",), ("prompt", "completion"), ("messages",)),
    "SEQ_CLS": (("text", "label"), ("text", "text_pair", "label")),
    "TOKEN_CLS": (("tokens", "tags"),),
    "QUESTION_ANS": (("question", "context", "answer"),),
    "SEQ_2_SEQ_LM": (("source", "target"),),
    "FEATURE_EXTRACTION": (("text", "text_pair"), ("text", "text_pair", "score")),
}
SPLITS = "train", "valid", "test"
LARGE = 1 << 53  # a number past it is no label; float64 counts exactly below it
ROLES = "system", "user", "assistant", "tool", "developer"


class Row(NamedTuple):
    """One line of a file, its values checked."""

    where: str  # file:line
    fields: dict[str, Any]


class Rows(NamedTuple):
    """The rows of one file, all of one format."""

    path: Path
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    ignored: tuple[str, ...]  # keys of some row that the format does not have


def task_name(task: str) -> str:
    """The task as PEFT names it, of either name. Raises ConfigError.

    >>> task_name("seq2seq-lm"), task_name("SEQ_CLS")
    ('SEQ_2_SEQ_LM', 'SEQ_CLS')
    """
    name = TASKS.get(task, task)
    if name not in FORMATS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return name


def data_files(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The files that hold the data, by split: a file is all training data; a directory has train.jsonl.

    Raises FormatError for a directory without train.jsonl or a file of another ending; the system's OSError
    where there is no such path.
    """
    given = Path(path)
    if not given.is_dir():
        given.stat()
        if given.suffix != ".jsonl":
            refuse(
                given,
                "a .jsonl file, one JSON object a line, or a directory with train.jsonl",
                show(given.name),
            )
        return {"train": given}
    found = {split: given / f"{split}.jsonl" for split in SPLITS if (given / f"{split}.jsonl").is_file()}
    if "train" not in found:
        others = ", ".join(sorted(file.name for file in given.glob("*.jsonl"))[:5]) or "no .jsonl file"
        refuse(given, "train.jsonl in the directory", others)
    return found


def read_rows(path: str | os.PathLike[str], task: str) -> Rows:
    """Read a file of rows for a task. The first row says which of the task's formats all rows have.

    Raises FormatError, one line that begins with the file and the line's number, for whatever is not UTF-8,
    no JSON object, lacks a key, or has a value that the format does not allow; and for a file without rows.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "train.jsonl")
    ...     _ = file.write_text('{"prompt": "1+1=", "completion": "2", "id": 7}\\n')
    ...     found = read_rows(file, "causal-lm")
    ...     found.keys, found.rows[0].fields, found.ignored
    (('prompt', 'completion'), {'prompt': '1+1=', 'completion': '2'}, ('id',))
    """
    path, task = Path(path), task_name(task)
    keys: tuple[str, ...] = ()
    first, rows = "", []
    ignored: dict[str, None] = {}
    for number, content in _objects(path):
        where = f"{path}:{number}"
        if not keys:
            keys, first = _format(where, content, task), f"line {number}"
        for key in keys:
            if key not in content:
                came = ", ".join(map(show, content)) or "none"
                refuse(where, f"the keys {', '.join(keys)}, as in {first}", came)
        ignored |= dict.fromkeys(key for key in content if key not in keys)
        fields = {key: _value(f"{where}: {key}", key, content[key]) for key in keys}
        _together(where, fields)
        rows.append(Row(where, fields))
    if not rows:
        refuse(path, "at least one row", "none")
    return Rows(path, keys, tuple(rows), tuple(ignored))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1, and the JSON objects on them; lines of spaces are passed over.

    Lines end at a newline byte alone: within a text, JSON allows other characters that end lines elsewhere.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not line.strip():
                continue
            try:
                found = json.loads(line.decode("utf-8"), object_pairs_hook=_once, parse_constant=_constant)
            except RecursionError:
                refuse(where, "a JSON object", "JSON nested too deep")
            except UnicodeDecodeError as error:
                refuse(where, "text in UTF-8", f"another byte at column {error.start + 1}")
            except json.JSONDecodeError as error:
                refuse(where, "one JSON object on the line", f"{error.msg} at column {error.colno}")
            except ValueError as error:  # a key twice, NaN, an integer of thousands of digits
                refuse(where, "JSON", " ".join(str(error).split())[:120])
            if not isinstance(found, dict):
                refuse(where, "a JSON object", show(found))
            yield number, found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key twice among {', '.join(show(key) for key, _ in pairs[:8])}")
    return found


def _constant(word: str) -> None:
    raise ValueError(f"{word}, which JSON does not have")


def _format(where: str, content: dict[str, Any], task: str) -> tuple[str, ...]:
    """The format of the task that a row has, by its keys."""
    fits = [keys for keys in FORMATS[task] if all(key in content for key in keys)]
    most = [keys for keys in fits if not any(set(keys) < set(other) for other in fits)]
    if len(most) != 1:
        wanted = " or ".join("{" + ", ".join(keys) + "}" for keys in FORMATS[task])
        came = " and ".join("{" + ", ".join(keys) + "}" for keys in most)
        refuse(where, f"the keys of one format, {wanted}", came or ", ".join(map(show, content)) or "none")
    return most[0]


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        refuse(where, "a text", show(value))
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        refuse(where, "Unicode", f"half of a surrogate pair at character {error.start}")
    return value


def _messages(where: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        refuse(where, "a list of messages, each with a role and a content", show(value))
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            refuse(f"{where}: message {i}", "an object with role and content", show(message))
        if message["role"] not in ROLES:
            refuse(f"{where}: message {i}: role", f"one of {', '.join(ROLES)}", show(message["role"]))
        _text(f"{where}: message {i}: content", message["content"])
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _tokens(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        refuse(where, "a list of words", show(value))
    return [_text(f"{where}: word {i}", word) for i, word in enumerate(value, 1)]


def _label(where: str, value: Any) -> Any:
    """A class by name or by index, a list of such, or a number."""
    several = value if isinstance(value, list) else [value]
    for one in several:
        scalar = isinstance(one, (str, int)) or (isinstance(one, float) and one is value)
        if not scalar or isinstance(one, bool) or (not isinstance(one, str) and not -LARGE < one < LARGE):
            refuse(where, "a class by name or index, a list of classes, or a number", show(value))
        if isinstance(one, str):
            _text(where, one)
    return value


def _tags(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        refuse(where, "a list of tags", show(value))
    for i, tag in enumerate(value, 1):
        if isinstance(tag, (list, float)):
            refuse(f"{where}: tag {i}", "a class by name or index", show(tag))
        _label(f"{where}: tag {i}", tag)
    return value


def _answer(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not {"text", "start"} <= value.keys():
        refuse(where, "an object with text and start, in characters", show(value))
    text, start = _text(f"{where}: text", value["text"]), value["start"]
    if not text.strip():
        refuse(f"{where}: text", "a piece of the context", show(text))
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        refuse(f"{where}: start", "a character's number, from 0", show(start))
    return {"text": text, "start": start}


def _score(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 <= value <= 1:
        refuse(where, "a number from -1 to 1, as a cosine is", show(value))
    return float(value)


def _value(where: str, key: str, value: Any) -> Any:
    """A value as its key wants it: of most keys, a text."""
    check: Callable[[str, Any], Any] = CHECKS.get(key, _text)
    return check(where, value)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "messages": _messages,
    "tokens": _tokens,
    "tags": _tags,
    "label": _label,
    "answer": _answer,
    "score": _score,
}


def _together(where: str, fields: dict[str, Any]) -> None:
    """What values must be to each other."""
    if "tags" in fields and len(fields["tags"]) != len(fields["tokens"]):
        refuse(f"{where}: tags", f"{len(fields['tokens'])} tags, one a word", len(fields["tags"]))
    if "answer" in fields:
        (text, start), context = fields["answer"].values(), fields["context"]
        if context[start : start + len(text)] != text:
            at = context.find(text)
            hint = f"; it stands at {at}" if at >= 0 else "; it stands nowhere in it"
            came = show(context[start : start + len(text)])
            refuse(f"{where}: answer", f"{show(text)} at character {start} of the context", came + hint)
