"""Rows of a causal model as ids with shifted labels: plain text, prompt and completion, messages."""

from collections import Counter

from ..errors import FormatError
from ..io.gguf_header import refuse
from .examples import (
    Example,
    Settings,
    Span,
    Tokens,
    count_specials,
    cut,
    ints,
    labelled,
    shifted,
    text_bytes,
)
from .rows import Row
from .tokenizer import Tokenizer


def causal_example(row: Row, tokenizer: Tokenizer, settings: Settings, counts: Counter[str]) -> Example:
    """Ids of the whole text at once, and labels where a token carries a character that is to be learned.

    Prompt and completion are tokenised as one text, as the model will see them; a token across their border is
    labelled, since it carries the completion's first characters, and counted. Exactly one start token stands
    in front where the tokenizer adds one; exactly one end token follows, unless the text was cut before it.
    """
    text, spans = _text(row, tokenizer, settings.mask_prompt, counts)
    found = tokenizer.encode(text)
    chosen = labelled(found.offsets, spans)
    counts["rows whose tokens do not give their text back"] += tokenizer.decode(found.ids) != text
    if "prompt" in row.fields:
        border = len(row.fields["prompt"])
        counts["tokens across a prompt's border"] += sum(a < border < b for a, b in found.offsets)
    start, end = _around(row, tokenizer, found.ids)
    ids = cut([*start, *found.ids, *end], settings.max_length, counts)
    chosen = [*[False] * len(start), *chosen, *[True] * len(end)][: len(ids)]
    offsets = [*[(0, 0)] * len(start), *found.offsets, *[(len(text), len(text))] * len(end)][: len(ids)]
    count_specials(tokenizer, ids, counts)
    labels = shifted(row.where, ids, chosen)
    carried = [t > 0 and kept and ids[t] not in tokenizer.names for t, kept in enumerate(chosen)]
    kept = sum(chosen[1:])
    return Example(row.where, (Tokens(ints(ids)),), labels, None, kept, text_bytes(text, offsets, carried))


def _text(row: Row, tokenizer: Tokenizer, masked: bool, counts: Counter[str]) -> tuple[str, list[Span]]:
    """The text of a row, and the characters to be learned."""
    if "text" in row.fields:
        text, spans = row.fields["text"], []
    elif "prompt" in row.fields:
        text = row.fields["prompt"] + row.fields["completion"]
        spans = [(len(row.fields["prompt"]), len(text))]
    else:
        text, spans = _written(row, tokenizer, counts)
    return text, spans if masked and "text" not in row.fields else [(0, len(text))]


def _written(row: Row, tokenizer: Tokenizer, counts: Counter[str]) -> tuple[str, list[Span]]:
    """Messages as one text by the model's template. What spells a special token will be one, and is counted."""
    if tokenizer.chat is None:
        refuse(f"{row.where}: messages", "a tokenizer with a chat template", f"none in {tokenizer.path}")
    messages = row.fields["messages"]
    spelt = any(name in one["content"] for one in messages for name in tokenizer.names.values())
    counts["rows whose messages spell a special token"] += spelt
    try:
        text, turns = tokenizer.chat.render(messages)
    except FormatError as error:
        refuse(f"{row.where}: messages", "what the chat template can write", str(error))
    return text, list(turns)


def _around(row: Row, tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """The start tokens that are still missing in front, and the end tokens that are behind."""
    start, end = list(tokenizer.template.start), list(tokenizer.template.end)
    if ids[: len(start)] == start:
        start = []
    if "messages" in row.fields:  # the template ends its turns itself
        return start, []
    if not end and tokenizer.specials.eos is not None:
        end = [tokenizer.specials.eos]
    if not end:
        refuse(tokenizer.path, "an end token, eos_token, with which texts end", "none")
    return start, [] if ids[len(ids) - len(end) :] == end else end
