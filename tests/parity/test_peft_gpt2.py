"""GPT-2 against torch's autograd through transformers and PEFT.  See specs/gpt.md."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lorax_np.models.records import Trained
from lorax_np.models.tasks import outputs
from tests.parity.encoder_oracle import STARTS, adapters, agreement, batch, ours, raw, tiny, whole
from tests.parity.peft_layers import torch

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]

EXACT = 1e-12  # float64: of each tensor's largest entry
RNG = np.random.default_rng(1)
NEXT = np.where(RNG.random(STARTS[-1]) < 0.3, -100, RNG.integers(0, 29, STARTS[-1]))
NEXT[np.array(STARTS[1:]) - 1] = -100
TASKS: dict[str, tuple[str, Any]] = {
    "next token": ("CAUSAL_LM", NEXT),
    "classes": ("SEQ_CLS", np.array([2, 0, 0, 1])),
    "tokens": ("TOKEN_CLS", np.where(NEXT < 0, -100, NEXT % 3)),
    "spans": ("QUESTION_ANS", np.array([[0, 2], [0, 0], [3, 5], [1, -100]])),
}


def model_of(what, **changed):
    task, labels = TASKS[what]
    return tiny("gpt2", task, num_labels=2 if task == "QUESTION_ANS" else 3, **changed), task, batch(labels)


@pytest.mark.parametrize(
    "case",
    [
        ("next token", {}),
        ("next token", {"tie_word_embeddings": False}),
        ("next token", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
        ("next token", {"scale_attn_weights": False, "n_inner": None}),
        *((what, {}) for what in TASKS if what != "next token"),
    ],
    ids=str,
)
def test_every_parameter(case):
    what, changed = case
    model, task, b = model_of(what, **changed)
    off, each = whole(model, task, b, "gpt2")
    assert off <= 1e-13
    name = max(each, key=lambda key: each[key])
    assert each[name] <= EXACT, name
    assert agreement(model, task, b) <= 1e-13


CASES = {
    "c_attn": ("next token", {"target_modules": ["c_attn"]}),
    "all linear, dropped": ("next token", {"target_modules": "all-linear", "lora_dropout": 0.4}),
    "biases of all": ("next token", {"target_modules": ["c_fc", "c_proj"], "lora_dropout": 0.3, "bias": "all"}),
    "dora, dropped": ("next token", {"target_modules": ["c_attn"], "use_dora": True, "lora_dropout": 0.3}),
    "classes": ("classes", {"target_modules": ["c_attn", "c_proj"], "lora_dropout": 0.3, "bias": "lora_only"}),
    "tokens": ("tokens", {"target_modules": ["c_attn"], "use_rslora": True, "lora_dropout": 0.2}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_under_masks(tmp_path, case):
    what, options = CASES[case]
    model, task, b = model_of(what)
    off, each = adapters(model, task, b, "gpt2", tmp_path, fan_in_fan_out=True, **options)
    assert off <= 1e-13
    key = max(each, key=lambda name: each[name])
    assert each[key] <= EXACT, key


def test_float64_is_what_it_says():
    """From float32 to float64 the logits come nearer by a million at least: nothing stays behind."""
    model, task, b = model_of("next token")
    apart = {}
    for dtype in ("float32", "float64"):
        mine = ours(model, task, dtype=dtype)
        got = outputs(mine, {}, Trained({}, {}), b, task=task)
        assert got.dtype == dtype
        with torch.no_grad():
            found, p = raw(model.double(), replace(b))
            want = p.rows(found.logits).numpy()
        apart[dtype] = np.abs(got - want).max() / np.abs(want).max()
    assert apart["float32"] < 1e-5
    assert apart["float32"] > 1e6 * apart["float64"]
