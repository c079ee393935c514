"""lorax-np train beside a mixture of experts: parameters that get adapters are named by flags."""

import json

import numpy as np
import pytest
import tokenizers as hf
from small_run import CONFIG, weights
from tokenizers import models, pre_tokenizers

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.models.load import model_of
from lorax_np.models.upcycle import upcycle
from lorax_np.train import output
from lorax_np.train.log import records

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A mixture's directory, its tokenizer, and rows."""
    monkeypatch.setattr(output, "picture", lambda rows: None)
    mixture = upcycle(model_of(weights(), CONFIG), experts=3, top_k=2)
    lx.write_safetensors(tmp_path / "model.safetensors", dict(mixture.weights))
    config = {name: value for name, value in mixture.config.items() if name != "windows"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = hf.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["[UNK]", "[END]", *WORDS])}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[END]"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[END]"}))
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, n))} for n in rng.integers(3, 9, size=12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_experts_and_the_router_train(place, capsys):
    same = ["--model", place, "--data", place / "rows.jsonl", "--batch-size", "4"]
    how = ["--valid", place / "rows.jsonl", "--iters", "3", "--r", "2", "--lora-dropout", "0"]
    how += ["--learning-rate", "0.02", "--target-modules", "q_proj,v_proj"]
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    train = ["train", *map(str, same + how), "--quiet", "--json", "-", "--target-parameters"]
    out = place / "run"
    assert main([*train, ",".join(names), "--adapter-path", str(out)]) == 0
    files = lx.load_adapter(out)
    assert list(files.config.target_parameters) == names
    assert sum(site.kind == "experts" for site in files.sites.values()) == 3 * CONFIG["num_hidden_layers"]
    moved = {name: float(np.abs(adapter.B).max()) for name, adapter in files.adapters.items()}
    assert min(moved.values()) > 0, moved
    capsys.readouterr()
    assert main(["evaluate", *map(str, same), "--adapter-path", str(out), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    first, *_, last = [r["loss"] for r in records(out / "metrics.jsonl") if r["event"] == "eval"]
    assert last < first
    assert abs(told - last) < 1e-6
    assert main([*train, "experts.dwn_proj", "--adapter-path", str(place / "no")]) == 2
    assert "target_parameters: " in capsys.readouterr().err
