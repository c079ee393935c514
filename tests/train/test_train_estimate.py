"""What a run will take: counts of (training.10) where they can be done by hand.  specs/training.md."""

from math import prod

import pytest
from small_run import examples, settings, started

from lorax_np.fast.llama.head import CHUNK
from lorax_np.models.records import Trained
from lorax_np.train import Passes
from lorax_np.train.memory import memory_of
from lorax_np.train.step import parameters
from lorax_np.train.work import work_of


def counted(**more):
    """The parts of the estimate of a small run, and the bytes of what trains."""
    base, adapters, sites, _ = started()
    trained, config = Trained(adapters, {}), settings(**{"engine": "fast", "workers": 2, **more})
    passes = Passes(base, sites, trained, task="CAUSAL_LM", config=config)
    work = work_of(passes, trained, examples(longest=200))
    return memory_of(work), sum(4 * prod(value.shape) for value in parameters(trained).values())


@pytest.mark.parametrize(
    ("more", "gradients", "optimiser"),
    [
        ({"grad_accumulation_steps": 1}, 4, 3),  # of two workers, by name, flat; p, m and v
        ({"engine": "reference", "grad_accumulation_steps": 1}, 2, 3),
        ({}, 5, 3),  # and those of the micro-batch before
        ({"optimizer": "sgd"}, 5, 2),  # p, old and new
        ({"optimizer": "sgd", "momentum": 0.5}, 5, 4),
        ({"optimizer": "lora-fa"}, 5, 6),
    ],
)
def test_copies_of_what_trains(more, gradients, optimiser):
    found, P = counted(**more)
    assert found["adapters"] == P
    assert (found["gradients"], found["optimiser"]) == (gradients * P, optimiser * P)


def test_logits_are_those_of_a_chunk():
    """As many rows as the plan's head has at once, of each worker."""
    found, _ = counted(batch_size=24)
    assert found["logits"] == 2 * CHUNK * 23 * 4
