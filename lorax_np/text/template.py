"""The special tokens that a tokenizer puts before, between and after texts, found once and applied to ids."""

from pathlib import Path
from typing import Any, NamedTuple

from ..io.gguf_header import refuse

LETTERS = "a", "b"  # two texts by which a tokenizer shows its template


class Template(NamedTuple):
    """One text becomes start + a + end; two become start + a + middle + b + last."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    middle: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    types: tuple[tuple[int, ...], ...] = ((), (0,), (), (0,), ())  # type ids of start, a, middle, b, last

    @property
    def typed(self) -> bool:
        """Whether two texts are told apart by type ids."""
        return any(any(part) for part in self.types)

    @property
    def around(self) -> int:
        """How many tokens stand around one text."""
        return len(self.start) + len(self.end)

    @property
    def around_two(self) -> int:
        """How many tokens stand around and between two."""
        return len(self.start) + len(self.middle) + len(self.last)

    def one(self, a: list[int]) -> list[int]:
        """Ids of one text with its special tokens."""
        return [*self.start, *a, *self.end]

    def two(self, a: list[int], b: list[int]) -> tuple[list[int], list[int], int]:
        """Ids of two texts with their special tokens, the type id of each, and where b begins.

        >>> template = Template((1,), (2,), (2,), (2,), ((0,), (0,), (0,), (1,), (1,)))
        >>> template.two([7], [8, 9])
        ([1, 7, 2, 8, 9, 2], [0, 0, 0, 1, 1, 1], 3)
        """
        start, first, middle, second, last = self.types
        ids = [*self.start, *a, *self.middle, *b, *self.last]
        types = [*start, *first * len(a), *middle, *second * len(b), *last]
        return ids, types, len(self.start) + len(a) + len(self.middle)


def template_of(where: Path, made: Any) -> Template:
    """Read the template of a tokenizer off what its library makes of one text and of two, of a letter each."""
    single, pair = made.encode(LETTERS[0]), made.encode(*LETTERS)
    if 0 not in single.sequence_ids or not {0, 1} <= set(pair.sequence_ids):
        refuse(where, "a token for the letters a and b, to find the special tokens around them", "none")
    begin, end = _bounds(single.sequence_ids, 0)
    first, middle = _bounds(pair.sequence_ids, 0)
    second, last = _bounds(pair.sequence_ids, 1)
    ids, types = tuple(pair.ids), tuple(pair.type_ids)
    if ids[:first] != tuple(single.ids[:begin]) or second < middle:
        refuse(where, "two texts in order that begin as one text does", show_tokens(pair))
    return Template(
        ids[:first],
        tuple(single.ids[end:]),
        ids[middle:second],
        ids[last:],
        (
            types[:first],
            types[first : first + 1],
            types[middle:second],
            types[second : second + 1],
            types[last:],
        ),
    )


def show_tokens(encoding: Any) -> str:
    """The tokens of an encoding, for an error."""
    return " ".join(encoding.tokens)[:80]


def _bounds(sequences: list[int | None], which: int) -> tuple[int, int]:
    """Where the tokens of one text begin and end."""
    return sequences.index(which), len(sequences) - sequences[::-1].index(which)
