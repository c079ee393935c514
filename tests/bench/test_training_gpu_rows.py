"""Rows of the bench of training on a GPU: what they compare, and what is said where there is none."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import machine, training, training_gpu, training_race
from bench.training_rows import ROWS, UNEVEN, NoDevice

GPU_ROWS = "gpu p=0.05", "gpu p=0", "gpu checkpoint", "gpu padded", "gpu curve"


def found(engine, seconds, losses, peak, used):
    return training_race.Found(engine, "", 1000, list(seconds), list(losses), [], peak, used, "")


@pytest.mark.parametrize("name", GPU_ROWS)
def test_figures_compare_the_pools(name):
    row = ROWS[name]
    assert row.device
    some = [found("cupy", [9, 2], (1.0, 2.0), 30, 7), found("peft gpu", [9, 1.8], (1.0, 2.5), 100, 90)]
    figures = training_race.figures(row, some)
    assert figures["ours / peft"] == pytest.approx(0.9)
    assert figures["memory"] == 0.3
    assert figures.get("curve") == (0.5 if name == "gpu curve" else None)
    assert row.goals == ({"curve": 1e-4} if name == "gpu curve" else {"ours / peft": 0.8, "memory": 0.5})
    assert "peak  0.00 GB (0.00 used)" in some[0].line()


def test_a_race_that_broke_off_is_judged_by_what_it_knows():
    some = [found("cupy", [2], (1.0,), 0, 0), found("peft gpu", [1], (1.0,), 0, 0)]
    assert list(training_race.figures(ROWS["gpu p=0"], some)) == ["ours / peft", "best ours / best peft"]


def test_other_rows_are_no_devices():
    assert {name for name, row in ROWS.items() if row.device} == set(GPU_ROWS)
    assert ROWS["gpu padded"].lengths == UNEVEN
    assert ROWS["gpu curve"].steps == 50


@pytest.fixture
def no_device(monkeypatch):
    def refuse():
        raise NoDevice("not run on a GPU: no CuPy")

    monkeypatch.setattr(training_race, "library", refuse)


def test_a_named_row_without_a_device_is_a_fault_of_one_line(no_device, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert training.main(["gpu p=0", "--json", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "gpu p=0: a GPU, no dropout\n  not measured: row: not run on a GPU: no CuPy\n" in shown
    assert not path.exists()


def test_without_names_rows_that_need_a_device_are_passed_over(no_device, monkeypatch, capsys):
    monkeypatch.setitem(training.KINDS, "quiet", lambda *args: None)
    monkeypatch.setattr(training, "ROWS", {"gpu p=0": ROWS["gpu p=0"]})
    assert training.main([]) == 0
    assert "not measured: row: not run on a GPU: no CuPy" in capsys.readouterr().out


def test_a_missing_library_is_no_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    from lorax_np import backend

    monkeypatch.setattr(backend, "_cupy", lambda: (None, "CuPy cannot be imported"))
    with pytest.raises(NoDevice, match=r"not run on a GPU: .*CuPy cannot be imported"):
        training_gpu.library()
    assert training_gpu.main(["profile"]) == 1


class Fake:
    """An engine that answers at once."""

    about = "a fake"

    def __init__(self, engine, how):
        assert how == {"p": 0.05, "workers": "auto"}
        self.engine = engine

    def ask(self, do, **how):
        if do == "peak":
            ours = {"bytes": 40, "used": 20, "said": "no wait inside a pass: yes"}
            return ours if self.engine == "cupy" else {"bytes": 80, "used": 60}
        return {"seconds": 0.5, "loss": 2.0}

    def close(self):
        pass


def test_a_row_that_ran_says_the_device_and_what_engines_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_race, "Process", Fake)
    monkeypatch.setattr(training_race, "library", lambda: None)
    monkeypatch.setattr(training_race, "smollm2_or_drawn_ids", lambda: list(range(5000)))
    monkeypatch.setattr(training_gpu, "about", lambda: {"name": "a card", "driver": "580"})
    monkeypatch.setattr(machine.Gate, "wait", lambda self: 0.0)
    path = tmp_path / "figures.json"
    assert training.main(["gpu p=0.05", "--steps", "4", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "ours / peft                 1.00   goal ≥ 0.8: kept" in shown
    assert "memory                      0.50   goal ≤ 0.5: kept" in shown
    assert "last loss 2.0000   no wait inside a pass: yes" in shown
    row = json.loads(path.read_text())["rows"]["gpu p=0.05"]
    assert row["about"]["device"] == {"name": "a card", "driver": "580"}
    assert [run["engine"] for run in row["runs"]] == ["cupy", "peft gpu"]
    assert row["runs"][0]["said"] == "no wait inside a pass: yes"
