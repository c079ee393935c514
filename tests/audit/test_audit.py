"""The auditor finds every planted fault, raises nothing on sound adapters, and each of its checks can speak."""

import json
import re
import time
from pathlib import Path

import adapters
import numpy as np
import pytest
from adapters import SITES, linear, write
from faults import faults, with_base

import lorax_np as lx
from lorax_np.audit import audit
from lorax_np.audit.experts import misplaced
from lorax_np.audit.report import FAULTS
from lorax_np.audit.weights import rounded
from lorax_np.errors import FormatError
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.io.writer import write_safetensors
from lorax_np.stream.init import init_checkpoint

SOUND, PLANTED, BESIDE = adapters.sound(), faults(), with_base()
ROOT = Path(__file__).parents[2]


class Weights(dict):
    """Weights with the settings of their model, as a checkpoint has them."""

    config: dict = {}  # noqa: RUF012


def test_there_are_enough():
    assert len(SOUND) >= 40
    assert len(PLANTED) + len(BESIDE) >= 60
    assert {id for id, *_ in (*PLANTED.values(), *BESIDE.values())} | {"pickle", "base-bias"} == set(FAULTS)


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_said_of_a_sound_one(tmp_path, name):
    found = audit(write(tmp_path / "a", *SOUND[name]))
    assert found.passed, str(found)
    assert {f.id for f in found.findings} <= {"base-bias"}
    assert len(found.rows) == len({k.partition(".lora_")[0] for k in SOUND[name][1] if ".lora_" in k})


@pytest.mark.parametrize("name", [name for name in SOUND if name.startswith("linear")])
def test_nothing_is_said_beside_the_right_base(tmp_path, name):
    found = audit(write(tmp_path / "a", *SOUND[name]), adapters.base())
    assert found.passed, str(found)
    assert all(0 < row.relative < 1 and 0 <= row.lost < np.sqrt(0.5) for row in found.rows)


def test_attention_beside_its_base(tmp_path):
    """q, k and v are looked for in one parameter, and the output below its module."""
    rng, (D, wide) = np.random.default_rng(0), (adapters.D, adapters.WIDE)
    shapes = {"attn.in_proj_weight": (3 * D, D), "attn.out_proj.weight": (D, D), "up_proj.weight": (wide, D)}
    weights = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    found = audit(write(tmp_path / "a", *adapters.attention(3)), weights)
    assert found.passed, str(found)
    assert {row.site: row.relative is None for row in found.rows} == dict.fromkeys(
        ("attn", "attn.out_proj", "up_proj"), False
    )
    del weights["attn.out_proj.weight"]
    assert {f.id for f in audit(tmp_path / "a", weights).findings} == {"no-site"}


@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_fault_is_found(tmp_path, name):
    id, config, tensors = PLANTED[name]
    found = audit(write(tmp_path / "a", config, tensors))
    assert id in {f.id for f in found.findings}, str(found)
    assert not found.passed
    assert {f.id for f in found.findings} <= {id, *ALSO.get(name, ())}, str(found)
    assert all(len(line) == 1 for f in found.findings if (line := f.text.splitlines()) is not None)


ALSO = {  # what a planted fault brings with it
    "A without B": {"identity"},
    "no tensor at all": {"unexpected", "target", "prefix"},
    "base biases with none": {"base-bias"},
}


@pytest.mark.parametrize("name", BESIDE)
def test_every_fault_that_the_base_shows_is_found(tmp_path, name):
    id, config, tensors, weights, settings = BESIDE[name]
    there = Weights(weights)
    there.config = settings
    found = audit(write(tmp_path / "a", config, tensors), there)
    assert id in {f.id for f in found.findings}, str(found)
    assert {f.id for f in found.findings} == {id}, str(found)
    assert audit(tmp_path / "a").passed  # the base alone shows it


def test_a_start_is_sound_beside_the_base_that_it_left(tmp_path):
    """PiSSA's update may be larger than the rest, and only there."""
    write_safetensors(tmp_path / "w.safetensors", adapters.base(), {"format": "pt"})
    config = lx.LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    init_checkpoint(tmp_path / "w.safetensors", config, tmp_path / "a")
    found = audit(tmp_path / "a", open_checkpoint(tmp_path / "a" / "base"))
    assert found.passed, str(found)
    assert max(row.relative for row in found.rows) > 1
    beside = audit(tmp_path / "a", open_checkpoint(tmp_path / "w.safetensors"))
    assert {f.id for f in beside.findings} == {"start-base"}
    assert {f.id for f in audit(tmp_path / "a").findings} == {"start-base"}


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "alpha_pattern"])
def test_a_strangers_expression_ends(tmp_path, field):
    """(a+)+$ against a name of as takes re longer than anyone waits."""
    config, tensors = linear(0)
    name = "a" * 60 + "!"
    tensors = {key.replace("model.layers", name): value for key, value in tensors.items()}
    config[field] = "(a+)+$" if field == "target_modules" else {"(a+)+$": 4}
    started = time.monotonic()
    found = audit(write(tmp_path / "a", config, tensors))
    assert time.monotonic() - started < 5
    assert {f.id for f in found.findings} & {"untargeted", "pattern"}


def test_a_pickle_is_never_loaded(tmp_path):
    write(tmp_path, linear(0)[0], None)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    found = audit(tmp_path)
    assert {f.id for f in found.findings} == {"pickle"}
    assert "weights_only=True" in found.findings[0].text


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        (None, None, "adapter_config.json: expected the config of an adapter, got no such file"),
        ("{", {}, "expected JSON"),
        ("[1]", {}, "expected a JSON object"),
        ("[" * 100000, {}, "expected JSON"),
        (linear(0)[0], None, "adapter_model.safetensors: expected the weights of an adapter, got no such file"),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path, config, tensors, words):
    if config is None:
        tmp_path.mkdir(exist_ok=True)
    else:
        write(tmp_path, config, tensors)
    with pytest.raises(FormatError, match=re.escape(words)):
        audit(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(FormatError, match="expected an adapter directory, got nothing"):
        audit(tmp_path / "nothing")


def test_the_figures_are_those_of_the_update(tmp_path):
    config, tensors = linear(5)
    found = audit(write(tmp_path, config, tensors), adapters.base())
    for row in found.rows:
        A, B = (tensors[f"base_model.model.{row.site}.lora_{name}.weight"].astype(float) for name in "AB")
        delta = 6 / 4 * B @ A
        W = adapters.base()[f"{row.site}.weight"].astype(float)
        assert row.scaling == 1.5
        np.testing.assert_allclose(row.norm, np.linalg.norm(delta), rtol=1e-12)
        np.testing.assert_allclose(row.largest, np.linalg.norm(delta, 2), rtol=1e-12)
        np.testing.assert_allclose(row.relative, np.linalg.norm(delta) / np.linalg.norm(W), rtol=1e-12)
        lost = np.linalg.norm(rounded(W + delta, 8) - rounded(W, 8) - delta) / np.linalg.norm(delta)
        np.testing.assert_allclose(row.lost, lost, rtol=1e-9)


def test_experts_without_a_difference_convict_nobody():
    """Sizes that mean nothing: not one of 500 draws in either order, at a chance of 1e-6 each."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        E, r = rng.integers(2, 9), rng.integers(2, 9)
        assert misplaced(rng.standard_normal((E * r, 8)), rng.standard_normal((9, E * r)), int(E)) == ""


def test_the_chance_is_that_of_the_beta_distribution():
    """Against the share of random groupings that reach an η² as large."""
    from lorax_np.audit.experts import _chance

    rng = np.random.default_rng(1)
    draws = np.array([_chance(rng.standard_normal(24), np.arange(24) % 4, 4) for _ in range(4000)])
    for level in (0.5, 0.1, 0.02):
        share = (draws < level).mean()
        assert abs(share - level) < 5 * np.sqrt(level * (1 - level) / len(draws))


def test_it_prints_and_writes_what_it_found(tmp_path):
    id, config, tensors = PLANTED["NaN in A"]
    found = audit(write(tmp_path, config, tensors))
    text = str(found)
    assert text.splitlines()[0] == "ERROR   not-finite: NaN or infinity"
    assert text.splitlines()[-1] == f"FAIL  {tmp_path}  {len(SITES) - 1} sites, 1 errors, 0 warnings"
    assert json.loads(json.dumps(found.to_dict()))["findings"][0]["id"] == id


def test_the_spec_lists_every_finding():
    spec = (ROOT / "specs" / "audit.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", spec, re.M)) == set(FAULTS)
