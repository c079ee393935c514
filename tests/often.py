"""Which situations of a kind run each time; the others are thorough, for .ci/run alone (conftest.py)."""

import pytest


def one_in(n, values):
    """Each n-th of some values to parametrise with; tuples are values of several arguments."""
    return [_param(i % n == 0, value) for i, value in enumerate(values)]


def once_each(values, others):
    """All pairs of two kinds of value, of which each value of either kind is in one that runs each time."""
    values, others = list(values), list(others)
    n, m = len(values), len(others)
    always = {(i % n, i % m) for i in range(max(n, m))}
    return [_param((i, j) in always, values[i], others[j]) for i in range(n) for j in range(m)]


def _param(always, *parts):
    """The arguments of one situation."""
    values = [value for part in parts for value in (part if isinstance(part, tuple) else (part,))]
    return pytest.param(*values, marks=() if always else pytest.mark.thorough)
