"""Hypothesis profiles: `ci` repeats the same examples everywhere, `deep` draws many new ones."""

import os

from hypothesis import HealthCheck, settings

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=slow)
settings.register_profile("deep", deadline=None, max_examples=1000, suppress_health_check=slow)
settings.load_profile(os.environ.get("LORAX_NP_HYPOTHESIS", "ci"))
