"""A text written token by token.  specs/generation.md."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..backend import quiet
from ..config import Site
from ..errors import ConfigError, FormatError
from ..models.pairs import PAIRS
from ..models.passes import Pass
from ..models.records import Model, Trained
from ..text.tokenizer import Tokenizer
from .decoders import writer_of
from .one_row import OneRow
from .prompts import Told, end_ids, has_template, prompt_ids
from .sampling import Sampling, choose

GREEDY = Sampling()
NOTHING = Trained({}, {})


class Written(NamedTuple):
    """What a model wrote.

    text    : without special tokens
    ids     : its tokens, without the one that ended it
    ended   : "stop", by a token that ends texts; "length", by how many were asked for; or "context", since the
              model has no more positions
    prompt  : how many tokens the model read
    reading : seconds up to the first token
    writing : seconds from then on
    """

    text: str
    ids: tuple[int, ...]
    ended: str
    prompt: int
    reading: float
    writing: float

    @property
    def rate(self) -> float:
        """Tokens a second behind the first one; 0 where there is none."""
        return max(len(self.ids) - 1, 0) / self.writing if self.writing else 0.0


def token_stream(
    model: Model,
    prompt: Sequence[int],
    *,
    sites: Mapping[str, Site] | None = None,
    trained: Trained = NOTHING,
    sampling: Sampling = GREEDY,
    most: int = 256,
    stop: Collection[int] = (),
    tokens: Mapping[str, Sequence[int]] | None = None,
    engine: str = "fast",
) -> Iterator[int]:
    """The ids that a model writes after a prompt, one at a time; keys and values are computed once and kept.

    model, sites, trained, tokens : as loss_and_gradients takes them; adapters stay beside the base
    prompt   : ids, at least one
    sampling : how one is chosen of all
    most     : how many are written, unless one of `stop` comes, which is given too, or positions run out

    Raises ConfigError for a family that does not write, for a prompt longer than the model's positions, and for
    most < 1; FormatError where logits are not finite. Source: specs/generation.md.
    """
    writer = writer_of(model)
    if engine not in PAIRS:
        raise ConfigError(f"engine: expected one of {', '.join(PAIRS)}, got {engine!r}")
    room = _room(model, prompt, most)
    at = Pass(model, sites or {}, trained, pair=OneRow(engine).pair(), tokens=tokens)
    with quiet():
        z, going = writer.begin(model, at, prompt)
    for t in range(room):
        if not np.isfinite(z).all():
            raise FormatError(f"{model.path}: expected finite logits, got NaN or infinity for token {t + 1}")
        token = choose(z, sampling, t)
        yield token
        if token in stop or t + 1 == room:
            return
        with quiet():
            z, going = writer.step(model, at, token, going)


def _room(model: Model, prompt: Sequence[int], most: int) -> int:
    """How many tokens can be written."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ConfigError(f"max_tokens: expected how many tokens to write, at least 1, got {most!r}")
    if not len(prompt):
        raise ConfigError("prompt: expected one token at least, got none")
    longest = writer_of(model).limit(model.config)
    if longest is None:
        return most
    if len(prompt) > longest:
        wanted = f"at most {longest} tokens, as many as the model has positions for"
        raise ConfigError(f"prompt: expected {wanted}, got {len(prompt)}")
    return min(most, longest - len(prompt) + 1)  # the last one is not read


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    sites: Mapping[str, Site] | None = None,
    trained: Trained = NOTHING,
    sampling: Sampling = GREEDY,
    most: int = 256,
    chat: bool | None = None,
    tokens: Mapping[str, Sequence[int]] | None = None,
    engine: str = "fast",
    on_text: Callable[[str], None] | None = None,
) -> Written:
    """What a model writes after a prompt, or answers to it.

    tokenizer : of load_tokenizer
    chat      : whether the prompt is a user's message, written by the model's template; None: where its files
                have one
    on_text   : is given the text piece by piece, as it comes
    Else as token_stream, which it calls. Source: specs/generation.md.
    """
    chat = has_template(tokenizer) if chat is None else chat
    apart = writer_of(model).apart
    ids, stop = prompt_ids(tokenizer, prompt, chat=chat, apart=apart), end_ids(model, tokenizer, chat=chat)
    how = {"sites": sites, "trained": trained, "sampling": sampling, "tokens": tokens, "engine": engine}
    told, found, say = Told(tokenizer, () if apart else ids), list[int](), on_text or (lambda piece: None)
    began = first = time.perf_counter()
    ended = "length"
    for token in token_stream(model, ids, most=most, stop=stop, **how):  # type: ignore[arg-type]
        if not found:
            first = time.perf_counter()
        if token in stop:
            ended = "stop"
            break
        found.append(token)
        if piece := told.add(token):
            say(piece)
    if piece := told.rest():
        say(piece)
    if ended != "stop" and len(found) < most:
        ended = "context"
    return Written(told.text, tuple(found), ended, len(ids), first - began, time.perf_counter() - first)
