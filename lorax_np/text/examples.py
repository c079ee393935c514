"""What a row becomes: token ids and what is to be learned of them.  Rules: specs/data.md."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from ..io.gguf_header import refuse
from .labels import IGNORED
from .tokenizer import Tokenizer

Span = tuple[int, int]  # characters [begin, end)
MANY = 3
SHORTEST = 8  # tokens that a sequence must have room for
DOUBLED = "sequences with two "  # begins the name of a count that is a warning


class Settings(NamedTuple):
    """How rows become examples.

    max_length  : tokens of a sequence, special ones among them; what is longer is cut, and counted
    mask_prompt : whether prompts, and turns of others than the assistant, carry no labels
    stride      : tokens that two windows of one context share
    typed       : whether the model tells two texts apart by type ids; None leaves it to the tokenizer
    decoder_start : the decoder's first id; None stands for the padding token, as in T5
    """

    max_length: int = 1024
    mask_prompt: bool = True
    stride: int = 128
    typed: bool | None = None
    decoder_start: int | None = None

    def checked(self) -> "Settings":
        """The same; ConfigError for lengths that leave no room."""
        if self.max_length < SHORTEST:
            raise ConfigError(f"max_length: expected at least {SHORTEST} tokens, got {self.max_length}")
        if not 0 <= self.stride < self.max_length:
            raise ConfigError(f"stride: expected 0 <= stride < max_length={self.max_length}, got {self.stride}")
        return self


class Tokens(NamedTuple):
    """Token ids : (T,) and, where texts are told apart, a type id each."""

    ids: HostArray
    types: HostArray | None = None


class Window(NamedTuple):
    """Where an answer may be: a part of a context, by the rows of its tokens."""

    context: str
    first: int  # the row of the part's first token
    offsets: tuple[Span, ...]  # characters of each of its tokens
    answer: str  # the right one


class Example(NamedTuple):
    """One sequence to learn from, or two that belong together.

    labels : (T,) ints of a causal model, of tags, or of the decoder; an int, a float or (C,) of a class; (2,)
             rows of an answer's first and last token; a score or None of a pair
    """

    where: str
    sequences: tuple[Tokens, ...]
    labels: Any
    decoder: HostArray | None = None  # (Td,) ids that the decoder reads
    kept: int = 1  # labels that count
    nbytes: int = 0  # UTF-8 bytes of the text whose tokens are labelled, for bits per byte
    window: Window | None = None

    @property
    def tokens(self) -> int:
        """Rows that a model computes for it, the decoder's apart."""
        return sum(len(sequence.ids) for sequence in self.sequences)


def ints(values: Sequence[int]) -> HostArray:
    """Token ids as an array."""
    return np.asarray(values, dtype=np.int64)


def cut(ids: list[int], room: int, counts: Counter[str]) -> list[int]:
    """The first tokens that have room; what is cut is counted."""
    if len(ids) > room:
        counts["rows cut to the maximal length"] += 1
        counts["tokens cut"] += len(ids) - room
    return ids[:room]


def labelled(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens carry a character of one of the spans, or stand within it; a token across a border does.

    >>> labelled([(0, 3), (3, 6), (6, 6), (6, 8)], [(5, 7)])
    [False, True, True, True]
    """
    return [any(begin < stop and end > start for start, stop in spans) for begin, end in offsets]


def text_bytes(text: str, offsets: Sequence[Span], chosen: Sequence[bool]) -> int:
    """UTF-8 bytes of the characters of chosen tokens; a character of several tokens counts at its first.

    >>> text_bytes("aé€", [(0, 1), (1, 2), (2, 3), (2, 3)], [False, True, True, True])
    5
    """
    total, past = 0, 0
    for (begin, end), chosen_ in zip(offsets, chosen, strict=True):
        if chosen_ and end > past:
            total += len(text[max(begin, past) : end].encode())
        past = max(past, end)
    return total


def shifted(where: str, ids: Sequence[int], chosen: Sequence[bool]) -> HostArray:
    """Labels of a causal model: row t is to predict the token at t + 1, where that one is chosen.  (data.1)

    >>> shifted("train.jsonl:1", [5, 6, 7], [False, False, True]).tolist()
    [-100, 7, -100]
    """
    if not ids:
        refuse(where, "at least one token", "none")
    return ints([i if chosen_ else IGNORED for i, chosen_ in zip(ids[1:], chosen[1:], strict=True)] + [IGNORED])


def count_specials(tokenizer: Tokenizer, ids: Sequence[int], counts: Counter[str]) -> None:
    """Count how many start and end tokens a sequence has, so that a doubled one is seen."""
    template, specials = tokenizer.template, tokenizer.specials
    start = template.start[0] if template.start else specials.bos
    end = template.end[-1] if template.end else specials.eos
    for name, i, edge in (("start", start, ids[:2]), ("end", end, ids[-2:])):
        if i is not None:
            found = min(list(ids).count(i), MANY)
            counts[f"sequences with {found}{' or more' * (found == MANY)} {name} tokens"] += 1
            counts[f"{DOUBLED}{name} tokens side by side"] += list(edge) == [i, i]
