"""What all tests of the harness share."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def judged_by_known_truths(truths_once: None) -> None:
    """Subject after subject is judged on the same cases."""
