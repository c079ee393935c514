"""BERT and RoBERTa against torch's autograd through transformers and PEFT.  See specs/bert.md."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.inject import plan
from tests.parity.encoder_oracle import STARTS, adapters, agreement, batch, ours, tiny, whole
from tests.parity.llama_oracle import Padded, adapted
from tests.parity.peft_layers import torch

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]

EXACT = 1e-12  # float64: of each tensor's largest entry
RNG = np.random.default_rng(0)
TOKENS = np.where(RNG.random(STARTS[-1]) < 0.3, -100, RNG.integers(0, 3, STARTS[-1]))
TASKS: dict[str, tuple[str, Any]] = {
    "classes": ("SEQ_CLS", np.array([2, -100, 0, 1])),
    "several classes": ("SEQ_CLS", RNG.integers(0, 2, (4, 3)).astype(float)),
    "numbers": ("SEQ_CLS", RNG.standard_normal(4)),
    "tokens": ("TOKEN_CLS", TOKENS),
    "spans": ("QUESTION_ANS", np.array([[0, 2], [0, 0], [3, 5], [1, -100]])),
    "pairs": ("FEATURE_EXTRACTION", None),
    "scored pairs": ("FEATURE_EXTRACTION", np.array([0.3, -0.7])),
}


def model_of(kind, what, **changed):
    task, labels = TASKS[what]
    C = 1 if what == "numbers" else 2 if task == "QUESTION_ANS" else 3
    return tiny(kind, task, num_labels=C, **changed), task, batch(labels, types=kind == "bert")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("what", TASKS)
def test_every_parameter(kind, what):
    model, task, b = model_of(kind, what)
    off, each = whole(model, task, b, kind)
    assert off <= 1e-13
    name = max(each, key=lambda key: each[key])
    assert each[name] <= EXACT, name
    assert agreement(model, task, b) <= 1e-13


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu", "tanh", "gelu_pytorch_tanh"])
def test_other_activations(act):
    model, task, b = model_of("bert", "tokens", hidden_act=act)
    off, each = whole(model, task, b, "bert")
    assert max(off, *each.values()) <= EXACT


CASES = {
    "query and value": ("classes", {"target_modules": ["query", "value"]}),
    "all linear, dropped": ("classes", {"target_modules": "all-linear", "lora_dropout": 0.4}),
    "dense, dropped, biases of all": (
        "classes",
        {"target_modules": ["dense", "query"], "lora_dropout": 0.3, "bias": "all"},
    ),
    "dora, dropped": ("tokens", {"target_modules": ["key", "dense"], "use_dora": True, "lora_dropout": 0.3}),
    "tables": ("tokens", {"target_modules": ["word_embeddings", "position_embeddings", "value"]}),
    "spans": (
        "spans",
        {"target_modules": ["query", "value", "dense"], "lora_dropout": 0.2, "bias": "lora_only"},
    ),
    "pairs": (
        "pairs",
        {"target_modules": r".*(query|output\.dense)", "lora_dropout": 0.3},
    ),
    "a pooler that trains whole": (
        "several classes",
        {"target_modules": ["query"], "modules_to_save": ["pooler"], "lora_dropout": 0.3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_under_masks(tmp_path, case):
    what, options = CASES[case]
    off, each = adapters(*model_of("bert", what), "bert", tmp_path, **options)
    assert off <= 1e-13
    key = max(each, key=lambda name: each[name])
    assert each[key] <= EXACT, key


def test_peft_loses_token_types_where_answers_are_sought(tmp_path):
    """peft-0.21.2/qa-token-types: its forward for QUESTION_ANS takes token_type_ids, and hands on none."""
    model, task, b = model_of("bert", "spans")
    theirs = adapted(model, tmp_path, r=3, task_type=task, target_modules=["query"])
    p = Padded.of(b)
    types = Padded.of(replace(b, ids=b.types, types=None)).ids
    with torch.no_grad():
        z, without = (
            theirs(input_ids=p.ids, attention_mask=p.mask, **more).start_logits
            for more in ({"token_type_ids": types}, {})
        )
        right = theirs.base_model.model(
            input_ids=p.ids, attention_mask=p.mask, token_type_ids=types
        ).start_logits
    assert torch.equal(z, without)
    assert (right - z).abs().max() > 0.1


def test_peft_means_its_own_head_by_all_linear(tmp_path):
    """peft-0.21.2/qa-all-linear: and cannot then train it whole; here it is no target."""
    model, task, _ = model_of("bert", "spans")
    mine = ours(model, task)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        adapted(model, tmp_path, task_type=task, target_modules="all-linear")
    found = plan(mine.weights, lx.LoraConfig(target_modules="all-linear", task_type=task))
    assert "qa_outputs" not in found.sites
    assert found.saved == ("qa_outputs.weight", "qa_outputs.bias")


def test_robertas_classifier(tmp_path):
    off, each = adapters(
        *model_of("roberta", "classes"),
        "roberta",
        tmp_path,
        target_modules=["query", "dense"],
        lora_dropout=0.3,
    )
    assert any(name.startswith("classifier.dense.weight") for name, _ in each)
    assert max(off, *each.values()) <= EXACT
