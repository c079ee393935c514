"""What is said of a run fits a terminal of 80 columns, and loses no word for it."""

import pytest

from lorax_np.train.lines import Lines

LONG = {
    "eval": {
        "event": "eval", "step": 1200, "rows": 1000, "on": "valid",
        "loss": 3.7438, "perplexity": 42.26, "bits per byte": 1.4153, "macro F1": 0.25, "accuracy": 0.5,
    },
    "start": {
        "event": "start", "steps": 10, "rows": 40, "ranks": 2,
        "pass": "general pass, fast, since model.layers.0.mlp.up_proj: m: expected no magnitude, got one",
    },
    "bad": {
        "event": "bad", "step": 3, "came": "gradients that are not finite",
        "first": "model.layers.29.mlp.gate_proj.A", "rows": [f"train.jsonl:{i}" for i in range(9)],
    },
}  # fmt: skip


@pytest.mark.parametrize("record", LONG.values(), ids=LONG)
def test_long_lines_go_on_below(record):
    said = []
    Lines(said.append)(record)
    assert max(map(len, said)) <= 80
    assert len(said) > 1
    assert all(line.startswith("  ") for line in said[1:])
    first = {"eval": "macro F1 0.2500", "start": "expected no magnitude", "bad": "train.jsonl:3"}[
        record["event"]
    ]
    assert first in " ".join(line.strip() for line in said)
