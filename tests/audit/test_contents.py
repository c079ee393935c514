"""What inspect says is in the files: sizes, norms and spectra as NumPy computes them; and the two commands."""

import json
import re

import adapters
import ml_dtypes
import numpy as np
import pytest
from adapters import linear, write

from lorax_np.audit import contents
from lorax_np.cli import main
from lorax_np.io.writer import write_safetensors


@pytest.fixture
def adapter(tmp_path):
    return write(tmp_path / "adapter", *linear(4, r=3))


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    write_safetensors(tmp_path / "base" / "model.safetensors", adapters.base())
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama", "vocab_size": 5}')
    return tmp_path / "base"


def test_an_adapter_shows_its_spectra(adapter):
    tensors = linear(4, r=3)[1]
    found = contents(adapter)
    assert (found.kind, found.files, found.settings["r"]) == ("adapter", 1, 3)
    assert found.entries == sum(value.size for value in tensors.values())
    assert found.nbytes == sum(value.nbytes for value in tensors.values())
    for row in found.rows:
        A, B = (tensors[f"base_model.model.{row.site}.lora_{name}.weight"].astype(float) for name in "AB")
        np.testing.assert_allclose(row.spectrum, np.linalg.svd(2 * B @ A)[1][:3], rtol=1e-12)


def test_layers_come_in_their_order(tmp_path):
    tensors = {f"layers.{i}.w": np.full((2, 2), i + 1, np.float32) for i in range(12)}
    write_safetensors(
        tmp_path / "model.safetensors", tensors | {"n": np.arange(3), "s": np.array(2, np.float32)}
    )
    found = contents(tmp_path, norms=True)
    assert [(g.name, g.tensors, g.shape) for g in found.groups] == [
        ("layers.*.w", 12, (2, 2)),
        ("n", 1, (3,)),
        ("s", 1, ()),
    ]
    assert found.groups[0].norms == tuple(2.0 * (i + 1) for i in range(12))
    assert (found.groups[1].norms, found.groups[2].norms) == ((), (2.0,))


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_norms_are_summed_wide(tmp_path, dtype):
    values = np.random.default_rng(0).standard_normal((300, 200)).astype(dtype)
    write_safetensors(tmp_path / "model.safetensors", {"w": values})
    (group,) = contents(tmp_path, norms=True).groups
    np.testing.assert_allclose(group.norms[0], np.linalg.norm(values.astype(float)), rtol=1e-12)


def test_inspect_prints_a_table_and_writes_json_and_a_picture(adapter, base, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    assert (
        main(["inspect", str(adapter), "--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")])
        == 0
    )
    out = capsys.readouterr().out
    assert re.search(r"^model.layers.0.mlp.up_proj +linear +3 +2 ", out, re.M)
    assert out.splitlines()[-1].startswith("adapter  ")
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 4
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.part*"))
    assert main(["inspect", str(base), "--plot", str(tmp_path / "b.svg"), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("checkpoint  ")
    assert (tmp_path / "b.svg").read_text().startswith("<?xml")
    assert main(["inspect", str(base), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"model_type": "llama", "vocab_size": 5}


def test_check_says_what_is_wrong_and_exits_by_it(adapter, base, tmp_path, capsys):
    assert main(["check", str(adapter)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("PASS  ")
    assert main(["check", str(adapter), "--base", str(base), "--quiet"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    config, tensors = linear(4, r=3)
    bad = write(tmp_path / "bad", config | {"use_rs_lora": True}, tensors)
    assert main(["check", str(bad), "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [f["id"] for f in found["findings"]] == ["ignored-field"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nowhere"], "expected an adapter directory, got nothing"),
        (["inspect", "nowhere"], "nowhere"),
        (["inspect", "ADAPTER", "--plot", "picture.bmp"], "--plot: expected a .png, .svg or .pdf"),
        (["inspect", "ADAPTER", "--plot", "no/such/picture.png"], "--plot: expected a .png, .svg or .pdf"),
        (["check", "ADAPTER", "--base", "nowhere"], "nowhere"),
    ],
)
def test_bad_usage_is_one_line(adapter, arguments, words, capsys):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="needs the plot extra")
    assert main([str(adapter) if word == "ADAPTER" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_a_plot_without_matplotlib_names_the_extra(adapter, monkeypatch, capsys):
    monkeypatch.setattr("lorax_np.commands.inspect.find_spec", lambda name: None)
    assert main(["inspect", str(adapter), "--plot", "a.png"]) == 2
    assert "pip install 'lorax-np[plot]'" in capsys.readouterr().err
