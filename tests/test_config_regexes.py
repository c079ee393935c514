"""Regular expressions from files: re's answers, in bounded time."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorax_np as lx
from lorax_np.config.regexes import Budget, Regex

ATOMS = (
    "a",
    "b",
    ".",
    r"\d",
    "[ab]",
    "[^a]",
    "1",
    r"\.",
    "$",
    "^",
    r"\b",
    r"\B",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
    r"\w",
)
atoms = st.sampled_from(ATOMS)
repeats = st.sampled_from(("", "", "*", "+", "?", "{1,2}", "{2}", "*?", "{2,}"))
patterns = st.recursive(
    atoms,
    lambda part: st.tuples(st.lists(part, min_size=1, max_size=3), repeats, st.booleans()).map(
        lambda given: "(" + ("|" if given[2] else "").join(given[0]) + ")" + given[1]
    ),
    max_leaves=8,
)


@given(st.lists(patterns, max_size=3).map("".join), st.text("ab1.", max_size=7))
def test_regular_expressions_answer_as_re_does(pattern, text):
    try:
        known = re.compile(pattern)
    except re.error:
        with pytest.raises(lx.ConfigError):
            Regex(pattern)
        return
    regex = Regex(pattern)
    assert regex.match(text) == bool(known.match(text))
    assert regex.fullmatch(text) == bool(known.fullmatch(text))


@pytest.mark.parametrize(
    "pattern", ["(a)\\1", "(?>a)b", "a*+", "(?i)a", "(?i:a)b", "(?a)a", "(?(1)a|b)", "a" * 4001]
)
def test_what_is_not_followed_is_refused(pattern):
    with pytest.raises(lx.ConfigError, match="regular expression: expected") as caught:
        Regex(pattern).match("ab")
    assert "\n" not in str(caught.value)


def test_steps_are_counted():
    with pytest.raises(lx.ConfigError, match="fewer steps"):
        Regex("((a|b)*c|d*)*x", Budget(1000)).match("abcd" * 100)
