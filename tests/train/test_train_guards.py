"""What is found before the first step, and what happens where a step is not finite."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from small_run import CONFIG, examples, lora, settings, started, weights

import lorax_np as lx
from lorax_np.errors import ConfigError, FormatError
from lorax_np.models.load import model_of
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Trained
from lorax_np.text.examples import Example, Tokens
from lorax_np.text.labels import Labels
from lorax_np.train import output, train
from lorax_np.train.checks import check_start
from lorax_np.train.log import records
from lorax_np.train.step import parameters


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(output, "picture", lambda rows: None)


def run(base=None, adapters=None, rows=None, out=None, **more):
    found, own, sites, config = started()
    given = {"steps_per_report": 1, **more}
    return train(
        base or found, adapters or own, rows or examples(), settings(**given), sites=sites, lora=config, out=out
    )


# ---- before the first step ---------------------------------------------------------------------------------


def test_weights_that_are_not_finite():
    wrong = weights()
    wrong["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    name = r"tiny: model.layers.1.mlp.up_proj.weight: expected finite numbers, got NaN or infinity"
    with pytest.raises(FormatError, match=name):
        run(base=model_of(wrong, CONFIG, path="tiny"))
    _, adapters, _, _ = started()
    first = next(iter(adapters))
    B = adapters[first].B.copy()
    B[0, 0] = np.inf
    with pytest.raises(FormatError, match=rf"{first}.B: expected finite numbers"):
        run(adapters={**adapters, first: replace(adapters[first], B=B)})


def test_rows_that_the_model_cannot_read():
    rows = list(examples())
    ids = rows[4].sequences[0].ids
    for wrong in (23, -1):
        rows[4] = rows[4]._replace(sequences=(Tokens(np.append(ids[:-1], wrong)),))
        with pytest.raises(ConfigError, match=rf"rows.jsonl:5: expected tokens below 23, .*, got {wrong}"):
            run(rows=rows)
    rows[4] = rows[4]._replace(sequences=(Tokens(np.zeros(65, "int64")),), labels=np.zeros(65, "int64"))
    with pytest.raises(
        ConfigError, match=r"rows.jsonl:5: expected at most 64 tokens, .*, got 65; lower max_seq"
    ):
        run(rows=rows)
    rows = [row._replace(labels=np.full_like(row.labels, -100), kept=0) for row in examples()]
    with pytest.raises(
        ConfigError, match=r"data: expected a label that counts .* none in 24 rows, first rows.jsonl:1"
    ):
        run(rows=rows)


@pytest.mark.parametrize(
    ("outputs", "labels", "told"),
    [
        (1, (0, 0, 0), r"rows:1: expected at least two outputs in score\.weight, for classes, got one, which"),
        (3, (0, 2, 3), r"rows:3: expected classes below 3, the rows of score\.weight, got 3"),
        (
            3,
            (0.5, 1.0, 2.0),
            r"rows:1: expected a class, or 3 numbers, for the outputs of score\.weight, got num",
        ),
        (
            3,
            (np.ones(3), np.ones(2), np.ones(3)),
            r"rows:2: expected a class, or 3 numbers, .* of shape \(2,\)",
        ),
    ],
)
def test_classes_that_the_head_has_no_outputs_for(outputs, labels, told, tmp_path):
    """Of one output the loss of classes is 0, whatever it is: a run would go on and learn nothing."""
    base = with_head(model_of(weights(), CONFIG, path="tiny"), "SEQ_CLS", outputs, np.random.default_rng(0))
    _, adapters, sites, config = started()
    rows = [Example(f"rows:{i}", (Tokens(np.arange(3)),), label) for i, label in enumerate(labels, 1)]
    with pytest.raises(ConfigError, match=told):
        train(base, adapters, rows, settings(), sites=sites, task="SEQ_CLS", lora=config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "outputs", "label"), [("regression", 1, 0.5), ("single", 2, 1), ("multi", 2, np.array([0.0, 1.0]))]
)
def test_classes_and_numbers_that_it_has_outputs_for(kind, outputs, label):
    base = with_head(model_of(weights(), CONFIG, path="tiny"), "SEQ_CLS", outputs, np.random.default_rng(0))
    _, adapters, sites, _ = started()
    rows = [Example(f"rows:{i}", (Tokens(np.arange(3)),), label, kept=np.size(label)) for i in range(3)]
    how = {"task": "SEQ_CLS", "labels": Labels(kind, ("a", "b")[:outputs])}
    found = train(base, adapters, rows, settings(iters=1), sites=sites, **how)
    assert found.step == 1


def test_what_has_no_meaning():
    base, adapters, sites, _ = started()
    with pytest.raises(ConfigError, match="adapters: expected something that trains, got nothing"):
        train(base, {}, examples(), settings(), sites={})
    with pytest.raises(ConfigError, match="examples: expected at least one"):
        train(base, adapters, (), settings(), sites=sites)
    with pytest.raises(ConfigError, match="warmup: expected 0 to 6, the steps of the run, got 7"):
        run(warmup=7)
    with pytest.raises(
        ConfigError, match="lora: expected the adapters' config, by which out is written, got None"
    ):
        train(base, adapters, examples(), settings(), sites=sites, out="anywhere")
    with pytest.raises(ConfigError, match="out: expected the directory of the run to resume, got None"):
        train(base, adapters, examples(), settings(), sites=sites, resume=True)
    with pytest.raises(ConfigError, match="task: expected one of CAUSAL_LM, SEQ_CLS"):
        train(base, adapters, examples(), settings(), sites=sites, task="QUESTION_ANS")


# ---- steps that are not finite -----------------------------------------------------------------------------


def exploding(rate):
    """Adapters so large in one place, far from the first, that float32 is not enough there on some rows."""
    base, adapters, sites, config = started()
    name = "model.layers.1.mlp.gate_proj"
    big = replace(adapters[name], B=adapters[name].B * np.float32(rate))
    return base, {**adapters, name: big}, sites, config


def test_a_step_that_is_not_finite_is_passed_over(tmp_path):
    """Nothing is updated; the place, the batch and the rows are kept; three in a row end the run."""
    base, adapters, sites, config = exploding(3e38)
    more = {"sites": sites, "lora": config, "out": tmp_path / "run"}
    seen = []
    found = train(base, adapters, examples(), settings(steps_per_report=1), callbacks=[seen.append], **more)
    assert (found.ended, found.step) == ("not finite", 3)
    for name, adapter in found.trained.adapters.items():
        assert np.array_equal(adapter.A, adapters[name].A)
        assert np.array_equal(adapter.B, adapters[name].B)
    bad = [record for record in seen if record["event"] == "bad"]
    assert [record["first"] for record in bad] == ["model.layers.1.mlp.gate_proj, forward"] * 3
    assert [record["step"] for record in bad] == [1, 2, 3]
    assert "loss" in bad[0]["came"]
    kept = [json.loads(line) for line in (tmp_path / "run" / "bad-batch.jsonl").read_text().splitlines()]
    assert [row["row"] for row in kept if row["step"] == 2] == bad[1]["rows"]
    assert len(kept) == 12
    by_row = {example.where: example for example in examples()}
    assert all(by_row[row["row"]].sequences[0].ids.tolist() == row["ids"][0] for row in kept)
    assert records(tmp_path / "run" / "metrics.jsonl")[-1]["skipped"] == 3


def test_a_bad_step_alone_does_not_end_a_run(monkeypatch, tmp_path):
    """The moments, the parameters and the counts go on as if the step had not been; resumed, too."""
    from lorax_np.train import passes

    plain, seen = passes.Passes.gradients, []

    def wrong(self, trained, batch, *, n, dropout):
        loss, found = plain(self, trained, batch, n=n, dropout=dropout)
        if dropout is not None and dropout.step == 2:
            name = "model.layers.0.mlp.down_proj"
            A = np.full_like(found.adapters[name].A, np.nan)
            found = found._replace(adapters={**found.adapters, name: replace(found.adapters[name], A=A)})
        return loss, found

    monkeypatch.setattr(passes.Passes, "gradients", wrong)
    base, adapters, sites, config = started()
    more = {"sites": sites, "lora": config}
    found = train(base, adapters, examples(), settings(), callbacks=[seen.append], **more)
    assert (found.ended, found.step) == ("done", 6)
    bad = [record for record in seen if record["event"] == "bad"]
    assert [(record["step"], record["first"]) for record in bad] == [
        (3, "adapters.model.layers.0.mlp.down_proj.A, gradient".partition(".")[2])
    ]
    assert "grad_norm nan" in bad[0]["came"]
    assert all(np.isfinite(value).all() for value in parameters(found.trained).values())
    ends = [lambda record: record["event"] == "train" and record["step"] >= 4]
    out = {"out": tmp_path / "run", "callbacks": ends}
    train(base, adapters, examples(), settings(), **more, **out)
    again = train(base, adapters, examples(), settings(), **more, out=tmp_path / "run", resume=True)
    for name, value in parameters(found.trained).items():
        assert np.array_equal(parameters(again.trained)[name], value), name


def test_a_residual_start_is_saved_as_a_plain_adapter(tmp_path):
    """PiSSA's adapter is for what it left of the base; what is saved is right beside the original one."""
    original = model_of(weights(), CONFIG, path="tiny")
    config = lora(init_lora_weights="pissa", lora_dropout=0.0)
    left, adapters, sites = lx.inject(original.weights, config, lx.torch_generator(0))
    base = replace(original, weights=left)
    found = train(base, adapters, examples(), settings(), sites=sites, lora=config, out=tmp_path / "run")
    files = lx.load_adapter(tmp_path / "run", weights=original.weights)
    assert files.config.r == 6
    rows = examples(6, seed=4)
    here = lx.evaluate(base, sites, found.trained, rows, "CAUSAL_LM")["loss"]
    there = lx.evaluate(
        original, files.sites, found.trained._replace(adapters=files.adapters), rows, "CAUSAL_LM"
    )
    assert there["loss"] == pytest.approx(here, rel=2e-6)
    assert (
        abs(here - lx.evaluate(original, {}, found.trained._replace(adapters={}), rows, "CAUSAL_LM")["loss"])
        > 0.05
    )


class Written(dict):
    """Weights that are written out when they are asked for, as a base in few bits is."""

    def __getitem__(self, name):
        return super().__getitem__(name) + 0

    def items(self):
        return ((name, self[name]) for name in self)


def test_a_base_is_checked_one_tensor_at_a_time():
    """A base in few bits would else be there in full."""
    base, adapters, _, _ = started()
    weights = Written(dict.fromkeys(base.weights, np.ones((1000, 500), "float32")))
    tracemalloc.start()
    check_start(replace(base, weights=weights), Trained(adapters, {}), (), "CAUSAL_LM")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6e6 < 2e6 * len(weights)
