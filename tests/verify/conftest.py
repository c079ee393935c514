"""What all tests of the harness share."""

from collections.abc import Iterator

import pytest

from lorax_np.verify.mutants.matrix import remembered


@pytest.fixture(scope="session", autouse=True)
def truths_once() -> Iterator[None]:
    """Compute the truth of each case once: subject after subject is judged on the same ones."""
    with remembered():
        yield
