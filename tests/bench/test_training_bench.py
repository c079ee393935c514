"""The bench of training: its figures, its verdicts, and what it says of engines that are missing or break."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import machine, training


def found(engine, seconds, losses=(1.0,), peak=1, row="p=0"):
    return training.Found(row, engine, "", 1000, list(seconds), list(losses), [], peak)


def test_a_rate_is_of_the_median_of_the_last_half():
    each = found("peft", [9, 9, 9, 4, 2, 5])
    assert each.rate == 1000 / 4
    assert each.best == 1000 / 2


def test_figures_and_verdicts():
    some = [found("ours", [2, 2], peak=20), found("peft", [4, 3], peak=100), found("gemm", [1, 1])]
    figures = training.figures("p=0", some)
    assert figures == {
        "ours / peft": 1.5, "best ours / best peft": 1.5, "memory": 0.2, "ours / gemm": 0.5,
    }  # fmt: skip
    text = training.render(["p=0"], some, {"p=0: mkl": "not installed"})
    for line in (
        "ours / peft",
        "1.50   goal ≥ 1.3: kept",
        "0.50   goal ≥ 0.72: MISSED",
        "0.20   goal ≤ 0.28: kept",
    ):
        assert line in text
    assert "not measured: p=0: mkl: not installed" in text


def test_the_curve_is_the_largest_difference_of_losses():
    some = [found("ours", [1, 1], (3.0, 2.0), row="curve"), found("peft", [1, 1], (3.0, 2.5), row="curve")]
    assert training.figures("curve", some)["curve"] == 0.5


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


def test_engines_take_turns_and_a_missing_one_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "Process", Fake)
    monkeypatch.setattr(training, "text_ids", lambda: list(range(5000)))
    monkeypatch.setattr(machine.Gate, "wait", lambda self: 0.0)
    path = tmp_path / "some" / "figures.json"
    assert training.main(["p=0.05", "padded", "--steps", "4", "--json", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "ours / peft                 2.00   goal ≥ 1.5: kept" in shown
    assert "not measured: p=0.05: gemm: no such library" in shown
    record = json.loads(path.read_text())
    assert [row["engine"] for row in record["rows"]] == ["ours", "peft", "ours", "peft"]
    assert record["rows"][2]["tokens"] == sum(training.UNEVEN)
    assert all(len(row["seconds"]) == 4 for row in record["rows"])
    assert sorted(Fake.closed) == ["ours", "ours", "peft", "peft"]
    assert list(tmp_path.glob("**/*.part")) == []


def test_an_unknown_row_is_refused(capsys):
    assert training.main(["nothing"]) == 2
    assert "expected rows of p=0" in capsys.readouterr().err


def test_a_broken_engine_says_why():
    with pytest.raises(RuntimeError, match=r"KeyError|the process ended"):
        training.Process("no such engine", {})
