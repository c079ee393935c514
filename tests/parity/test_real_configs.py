"""config.json files of models that people have: each loads, and computes as transformers' model does.

Weights are random, in float64 and under the names that transformers saves; other families are refused by name.
"""

import json

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.io.writer import write_safetensors
from lorax_np.models.records import Trained
from lorax_np.models.tasks import outputs
from lorax_np.ops.rope import rope_frequencies
from tests.parity import encoder_oracle, llama_oracle, moe_oracle, t5_oracle
from tests.parity.llama_oracle import T
from tests.parity.peft_layers import torch
from tests.parity.real_configs import DECODERS, ENCODERS, SEQUENCES, SMALL

pytestmark = pytest.mark.peft

REFUSED = (
    "distilbert",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt_neox",
    "opt",
    "falcon",
    "deepseek_v3",
)
LENGTHS = 11, 1, 4
KINDS = {
    "FEATURE_EXTRACTION": "AutoModel",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}


def theirs(folder, config, kind, exact):
    """transformers' model of a config.json, random in float64, and saved beside it under the names it saves."""
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    said = T.AutoConfig.from_pretrained(folder)
    said._attn_implementation = "eager" if config["model_type"] in ("t5", "mt5") else "sdpa"
    said._experts_implementation = "eager"
    model = getattr(T, kind).from_config(said, dtype=torch.float64)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(("norm" in name.lower()) + 0.3 * torch.randn_like(value))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))  # as it was, not as transformers writes it
    return exact(model.eval())


def close(got, want):
    assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_people_have_compute_as_theirs(tmp_path, name):
    """Logits; and the angles of positions, which the oracle takes from here, transformers from its own code."""
    config = DECODERS[name]
    model = theirs(tmp_path, config, "AutoModelForCausalLM", moe_oracle.exact)
    b = llama_oracle.batch(LENGTHS, 29)
    mine = lx.load_model(tmp_path, task="CAUSAL_LM")
    with torch.no_grad():
        close(outputs(mine, {}, Trained({}, {}), b, task="CAUSAL_LM"), llama_oracle.logits(model, b).numpy())
    if config["model_type"] != "gpt2":
        rope, turn = mine.config["rope_parameters"], model.model.rotary_emb
        angles, factor = rope_frequencies(mine.config["head_dim"], theta=rope["rope_theta"], scaling=rope)
        np.testing.assert_allclose(angles, turn.inv_freq.numpy(), rtol=1e-6)
        assert factor == pytest.approx(turn.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("task", KINDS)
def test_encoders_people_have_compute_as_theirs(tmp_path, name, task):
    model = theirs(tmp_path, ENCODERS[name], KINDS[task], lambda model: model)
    b = encoder_oracle.batch(None)
    mine = lx.load_model(tmp_path, task=task)
    with torch.no_grad():
        close(outputs(mine, {}, Trained({}, {}), b, task=task), encoder_oracle.theirs(model, b, task).numpy())


@pytest.mark.parametrize("name", SEQUENCES)
def test_t5s_people_have_compute_as_theirs(tmp_path, name):
    model = theirs(tmp_path, SEQUENCES[name], "AutoModelForSeq2SeqLM", t5_oracle.exact)
    b = t5_oracle.batch((3, 1, 40, 2))
    mine = lx.load_model(tmp_path, task="SEQ_2_SEQ_LM")
    with torch.no_grad():
        close(outputs(mine, {}, Trained({}, {}), b, task="SEQ_2_SEQ_LM"), t5_oracle.logits(model, b).numpy())


@pytest.mark.parametrize("kind", REFUSED)
def test_models_of_other_families_are_refused_in_one_line(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": kind}))
    write_safetensors(tmp_path / "model.safetensors", {"w": np.ones(2)})
    with pytest.raises(
        lx.ConfigError, match=rf"config.json: model_type: expected one of .*, got '{kind}'"
    ) as said:
        lx.load_model(tmp_path)
    assert "\n" not in str(said.value)
