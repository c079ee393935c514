"""--num-layers on families that call their layers by other words than a llama."""

import json

import pytest
from writers import CONFIGS, VOCAB, directory

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.train import output

T5 = {
    "model_type": "t5",
    "d_model": 12,
    "d_kv": 4,
    "num_heads": 3,
    "d_ff": 8,
    "num_layers": 2,
    "pad_token_id": 1,
}
ROWS = {"causal-lm": {"text": "abc"}, "seq2seq-lm": {"source": "abc", "target": "d"}}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_last_layers_are_those_of_any_family(tmp_path, monkeypatch, capsys, family):
    monkeypatch.setattr(output, "picture", lambda rows: None)
    task, config = ("causal-lm", CONFIGS["gpt2"]) if family == "gpt2" else ("seq2seq-lm", T5)
    head = "CAUSAL_LM" if family == "gpt2" else "SEQ_2_SEQ_LM"
    place = directory(tmp_path / "base", config | {"vocab_size": VOCAB}, task=head)
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{json.dumps(ROWS[task])}\n" * 4)
    how = [
        "--model",
        str(place),
        "--data",
        str(data),
        "--task",
        task,
        "--quiet",
        "--iters",
        "1",
        "--warmup",
        "0",
    ]
    assert main(["train", *how, "--num-layers", "1", "--adapter-path", str(tmp_path / "out")]) == 0
    sites = lx.load_adapter(tmp_path / "out").sites
    parts = {"gpt2": {"transformer"}, "t5": {"encoder", "decoder"}}[family]
    assert {name.partition(".")[0] for name in sites} == parts
    assert all(".1." in name for name in sites)
    assert len(sites) > 3 * len(parts)
    assert main(["train", *how, "--num-layers", "3", "--adapter-path", str(tmp_path / "no")]) == 2
    assert "num_layers: expected 1 to 2, the model's layers, got 3" in capsys.readouterr().err
