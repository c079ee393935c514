"""Lines for a terminal: in 80 columns, and with a sign for each letter that has no shape of its own."""

import re
import shlex
import textwrap

WIDTH = 80
# Letters without a shape of their own: controls, halves of a pair, what turns the direction of writing.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with a sign for each letter that has no shape, so that it can hide and break nothing."""

    def sign(found: re.Match[str]) -> str:
        code = ord(found[0])
        return chr(0x2400 + code) if code < 32 else f"\\u{code:04x}"

    return _UNSEEN.sub(sign, text)


def flat(text: str) -> str:
    """The visible text on one line."""
    return visible(text).replace("\n", "␊").replace("\t", "␉")


def fold(line: str) -> list[str]:
    """A line that is too wide as several, those after the first indented; letters without a shape as signs."""
    line = flat(line)
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ") if len(line) > WIDTH else [line]


def continued(line: str) -> list[str]:
    """A command as lines of at most 80 columns, still to be copied: a word goes on at the next line's start."""
    lines = line.replace(" --case ", " \\\n  --case ").splitlines() if len(line) > WIDTH else [line]
    if max(map(len, lines)) <= WIDTH:
        return lines
    try:
        words = shlex.split(line)
    except ValueError:  # no command that a shell would take
        return fold(line)
    lines, here = [], ""
    for word in words:
        inside = False
        while word:
            n = next(n for n in range(len(word), 0, -1) if len(shlex.quote(word[:n])) <= WIDTH - 4)
            part, word = shlex.quote(word[:n]), word[n:]
            if not inside and part != "--case" and len(here) + len(part) + 3 <= WIDTH:
                here = f"{here} {part}" if here else part
            else:
                lines.append(here + ("\\" if inside else " \\"))
                here = part if inside else f"  {part}"
            inside = True
    return [*lines, here]


def middle(text: str, width: int) -> str:
    """A text cut in its middle to a width."""
    return text if len(text) <= width else f"{text[: (width - 1) // 2]}…{text[len(text) - width // 2 :]}"


def many(n: int, thing: str = "check") -> str:
    """A number of things: 1 check, 2 checks."""
    return f"{n} {thing}{'s' * (n != 1)}"
