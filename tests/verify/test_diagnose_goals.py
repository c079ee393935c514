"""How often the diagnosis is right: known faults planted, alone and in pairs. In full: bench/diagnosis.py."""

import random
from collections import Counter
from itertools import combinations, islice

import pytest

from lorax_np.verify.diagnosis.dictionary import faults
from lorax_np.verify.diagnosis.trials import pair, single

FOUND = ("named", "class", "hidden")


@pytest.mark.parametrize(
    ("profile", "goal"), [("fp32", 0.99), pytest.param("bf16", 0.95, marks=pytest.mark.thorough)]
)
def test_each_known_fault_is_named_and_nothing_is_invented_in_its_place(profile, goal):
    """A fault below a profile's roundings counts where it is printed with the right layer."""
    if profile == "bf16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    trials = [single(id, profile) for id in faults()]
    counts = Counter(trial.outcome for trial in trials)
    print(f"{profile}: {len(trials)} faults, {dict(counts)}")
    assert sum(counts[word] for word in FOUND) >= goal * len(trials)
    assert {trial.planted: trial.invented for trial in trials if trial.invented} == {}
    hidden = [trial.planted[0] for trial in trials if trial.outcome == "hidden"]
    assert all(faults()[id].kind == "precision" for id in hidden)


@pytest.mark.parametrize(
    ("profile", "count"), [("fp32", 60), pytest.param("bf16", 30, marks=pytest.mark.thorough)]
)
def test_pairs_of_known_faults_are_named(profile, count):
    if profile == "bf16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    every = list(combinations([id for id, fault in faults().items() if fault.steps is not None], 2))
    random.Random(1).shuffle(every)
    trials = list(islice((t for one, other in every if (t := pair(one, other, profile))), count))
    counts = Counter(trial.outcome for trial in trials)
    print(f"{profile}: {len(trials)} pairs, {dict(counts)}")
    asked = len(trials) - counts["masked"]
    assert sum(counts[word] for word in FOUND) >= 0.9 * asked
    assert counts["wrong"] == 0
