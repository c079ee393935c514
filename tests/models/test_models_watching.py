"""What sites are given, and gradients by their weights, beside what each is by definition; starts of them."""

import json

import numpy as np
import pytest
from writers import directory

import lorax_np as lx
from lorax_np.cli import main
from lorax_np.inject import plan
from lorax_np.models.records import Model, Trained
from lorax_np.models.tasks import count, loss
from lorax_np.models.watching import site_gradients, site_inputs
from tests.models import tiny

LORA = lx.LoraConfig(r=2, target_modules=tiny.ALL)


def test_the_first_layer_is_given_normed_embeddings():
    """The moments of rows that are made here by hand, over two batches."""
    model = tiny.model()
    sites = plan(model.weights, LORA).sites
    batches = tiny.split(tiny.batch(), 2)
    found = site_inputs(model, sites, batches)
    assert found.keys() == sites.keys()
    h = np.concatenate([model.weights["model.embed_tokens.weight"][b.ids] for b in batches])
    w = model.weights["model.layers.0.input_layernorm.weight"]
    x = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + 1e-5) * w
    for name in ("q_proj", "k_proj", "v_proj"):
        seen = found[f"model.layers.0.self_attn.{name}"]
        assert seen.rows == len(x)
        np.testing.assert_allclose(seen.mean, x.mean(axis=0), rtol=0, atol=1e-14)
        np.testing.assert_allclose(seen.scatter, (x - x.mean(0)).T @ (x - x.mean(0)), rtol=0, atol=1e-12)


def test_gradients_are_the_slopes_of_the_loss():
    """Along a random direction in every site's weight at once, by central differences of an O(h²) error."""
    model, batches = tiny.model(), tiny.split(tiny.batch(), 2)
    sites = plan(model.weights, LORA).sites
    found = site_gradients(model, sites, batches, task="CAUSAL_LM")
    n = sum(count("CAUSAL_LM", b.labels) for b in batches)
    rng, slope = np.random.default_rng(3), 0.0
    along = {site.weight: rng.standard_normal(model.weights[site.weight].shape) for site in sites.values()}
    for h in (1e-5, -1e-5):
        moved = {name: W + h * along.get(name, 0) for name, W in model.weights.items()}
        there = Model(model.path, model.family, model.config, moved)
        total = sum(loss(there, {}, Trained({}, {}), b, task="CAUSAL_LM", n=n) for b in batches)
        slope += float(total) / (2 * h)
    want = sum(float(np.sum(found[name] * along[site.weight])) for name, site in sites.items())
    assert abs(slope - want) < 1e-8 * max(1, sum(float(np.abs(g).sum()) for g in found.values()))
    wrong = want + 0.001 * float(np.sum(np.abs(found["model.layers.2.mlp.down_proj"])))
    assert abs(slope - wrong) > 1e-8 * sum(float(np.abs(g).sum()) for g in found.values())


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_the_command_starts_from_rows(tmp_path, start):
    base, data = tmp_path / "base", tmp_path / "rows.jsonl"
    directory(base)
    rows = ("a few words", "some others here", "and then a third of them, which is longer")
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    given = [
        "init",
        str(base),
        str(tmp_path / "out"),
        "--start",
        start,
        "-r",
        "2",
        "--data",
        str(data),
        "--quiet",
    ]
    assert main([*given, "--target-modules", "q_proj", "down_proj"]) == 0
    residual = start != "eva"
    found = lx.load_adapter(tmp_path / "out", residual_base=residual)
    assert len(found.sites) == 4
    for name, adapter in found.adapters.items():
        assert np.any(np.asarray(adapter.A)), name
        assert np.any(np.asarray(adapter.B)) == residual, name


def test_a_place_that_is_taken_is_refused_before_anything_is_read(tmp_path, capsys):
    directory(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    given = ["--start", "eva", "--data", str(tmp_path / "none.jsonl")]
    assert main(["init", str(tmp_path / "base"), str(tmp_path / "out"), *given]) == 2
    assert "which holds something" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_dry_run_reads_no_rows(tmp_path, capsys):
    directory(tmp_path / "base")
    given = ["--start", "eva", "--dry-run", "-r", "2", "--data", str(tmp_path / "none.jsonl")]
    assert main(["init", str(tmp_path / "base"), str(tmp_path / "out"), *given]) == 0
    assert "would start" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_data_without_a_start_that_reads_it_is_refused(tmp_path, capsys):
    directory(tmp_path / "base")
    assert main(["init", str(tmp_path / "base"), str(tmp_path / "out"), "--data", "rows.jsonl"]) == 2
    assert "--data: expected --start eva, corda or lora_ga, got True" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
