"""Batches whose parts do not fit each other are refused in one line, before anything is computed."""

from dataclasses import replace

import numpy as np
import pytest
import tiny

import lorax_np as lx
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.models.records import Trained
from lorax_np.models.tasks import loss, loss_and_gradients, outputs
from lorax_np.train.passes import Passes

LM = {"task": "CAUSAL_LM"}
BAD = {
    "ids of a list": ({"ids": [1] * 17}, ShapeError, "ids: expected an array of integers, got list"),
    "ids of floats": ({"ids": np.ones(17)}, DtypeError, "ids: expected integers, got float64"),
    "ids of bools": ({"ids": np.ones(17, bool)}, DtypeError, "ids: expected integers, got bool"),
    "ids of two axes": ({"ids": np.ones((1, 17), int)}, ShapeError, r"ids: expected \(N,\), .* got \(1, 17\)"),
    "too few ids": (
        {"ids": np.ones(16, int)},
        ShapeError,
        "starts: expected row bounds that rise from 0 to 16",
    ),
    "bounds that fall": ({"starts": (0, 5, 4, 14, 17)}, ShapeError, "starts: expected row bounds that rise"),
    "no bounds": ({"starts": ()}, ShapeError, r"starts: expected row bounds .* got \(\)"),
    "too few numbers": ({"index": (0, 1)}, ShapeError, "index: expected 4 numbers, one a sequence, got 2"),
    "types of other rows": (
        {"types": np.zeros(3, int)},
        ShapeError,
        r"types: expected \(N,\) with N=17",
    ),
    "types of a llama": (
        {"types": np.zeros(17, int)},
        ConfigError,
        r"types: expected None, since tokens of a llama have no types, got an array of shape \(17,\)",
    ),
    "a decoder of others": (
        {"decoder_ids": np.ones(2, int), "decoder_starts": (0, 2)},
        ShapeError,
        "decoder_starts: expected 4 sequences, as ids have, got 1",
    ),
}


@pytest.mark.parametrize(("parts", "error", "told"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(parts, error, told):
    model, batch = tiny.model(), replace(tiny.batch(), **parts)
    with pytest.raises(error, match=told):
        loss_and_gradients(model, {}, Trained({}, {}), batch, n=5, **LM)
    with pytest.raises(error, match=told):
        loss(model, {}, Trained({}, {}), batch, n=5, **LM)
    with pytest.raises(error, match=told):
        outputs(model, {}, Trained({}, {}), batch, **LM)


def test_labels_are_needed_where_a_loss_is_asked_for():
    model, batch = tiny.model(), replace(tiny.batch(), labels=None)
    with pytest.raises(ShapeError, match="labels: expected an array, got NoneType"):
        loss_and_gradients(model, {}, Trained({}, {}), batch, n=5, **LM)
    assert outputs(model, {}, Trained({}, {}), batch, **LM).shape == (17, tiny.CONFIG["vocab_size"])


def test_the_planned_pass_refuses_the_same():
    model = tiny.model(dtype="float32")
    _, adapters, sites = lx.inject(model.weights, lx.LoraConfig(r=2), np.random.default_rng(0))
    passes, trained = Passes(model, sites, Trained(adapters, {}), task="CAUSAL_LM"), Trained(adapters, {})
    assert passes.planned
    for parts, error, told in (BAD["types of a llama"], BAD["too few numbers"]):
        batch = replace(tiny.batch(), **parts)
        with pytest.raises(error, match=told):
            passes.gradients(trained, batch, n=5, dropout=None)
        with pytest.raises(error, match=told):
            passes.loss(trained, batch, n=5)
