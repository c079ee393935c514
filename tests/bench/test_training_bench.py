"""The bench of training: its figures, its verdicts, and what it says of engines that are missing or break."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import machine, training, training_race
from bench.training_models import batches, kind, next_tokens
from bench.training_rows import ROWS, UNEVEN, Told


def found(engine, seconds, losses=(1.0,), peak=1):
    return training_race.Found(engine, "", 1000, list(seconds), list(losses), [], peak)


def test_a_rate_is_of_the_median_of_the_last_half():
    each = found("peft", [9, 9, 9, 4, 2, 5])
    assert each.rate == 1000 / 4
    assert each.best == 1000 / 2


def test_figures_and_verdicts():
    some = [found("ours", [2, 2], peak=20), found("peft", [4, 3], peak=100), found("gemm", [1, 1])]
    figures = training_race.figures(ROWS["p=0"], some)
    assert figures == {
        "ours / peft": 1.5, "best ours / best peft": 1.5, "memory": 0.2, "ours / gemm": 0.5,
    }  # fmt: skip
    text = training.render(Told("p=0", figures=figures, refused={"mkl": "not installed"}))
    for line in (
        "ours / peft",
        "1.50   goal ≥ 1.3: kept",
        "0.50   goal ≥ 0.72: MISSED",
        "0.20   goal ≤ 0.28: kept",
        "not measured: mkl: not installed",
    ):
        assert line in text


@pytest.mark.parametrize("row", ["mkl p=0", "minilm"])
def test_other_engines_are_ours_and_peft_too(row):
    some = [found(engine, [1 + i, 1 + i]) for i, engine in enumerate(ROWS[row].engines)]
    assert training_race.figures(ROWS[row], some)["ours / peft"] == 2


def test_the_curve_is_the_largest_difference_of_losses():
    some = [found("ours", [1, 1], (3.0, 2.0)), found("peft", [1, 1], (3.0, 2.5))]
    assert training_race.figures(ROWS["curve"], some)["curve"] == 0.5
    assert "5.0e-05   goal ≤ 0.0001: kept" in training.render(Told("curve", figures={"curve": 5e-5}))
    assert "0.50   goal ≤ 0.0001: MISSED" in training.render(Told("curve", figures={"curve": 0.5}))


def test_sequences_follow_one_another_and_begin_again():
    one, two = batches(range(9), (3, 2), 2, next_tokens)
    assert one == {"ids": [[0, 1, 2], [3, 4]], "labels": [[1, 2, -100], [4, -100]]}
    assert two["ids"] == [[5, 6, 7], [0, 1]]
    assert batches(range(9), (3, 2), 1, kind)[0]["labels"] == [3, 2]


class Fake:
    """An engine that answers at once, or not at all."""

    about, closed = "a fake", []

    def __init__(self, engine, how):
        if engine == "gemm":
            raise RuntimeError("no such library")
        self.engine, self.how = engine, how

    def ask(self, do, **how):
        if do == "peak":
            return {"bytes": 7}
        assert [len(row) for row in how["ids"]] == [len(row) for row in how["labels"]]
        assert how["labels"][0][:-1] == how["ids"][0][1:]
        assert how["labels"][0][-1] == -100
        return {"seconds": 1.0 if self.engine == "peft" else 0.5, "loss": 2.0}

    def close(self):
        self.closed.append(self.engine)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(training_race, "Process", Fake)
    monkeypatch.setattr(training_race, "smollm2_ids", lambda: list(range(5000)))
    monkeypatch.setattr(machine.Gate, "wait", lambda self: 0.0)
    Fake.closed = []


def test_engines_take_turns_and_a_missing_one_is_said(fake, tmp_path, capsys):
    path = tmp_path / "some" / "figures.json"
    assert training.main(["p=0.05", "padded", "--steps", "4", "--json", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "ours / peft                 2.00   goal ≥ 1.5: kept" in shown
    assert "not measured: gemm: no such library" in shown
    rows = json.loads(path.read_text())["rows"]
    assert [run["engine"] for row in rows.values() for run in row["runs"]] == ["ours", "peft"] * 2
    assert rows["padded"]["runs"][0]["tokens"] == sum(UNEVEN)
    assert all(len(run["seconds"]) == 4 for row in rows.values() for run in row["runs"])
    assert rows["padded"]["about"]["command"].startswith("python -m bench.training")
    assert sorted(Fake.closed) == ["ours", "ours", "peft", "peft"]
    assert list(tmp_path.glob("**/*.part")) == []


def test_a_file_keeps_its_other_rows(fake, tmp_path, capsys):
    """Each with the machine and the date of its own run; what was measured again is in place of the old."""
    path = tmp_path / "figures.json"
    old = {"schema": 2, "rows": {name: {"about": {"date": "before"}} for name in ("padded", "one")}}
    path.write_text(json.dumps(old))
    assert training.main(["padded", "--steps", "4", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["one", "padded"]  # as the bench has them
    assert rows["one"] == {"about": {"date": "before"}}
    assert rows["padded"]["figures"]["ours / peft"] == 2
    assert rows["padded"]["about"]["date"] != "before"


@pytest.mark.parametrize("content", ['{"schema": 1, "rows": []}', "[]", "no JSON"])
def test_another_file_is_refused_before_anything_runs(fake, tmp_path, capsys, content):
    path = tmp_path / "figures.json"
    path.write_text(content)
    assert training.main(["padded", "--json", str(path)]) == 2
    assert f"{path}: expected a file of bench.training, schema 2, got another" in capsys.readouterr().err
    assert path.read_text() == content
    assert Fake.closed == []


def test_an_unknown_row_is_refused(capsys):
    assert training.main(["nothing"]) == 2
    assert "expected rows of p=0" in capsys.readouterr().err


def test_a_broken_engine_says_why():
    with pytest.raises(RuntimeError, match=r"KeyError|the process ended"):
        training_race.Process("no such engine", {})
