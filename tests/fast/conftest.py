"""What the tests of the fast engine share."""

import numpy as np
import pytest

from lorax_np.fast import cpu_branch, cpu_dora, norms, split, weights


@pytest.fixture(scope="session", autouse=True)
def judged_by_known_truths(truths_once):
    """Plan after plan is judged on the same cases."""


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of the fewest rows and features there may be, so that small layers have several and a tail."""
    monkeypatch.setattr(weights, "ENTRIES", 1)
    monkeypatch.setattr(cpu_dora, "FEATURES", 3)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that comes with NaN in it, so that what is read before it is written shows."""

    def empty(shape, dtype):
        return np.full(shape, np.nan, dtype)

    for module in (cpu_branch, cpu_dora, norms, split, weights):
        monkeypatch.setattr(module, "empty", empty)
