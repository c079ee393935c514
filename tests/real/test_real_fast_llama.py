"""SmolLM2-135M, all 30 layers: the planned pass against the general one, in float64 and float32, with masks."""

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.models.records import Dropout, Trained
from lorax_np.models.tasks import count, loss_and_gradients
from tests.real.test_real_llama import LORA, ONE, TWO, batch, file  # noqa: F401, a fixture

pytestmark = pytest.mark.real

DROPOUT = Dropout(seed=3, step=8)
EXACT, LARGEST, NORM = 1e-12, 5e-4, 2e-4  # of float64; of float32 by largest entries, and by norms


def far(found, want):
    """How far gradients are off, in the largest entry and in the norm, each of its tensor's."""
    worst = np.zeros(2)
    for site, g in want.items():
        for part in "AB":
            right = getattr(g, part)
            gap = getattr(found[site], part).astype("float64") - right
            here = np.abs(gap).max() / np.abs(right).max(), np.linalg.norm(gap) / np.linalg.norm(right)
            worst = np.maximum(worst, here)
    return worst


def test_gradients_of_all_layers(file):  # noqa: F811
    model = lx.load_model(file, task="CAUSAL_LM", dtype="float64")
    config = lx.LoraConfig(**LORA, lora_dropout=0.1)
    rng = np.random.default_rng(0)
    _, adapters, sites = lx.inject(model.weights, config, rng)

    def moved(a):  # B off zero, and both as float32 has them
        B = (0.02 * rng.standard_normal(a.B.shape)).astype("float32")
        return lx.Adapter(a.A.astype("float32").astype("float64"), B.astype("float64"))

    wide = {site: moved(a) for site, a in adapters.items()}
    b = batch(ONE, TWO)
    n = count("CAUSAL_LM", b.labels)
    want, g = loss_and_gradients(
        model, sites, Trained(wide, {}), b, task="CAUSAL_LM", n=n, dropout=DROPOUT, engine="reference"
    )
    where = b.ids, b.starts, b.index, b.labels

    planned = lx.fast.llama_plan(model.weights, model.config, wide, sites)
    found, gradients, _ = planned.loss_and_gradients(wide, {}, *where, n=n, dropout=DROPOUT)
    off = far(gradients, g.adapters)
    print(f"float64: loss {abs(found / float(want) - 1):.1e}, gradients {off[0]:.1e}, by norm {off[1]:.1e}")
    assert abs(found - want) <= EXACT * want
    assert off.max() <= EXACT
    del planned, model

    small = lx.load_model(file, task="CAUSAL_LM")
    narrow = {site: lx.Adapter(a.A.astype("float32"), a.B.astype("float32")) for site, a in wide.items()}
    planned = lx.fast.llama_plan(small.weights, small.config, narrow, sites, checkpoint=True)
    found, gradients, _ = planned.loss_and_gradients(narrow, {}, *where, n=n, dropout=DROPOUT)
    off = far(gradients, g.adapters)
    print(f"float32: loss {abs(found / float(want) - 1):.1e}, gradients {off[0]:.1e}, by norm {off[1]:.1e}")
    assert abs(found - want) <= 1e-5 * want
    assert off[0] <= LARGEST
    assert off[1] <= NORM
