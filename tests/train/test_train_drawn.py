"""What is drawn for a task and is not the base's has to be in the directory that a run leaves."""

import json

import pytest
from writers import BERT, directory

from lorax_np.cli import main
from lorax_np.train import output
from lorax_np.train.log import records


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A command on a BERT without a pooler and on three rows; its code and what it says."""
    monkeypatch.setattr(output, "picture", lambda rows: None)
    place, data = directory(tmp_path / "base", BERT, task="FEATURE_EXTRACTION"), tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"abc {i}", "label": "xyz"[i]}) + "\n" for i in range(3)))

    def go(command, *flags):
        how = ["--model", str(place), "--data", str(data), "--task", "seq-cls", "--quiet", *flags]
        return main([command, *how, "--adapter-path", str(tmp_path / "out")]), *capsys.readouterr()

    return go


def test_a_pooler_that_would_be_in_no_file_is_refused(run, tmp_path):
    """It stands between the encoder and the class, and no task type trains it."""
    code, _, said = run("train", "--iters", "2", "--warmup", "0")
    assert code == 2
    assert said.startswith("lorax-np: modules_to_save: expected pooler among them, since ")
    assert not (tmp_path / "out").exists()
    code, _, said = run("train", "--iters", "2", "--warmup", "0", "--modules-to-save", "pooler")
    assert (code, said) == (0, "")
    *_, last = (line["loss"] for line in records(tmp_path / "out" / "metrics.jsonl") if line["event"] == "eval")
    code, out, _ = run("evaluate", "--json", "-")
    assert json.loads(out)["metrics"]["loss"] == pytest.approx(last, rel=1e-6)
