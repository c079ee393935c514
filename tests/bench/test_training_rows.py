"""Rows of the bench of training that are no race, and the masks that PEFT is given."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

import lorax_np as lx
from bench import training_commands as commands
from bench.training_micro import Micro
from bench.training_models import SEED
from bench.training_peft import Masks
from bench.training_rows import ROWS, Told
from lorax_np.train import lines
from lorax_np.train.estimate import Estimate


class Gate:
    """A machine that is quiet."""

    def wait(self):
        return 0.0


def test_each_sequence_has_the_mask_of_its_number():
    masks = Masks(SimpleNamespace(from_numpy=lambda x: x), "layers.3.q_proj", 0.25)
    masks.step, masks.index = 5, [2, 0]
    x = np.random.default_rng(0).standard_normal((2, 7, 12)).astype("float32")
    found = masks(x)
    for i, index in enumerate(masks.index):
        mask = lx.dropout_mask((7, 12), 0.25, SEED, 5, lx.site_key("layers.3.q_proj"), c3=index)
        assert 0 < np.count_nonzero(mask == 0) < mask.size / 2
        np.testing.assert_array_equal(found[i], x[i] * mask)


def test_the_worst_entry_of_any_tensor_and_any_parts_is_the_gap(monkeypatch):
    engine, given = Micro(), {8: 0.0, 4: 1e-3, 2: -4e-3, 1: 2e-3}

    def gradients(ids, labels, each):
        large, small = np.array([200.0, 1.0]), np.array([0.5, 0.25])
        return {"large": large + 10 * given[each], "small": small + given[each]}

    monkeypatch.setattr(engine, "gradients", gradients)
    found = engine.compare([[0]] * 8, [[0]] * 8)["gaps"]
    assert found == pytest.approx({"2x4": 2e-3, "4x2": 8e-3, "8x1": 4e-3})


def test_what_a_run_expects_is_read_off_its_lines(monkeypatch):
    parts = {"programs": 130_000_000, "base": 1_200_000_000, "logits": 600}
    monkeypatch.setattr(lines, "estimated", lambda work: Estimate(1024, 1020, 2.5, parts))
    monkeypatch.setattr(lines, "alternatives", lambda work: [("--quantize nf4", 700_000_000)])
    config = SimpleNamespace(steps=lambda feed: 8, feed=lambda *args, **how: None)
    run = SimpleNamespace(config=config, data={"train": SimpleNamespace(examples=())}, task="CAUSAL_LM")
    said = "\n".join(["model: 3 tensors", *lines.estimate_lines(run, None, 1)])
    assert commands.expected(said) == {"seconds": 20.0, "bytes": 1_330_000_600.0}
    with pytest.raises(RuntimeError, match="expected lines of time and memory, got none"):
        commands.expected("nothing of the kind")


@pytest.fixture
def runs(monkeypatch):
    """lorax-np train, which takes no time: two ranks have 1.8 times the rate of one, and no less memory."""
    monkeypatch.setattr(commands, "model_path", lambda: Path("model"))
    monkeypatch.setattr(commands.shutil, "which", lambda *args, **how: "mpiexec")
    seen = []

    def finished(command, more):
        seen.append((command, more))
        out = Path(command[command.index("--adapter-path") + 1])
        if "--dry-run" in command:
            assert not out.exists()
            time = "expected: 2.00 s a step of 9 tokens, 5 tok/s, 4 steps in 8s"
            return f"{time}\nexpected memory: 1.0 GB\n  base  1.0 GB", 1
        out.mkdir()
        rate = 180.0 if command[0] == "mpiexec" else 100.0
        step = {"event": "train", "seconds": 10.0}
        reports = [step | {"tokens_per_second": each} for each in (1.0, 2.0, rate, rate)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in reports))
        return "", 1_250_000_000 if "nf4" in command else 1_000_000_000

    monkeypatch.setattr(commands, "finished", finished)
    return seen


def test_two_ranks_are_held_to_twice_one(runs):
    told = Told("ranks")
    commands.ranks(ROWS["ranks"], 4, Gate(), told)
    assert told.figures == {"efficiency": 0.9}
    assert [command[0] == "mpiexec" for command, _ in runs] == [False, True] * commands.ROUNDS
    assert all(more["OPENBLAS_NUM_THREADS"] == "1" for _, more in runs)
    assert all("--workers" in command for command, _ in runs)


def test_what_was_expected_is_held_to_the_worst_run(runs):
    told = Told("dry-run")
    commands.dry_run(ROWS["dry-run"], 4, Gate(), told)
    assert told.figures == pytest.approx({"time off by": 0.2, "memory off by": 0.2})
    assert [each["case"] for each in told.details] == list(commands.CASES)
    assert ["--dry-run" in command for command, _ in runs] == [True, False] * len(commands.CASES)


def test_a_command_that_fails_says_why_and_one_that_does_not_how_much_it_had():
    with pytest.raises(RuntimeError, match=r"ended with 3: the last line"):
        commands.finished(
            [sys.executable, "-c", "import sys; print('the last line', file=sys.stderr); exit(3)"], {}
        )
    mine = bytearray(500_000_000)  # which no child has, though it is started from here
    said, peak = commands.finished(
        [sys.executable, "-c", "x = bytearray(90_000_000); print(len(x)); import time; time.sleep(0.2)"], {}
    )
    assert said == "90000000\n"
    assert 90e6 < peak < 400e6 < len(mine)


def test_rows_are_longer_than_they_may_be(tmp_path):
    rows = [
        json.loads(line) for line in commands.write_rows(tmp_path / "rows.jsonl", 3).read_text().splitlines()
    ]
    assert len(rows) == 3
    assert all(len(row["text"].split()) > 100 for row in rows)
    assert len({row["text"] for row in rows}) == 3
