"""A prompt as token ids, the tokens that end a text, and text as its tokens come.  specs/generation.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError
from ..io.checkpoint import read_json
from ..models.records import Model
from ..text.tokenizer import Tokenizer

UNKNOWN = "\ufffd"  # what a decoder puts for bytes that are no whole character, yet or ever
AROUND = 8  # tokens of the prompt beside which new ones are decoded, since a first word's space depends on them


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, chat: bool, apart: bool = False) -> list[int]:
    """The ids that a model reads: start tokens, where they are missing, and the prompt.

    chat : bool   the prompt is what a user says, written as the model's template has it, up to where it answers
    apart : bool  the prompt is a whole text, and ends as texts do
    Raises ConfigError for chat without a template, and for a prompt without a token.
    """
    if chat and tokenizer.chat is None:
        raise ConfigError(f"chat: expected a tokenizer with a chat template, got none in {tokenizer.path}")
    if chat and tokenizer.chat is not None:
        prompt = tokenizer.chat.render([{"role": "user", "content": prompt}], generation=True).text
    ids, start = tokenizer.encode(prompt).ids, list(tokenizer.template.start)
    found = ids if ids[: len(start)] == start else start + ids
    if apart:
        found = tokenizer.template.one(ids)
    if not found:
        raise ConfigError("prompt: expected a text of one token at least, got none")
    return found


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the model's own files say how messages are written."""
    return tokenizer.chat is not None and tokenizer.chat.template is not None


def end_ids(model: Model, tokenizer: Tokenizer | None = None, *, chat: bool = False) -> frozenset[int]:
    """The tokens after which nothing is written.

    Those that config.json and generation_config.json call eos_token_id, the tokenizer's end token, and with
    chat the special token that ends an assistant's turn.
    """
    where = f"{model.path}: eos_token_id"
    found = _listed(model.config.get("eos_token_id"), where)
    file = Path(model.path) / "generation_config.json"
    if model.path and file.is_file():
        found |= _listed(read_json(file).get("eos_token_id"), f"{file}: eos_token_id")
    if tokenizer is None:
        return frozenset(found)
    if tokenizer.specials.eos is not None:
        found.add(tokenizer.specials.eos)
    if chat and tokenizer.chat is not None:
        found |= _turn_end(tokenizer)
    return frozenset(found)


def _turn_end(tokenizer: Tokenizer) -> set[int]:
    """The special token that the template ends an assistant's turn with, where it does."""
    if tokenizer.chat is None:
        return set()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, turns = tokenizer.chat.render(messages)
    last = tokenizer.encode(text[slice(*turns[-1])].rstrip()).ids[-1:] if turns else []
    return {i for i in last if i in tokenizer.names}


def _listed(said: Any, where: str) -> set[int]:
    """An id, a list of ids, or none."""
    found = said if isinstance(said, list) else [] if said is None else [said]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise FormatError(f"{where}: expected an id or a list of ids, got {said!r}")
    return set(found)


class Told:
    """The text of tokens as they come; its pieces, joined, are the text of all.

    What may still change, the bytes of a character whose others have not come, waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """Begin behind a prompt."""
        self._tokenizer, self._around = tokenizer, [int(i) for i in prompt[-AROUND:]]
        self._ids: list[int] = []
        self._before = tokenizer.decode(self._around, specials=False)
        self._said = ""

    @property
    def text(self) -> str:
        """The text of all tokens so far, without the special ones."""
        both = self._tokenizer.decode([*self._around, *self._ids], specials=False)
        if both.startswith(self._before):
            return both[len(self._before) :]
        return self._tokenizer.decode(self._ids, specials=False)

    def add(self, token: int) -> str:
        """The text that a token adds to what was said before."""
        self._ids.append(token)
        return self._more(self.text.rstrip(UNKNOWN))

    def rest(self) -> str:
        """What was kept back."""
        return self._more(self.text)

    def _more(self, text: str) -> str:
        if not text.startswith(self._said):
            return ""
        found, self._said = text[len(self._said) :], text
        return found
