"""Messages written as one text, as a model was taught them, and which characters the assistant wrote.

ChatML needs no library; any other template is Jinja's, and runs in its sandbox.  Rules: specs/data.md.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from ..errors import BackendError, FormatError

Message = Mapping[str, str]
START, END = "<|im_start|>", "<|im_end|>"
# The ChatML templates in use, with the spaces around them that Jinja passes over; some write a system turn
# where none is given.
CHATML = re.compile(
    r"[ \t]*\{% for message in messages %\}"
    r"(?:\{% if loop\.first and messages\[0\]\['role'\] != 'system' %\}"
    r"\{\{ ?'<\|im_start\|>system(?:\n|\\n)(?P<system>[^'\\{}\r]+)<\|im_end\|>(?:\n|\\n)' ?\}\}\{% endif %\})?"
    r"\{\{ ?'<\|im_start\|>' ?\+ ?message\['role'\] ?\+ ?'(?:\n|\\n)' ?\+ ?message\['content'\] ?"
    r"\+ ?'<\|im_end\|>' ?\+ ?'(?:\n|\\n)' ?\}\}\{% endfor %\}"
    r"\{% if add_generation_prompt %\}\{\{ ?'<\|im_start\|>assistant(?:\n|\\n)' ?\}\}\{% endif %\}\n{0,2}"
)
GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")


class Rendered(NamedTuple):
    """One text, and the characters [begin, end) of each turn of the assistant, its end token among them."""

    text: str
    turns: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Chat:
    """How a model writes messages; `template` is Jinja's text, None for plain ChatML."""

    where: str
    template: str | None
    words: Mapping[str, str] = field(default_factory=dict)  # bos_token and the like, which templates name
    specials: tuple[str, ...] = ()  # texts of special tokens, one of which ends a turn

    @cached_property
    def chatml(self) -> str | None:
        """The system turn that ChatML begins with where none is given ("" for none); None: not ChatML."""
        if self.template is None:
            return ""
        found = CHATML.fullmatch(self.template)
        return None if found is None else found["system"] or ""

    def render(self, messages: Sequence[Message], *, generation: bool = False) -> Rendered:
        """Write messages as one text; with `generation`, up to where the assistant's next turn begins.

        Raises FormatError where the template refuses the messages, or writes the beginning of a dialogue
        otherwise than as the beginning of the whole: then no turn could be found in it. BackendError where
        the template needs Jinja and there is none.

        >>> Chat("model", None).render([{"role": "assistant", "content": "Hi"}])
        Rendered(text='<|im_start|>assistant\\nHi<|im_end|>\\n', turns=((22, 34),))
        """
        if self.chatml is not None:
            return _chatml(messages, self.chatml, generation)
        whole = self._jinja(messages, generation)
        turns = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = self._jinja(messages[:i], True), self._jinja(messages[: i + 1], False)
                if not (whole.startswith(before) and after.startswith(before) and whole.startswith(after)):
                    self._refuse(
                        f"a template whose text of messages 1 to {i + 1} begins its text of all", "another"
                    )
                turn = after[len(before) :].rstrip()  # what stands behind an end token is not the assistant's
                ended = turn.endswith(self.specials) if self.specials else False
                turns.append((len(before), len(before) + len(turn) if ended else len(after)))
        return Rendered(whole, tuple(turns))

    def _jinja(self, messages: Sequence[Message], generation: bool) -> str:
        try:
            written = {"messages": [dict(one) for one in messages], "add_generation_prompt": generation}
            return str(self._compiled.render(**written, tools=None, documents=None, **self.words))
        except (BackendError, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            self._refuse("messages that the chat template can write", " ".join(str(error).split())[:200])

    @cached_property
    def _compiled(self) -> Any:
        """The template, compiled in Jinja's sandbox, which gives it no attribute and no module to misuse."""
        try:
            sandbox = import_module("jinja2.sandbox")
        except ImportError:
            raise BackendError(
                f"{self.where}: chat_template: expected Jinja for a template other than ChatML, "
                "got no such package: pip install 'lorax-np[chat]'"
            ) from None
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raised
        environment.filters["tojson"] = _json
        try:
            return environment.from_string(GENERATION.sub(_plainly, self.template or ""))
        except Exception as error:
            self._refuse("a Jinja template", " ".join(str(error).split())[:200])

    def _refuse(self, wanted: str, came: str) -> NoReturn:
        raise FormatError(f"{self.where}: chat_template: expected {wanted}, got {came}") from None


def _chatml(messages: Sequence[Message], system: str, generation: bool) -> Rendered:
    text, turns = "", []
    if system and messages and messages[0]["role"] != "system":
        text = f"{START}system\n{system}{END}\n"
    for message in messages:
        text += f"{START}{message['role']}\n"
        begin = len(text)
        text += f"{message['content']}{END}"
        if message["role"] == "assistant":
            turns.append((begin, len(text)))
        text += "\n"
    return Rendered(text + f"{START}assistant\n" * generation, tuple(turns))


def _plainly(tag: re.Match[str]) -> str:
    """A mark of what the assistant writes, as a tag that Jinja knows."""
    return f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}"


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """What templates call to write JSON: letters as they are, none of them escaped for a browser."""
    how: Any = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _raised(message: str) -> NoReturn:
    """What templates call to refuse messages."""
    raise ValueError(message)
