"""The planned pass on a base in few bits: the bits that it has on a dense base of the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
from often import once_each

import lorax_np as lx
from lorax_np.models.quantised import Quantised, let_go
from lorax_np.models.tasks import count
from tests.models import tiny

KINDS = [("nf4", False), ("nf4", True), ("int8", False), ("bf16", False)]


@pytest.mark.parametrize(("way", "double", "dtype"), once_each(KINDS, ["float32", "float64"]))
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_planned_pass_has_the_bits_of_a_dense_base(way, double, dtype, checkpoint):
    """With masks, biases, and norms folded in, in two threads whose layers are written out at the same time."""
    stored = tiny.model(dtype=dtype, attention_bias=True)
    few = lx.quantised(stored, way, double=double)
    dense = replace(stored, weights={name: np.array(W) for name, W in few.weights.items()})
    sites, trained, _ = tiny.start(stored, lora_dropout=0.3)
    b = tiny.batch()
    how = {"n": count("CAUSAL_LM", b.labels), "dropout": tiny.DROPOUT}
    where = b.ids, b.starts, b.index, b.labels

    def run(model):
        plan = lx.fast.llama_plan(
            model.weights, model.config, trained.adapters, sites, workers=2, checkpoint=checkpoint
        )
        if isinstance(model.weights, Quantised):
            let_go(model.weights)
        steps = [plan.loss_and_gradients(trained.adapters, {}, *where, **how) for _ in range(2)]
        return [(value, tiny.tensors(tiny.Trained(g, {}))) for value, g, _ in steps]

    want, found = run(dense), run(few)
    for (value, g), (right, its) in zip(found, want, strict=True):
        assert value == right
        assert g.keys() == its.keys()
        for key in g:
            assert g[key].tobytes() == its[key].tobytes(), key
    plain = run(stored)
    assert plain[0][0] != found[0][0]
