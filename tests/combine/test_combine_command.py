"""lorax-np combine: what it writes is what combine_sets gives, and PEFT's directories go in and out."""

import json

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.cli import main


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, r, alpha in (("a", 3, 5), ("b", 3, 7), ("wide", 4, 2)):
        config = lx.LoraConfig(r=r, lora_alpha=alpha, use_rslora=name == "b", target_modules=["q", "v"])
        adapters = {
            f"layers.{i}.{site}": lx.Adapter(
                rng.standard_normal((r, 6)).astype("f4"), rng.standard_normal((5, r)).astype("f4")
            )
            for i in range(2)
            for site in "qv"
        }
        lx.save_adapter(tmp_path / name, adapters, config)
    return tmp_path


def delta(folder):
    files = lx.load_adapter(folder)
    return {
        n: files.sites[n].scaling * a.B.astype(float) @ a.A.astype(float) for n, a in files.adapters.items()
    }


def run(folders, names, *options):
    return main(["combine", *(str(folders / name) for name in names), "--out", str(folders / "out"), *options])


def test_cat_is_the_weighted_sum(folders, capsys):
    assert run(folders, ["a", "b", "wide"], "--weights", "0.5,-2,1") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith(f"wrote {folders / 'out'}: 4 sites of rank 10, scale 1, ")
    parts, found = [delta(folders / name) for name in ("a", "b", "wide")], delta(folders / "out")
    for name, value in found.items():
        want = sum(w * part[name] for w, part in zip((0.5, -2, 1), parts, strict=True))
        np.testing.assert_allclose(value, want, rtol=0, atol=64 * 2.0**-24 * np.abs(want).max())


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "svd", "ties_svd", "dare_linear_svd"])
def test_every_method_writes_what_the_function_gives(folders, method):
    dense = () if method in ("linear", "svd") else ("--density", "0.6")
    assert run(folders, ["a", "b"], "--method", method, *dense, "--seed", "3") == 0
    sets = {name: lx.load_adapter(folders / name) for name in "ab"}
    want = lx.combine_sets(
        sets,
        {"a": 1.0, "b": 1.0},
        method=method,
        density=0.6 if dense else None,
        rng=np.random.default_rng(3) if "dare" in method else None,
    )
    found = lx.load_adapter(folders / "out")
    assert found.config.scaling == 1
    for name, adapter in want.adapters.items():
        assert np.array_equal(adapter.A, found.adapters[name].A)
        assert np.array_equal(adapter.B, found.adapters[name].B)


def test_one_directory_may_come_twice(folders):
    assert run(folders, ["a", "a"], "--quiet") == 0
    once, found = delta(folders / "a"), delta(folders / "out")
    for name, value in once.items():
        np.testing.assert_allclose(found[name], 2 * value, rtol=0, atol=64 * 2.0**-24 * np.abs(value).max())


def test_a_dry_run_writes_nothing_and_counts_bytes(folders, capsys):
    assert run(folders, ["a", "b"], "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == 4 * 4 * (6 * 6 + 5 * 6)
    assert (found["ranks"], found["dry_run"]) == ([6], True)
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["a", "b"], ["--weights", "1"], "--weights: expected 2 numbers"),
        (["a", "wide"], ["--method", "linear"], "expected one rank"),
        (["a", "b"], ["--method", "ties"], "density: expected a share in (0, 1]"),
        (["a", "b"], ["--density", "0.5"], "density: expected None with method='cat'"),
        (["a", "nothing"], [], "nothing"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_writes_nothing(folders, names, options, words, capsys):
    assert run(folders, names, *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (folders / "out").exists()
