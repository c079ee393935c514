"""What a run is told, by flags and by files: kinds, names, which says the last word."""

from pathlib import Path

import numpy as np
import pytest
from small_run import examples, settings, started

import lorax_np as lx
from lorax_np.errors import ConfigError, FormatError
from lorax_np.train import TrainConfig
from lorax_np.train.settings import SETTINGS, changed, resolved, stored, train_config
from lorax_np.train.step import parameters
from lorax_np.train.told import read_file


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"iters": 0}, "iters: expected an int of at least 1"),
        ({"iters": 2.0}, "iters: expected an int"),
        ({"iters": 1, "epochs": 2}, "epochs: expected None beside iters, got 2"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number from 1.2e-38 to 3.4e.38, got nan"),
        (
            {"lr_schedule": "cosin"},
            r"lr_schedule: expected one of constant, linear, cosine.*did you mean 'cosine'",
        ),
        ({"optimizer": "adam"}, r"optimizer: expected one of adamw, sgd, lora-fa.*did you mean 'adamw'"),
        ({"momentum": 0.5}, "momentum: expected 0.0 beside optimizer='adamw', got 0.5"),
        ({"beta1": 1.0}, "beta1: expected a number 0 <= x < 1, got 1.0"),
        ({"workers": "many"}, "workers: expected auto, or an int of at least 1, got 'many'"),
        ({"workers": 0}, "workers: expected auto"),
        ({"loss_mean": "sequence", "max_tokens": 9}, "max_tokens: expected None beside loss_mean='sequence'"),
        ({"shuffle": 1}, "shuffle: expected True or False"),
        ({"batch_size": 0, "seed": -1}, "batch_size: .*; seed: "),
    ],
)
def test_a_config_is_checked_when_made(given, wanted):
    with pytest.raises(ConfigError, match=wanted):
        TrainConfig(**given)


def test_a_config_survives_its_mapping():
    config = TrainConfig(iters=3, learning_rate=1, workers=2)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.learning_rate == 1.0
    assert isinstance(config.learning_rate, float)
    with pytest.raises(ConfigError, match=r"learnin_rate: .*did you mean 'learning_rate'"):
        TrainConfig.from_dict({"learnin_rate": 1})


def test_how_long_a_run_is():
    rows = examples(10)
    for given, ranks, want in [
        ({"iters": 7}, 3, 7),
        ({"batch_size": 4}, 1, 3),
        ({"batch_size": 4, "epochs": 2}, 1, 6),
        ({"batch_size": 2, "epochs": 1}, 2, 3),
        ({"batch_size": 4, "epochs": 0.5}, 1, 2),
        ({"batch_size": 4, "epochs": 1e15}, 1, 3 * 10**15),  # at once
        ({"batch_size": 1, "grad_accumulation_steps": 3}, 1, 4),
    ]:
        config = TrainConfig(**given)
        assert config.steps(config.feed(rows, "CAUSAL_LM", ranks=ranks)) == want, given
    assert [TrainConfig().warm(steps) for steps in (5, 100, 1000)] == [0, 10, 20]
    assert TrainConfig(warmup=5).warm(5) == 5


def test_every_row_is_taken_once_an_epoch_over_all_ranks():
    """(training.5): rank k's micro-batches are every R-th, and no row is left out or taken twice."""
    rows, config = examples(11), TrainConfig(batch_size=2, grad_accumulation_steps=2)
    feed, position, seen = config.feed(rows, "CAUSAL_LM", ranks=2), None, []
    for _ in range(config.steps(feed)):
        work = feed.step() if position is None else feed.step(position)
        position = work.next
        assert len(work.batches) == 4
        for rank in range(2):
            for batch in work.batches[rank::2]:
                seen += [
                    (rank, tuple(map(int, batch.ids[a:b])))
                    for a, b in zip(batch.starts, batch.starts[1:], strict=False)
                ]
    assert sorted(ids for _, ids in seen) == sorted(tuple(row.sequences[0].ids.tolist()) for row in rows)
    assert {rank for rank, _ in seen} == {0, 1}


# ---- settings ----------------------------------------------------------------------------------------------


def test_flags_override_a_file_and_a_file_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning-rate: 1e-4\nr: 4\nlayers_to_transform: [3, 5]\n"
        "target_modules: q_proj,v_proj\nuse_dora: true\n"
    )
    found = resolved((str(file), read_file(file)), ("the command line", {"r": "8", "iters": "20"}))
    assert (found["learning_rate"], found["r"], found["iters"]) == (1e-4, 8, 20)
    assert found["layers_to_transform"] == [3, 5]
    assert found["target_modules"] == ["q_proj", "v_proj"]
    assert found["use_dora"] is True
    assert found["batch_size"] == 4
    again = tmp_path / "run.json"
    again.write_bytes(stored(found))
    assert resolved(("again", read_file(again))) == found
    assert train_config(found).iters == 20


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"lora_rnak": 1}, "FILE: expected a known name, got 'lora_rnak'"),
        ({"lora-dropuot": 1}, r"got 'lora-dropuot' \(did you mean 'lora_dropout'\?\)"),
        ({"r": "big"}, "FILE: r: expected a whole number, got 'big'"),
        ({"r": True}, "FILE: r: expected a whole number, got True"),
        ({"learning_rate": [1]}, "FILE: learning_rate: expected a number"),
        ({"use_dora": "perhaps"}, "FILE: use_dora: expected true or false"),
        ({"layers_to_transform": "3-x"}, "FILE: layers_to_transform: expected layers as in 3,5,7 or 20-29"),
        ({"target_modules": 3}, "FILE: target_modules: expected names with commas between"),
        ({"task": 1}, "FILE: task: expected a word"),
    ],
)
def test_what_a_file_says_is_checked(given, wanted):
    with pytest.raises(ConfigError, match=wanted):
        resolved(("FILE", given))


def test_kinds_of_values():
    read = lambda name, value: resolved(("x", {name: value}))[name]  # noqa: E731
    assert read("layers_to_transform", "20-22,25") == [20, 21, 22, 25]
    assert read("layers_to_transform", 7) == [7]
    assert read("target_modules", "all-linear") == "all-linear"
    assert read("modules_to_save", "score") == ["score"]
    assert read("init_lora_weights", "false") is False
    assert read("init_lora_weights", "pissa") == "pissa"
    assert read("workers", "3") == 3
    assert read("workers", "auto") == "auto"
    assert read("epochs", "0.5") == 0.5
    assert read("mask_prompt", False) is False
    assert read("max_grad_norm", None) == 1.0  # null says nothing
    assert all(setting.about for setting in SETTINGS.values())


def test_files_that_are_no_settings(tmp_path):
    file = tmp_path / "run.yaml"
    for text, wanted in [("- 1\n", "expected names with values"), ("a: [", "expected YAML in UTF-8")]:
        file.write_text(text)
        with pytest.raises(FormatError, match=wanted):
            read_file(file)
    file.write_text("!!python/object/apply:os.system ['touch planted']\n")
    with pytest.raises(FormatError, match="expected YAML"):
        read_file(file)
    assert not Path("planted").exists()


@pytest.mark.parametrize(
    ("said", "name", "wanted"),
    [
        ("off", "mask_prompt", False),
        ("on", "use_dora", True),
        ("010", "iters", 10),
        ("1_000", "iters", 1000),
        ("+7", "iters", 7),
        ("-1", "seed", -1),
        ("1e-4", "learning_rate", 1e-4),
        ("1.5e+3", "lora_alpha", 1500.0),
        (".5", "lora_dropout", 0.5),
        ("off", "grad_checkpoint", "off"),
        ("on", "grad_checkpoint", "on"),
        ("no", "use_dora", False),
        ("Yes", "use_dora", True),
        ("TRUE", "use_dora", True),
        ("no", "data", "no"),
        ("2026-11-27", "adapter_path", "2026-11-27"),
        ("1:30", "adapter_path", "1:30"),
        ("010", "adapter_path", "010"),
        ("[03, 5]", "layers_to_transform", [3, 5]),
        ("[on]", "target_modules", ["on"]),
        ("~", "r", 16),
        ("", "r", 16),
    ],
)
def test_a_file_is_read_as_it_stands(tmp_path, said, name, wanted):
    """Where YAML 1.1 would have octal digits, truth of words, minutes in base 60, or a date."""
    file = tmp_path / "run.yaml"
    file.write_text(f"batch_size: 2\n{name}: {said}\n")
    found = resolved((str(file), read_file(file)))[name]
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize(
    ("said", "name", "wanted"),
    [
        ("1:30", "iters", "iters: expected a whole number, got '1:30'"),
        ("0x10", "iters", "iters: expected a whole number, got '0x10'"),
        ("1:30", "learning_rate", "learning_rate: expected a number, got '1:30'"),
        ("off", "r", "r: expected a whole number, got 'off'"),
        ("nein", "use_dora", "use_dora: expected true or false, got 'nein'"),
    ],
)
def test_a_value_of_a_file_is_refused_with_its_line(tmp_path, said, name, wanted):
    file = tmp_path / "run.yaml"
    file.write_text(f"# a run\nbatch_size: 2\n\n{name}: {said}\n")
    with pytest.raises(ConfigError) as refused:
        resolved((str(file), read_file(file)))
    assert str(refused.value) == f"{file}:4: {wanted}"


def test_a_run_that_goes_on_is_told_the_same():
    before = resolved(("x", {"r": 4, "data": "rows.jsonl"}))
    changed(before, {**before, "adapter_path": "elsewhere"}, but=("adapter_path",))
    with pytest.raises(ConfigError, match="r: expected 4, as the run began, got 8"):
        changed(before, {**before, "r": 8}, but=("adapter_path",))


def test_order_is_a_permutation_that_the_seed_decides():
    feeds = [TrainConfig(seed=seed).feed(examples(50), "CAUSAL_LM") for seed in (0, 0, 1)]
    orders = [feed.order(0) for feed in feeds]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], feeds[0].order(1))
    assert sorted(orders[0].tolist()) == list(range(50))


def test_sites_are_those_that_the_config_means():
    """Without inject's: the same bits; with neither, one line."""
    base, adapters, sites, config = started()
    given = base, adapters, examples(6), settings(iters=2)
    want = lx.train(*given, sites=sites, lora=config)
    found = lx.train(*given, lora=config)
    for name, value in parameters(want.trained).items():
        assert np.array_equal(parameters(found.trained)[name], value), name
    with pytest.raises(ConfigError, match=r"^sites: expected inject's, or lora, .* got neither$"):
        lx.train(*given)
