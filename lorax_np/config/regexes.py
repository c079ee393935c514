"""Regular expressions from a stranger's file, matched in bounded time.

Python's own engine goes back and forth, and (a+)+$ on thirty letters keeps it busy for minutes. Here a pattern
is followed by the set of positions that it can have reached, an int with a bit for each, so that repeats cannot
multiply; steps are counted, and a pattern that wants too many is refused. The answer is that of re.match; what
is no matter of such sets (references to groups, atomic groups) is refused too.
"""

import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from ..errors import ConfigError
from ..kinds import shown

_parser = importlib.import_module("re._parser")  # re's own, which has no public name
Reached = int  # bit i is set where position i of the text can have been reached

LONGEST = 4_000  # characters of a pattern
STEPS = 3_000_000  # of patterns that share a budget, over all the names that they are held against
FOLLOWED = re.UNICODE | re.VERBOSE | re.DOTALL | re.MULTILINE  # the last two matter to line breaks alone
CATEGORIES: Mapping[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}


WORDS = frozenset(chr(c) for c in range(128) if chr(c).isalnum()) | set("_-.")


def plain(pattern: str) -> bool:
    """Whether a pattern is a name: letters, digits, and dots, which as a pattern are any character."""
    return WORDS.issuperset(pattern)


class Budget:
    """Steps that are left to some patterns together."""

    def __init__(self, steps: int = STEPS) -> None:
        """Start with so many steps."""
        self.left = steps


class Regex:
    """One pattern, to be held against many names; a budget may be shared with others.

    Raises ConfigError for a pattern that re does not take, or that this module does not follow.

    >>> Regex(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj")
    True
    >>> Regex("(a+)+$").match("a" * 30 + "!")
    False
    """

    def __init__(self, pattern: str, budget: Budget | None = None) -> None:
        """Parse the pattern; nothing is matched yet."""
        self.pattern = pattern
        self._budget = budget or Budget()
        if len(pattern) > LONGEST:
            self._refuse(f"at most {LONGEST} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python may read otherwise
                tree = _parser.parse(pattern)
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            self._refuse(f"what re can compile ({error})")
        if tree.state.flags & ~FOLLOWED:
            self._refuse("no flags but m, s and x")
        self._tree = list(tree)
        self._text = ""
        self._places: dict[tuple[int, str], int] = {}  # positions at which a part takes the character

    def match(self, text: str) -> bool:
        """Whether re.match finds the pattern at the start of a text without line breaks."""
        return self._reached(text) != 0

    def fullmatch(self, text: str) -> bool:
        """Whether re.fullmatch finds the pattern to be all of a text without line breaks."""
        return self._reached(text) >> len(text) == 1

    def _reached(self, text: str) -> Reached:
        self._text, self._places = text, {}
        try:
            return self._all(self._tree, 1)
        except RecursionError:
            self._refuse("no deep nesting")

    def _all(self, parts: Iterable[Any], starts: Reached) -> Reached:
        """Where a sequence of parts can end, from some starts."""
        for op, value in parts:
            self._budget.left -= 1
            if self._budget.left < 0:
                self._refuse("what is matched in fewer steps")
            starts = self._one(str(op), value, starts)
            if not starts:
                break
        return starts

    def _one(self, op: str, value: Any, starts: Reached) -> Reached:
        """Where one part can end."""
        if op in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
            return (starts & self._takes(op, value)) << 1
        if op == "SUBPATTERN":
            _, on, off, parts = value
            if on or off:
                self._refuse("no flags within it")
            return self._all(parts, starts)
        if op == "BRANCH":
            ends = 0
            for branch in value[1]:
                ends |= self._all(branch, starts)
            return ends
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, parts = value
            return self._repeated(least, most, parts, starts)
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, parts = value
            return starts & self._where(lambda i: self._around(direction, parts, i) == (op == "ASSERT"), starts)
        if op == "AT":
            return starts & self._where(lambda i: self._at(str(value), i), starts)
        self._refuse("no references and no atomic groups")

    def _repeated(self, least: int, most: int, parts: Any, starts: Reached) -> Reached:
        """From `least` rounds on, whatever is reached; a round that reaches nothing new is the last."""
        now, rounds = starts, 0
        while rounds < least:
            before, now = now, self._all(parts, now)
            rounds += 1
            if now == before:
                break  # and so would every further round be
        found = now
        while now and rounds < most:
            now = self._all(parts, now) & ~found
            found |= now
            rounds += 1
        return found

    def _around(self, direction: int, parts: Any, i: int) -> bool:
        if direction > 0:
            return self._all(parts, 1 << i) != 0
        width = parts.getwidth()[0]  # what is looked back at has one width
        return i >= width and bool(self._all(parts, 1 << (i - width)) >> i & 1)

    def _at(self, where: str, i: int) -> bool:
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return i == 0
        if where in ("AT_END", "AT_END_STRING"):
            return i == len(self._text)
        word = CATEGORIES["CATEGORY_WORD"]
        around = self._text[max(i - 1, 0) : i], self._text[i : i + 1]
        edge = len({bool(c) and word(c) for c in around}) == 2
        return edge == (where == "AT_BOUNDARY") and (bool(self._text) or where == "AT_BOUNDARY")

    def _takes(self, op: str, value: Any) -> int:
        """The positions whose character a part takes."""
        key = id(value), op if op in ("IN", "ANY") else f"{op} {value}"
        if key not in self._places:
            places = 0
            for i, c in enumerate(self._text):
                places |= int(self._char(op, value, c)) << i
            self._places[key] = places
        return self._places[key]

    def _where(self, holds: Callable[[int], bool], starts: Reached) -> int:
        places = 0
        for i in range(len(self._text) + 1):
            if starts >> i & 1 and holds(i):
                places |= 1 << i
        return places

    @staticmethod
    def _char(op: str, value: Any, c: str) -> bool:
        if op == "ANY":
            return True
        if op == "IN":
            negated = str(value[0][0]) == "NEGATE"
            return negated != any(_within(item, ord(c)) for item in value[negated:])
        return bool(value == ord(c)) == (op == "LITERAL")

    def _refuse(self, wanted: str) -> NoReturn:
        raise ConfigError(f"regular expression: expected {wanted}, got {shown(self.pattern)}") from None


def _within(item: Any, code: int) -> bool:
    op, value = str(item[0]), item[1]
    if op == "LITERAL":
        return bool(code == value)
    if op == "RANGE":
        return bool(value[0] <= code <= value[1])
    name = str(value)
    return CATEGORIES[name.replace("NOT_", "")](chr(code)) != name.startswith("CATEGORY_NOT_")
