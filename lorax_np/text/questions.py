"""Questions on a context: its windows where it is long, answers as rows, and answers read off again."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..backend import HostArray
from ..io.gguf_header import refuse
from .examples import Example, Settings, Span, Tokens, Window, count_specials, ints
from .rows import Row
from .tokenizer import Tokenizer

LONGEST = 30  # tokens of an answer that is read off


def question_examples(
    row: Row, tokenizer: Tokenizer, settings: Settings, counts: Counter[str]
) -> list[Example]:
    """A question with each window of its context, and the rows of the answer's first and last token.

    A window that lacks a token of the answer has (0, 0) for it. Windows share `stride` tokens.
    """
    question = tokenizer.encode(row.fields["question"]).ids
    context, (answer, start) = row.fields["context"], row.fields["answer"].values()
    ids, offsets = tokenizer.encode(context)
    found = _tokens_of(offsets, (start, start + len(answer)))
    if found is None:
        refuse(f"{row.where}: answer", "a text of at least one token", "none")
    room = settings.max_length - tokenizer.template.around_two - len(question)
    if room <= settings.stride:
        most = settings.max_length - tokenizer.template.around_two - settings.stride - 1
        refuse(f"{row.where}: question", f"at most {most} tokens beside a window", len(question))
    typed = tokenizer.template.typed if settings.typed is None else settings.typed
    examples, inside = [], 0
    for begin in windows(len(ids), room, settings.stride):
        part = slice(begin, begin + room)
        whole, types, first = tokenizer.template.two(question, ids[part])
        has = begin <= found[0] and found[1] < begin + room
        rows = (first + found[0] - begin, first + found[1] - begin) if has else (0, 0)
        inside += has
        count_specials(tokenizer, whole, counts)
        sequence = Tokens(ints(whole), ints(types) if typed else None)
        window = Window(context, first, tuple(offsets[part]), answer)
        examples.append(Example(row.where, (sequence,), ints(rows), kept=2, window=window))
    counts["windows"] += len(examples)
    counts["windows without the answer"] += len(examples) - inside
    counts["answers in no window"] += not inside
    return examples


def windows(length: int, room: int, stride: int) -> list[int]:
    """Where windows of `room` tokens begin so that neighbours share `stride` and the last reaches the end.

    >>> windows(10, 6, 2), windows(6, 6, 2)
    ([0, 4], [0])
    """
    begins = [0]
    while begins[-1] + room < length:
        begins.append(begins[-1] + room - stride)
    return begins


def _tokens_of(offsets: Sequence[Span], span: Span) -> tuple[int, int] | None:
    """The first and the last token that carry a character of a span; None where none does."""
    first = bisect_right([end for _, end in offsets], span[0])  # the first that ends behind the span's begin
    last = bisect_left([begin for begin, _ in offsets], span[1]) - 1  # the last that begins before its end
    return (first, last) if first <= last else None


class Found(NamedTuple):
    """An answer read off a window: its text, and the sum of its two outputs."""

    text: str
    score: float


def best_answer(window: Window, z: HostArray, longest: int = LONGEST) -> Found:
    """The best answer of a window by outputs z : (T, 2), for a first and for a last token.

    Of all pairs of tokens of the window's part of the context, in order and at most `longest` apart, the one
    with the largest sum; of equal ones the shortest, and of those the earliest. An empty text where the part
    has no token.
    """
    n = len(window.offsets)
    if not n:
        return Found("", -np.inf)
    start, stop = (np.asarray(z)[window.first : window.first + n, side].astype(np.float64) for side in (0, 1))
    best = (-np.inf, 0, 0)
    for length in range(min(longest, n)):
        sums = start[: n - length] + stop[length:]  # (n − length,)
        at = int(np.argmax(sums))
        if sums[at] > best[0]:
            best = (float(sums[at]), at, at + length)
    score, first, last = best
    return Found(window.context[window.offsets[first][0] : window.offsets[last][1]].strip(), score)


def answers(examples: Sequence[Example], outputs: Sequence[HostArray]) -> dict[str, tuple[str, str]]:
    """Of each row: the best answer over its windows, and the right one.

    outputs : (T, 2) of each example
    """
    best: dict[str, tuple[Found, str]] = {}
    for example, z in zip(examples, outputs, strict=True):
        if example.window is None:
            refuse(example.where, "a window of a context", "none")
        found = best_answer(example.window, z)
        if example.where not in best or found.score > best[example.where][0].score:
            best[example.where] = found, example.window.answer
    return {where: (found.text, right) for where, (found, right) in best.items()}
