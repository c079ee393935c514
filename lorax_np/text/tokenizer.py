"""A model's tokenizer, as the library `tokenizers` runs it: ids with their characters, and special tokens.

Rules: specs/data.md.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import BackendError, FormatError
from ..io.checkpoint import read_json
from ..io.gguf_header import refuse
from ..io.safetensors import show
from .chat import Chat
from .template import Template, template_of

SPECIALS = "bos", "eos", "pad", "unk", "cls", "sep", "mask"
INSTALL = "pip install 'lorax-np[text]'"


class Encoding(NamedTuple):
    """Token ids of a text, and the characters [begin, end) that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Specials(NamedTuple):
    """Ids of the tokens with a part to play; None where the tokenizer names none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """Text to token ids and back; made by load_tokenizer."""

    path: Path
    specials: Specials
    template: Template  # the special tokens around one text and between two
    chat: Chat | None  # how messages are written as one text; None where the model does not say
    names: dict[int, str]  # the special tokens by id
    rows: int  # largest id + 1: the fewest rows an embedding may have
    _library: Any  # tokenizers.Tokenizer

    def encode(self, text: str) -> Encoding:
        """Token ids of a text and their characters, without special tokens around it.

        The text of a special token within `text` becomes that token, as it does in the model's own pipeline.
        Raises FormatError for text that is not Unicode: a lone half of a surrogate pair.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            refuse("text", "Unicode", f"half of a surrogate pair at character {error.start}")
        found = built(self.path, partial(self._library.encode, add_special_tokens=False), text)
        return Encoding(list(found.ids), list(found.offsets))

    def decode(self, ids: Sequence[int], *, specials: bool = True) -> str:
        """The text of token ids; without the special tokens' own text where `specials` is False."""
        decode = partial(self._library.decode, skip_special_tokens=not specials)
        return str(built(self.path, decode, [int(i) for i in ids]))

    def id_of(self, token: str) -> int | None:
        """The id of a token by its own spelling, or None."""
        found: int | None = self._library.token_to_id(token)
        return found

    def __repr__(self) -> str:
        return f"<Tokenizer {str(self.path)!r}: {self.rows} ids, {len(self.names)} special>"


def load_tokenizer(path: str | os.PathLike[str], *, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a model: a Hugging Face directory with tokenizer.json, or a GGUF file.

    path       : the directory; its tokenizer.json; or a .gguf file, from whose metadata it is rebuilt
    vocab_size : rows of the model's embedding; an id past them is refused

    What tokenizer.json says of padding and truncation is dropped: lengths are the caller's.
    Raises BackendError without the library `tokenizers`; FormatError, one line with the path, where there is no
    tokenizer, one that the library refuses, a GGUF pre-tokenizer not known here, or an id without a row. The
    system's OSError where there is no such path.
    Source: specs/data.md.
    """
    given = Path(path)
    given.stat()
    tk = tokenizers()
    if given.suffix == ".gguf":
        from .gguf import from_gguf

        made, specials, template = from_gguf(given, tk)
    else:
        made, specials, template = _from_json(given, tk)
    added = made.get_added_tokens_decoder()
    names = {int(i): str(token.content) for i, token in added.items() if token.special}
    rows = max(made.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if vocab_size is not None and rows > vocab_size:
        refuse(given, f"token ids below {vocab_size}, the rows of the model's embedding", f"id {rows - 1}")
    found = Specials(*(_id(given, made, name, specials.get(name)) for name in SPECIALS))
    chat = None
    if template is not None:
        words = {f"{name}_token": names.get(i, made.id_to_token(i)) for name, i in _known(found)}
        chat = Chat(str(given), template, words, tuple(names.values()))
    elif made.token_to_id("<|im_start|>") is not None and made.token_to_id("<|im_end|>") is not None:
        chat = Chat(str(given), None, {})
    return Tokenizer(given, found, built(given, template_of, given, made), chat, names, rows, made)


def tokenizers() -> Any:
    """The library `tokenizers`. Raises BackendError, which names the extra, where it is not installed."""
    try:
        return import_module("tokenizers")
    except ImportError:
        raise BackendError(
            f"tokenizers: expected the library for text, got no such package: {INSTALL}"
        ) from None


def built(where: Path, make: Any, *arguments: Any) -> Any:
    """What the library makes of a stranger's data; FormatError for whatever it raises, its panics too."""
    try:
        return make(*arguments)
    except (FormatError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        refuse(where, "a tokenizer that the library tokenizers can read", " ".join(str(error).split())[:200])


def _known(specials: Specials) -> list[tuple[str, int]]:
    return [(name, i) for name, i in specials._asdict().items() if i is not None]


def _id(where: Path, made: Any, name: str, token: str | int | None) -> int | None:
    """The id of a special token that a file names by its text or its id."""
    if token is None:
        return None
    found = made.token_to_id(token) if isinstance(token, str) else token
    if found is None or not 0 <= found < 1 << 32 or made.id_to_token(found) is None:
        refuse(f"{where}: {name}", "a token of the vocabulary", show(token))
    return int(found)


def _from_json(given: Path, tk: Any) -> tuple[Any, dict[str, str | int | None], str | None]:
    """The library's tokenizer of a tokenizer.json, its special tokens' texts, and the chat template."""
    file = given / "tokenizer.json" if given.is_dir() else given
    if not file.is_file():
        came = "sentencepiece's own format alone" if (given / "tokenizer.model").is_file() else "no such file"
        refuse(given, "tokenizer.json in the directory", came)
    content = read_json(file)
    content["truncation"] = content["padding"] = None
    for part in ("post_processor", "pre_tokenizer"):
        _untrimmed(content.get(part))
    made = built(file, tk.Tokenizer.from_str, json.dumps(content))
    config = _json(file.parent / "tokenizer_config.json")
    listed = _json(file.parent / "special_tokens_map.json")
    specials: dict[str, str | int | None] = {}
    for name in SPECIALS:
        token = config.get(f"{name}_token") or listed.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            refuse(f"{file.parent}: {name}_token", "a token's text", show(token))
        specials[name] = token
    return made, specials, _chat_template(file.parent, config)


def _untrimmed(part: Any) -> None:
    """Let byte-level parts keep a token's space in its characters, so that every character has a token."""
    if isinstance(part, dict):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
        for inside in part.values():
            _untrimmed(inside)
    elif isinstance(part, list):
        for inside in part:
            _untrimmed(inside)


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template of its own file, else of tokenizer_config.json: a text, or the default of several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            refuse(file, "text in UTF-8", "other bytes")
    found = config.get("chat_template")
    if isinstance(found, list):
        several = [one for one in found if isinstance(one, dict)]
        found = next((one.get("template") for one in several if one.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise FormatError(f"{folder}: chat_template: expected a text, got {show(found)}")
    return found
