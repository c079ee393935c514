"""Hypothesis profiles: `quick` and `ci` repeat the same examples everywhere, `deep` draws many new ones."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

# The products of tests are small, and workers share the cores: threads that wait for one another cost more than
# they bring. NumPy reads this when it is loaded, after this file; workers and subjects' processes inherit it.
for library in ("OPENBLAS", "MKL", "OMP"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=25, suppress_health_check=slow)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=slow)
settings.register_profile("deep", deadline=None, max_examples=1000, suppress_health_check=slow)
THOROUGH = os.environ.get("LORAX_NP_TESTS") == "all"  # as .ci/run sets it; a newcomer has five minutes
settings.load_profile(os.environ.get("LORAX_NP_HYPOTHESIS", "ci" if THOROUGH else "quick"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, each with its reason, PEFT's lane where the extra is not installed, and what repeats at length."""
    if not THOROUGH:
        reason = "repeats what others of its kind show; LORAX_NP_TESTS=all runs it, as .ci/run does"
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason=reason))
    missing = [name for name in ("torch", "peft") if find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)}: not installed; pip install 'lorax-np[peft]'"
        for item in items:
            if item.get_closest_marker("peft"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def truths_once() -> Iterator[None]:
    """Compute the truth of each case once: subject after subject is judged on the same ones."""
    from lorax_np.verify.mutants.matrix import remembered

    with remembered():
        yield
