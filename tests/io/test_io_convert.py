"""Conversions there and back, bit for bit; one scaling for all; what is written, and what is not."""

import json
import math
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from convert_samples import SHAPES, assert_same, base, conv_files, default_config, delta, files, saved
from converting import EVERY, NAMES, ONE, ROWS, back, options, refusal, there

from lorax_np.io.convert import FORMATS, convert, detect, plan_adapter
from lorax_np.io.convert.model import Base
from lorax_np.io.convert.scales import is_embedding
from lorax_np.io.peft import load_adapter
from lorax_np.io.safetensors import open_safetensors
from lorax_np.io.writer import write_safetensors

# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", sorted(set(FORMATS) - {"peft"}))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_there_and_back_is_the_same_file(tmp_path, target, dtype):
    """The tensors' file is the same byte for byte, whatever program had it in between."""
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype) or getattr(np, dtype)
    what = files(NAMES, default_config(lora_alpha=6.0), dtype=dtype)
    checkpoint = base(tmp_path / "base")
    path, done = there(tmp_path, what, target, base=checkpoint)
    assert detect(path).format == target
    assert not [note for note in done.notes if "moves" in note or "rounding" in note]
    again = back(tmp_path, path, target, base=checkpoint)
    assert_same(load_adapter(again), what)
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert json.loads((again / "adapter_config.json").read_text())["target_modules"] == sorted(
        {module.rpartition(".")[2] for module in NAMES}
    )


@pytest.mark.parametrize("target", ["mlx", "torchtune"])
def test_dora_there_and_back(tmp_path, target):
    what = files(NAMES, default_config(use_dora=True))
    checkpoint = base(tmp_path / "base")
    path, _ = there(tmp_path, what, target, base=checkpoint)
    assert_same(load_adapter(back(tmp_path, path, target, base=checkpoint)), what)


@pytest.mark.parametrize("target", ["mlx", "loralib", "gguf"])
def test_embeddings_there_and_back(tmp_path, target):
    what = files([ONE], default_config(), embedding=True)
    checkpoint = base(tmp_path / "base")
    path, _ = there(tmp_path, what, target, base=checkpoint)
    assert_same(load_adapter(back(tmp_path, path, target, base=checkpoint)), what)


@pytest.mark.parametrize("target", ["kohya", "gguf", "loralib"])
def test_ranks_may_differ_where_the_file_says_each(tmp_path, target):
    config = default_config(rank_pattern={"q_proj": 2, "mlp.up_proj": 5})
    what = files(NAMES, config)
    checkpoint = base(tmp_path / "base")
    path, _ = there(tmp_path, what, target, base=checkpoint)
    assert_same(load_adapter(back(tmp_path, path, target, base=checkpoint)), what)


def test_kohya_keeps_each_alpha(tmp_path):
    config = default_config(rank_pattern={"k_proj": 2}, alpha_pattern={"layers.0.mlp.up_proj": 7})
    what = files(NAMES, config)
    checkpoint = base(tmp_path / "base")
    path, done = there(tmp_path, what, "kohya", base=checkpoint)
    assert not done.notes
    assert_same(load_adapter(back(tmp_path, path, "kohya", base=checkpoint)), what)


@pytest.mark.parametrize("target", ["mlx", "torchtune"])
def test_rank_stabilised_scalings_are_exact_in_double(tmp_path, target):
    what = files(NAMES, default_config(use_rslora=True))
    checkpoint = base(tmp_path / "base")
    path, _ = there(tmp_path, what, target, base=checkpoint)
    got = load_adapter(back(tmp_path, path, target, base=checkpoint))
    assert_same(got, what, scalings=False)
    for site in got.sites.values():
        assert abs(site.scaling / (5 / math.sqrt(3)) - 1) <= np.finfo(float).eps


@pytest.mark.parametrize("target", ["gguf", "kohya"])
def test_rank_stabilised_alpha_is_rounded_to_a_float32_and_said_so(tmp_path, target):
    what = files([ONE], default_config(use_rslora=True))
    checkpoint = base(tmp_path / "base")
    path, done = there(tmp_path, what, target, base=checkpoint)
    assert any("is kept as a float32" in note for note in done.notes)
    got = load_adapter(back(tmp_path, path, target, base=checkpoint))
    assert got.sites[ONE].scaling != what.sites[ONE].scaling
    assert abs(got.sites[ONE].scaling / what.sites[ONE].scaling - 1) <= 2**-24


# ---- one scaling for all -----------------------------------------------------------------------------------

PATTERN = {"alpha_pattern": {"k_proj": 10}}


@pytest.mark.parametrize("target", ["mlx", "torchtune", "gguf", "loralib"])
def test_a_power_of_two_goes_into_b_exactly(tmp_path, target):
    what = files(NAMES, default_config(**PATTERN))
    checkpoint = base(tmp_path / "base")
    path, done = there(tmp_path, what, target, base=checkpoint)
    assert any("B is multiplied by 2, exactly" in note for note in done.notes)
    got = load_adapter(back(tmp_path, path, target, base=checkpoint))
    for name in NAMES:
        want = delta(what, name)
        assert np.abs(delta(got, name) - want).max() <= 1e-14 * np.abs(want).max()


@pytest.mark.parametrize("target", ["mlx", "torchtune", "gguf", "loralib"])
def test_another_factor_rounds_b_and_is_refused_unless_allowed(tmp_path, target):
    what = files(NAMES, default_config(alpha_pattern={"k_proj": 7}))
    checkpoint = base(tmp_path / "base")
    words = "B times 1.4 would be rounded: allow it with fold"
    refusal(lambda: there(tmp_path, what, target, base=checkpoint), words)
    path, done = there(tmp_path, what, target, base=checkpoint, fold=True)
    assert any("B is multiplied by 1.4, with one more rounding" in note for note in done.notes)
    got = load_adapter(back(tmp_path, path, target, base=checkpoint))
    for name in NAMES:
        wide = {side: abs(what.adapters[name].__getattribute__(side)).astype(float) for side in "AB"}
        bound = 2.0**-23 * what.sites[name].scaling * wide["B"] @ wide["A"]
        assert (np.abs(delta(got, name) - delta(what, name)) <= bound).all()


def test_a_double_is_rounded_by_a_factor_too(tmp_path):
    what = files(NAMES, default_config(alpha_pattern={"k_proj": 7}), dtype=np.float64)
    refusal(lambda: there(tmp_path, what, "mlx", base=base(tmp_path / "base")), "B times 1.4 would be rounded")


def test_a_factor_that_overflows_is_refused(tmp_path):
    what = files(NAMES, default_config(alpha_pattern={"lm_head": 5 * 2.0**20}), dtype=np.float16)
    words = "expected numbers that float16 can hold"
    refusal(lambda: there(tmp_path, what, "gguf", base=base(tmp_path / "base"), fold=True), words)


# ---- what is written, and what is not ----------------------------------------------------------------------


@pytest.mark.parametrize("target", sorted(FORMATS))
def test_a_dry_run_checks_and_writes_nothing(tmp_path, target):
    source = saved(tmp_path / "peft", files(NAMES, default_config()))
    checkpoint = base(tmp_path / "base")
    bad = files([ONE], default_config(lora_bias=True))
    bad = bad._replace(adapters={ONE: replace(bad.adapters[ONE], bB=np.ones(ROWS, "f4"))})
    saved(tmp_path / "bad", bad)
    before = sorted(tmp_path.rglob("*"))
    done = convert(source, target, tmp_path / "out", base=checkpoint, dry_run=True)
    assert done.sites == len(NAMES)
    assert done.files
    if target != "peft":
        words = f"{target}: {ONE}: expected no bias of B"
        refusal(
            lambda: convert(tmp_path / "bad", target, tmp_path / "out", base=checkpoint, dry_run=True), words
        )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["peft", "mlx", "torchtune"])
def test_a_directory_that_holds_something_is_not_touched(tmp_path, target):
    source = saved(tmp_path / "peft", files(["lm_head"], default_config()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    refusal(lambda: convert(source, target, tmp_path / "out"), "expected no such path or an empty directory")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "peft"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    source = saved(tmp_path / "peft", files(["lm_head"], default_config()))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorax_np.io.convert.mlx.json.dumps", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, "mlx", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_between_two_formats_that_are_not_peft(tmp_path):
    what = files(NAMES, default_config())
    checkpoint = base(tmp_path / "base")
    path, _ = there(tmp_path, what, "mlx", base=checkpoint)
    convert(path, "gguf", tmp_path / "x.gguf", base=checkpoint)
    convert(tmp_path / "x.gguf", "torchtune", tmp_path / "tt", base=checkpoint)
    convert(tmp_path / "tt", "kohya", tmp_path / "k.safetensors", base=checkpoint)
    convert(tmp_path / "k.safetensors", "loralib", tmp_path / "l.safetensors", base=checkpoint)
    got = load_adapter(back(tmp_path, tmp_path / "l.safetensors", "loralib", base=checkpoint))
    assert_same(got, what)


def test_without_a_base_the_config_names_whole_modules(tmp_path):
    what = files(["model.layers.1.mlp.up_proj", "lm_head"], default_config())
    path, _ = there(tmp_path, what, "mlx")
    config = load_adapter(back(tmp_path, path, "mlx")).config
    assert config.target_modules == ("lm_head", "model.layers.1.mlp.up_proj")
    assert re.escape("a.b") == "a\\.b"


def test_a_weight_of_another_shape_than_the_factors_say_is_refused(tmp_path):
    what = files(["lm_head"], default_config())
    path, _ = there(tmp_path, what, "mlx")
    checkpoint = tmp_path / "base.safetensors"
    write_safetensors(checkpoint, {"lm_head.weight": np.zeros((3, 4), "f4")})
    words = "lm_head: expected a weight of the base of shape (17, 10), set by A and B, got (3, 4)"
    refusal(lambda: back(tmp_path, path, "mlx", base=checkpoint), words)
    refusal(lambda: plan_adapter(what, "mlx", options(checkpoint)), words)
    write_safetensors(checkpoint, {"head.weight": np.zeros((17, 10), "f4")})
    words = "lm_head: expected a module of the base, got a name that it does not have"
    refusal(lambda: back(tmp_path, path, "mlx", base=checkpoint), words)
    refusal(lambda: plan_adapter(what, "mlx", options(checkpoint)), words)


def test_loralib_keeps_biases(tmp_path):
    """Of adapted layers in their adapters, of others beside them, as PEFT does with bias="all"."""
    what = files([ONE, "lm_head"], default_config(bias="all"))
    b = np.arange(SHAPES[ONE][0], dtype="f4")
    adapters = what.adapters | {ONE: replace(what.adapters[ONE], b=b)}
    what = what._replace(adapters=adapters, saved={"norm.bias": np.ones(4, "f4")})
    checkpoint = base(tmp_path / "base", bias=ONE)
    path, _ = there(tmp_path, what, "loralib", base=checkpoint)
    assert np.array_equal(open_safetensors(path)[f"{ONE}.bias"], b)
    got = load_adapter(back(tmp_path, path, "loralib", base=checkpoint))
    assert_same(got, what)
    assert got.config.bias == "all"
    assert np.array_equal(got.saved["norm.bias"], np.ones(4))


@pytest.mark.parametrize("target", EVERY)
def test_a_weight_of_the_base_that_peft_copied_is_left_out(tmp_path, target):
    """PEFT saves the base weight of an adapted head; only where it is the base's own nothing is lost."""
    checkpoint = base(tmp_path / "base")
    own = np.array(open_safetensors(checkpoint / "model.safetensors")["lm_head.weight"])
    what = files(["lm_head"], default_config())
    for dtype in ("f4", "f8"):
        plan = plan_adapter(
            what._replace(saved={"lm_head.weight": own.astype(dtype)}), target, options(checkpoint)
        )
        assert plan.notes[0] == (
            "lm_head.weight, which PEFT copies from the base into its file, is the base's and left out"
        )
    changed = own.copy()
    changed[3, 2] = np.nextafter(changed[3, 2], np.float32(9))
    for other, words in (
        (changed, f"{target}: lm_head.weight: expected the base's own weight, as PEFT copies it, got another"),
        (own[:-1], "got another: it was trained, or resized"),
    ):
        more = what._replace(saved={"lm_head.weight": other})
        refusal(lambda more=more: plan_adapter(more, target, options(checkpoint)), words)
    refusal(lambda: plan_adapter(more, target, options()), "expected a base (--base)")


def test_last_parts_of_names_stand_for_sites_only_where_they_mean_no_others(tmp_path):
    what = files([ONE, "lm_head"], default_config())
    path, _ = there(tmp_path, what, "mlx")
    config = load_adapter(back(tmp_path, path, "mlx", base=base(tmp_path / "base"))).config
    assert config.target_modules == ("lm_head", ONE)  # the base has a q_proj in every layer


def test_what_an_embedding_is():
    A, B = np.ones((2, 5)), np.ones((3, 2))
    at = {"x": (3, 5), "y": (5, 3), "embed_tokens": (5, 3), "wte": (3, 5)}
    known = Base({f"{name}.weight": shape for name, shape in at.items()}, {}, {})
    assert [is_embedding(name, A, B, known) for name in at] == [False, False, True, False]
    assert [is_embedding(name, A, B, None) for name in ("x", "model.embed_tokens", "wte")] == [
        False,
        True,
        True,
    ]
    square = Base({"wte.weight": (3, 3), "x.weight": (3, 3)}, {}, {})
    assert is_embedding("wte", np.ones((2, 3)), B, square)
    assert not is_embedding("x", np.ones((2, 3)), B, square)


def test_a_name_that_ends_another_takes_no_number_from_it(tmp_path):
    """PEFT's patterns match ends of names: with a rank of its own, `b` would give it to `a.b`."""
    what = conv_files({"b": (6, 4), "a.b": (5, 4), "c": (3, 4), "d": (7, 4)}, default_config())
    path, _ = there(tmp_path, what, "kohya")
    arrays = dict(open_safetensors(path))
    draw = np.random.default_rng(2).standard_normal
    arrays["lora_unet_b.lora_down.weight"] = draw((2, 4)).astype("f4")
    arrays["lora_unet_b.lora_up.weight"] = draw((6, 2)).astype("f4")
    write_safetensors(tmp_path / "k.safetensors", arrays)
    table = {name.replace(".", "_"): name for name in what.adapters}
    words = "a.b: expected r 3 and α 5, got 2 and 5"
    refusal(lambda: back(tmp_path, tmp_path / "k.safetensors", "kohya", names=table), words)
