"""One example as a person sees it: its tokens decoded, those without a label dim."""

from collections.abc import Sequence

from .examples import Example
from .labels import IGNORED, Labels
from .tokenizer import Tokenizer

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
MOST = 2000  # characters shown


def shown(
    example: Example, tokenizer: Tokenizer, *, task: str, labels: Labels | None = None, colour: bool = False
) -> str:
    """The lines that show an example: its text, what of it is learned, and how much that is.

    Of tasks with labels in the text, what carries none is dim, or between ⟦ and ⟧ where `colour` is False.
    """
    ids = [int(i) for i in example.sequences[0].ids]
    if task == "CAUSAL_LM":
        learned = [False] + [int(label) != IGNORED for label in example.labels[:-1]]
        text = _marked(ids, learned, tokenizer, colour)
        what = f"{sum(learned)} of {len(ids)} tokens are learned"
    elif task == "TOKEN_CLS":
        pairs = [
            f"{tokenizer.decode([i])}/{_name(int(tag), labels)}"
            for i, tag in zip(ids, example.labels, strict=True)
        ]
        text, what = " ".join(pairs), f"{example.kept} of {len(ids)} tokens have a tag"
    elif task == "SEQ_2_SEQ_LM":
        target = [int(i) for i in example.labels]
        text = f"{tokenizer.decode(ids)} → {tokenizer.decode(target)}"
        what = f"{len(target)} tokens are learned, {len(ids)} read"
    elif task == "QUESTION_ANS":
        first, last = (int(i) for i in example.labels)
        text, what = (
            tokenizer.decode(ids),
            f"answer: {tokenizer.decode(ids[first : last + 1])!r}, rows {first} to {last}",
        )
    elif task == "FEATURE_EXTRACTION":
        text = " ↔ ".join(tokenizer.decode([int(i) for i in one.ids]) for one in example.sequences)
        what = "a pair" if example.labels is None else f"score {example.labels}"
    else:
        text, what = tokenizer.decode(ids), f"label: {_class(example.labels, labels)}"
    return f"first example, {example.where}: {what}\n{_short(text)}"


def _marked(ids: Sequence[int], learned: Sequence[bool], tokenizer: Tokenizer, colour: bool) -> str:
    """Text with its runs of tokens that carry no label marked."""
    dim, plain = (DIM, PLAIN) if colour else ("⟦", "⟧")
    parts, begin = [], 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or learned[at] != learned[begin]:
            run = tokenizer.decode(ids[begin:at])
            parts.append(run if learned[begin] else f"{dim}{run}{plain}")
            begin = at
    return "".join(parts)


def _class(label: object, labels: Labels | None) -> str:
    if labels is None or labels.kind == "regression":
        return str(label)
    if labels.kind == "multi":
        chosen = [name for name, there in zip(labels.names, list(label), strict=True) if there]  # type: ignore[call-overload]
        return ", ".join(chosen) or "none"
    return _name(int(str(label)), labels)


def _name(index: int, labels: Labels | None) -> str:
    return "·" if index == IGNORED else str(index) if labels is None else labels.names[index]


def _short(text: str) -> str:
    return text if len(text) <= MOST else f"{text[:MOST]} … ({len(text) - MOST} more characters)"
