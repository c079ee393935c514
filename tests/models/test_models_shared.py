"""(models.28): a micro-batch shared among threads has the loss and gradients of the whole, on every family."""

from itertools import pairwise

import numpy as np
import pytest
import test_models_bert as bert
import test_models_gpt2 as gpt2
import test_models_moe as moe
import test_models_t5 as t5
from whole import leaves

from lorax_np.errors import ConfigError
from lorax_np.models import shared
from lorax_np.models.tasks import loss, loss_and_gradients, outputs
from lorax_np.text.scoring import outputs_by_example
from lorax_np.train.config import TrainConfig
from lorax_np.train.passes import Passes

STEPS = {
    **{
        what: lambda what=what: bert.step_of(what) for what in ("classes", "several classes", "tokens", "spans")
    },
    "next token": lambda: gpt2.step_of("next token"),  # of the middle sequence no label counts
    "experts": moe.step_of,
    "written": t5.step_of,
}


def passes_of(step, workers):
    config = TrainConfig(workers=workers)
    return Passes(step.model, step.sites, step.trained, task=step.task, config=config)


@pytest.mark.parametrize("what", STEPS)
def test_shares_add_up_to_the_whole(what):
    """Masks, labels and types go with their sequences; n is the whole's. Twice the same, to the bit."""
    step = STEPS[what]()
    value, want = step.gradients(engine="fast")
    for workers in (2, 9):
        passes = passes_of(step, workers)
        found = [passes.gradients(step.trained, step.batch, n=step.n, dropout=step.dropout) for _ in range(2)]
        assert float(found[0][0]) == pytest.approx(float(value), rel=1e-13)
        got, again = (leaves(g) for _, g in found)
        for leaf, g in leaves(want).items():
            assert np.abs(got[leaf] - g).max() <= 1e-12 * np.abs(g).max() + 1e-15, leaf
            assert np.array_equal(got[leaf], again[leaf])
    alone = passes_of(step, 1).loss(step.trained, step.batch, n=step.n)
    assert passes_of(step, 2).loss(step.trained, step.batch, n=step.n) == pytest.approx(alone, rel=1e-13)


@pytest.mark.parametrize("what", ["classes", "several classes", "tokens", "spans"])
def test_one_forward_gives_loss_and_outputs_in_the_batchs_order(what):
    """Whoever computed them: those of the whole batch."""
    step = STEPS[what]()
    args = step.model, step.sites, step.trained, step.batch
    z = np.asarray(outputs(*args, task=step.task))
    want = list(outputs_by_example(step.task, step.batch, z))
    value = float(loss(*args, task=step.task, n=step.n))
    assert len(want) == len(step.batch.index)
    for workers in (1, 2, 9):
        got, found = passes_of(step, workers).judged(step.trained, step.batch, n=step.n)
        assert got == pytest.approx(value, rel=1e-13)
        for one, other in zip(found, want, strict=True):
            assert one.shape == other.shape
            assert np.abs(one - other).max() <= 1e-12 * np.abs(z).max()


def test_the_likeliest_tokens_are_in_the_batchs_order():
    step = t5.step_of()
    z = np.asarray(outputs(step.model, step.sites, step.trained, step.batch, task=step.task))
    starts = step.batch.decoder_starts
    want = [z[a:b].argmax(axis=1).tolist() for a, b in pairwise(starts)]
    assert len(set(map(tuple, want))) > 1
    for workers in (1, 2, 9):
        found = passes_of(step, workers).likeliest(step.trained, step.batch)
        assert [each.tolist() for each in found] == want


def sequences_of(step, workers):
    """The numbers of the sequences that each worker has."""
    return shared.in_shares(lambda part: part.index, step.batch, task=step.task, workers=workers)


def test_who_has_what():
    """Sequences of 3, 1 and 5 tokens, numbered 16, 9 and 2: the longest first, each to whom has least."""
    step = bert.step_of("tokens")
    assert sequences_of(step, 1) == [(16, 9, 2)]
    assert sequences_of(step, 2) == [(2,), (16, 9)]
    assert sequences_of(step, 9) == [(2,), (16,), (9,)]
    with pytest.raises(ConfigError, match="workers: expected 'auto' or a number of at least 1, got 0"):
        sequences_of(step, 0)


@pytest.mark.parametrize("what", ["pairs", "scored pairs"])
def test_losses_that_compare_sequences_are_not_shared(what):
    step = bert.step_of(what)
    assert sequences_of(step, 2) == [step.batch.index]
    value, want = step.gradients(engine="fast")
    found, got = passes_of(step, 2).gradients(step.trained, step.batch, n=step.n, dropout=step.dropout)
    assert float(found) == float(value)
    for leaf, g in leaves(want).items():
        assert np.array_equal(leaves(got)[leaf], g)


def test_one_worker_computes_the_whole_batch_itself():
    step = bert.step_of("classes")
    how = {"n": step.n, "dropout": step.dropout}
    value, want = loss_and_gradients(step.model, step.sites, step.trained, step.batch, task=step.task, **how)
    found, got = passes_of(step, 1).gradients(step.trained, step.batch, **how)
    assert float(found) == float(value)
    assert all(np.array_equal(leaves(got)[leaf], g) for leaf, g in leaves(want).items())
