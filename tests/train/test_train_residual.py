"""Starts that take s·BA out of the weights, with biases that train beside the sites: what is saved is right."""

import json

import pytest
from writers import CONFIGS, directory

from lorax_np.cli import main
from lorax_np.train import output
from lorax_np.train.log import records


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_biases_that_train_alone_are_saved_beside_plain_adapters(tmp_path, monkeypatch, capsys, start):
    """GPT-2's norms have biases and no adapter; the saved directory has the run's last figure."""
    monkeypatch.setattr(output, "picture", lambda rows: None)
    place, data, out = directory(tmp_path / "base", CONFIGS["gpt2"]), tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"text": f"abc {i}"}) + "\n" for i in range(6)))
    same = ["--model", str(place), "--data", str(data), "--quiet", "--adapter-path", str(out)]
    how = ["--iters", "2", "--warmup", "0", "--r", "2", "--learning-rate", "0.02", "--bias", "all"]
    assert main(["train", *same, *how, "--init-lora-weights", start]) == 0
    first, *_, last = (line["loss"] for line in records(out / "metrics.jsonl") if line["event"] == "eval")
    capsys.readouterr()
    assert main(["evaluate", *same, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    assert abs(found - last) <= 1e-5 * last < 0.1 * (first - last)
