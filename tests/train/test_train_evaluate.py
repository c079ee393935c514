"""Figures of a model on rows: over all labels, whatever the batches, and without dropout."""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
from small_run import CONFIG, examples, lora, settings, started, weights

import lorax_np as lx
from lorax_np.models.load import model_of
from lorax_np.models.new_head import with_head
from lorax_np.models.records import Batch, Trained
from lorax_np.models.tasks import outputs
from lorax_np.text.examples import Example, Tokens
from lorax_np.text.labels import Labels
from lorax_np.train import train


def test_the_loss_is_the_mean_over_all_labels():
    """(training.7): by an explicit loop over rows, for every size of batch; bits and perplexity, too."""
    base, adapters, sites, _ = started(dtype="float64")
    trained, rows = Trained(adapters, {}), examples(7, seed=5)
    total = 0.0
    for row in rows:
        ids = row.sequences[0].ids
        z = np.asarray(outputs(base, sites, trained, Batch(ids, (0, len(ids)), None, (0,)), task="CAUSAL_LM"))
        for t, label in enumerate(row.labels):
            if label != -100:
                total += log(np.exp(z[t] - z[t].max()).sum()) + z[t].max() - z[t, label]
    n = sum(row.kept for row in rows)
    for size in (1, 3, 7):
        found = lx.evaluate(base, sites, trained, rows, "CAUSAL_LM", batch_size=size)
        assert found["loss"] == pytest.approx(total / n, rel=1e-12)
        assert found["perplexity"] == pytest.approx(exp(total / n), rel=1e-12)
        assert found["bits per byte"] == pytest.approx(total / log(2) / (2 * n), rel=1e-12)
        assert (found["rows"], found["labels"]) == (7, n)


def test_evaluation_does_not_drop():
    base, adapters, sites, _ = started()
    still = {name: replace(site, p=0.0) for name, site in sites.items()}
    assert any(site.p for site in sites.values())
    args = Trained(adapters, {}), examples(5), "CAUSAL_LM"
    assert lx.evaluate(base, sites, *args) == lx.evaluate(base, still, *args)
    before = train(base, adapters, examples(), settings(iters=1, engine="fast"), sites=sites).before
    assert before == lx.evaluate(base, still, *args, batch_size=2)


def test_engines_agree():
    """The planned pass, the fast layers and the reference, where each computes the same."""
    base, adapters, sites, config = started()
    found = {}
    for engine in ("reference", "fast"):
        found[engine] = train(
            base,
            adapters,
            examples(),
            settings(engine=engine, lr_schedule="constant"),
            sites=sites,
            lora=config,
        )
    fast, reference = found["fast"], found["reference"]
    assert fast.before["loss"] == pytest.approx(reference.before["loss"], rel=1e-5)
    assert fast.after["loss"] == pytest.approx(reference.after["loss"], rel=1e-3)
    lookup = lx.evaluate(base, sites, fast.trained, examples(5), "CAUSAL_LM", batch_size=2)["loss"]
    assert lookup == pytest.approx(fast.after["loss"], rel=1e-5)


def test_classes():
    """A head that is trained whole beside the adapters: it learns, and its scores are those of its outputs."""
    base = with_head(model_of(weights(), CONFIG, path="tiny"), "SEQ_CLS", 2, np.random.default_rng(0))
    config = lora(task_type="SEQ_CLS", lora_dropout=0.0)
    found = lx.plan(base.weights, config)
    _, adapters, sites = lx.inject(base.weights, config, lx.torch_generator(0))
    trained = Trained(adapters, lx.saved_tensors(base.weights, found))
    assert list(trained.saved) == ["score.weight"]
    rng, rows = np.random.default_rng(3), []
    for i in range(20):
        label = int(rng.integers(2))
        ids = rng.integers(0, 11, 5) + 11 * label
        rows.append(Example(f"rows:{i}", (Tokens(ids),), label))
    names = Labels("single", ("low", "high"))
    how = settings(iters=15, learning_rate=0.02)
    done = train(base, trained, rows, how, sites=sites, task="SEQ_CLS", labels=names)
    assert done.after["loss"] < 0.5 * done.before["loss"]
    assert done.after["accuracy"] == 1.0
    z = np.concatenate(
        [
            np.asarray(
                outputs(
                    base, sites, done.trained, Batch(r.sequences[0].ids, (0, 5), None, (0,)), task="SEQ_CLS"
                )
            )
            for r in rows[:5]
        ]
    )
    assert (z.argmax(axis=1) == [r.labels for r in rows[:5]]).all()
    assert not np.array_equal(done.trained.saved["score.weight"], trained.saved["score.weight"])


def test_another_library_trains_as_numpy_does(tmp_path):
    """A model held in an array-standard library: the same losses and adapters, saved and gone on with."""
    import array_api_strict as strict

    from lorax_np.backend import from_host, to_host

    base, adapters, sites, config = started(dtype="float64")
    there = model_of(weights(0, "float64"), CONFIG, path="tiny", xp=strict)
    moved = {
        name: replace(a, A=from_host(a.A, strict), B=from_host(a.B, strict)) for name, a in adapters.items()
    }
    how = settings(iters=3)
    want = train(base, adapters, examples(), how, sites=sites)
    args = {"sites": sites, "lora": config, "out": tmp_path / "run"}
    train(there, moved, examples(), how, callbacks=[lambda r: r["event"] == "train"], **args)
    found = train(there, moved, examples(), how, resume=True, **args)
    assert (found.step, found.before["loss"]) == (3, pytest.approx(want.before["loss"], rel=1e-12))
    for name, adapter in found.trained.adapters.items():
        assert type(adapter.A) is type(moved[name].A)
        np.testing.assert_allclose(to_host(adapter.B), want.trained.adapters[name].B, rtol=1e-9, atol=1e-12)
