"""From a checkpoint on disk to an adapter's directory and into PEFT: injection at both ends of files."""

import copy
import warnings

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.io.checkpoint import open_checkpoint
from tests.parity.peft_models import injected, model, peft

pytestmark = pytest.mark.peft

CASES = {
    "llama": {},
    "gpt2": {"modules_to_save": ["ln_f"], "bias": "all"},
    "bert-cls": {"task_type": "SEQ_CLS", "use_dora": True},
    "whisper": {"target_modules": ["q_proj", "conv1"], "rank_pattern": {"conv1": 2}},
    "qwen2": {"trainable_token_indices": [1, 3]},
    "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_injected_saved_and_loaded_by_peft(name, tmp_path):
    """model_type from config.json, PEFT's bits in the order of the files, every tensor where PEFT wants it."""
    found, fields = model(name), {"r": 3, "lora_alpha": 5, **CASES[name]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy.deepcopy(found.torch).save_pretrained(tmp_path / "base")
    weights, config = open_checkpoint(tmp_path / "base"), lx.LoraConfig(**fields)
    theirs, plan = injected(found, seed=7, **fields), lx.plan(weights, config)
    _, adapters, sites = lx.inject(weights, config, lx.torch_generator(7))
    tuner = theirs.model.base_model
    assert list(sites) == tuner.targeted_module_names + tuner.targeted_parameter_names
    assert (plan.trainable, plan.total) == theirs.model.get_nb_trainable_parameters()
    for site, layer in theirs.layers.items():
        np.testing.assert_array_equal(adapters[site].A, layer.lora_A["default"].weight.detach().numpy())

    lx.save_adapter(tmp_path / "adapter", adapters, config, sites=sites, saved=lx.saved_tensors(weights, plan))
    assert lx.load_adapter(tmp_path / "adapter").sites.keys() == sites.keys()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(found.torch), str(tmp_path / "adapter"))
    assert not [warning for warning in said if "keys" in str(warning.message)]  # missing, or not expected
    got = {key: value for key, value in loaded.named_parameters() if "lora_" in key}
    want = {key: value for key, value in theirs.model.named_parameters() if "lora_" in key}
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[key].detach().numpy(), value.detach().numpy(), rtol=2e-6)
