"""Rows of models with a head: a class of one text or two, a tag a word, a text to write, a pair of texts."""

from collections import Counter

from ..errors import ConfigError
from ..io.gguf_header import refuse
from .examples import Example, Settings, Tokens, count_specials, cut, ints
from .labels import IGNORED, Labels
from .rows import Row
from .tokenizer import Tokenizer


def one_text(row: Row, text: str, tokenizer: Tokenizer, settings: Settings, counts: Counter[str]) -> Tokens:
    """A text with its special tokens; its own tokens are cut to what has room beside them."""
    template = tokenizer.template
    ids = cut(tokenizer.encode(text).ids, settings.max_length - template.around, counts)
    return _sequence(row, tokenizer, template.one(ids), None, counts)


def two_texts(row: Row, tokenizer: Tokenizer, settings: Settings, counts: Counter[str]) -> Tokens:
    """Two texts in one sequence; where they have no room, the longer is cut first."""
    template = tokenizer.template
    a, b = (tokenizer.encode(row.fields[key]).ids for key in ("text", "text_pair"))
    room = settings.max_length - template.around_two
    for_a, for_b = shared_room(len(a), len(b), room)
    cut([*a, *b], room, counts)  # counts what goes
    ids, types, _ = template.two(a[:for_a], b[:for_b])
    typed = template.typed if settings.typed is None else settings.typed
    return _sequence(row, tokenizer, ids, types if typed else None, counts)


def shared_room(a: int, b: int, room: int) -> tuple[int, int]:
    """What is left of two lengths: the longer is cut, and where half the room is too little for either, both.

    The odd token goes to the longer one, to the second of two equal ones.

    >>> shared_room(10, 3, 8), shared_room(9, 9, 5), shared_room(9, 8, 5)
    ((5, 3), (2, 3), (3, 2))
    """
    if a + b <= room:
        return a, b
    if min(a, b) <= room // 2:
        return (a, room - a) if a < b else (room - b, b)
    half, rest = room // 2, room - room // 2
    return (rest, half) if a > b else (half, rest)


def class_example(
    row: Row, tokenizer: Tokenizer, settings: Settings, labels: Labels, counts: Counter[str]
) -> Example:
    """A text, or two, and its class, classes or number."""
    label = labels.value(f"{row.where}: label", row.fields["label"])
    if "text_pair" in row.fields:
        sequence = two_texts(row, tokenizer, settings, counts)
    else:
        sequence = one_text(row, row.fields["text"], tokenizer, settings, counts)
    return Example(row.where, (sequence,), label, kept=labels.count if labels.kind == "multi" else 1)


def tag_example(
    row: Row, tokenizer: Tokenizer, settings: Settings, labels: Labels, counts: Counter[str]
) -> Example:
    """Words joined by spaces, with each word's tag at its first token and −100 at all others.

    A word of no token, or whose tokens were cut, loses its tag, which is counted.
    """
    words, template = row.fields["tokens"], tokenizer.template
    found = tokenizer.encode(" ".join(words))
    first = first_tokens(words, found.offsets)
    ids = cut(found.ids, settings.max_length - template.around, counts)
    tags = [IGNORED] * len(ids)
    for word, (tag, at) in enumerate(zip(row.fields["tags"], first, strict=True), 1):
        value = labels.index(f"{row.where}: tags: tag {word}", tag)
        if at is not None and at < len(ids):
            tags[at] = value
    kept = sum(tag != IGNORED for tag in tags)
    counts["words without a tag, for want of a token"] += len(words) - kept
    around = [IGNORED] * len(template.start), [IGNORED] * len(template.end)
    sequence = _sequence(row, tokenizer, template.one(ids), None, counts)
    return Example(row.where, (sequence,), ints([*around[0], *tags, *around[1]]), kept=kept)


def first_tokens(words: list[str], offsets: list[tuple[int, int]]) -> list[int | None]:
    """The first token of each of words joined by spaces: of those with a character of it, the first not taken.

    >>> first_tokens(["un", "", "do"], [(0, 1), (1, 2), (2, 3), (3, 6)])
    [0, None, 3]
    """
    found: list[int | None] = []
    begin, token = 0, 0
    for word in words:
        end = begin + len(word)
        while token < len(offsets) and offsets[token][1] <= begin:
            token += 1
        inside = begin < end and token < len(offsets) and offsets[token][0] < end and offsets[token][1] > begin
        found.append(token if inside else None)
        token += inside
        begin = end + 1
    return found


def written_example(row: Row, tokenizer: Tokenizer, settings: Settings, counts: Counter[str]) -> Example:
    """A source to read, a target to write with its end token; the decoder reads the target one token late."""
    sequence = one_text(row, row.fields["source"], tokenizer, settings, counts)
    start = tokenizer.specials.pad if settings.decoder_start is None else settings.decoder_start
    end = tokenizer.specials.eos
    if start is None or end is None:
        missing = "decoder_start, and no padding token to stand for it" if start is None else "end token"
        raise ConfigError(f"{tokenizer.path}: expected a decoder's first and last token, got no {missing}")
    found = tokenizer.encode(row.fields["target"])
    ids = found.ids if found.ids[-1:] == [end] else [*found.ids, end]
    labels = cut(ids, settings.max_length, counts)
    decoder = ints([start, *labels[:-1]])  # (data.2)
    nbytes = len(row.fields["target"][: found.offsets[: len(labels)][-1][1] if found.offsets else 0].encode())
    return Example(row.where, (sequence,), ints(labels), decoder, len(labels), nbytes)


def pair_example(row: Row, tokenizer: Tokenizer, settings: Settings, counts: Counter[str]) -> Example:
    """Two texts, a sequence each, and how alike they are where a score is given."""
    both = [one_text(row, row.fields[key], tokenizer, settings, counts) for key in ("text", "text_pair")]
    return Example(row.where, tuple(both), row.fields.get("score"))


def _sequence(
    row: Row, tokenizer: Tokenizer, ids: list[int], types: list[int] | None, counts: Counter[str]
) -> Tokens:
    if not ids:
        refuse(row.where, "at least one token", "none")
    count_specials(tokenizer, ids, counts)
    return Tokens(ints(ids), None if types is None else ints(types))
