"""Adapter directories: what is read, what is refused and in which words; a save is whole or nothing."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from adapter_samples import PREFIX, SAMPLES, conv, embedding, experts, linear, normals, sample, write
from hypothesis import given
from hypothesis import strategies as st

import lorax_np as lx
from lorax_np.config.regexes import Budget, Regex
from lorax_np.io import replace
from lorax_np.io.peft import load_adapter, save_adapter
from lorax_np.io.peft.keys import key_of, plain_key

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
HERE = Path(__file__).parent


def refused(folder, pattern, error=lx.FormatError, **given):
    with pytest.raises(error, match=pattern) as caught:
        load_adapter(folder, **given)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_loaded_is_saved_again_to_the_byte(tmp_path, name):
    folder = sample(tmp_path / "first", name)
    files = load_adapter(folder)
    save_adapter(tmp_path / "second", files.adapters, files.config, sites=files.sites, saved=files.saved)
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    again = load_adapter(tmp_path / "second")
    assert again.sites == files.sites
    assert again.config.to_dict() | {"inference_mode": 0} == files.config.to_dict() | {"inference_mode": 0}
    assert files.metadata == {"format": "pt"}


def test_sites_have_the_numbers_of_the_config(tmp_path):
    files = load_adapter(sample(tmp_path, "saved"))
    q, v = files.sites["layers.0.q"], files.sites["layers.0.v"]
    assert (q.r, q.alpha, q.scaling) == (3, 8, 8 / 3)
    assert (v.r, v.alpha, v.scaling) == (2, 5, 2.5)
    assert set(files.saved) == {"head.weight", "embed.token_adapter.trainable_tokens_delta"}


def test_kinds_are_told_by_keys_and_shapes(tmp_path):
    both = embedding("e") | conv("c") | linear("q")
    files = load_adapter(write(tmp_path, {"target_modules": ["e", "c", "q"]}, both))
    assert {name: site.kind for name, site in files.sites.items()} == {
        "c": "conv",
        "e": "embedding",
        "q": "linear",
    }
    assert isinstance(files.adapters["c"], lx.ConvAdapter)


def test_a_trained_bias_is_the_adapters_own(tmp_path):
    files = load_adapter(sample(tmp_path, "biases"))
    assert files.adapters["q"].b is not None
    assert files.adapters["q"].bB is not None
    assert list(files.saved) == ["norm.bias"]


def test_parameters_of_one_module_are_told_apart_by_depth(tmp_path):
    files = load_adapter(sample(tmp_path, "experts"))
    assert set(files.sites) == {"layers.0.e.gate_up_proj", "layers.0.e.down_proj"}
    assert files.adapters["layers.0.e.gate_up_proj"].A.shape == (6, 5)
    assert files.adapters["layers.0.e.down_proj"].A.shape == (6, 4)


def test_attention_has_its_q_k_and_v_in_one_weight(tmp_path):
    files = load_adapter(sample(tmp_path, "attention"))
    assert files.sites["a"].weight == "a.in_proj_weight"
    assert files.sites["a.out_proj"].weight == "a.out_proj.weight"


@pytest.mark.parametrize("name", SAMPLES)
def test_keys_without_the_prefix_are_read_too(tmp_path, name):
    said, tensors = SAMPLES[name]
    bare = {key.removeprefix(PREFIX): array for key, array in tensors.items()}
    one, other = load_adapter(write(tmp_path / "a", said, bare)), load_adapter(sample(tmp_path / "b", name))
    assert one.sites == other.sites
    for site, adapter in one.adapters.items():
        assert adapter.A.tobytes() == other.adapters[site].A.tobytes()


def test_half_the_keys_with_a_prefix_are_refused(tmp_path):
    tensors = linear("q") | {"v.lora_A.weight": normals(2, 5)}
    refused(write(tmp_path, {}, tensors), rf"every key to begin with {PREFIX} or none, got 'v.lora_A.weight'")


def test_arrays_are_views_that_nobody_writes_to(tmp_path):
    A = load_adapter(sample(tmp_path, "linear")).adapters["layers.0.q"].A
    assert not A.flags.writeable
    assert not A.flags.owndata


@given(st.lists(st.sampled_from(["a", "b", "base"]), min_size=1, max_size=4), st.integers(0, 2), st.booleans())
def test_names_and_keys_are_inverse(parts, depth, embedded):
    from lorax_np.io.peft.keys import sort_keys

    module = ".".join(parts)
    depths = {module: 1 if embedded else depth + 1}
    count = depths[module]
    keys = [key_of(module, d, part, depths, embedding=embedded) for d in range(count) for part in "AB"]
    found = sort_keys(Path("f"), [*keys, plain_key(f"{module}.bias", depths)])
    assert [wrapper.depth for wrapper in found.wrappers[module]] == list(range(count))
    assert set(found.plain) == {f"{module}.bias"}


def test_bfloat16_without_its_package_is_one_line(tmp_path, monkeypatch):
    import ml_dtypes

    tensors = {key: array.astype(ml_dtypes.bfloat16) for key, array in linear("q").items()}
    folder = write(tmp_path, {"target_modules": ["q"]}, tensors)
    assert load_adapter(folder).adapters["q"].A.dtype == ml_dtypes.bfloat16
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    refused(folder, r"ml_dtypes to read BF16 values.*pip install")


# ---- what is refused ---------------------------------------------------------------------------------------

M = {"lora_magnitude_vector": np.ones(4, "float32")}
Q = {"target_modules": ["q"]}
REFUSED = {
    "no B": (Q, {f"{PREFIX}q.lora_A.weight": normals(2, 5)}, "'q': expected A and B"),
    "rank": (Q | {"r": 3}, linear("q"), r"lora_A.weight': expected 3 rows, the rank of 'q' .* got \(2, 5\)"),
    "rank by pattern": (Q | {"rank_pattern": {"q": 4}}, linear("q"), "expected 4 rows"),
    "two patterns": (
        Q | {"rank_pattern": {"q": 2, ".*q": 4}},
        linear("q"),
        "rank_pattern: expected one value for 'q'",
    ),
    "B": (Q, linear("q", **{"lora_B.weight": normals(4, 3)}), r"lora_B.weight': expected \(d_out, 2\)"),
    "three axes of B": (Q, linear("q", **{"lora_B.weight": normals(4, 2, 1)}), r"expected \(d_out, 2\)"),
    "one axis": (Q, linear("q", **{"lora_A.weight": normals(2)}), r"expected \(r, d_in\) without axes of 0"),
    "an axis of 0": (Q, linear("q", d_in=0), "without axes of 0"),
    "B of a convolution": (
        {"target_modules": ["c"]},
        conv("c") | {f"{PREFIX}c.lora_B.weight": normals(4, 2, 3, 1)},
        r"expected \(d_out, r // groups, 1, 1\)",
    ),
    "experts' rows": (
        {"target_modules": [], "target_parameters": ["e.w"]},
        linear("e", r=3),
        r"expected \(E·r, d_in\) with r=2",
    ),
    "magnitude": (Q | {"use_dora": True}, linear("q"), "a magnitude at every site, with use_dora=True"),
    "no magnitude": (Q, linear("q", **M), "no magnitude at every site, with use_dora=False"),
    "magnitude's axes": (
        Q | {"use_dora": True},
        linear("q", lora_magnitude_vector=np.ones((1, 4), "float32")),
        r"lora_magnitude_vector': expected \(4,\), got \(1, 4\)",
    ),
    "bias of B": (Q | {"lora_bias": True}, linear("q"), "a bias of B at every site, with lora_bias=True"),
    "no bias of B": (Q, linear("q", **{"lora_B.bias": normals(4)}), "no bias of B at every site"),
    "target": (Q, linear("q") | linear("k"), "where target_modules has them, got 'k'"),
    "target by regex": ({"target_modules": ".*q"}, linear("q.x"), "where target_modules has them"),
    "layer": (
        Q | {"layers_to_transform": [0, 2]},
        linear("m.layers.0.q") | linear("m.layers.1.q"),
        "in the layers_to_transform alone, got 'm.layers.1.q'",
    ),
    "layer by pattern": (
        Q | {"layers_to_transform": 1, "layers_pattern": "blocks"},
        linear("1.blocks.0.q"),
        "layers_to_transform alone",
    ),
    "lists too long": (
        Q | {"modules_to_save": [f"m{i}" for i in range(200_000)]},
        {key: a for i in range(150) for key, a in linear(f"{i}.q").items()},
        "shorter lists of names",
    ),
    "excluded": (Q | {"exclude_modules": ["q"]}, linear("q"), "where exclude_modules has them"),
    "a key too many": (Q, linear("q") | {"head.weight": normals(2, 2)}, "every key to begin"),
    "nobody's key": (
        Q,
        linear("q") | {f"{PREFIX}head.weight": normals(2, 2)},
        r"no keys but those that the config asks for, got 'base_model.model.head.weight'",
    ),
    "adapter's name in a key": (
        Q,
        {key.replace("_A.", "_A.default."): array for key, array in linear("q").items()} | linear("q"),
        r"keys that end in lora_A.weight, .*lora_A.default.weight': the adapter's name does not belong",
    ),
    "bias": (Q, linear("q") | {f"{PREFIX}q.base_layer.bias": normals(4)}, "no keys but those"),
    "another's bias": (
        Q | {"bias": "lora_only"},
        linear("q") | {f"{PREFIX}norm.bias": normals(4)},
        "no keys but those",
    ),
    "rows": (
        Q | {"trainable_token_indices": {"e": [1, 2]}},
        linear("q") | {f"{PREFIX}e.token_adapter.trainable_tokens_delta": normals(3, 5)},
        r"expected \(2, dim\), a row for each of trainable_token_indices",
    ),
    "no rows": (Q | {"trainable_token_indices": {"e": [1, 2]}}, linear("q"), "rows of trainable_token_indices"),
    "rows unasked": (
        Q,
        linear("q") | {f"{PREFIX}e.token_adapter.trainable_tokens_delta": normals(3, 5)},
        "no trained rows without trainable_token_indices",
    ),
    "dtype": (Q, {k: v.astype("int32") for k, v in linear("q").items()}, "expected A in F16, BF16, F32, F64"),
    "dtypes": (Q, linear("q", **{"lora_B.weight": normals(4, 2, dtype="float16")}), "B: expected float32"),
    "NaN": (Q, linear("q", **{"lora_B.weight": np.full((4, 2), np.nan, "f4")}), "finite numbers, got NaN"),
    "nothing": (Q, {}, "expected the tensors of an adapter, got none"),
    "a hole among wrappers": (
        {"target_modules": [], "target_parameters": ["e.a", "e.b"]},
        {key: array for key, array in experts("e").items() if "base_layer" in key},
        "wrappers at every depth, got the depth 1 without that outside it",
    ),
    "a wrapper too many": (Q, experts("q"), "expected 2 of its parameters in target_parameters, got none"),
    "a parameter too many": (
        {"target_modules": [], "target_parameters": ["e.a", "e.b", "e.c"]},
        experts("e"),
        "expected wrappers for a, b, c",
    ),
    "../": (Q, {f"{PREFIX}../../q.lora_A.weight": normals(2, 5)}, "dotted names without spaces and slashes"),
    "start": (Q | {"init_lora_weights": "pissa_niter_4"}, linear("q"), "a plain one of rank 2r"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_do_not_fit_their_config_are_refused(tmp_path, name):
    said, tensors, pattern = REFUSED[name]
    refused(write(tmp_path, said, tensors), pattern, (lx.FormatError, lx.ConfigError))


CONFIGS = {
    "no peft_type": ('{"r": 2}', "peft_type: expected 'LORA', got none"),
    "another peft_type": ('{"peft_type": "VERA"}', "peft_type: expected 'LORA', got 'VERA'"),
    "a list": ("[]", r"a JSON object, got \[\]"),
    "broken": ('{"peft_type": ', "a JSON object in UTF-8, got Expecting value"),
    "a key twice": ('{"peft_type": "LORA", "r": 2, "r": 4}', "the key 'r' twice"),
    "NaN": ('{"peft_type": "LORA", "lora_alpha": NaN}', "the number NaN"),
    "infinite": ('{"peft_type": "LORA", "lora_alpha": 1e999}', "the number '1e999'"),
    "deep": ('{"a":' * 100_000, "nested too deep"),
    "negative rank": ('{"peft_type": "LORA", "r": -2}', "r: expected an int of at least 1.*got -2"),
    "rank as text": ('{"peft_type": "LORA", "r": "2"}', "r: expected an int of at least 1.*got '2'"),
    "near miss": ('{"peft_type": "LORA", "use_rslorra": true}', "did you mean 'use_rslora'"),
    "exotic": ('{"peft_type": "LORA", "use_qalora": true}', "use_qalora: expected False"),
    "hostile": ('{"peft_type": "LORA", "target_modules": "' + "(" * 3000 + '"}', "regular expression"),
    "long": ('{"peft_type": "LORA", "target_modules": "' + "a" * 5000 + '+"}', "at most 4000 characters"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_refused_in_one_line(tmp_path, name):
    text, pattern = CONFIGS[name]
    folder = sample(tmp_path, "linear")
    (folder / CONFIG).write_text(text)
    refused(folder, pattern, (lx.FormatError, lx.ConfigError))


def test_patterns_that_would_take_for_ever_are_quick(tmp_path):
    site = "a" * 60
    began = time.perf_counter()
    said = {"target_modules": "(a+)+b|a+", "rank_pattern": {"(.*)*(.*)*(.*)*x": 3}}
    files = load_adapter(write(tmp_path, said, linear(site)))
    assert files.sites[site].r == 2
    assert time.perf_counter() - began < 5


def test_huge_shapes_are_refused_before_anything_is_made(tmp_path):
    folder = sample(tmp_path, "linear")
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw.replace(b'"shape":[2,5]', b'"shape":[2147483648,5]', 1))
    refused(folder, "header length|data_offsets|JSON|shape")


def test_pickles_are_named_and_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    folder = sample(tmp_path / "a", "linear")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, r"adapter_model.bin: .*never loaded.*torch.load\(weights_only=True\)")
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)
    refused(folder, r"a pickle.*never loaded")
    assert not (tmp_path / "unpickled").exists()


def test_other_things_where_files_belong(tmp_path):
    folder = sample(tmp_path / "a", "linear")
    refused(folder / CONFIG, "an adapter directory, got a file")
    with pytest.raises(FileNotFoundError):
        load_adapter(tmp_path / "nowhere")
    (folder / WEIGHTS).rename(folder / "blob")
    (folder / WEIGHTS).symlink_to("blob")  # as the hub's cache has it
    assert load_adapter(folder).sites
    (folder / CONFIG).rename(folder / "kept")
    refused(folder, "config of an adapter, got no such file")
    (folder / CONFIG).mkdir()
    refused(folder, "expected a file, got a directory")
    (folder / CONFIG).rmdir()
    os.mkfifo(folder / CONFIG)
    refused(folder, "got a device, pipe or socket")
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(CONFIG)
    with pytest.raises((OSError, lx.FormatError)):
        load_adapter(folder)


# ---- what is said and is no error --------------------------------------------------------------------------


def test_notes(tmp_path):
    said = {
        "target_modules": ["q", "qq"],
        "modules_to_save": ["head"],
        "rank_pattern": {"k_proj": 4},
        "alpha_pattern": {"nobody": 3},
        "bias": "all",
    }
    B = np.zeros((4, 2), "float32")
    notes = load_adapter(write(tmp_path, said, linear("q", **{"lora_B.weight": B}))).notes
    assert notes == (
        "target_modules: 'qq' has no adapter (did you mean 'q'?)",
        "modules_to_save: 'head' has no tensors",
        "rank_pattern: 'k_proj' fits no site",
        "alpha_pattern: 'nobody' fits no site",
        "bias: 'all', and no bias is there",
        "s·BA is 0 at every site, 'q' the first: not trained, or not saved",
    )
    assert load_adapter(sample(tmp_path / "good", "linear")).notes == ()


def test_many_names_without_a_meaning_are_few_notes(tmp_path):
    said = {"target_modules": ["q", *(f"x{i}" for i in range(5000))]}
    began = time.perf_counter()
    notes = load_adapter(write(tmp_path, said, linear("q"))).notes
    assert len(notes) == 6
    assert notes[-1] == "target_modules: 4995 more names of which each has no adapter"
    assert time.perf_counter() - began < 5


def test_layers_to_transform(tmp_path):
    said = Q | {"layers_to_transform": [1], "layers_pattern": ["blocks", "h"]}
    assert load_adapter(write(tmp_path, said, linear("0.blocks.1.q"))).sites


def test_an_order_that_is_assumed_is_said(tmp_path):
    said = {"target_modules": [], "target_parameters": ["e.inner", "e.outer"]}
    files = load_adapter(write(tmp_path, said, experts("e")))
    assert files.notes == ("target_parameters: 'e' declares inner, outer in this order",)


# ---- beside the base ---------------------------------------------------------------------------------------


def ones(*shape):
    return np.ones(shape, "float32")


BASE = {"m.layers.0.q.weight": ones(4, 5), "m.layers.0.v.weight": ones(3, 5), "m.layers.1.q.weight": ones(4, 5)}


@pytest.mark.parametrize("start", ["", "m.", "x.m.", "deeper.still.m."])
def test_a_missing_prefix_is_found(tmp_path, start):
    weights = {f"{start}{name.removeprefix('m.')}": array for name, array in BASE.items()}
    files = load_adapter(sample(tmp_path, "linear"), weights=weights)
    assert {site.weight for site in files.sites.values()} == set(weights)
    assert list(files.adapters) == list(files.sites)
    assert files.notes == (() if not start else (f"names: the base's, with {start} in front",))


def test_a_prefix_too_many_is_found(tmp_path):
    tensors = {key.replace(PREFIX, f"{PREFIX}model."): a for key, a in SAMPLES["linear"][1].items()}
    folder = write(tmp_path, SAMPLES["linear"][0], tensors)
    files = load_adapter(folder, weights={name.removeprefix("m."): array for name, array in BASE.items()})
    assert files.notes == ("names: the base's, without model.",)
    assert "layers.0.q" in files.adapters


def test_two_places_for_an_adapter_are_refused(tmp_path):
    twice = {
        name.replace("m.", half): array for half in ("encoder.", "decoder.") for name, array in BASE.items()
    }
    folder = sample(tmp_path, "linear")
    refused(folder, r"names of one place in the base, got 'with decoder. .*encoder", weights=twice)
    fitting = twice | {"decoder.layers.0.v.weight": ones(2, 5)}  # only one of them has the shapes
    assert load_adapter(folder, weights=fitting).notes == ("names: the base's, with encoder. in front",)


def test_sites_that_the_base_lacks_are_named(tmp_path):
    folder = sample(tmp_path, "linear")
    less = {name: array for name, array in BASE.items() if "1.q" not in name}
    refused(folder, r"every site in the base, got 3 of 3 that are not there", weights=less)
    bare = {name.removeprefix("m."): array for name, array in less.items()}
    refused(folder, r"1 of 3 that are not there: 'layers.1.q.weight' \(did you mean", weights=bare)


def test_shapes_of_the_base_have_to_fit(tmp_path):
    wrong = {name.removeprefix("m."): array for name, array in BASE.items()} | {"layers.0.v.weight": ones(3, 6)}
    refused(
        sample(tmp_path, "linear"),
        r"'layers.0.v': expected layers.0.v.weight of \(3, 5\), by A and B, got \(3, 6\)",
        weights=wrong,
    )


def test_weights_that_lie_the_other_way_are_seen(tmp_path):
    turned = {name.removeprefix("m."): array.T for name, array in BASE.items()}
    files = load_adapter(sample(tmp_path, "linear"), weights=turned)
    assert all(site.transposed for site in files.sites.values())
    assert files.notes == ("3 weights lie the other way than the config says, 'layers.0.q' the first",)


def test_a_square_weight_lies_as_its_neighbours_do(tmp_path):
    tensors = linear("h.0.c") | linear("h.0.s", d_in=4, d_out=4) | linear("top", d_in=4, d_out=3)
    folder = write(tmp_path, {"target_modules": ["c", "s", "top"]}, tensors)
    weights = {"h.0.c.weight": ones(5, 4), "h.0.s.weight": ones(4, 4), "top.weight": ones(3, 4)}
    sites = load_adapter(folder, weights=weights).sites
    assert (sites["h.0.c"].transposed, sites["h.0.s"].transposed, sites["top"].transposed) == (
        True,
        True,
        False,
    )
    flat = {key.replace("h.0.", ""): array for key, array in tensors.items()}
    folder = write(tmp_path / "flat", {"target_modules": ["c", "s", "top"]}, flat)
    weights = {name.replace("h.0.", ""): array for name, array in weights.items()}
    refused(folder, "neighbours that tell how this square weight lies", weights=weights)


def test_the_order_of_parameters_is_found_by_shapes(tmp_path):
    said = {"target_modules": [], "target_parameters": ["e.outer", "e.inner"]}  # declared the other way round
    folder = write(tmp_path, said, experts("e"))
    weights = {"e.inner": ones(3, 8, 5), "e.outer": ones(3, 5, 4)}
    files = load_adapter(folder, weights=weights)
    assert files.adapters["e.inner"].A.shape == (6, 5)
    assert files.adapters["e.outer"].A.shape == (6, 4)


def test_rows_without_direction_are_counted_under_dora(tmp_path):
    tensors = linear("q", lora_magnitude_vector=ones(4))
    tensors[f"{PREFIX}q.lora_B.weight"] = np.array([[0, 0], [1, 2], [0, 0], [3, 1]], "float32")
    W = ones(4, 5)
    W[[0, 2]] = 0
    folder = write(tmp_path, Q | {"use_dora": True}, tensors)
    with pytest.raises(lx.ConfigError, match=r"^q: .*got 2 rows of zeros \(first: 0, 2\).*exclude_modules"):
        load_adapter(folder, weights={"q.weight": W})
    assert load_adapter(folder, weights={"q.weight": ones(4, 5)}).sites


def test_a_checkpoint_is_a_base(tmp_path):
    from lorax_np.io.checkpoint import open_checkpoint
    from lorax_np.io.writer import write_safetensors

    write_safetensors(tmp_path / "model.safetensors", {k.removeprefix("m."): v for k, v in BASE.items()})
    with_base = load_adapter(sample(tmp_path / "a", "linear"), weights=open_checkpoint(tmp_path))
    assert with_base.sites == load_adapter(tmp_path / "a").sites


# ---- saving ------------------------------------------------------------------------------------------------


def one(rank=2, value=1.0, dtype="float32"):
    A, B = np.full((rank, 5), value, dtype), np.full((4, rank), value, dtype)
    return {"q": lx.Adapter(A, B)}, lx.LoraConfig(r=rank, lora_alpha=3, target_modules=["q"])


def test_saved_files_are_those_of_the_format(tmp_path):
    adapters, config = one()
    save_adapter(tmp_path / "deep" / "down", adapters, config, metadata={"step": "7"})
    folder = tmp_path / "deep" / "down"
    assert sorted(path.name for path in folder.iterdir()) == [CARD, CONFIG, WEIGHTS]
    text = (folder / CONFIG).read_text(encoding="ascii")
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    assert json.loads(text)["inference_mode"] is True
    assert load_adapter(folder).metadata == {"format": "pt", "step": "7"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["down"]


def test_the_card_says_what_loading_needs(tmp_path):
    adapters, config = one()
    config = lx.LoraConfig(**{**vars(config), "task_type": "CAUSAL_LM", "base_model_name_or_path": 'a"b\n: c'})
    save_adapter(tmp_path, adapters, config)
    text = (tmp_path / CARD).read_text()
    front = text.split("---\n")[1]
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load(front)
    assert said["base_model"] == 'a"b\n: c'
    assert said["library_name"] == "peft"
    assert said["pipeline_tag"] == "text-generation"
    assert "lora" in said["tags"]
    assert "| scaling | 1.5 |" in text


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    adapters, config = one()
    save_adapter(tmp_path / "a", adapters, config, card=False)
    assert not (tmp_path / "a" / CARD).exists()
    save_adapter(tmp_path / "a", adapters, config)
    (tmp_path / "a" / CARD).write_text("mine")
    save_adapter(tmp_path / "a", adapters, config)
    assert (tmp_path / "a" / CARD).read_text() == "mine"


def test_what_else_is_there_stays_and_a_stale_pickle_goes(tmp_path):
    folder = tmp_path / "a"
    (folder / "other").mkdir(parents=True)
    (folder / "other" / CONFIG).write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "link").symlink_to("tokenizer.json")
    (folder / "adapter_model.bin").write_bytes(b"old")
    adapters, config = one()
    save_adapter(folder, adapters, config)
    save_adapter(folder, adapters, config)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [CARD, CONFIG, WEIGHTS, "link", "other", "tokenizer.json"]
    )
    assert (folder / "other" / CONFIG).read_text() == "{}"
    assert (folder / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_process_that_stands_in_the_directory_goes_on_there(tmp_path, monkeypatch):
    (tmp_path / "a" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "below")
    for rank in (2, 3):
        save_adapter("..", *one(rank))
        assert Path.cwd() == tmp_path / "a" / "below"
        assert load_adapter("..").sites["q"].r == rank


def test_the_mode_of_a_directory_stays(tmp_path):
    (tmp_path / "a").mkdir(mode=0o750)
    save_adapter(tmp_path / "a", *one())
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_adapter(tmp_path / "link", *one())
    assert (tmp_path / "link").is_symlink()
    assert load_adapter(tmp_path / "real").sites


BAD_SAVES = {
    "rank": (lambda a, c: (a, lx.LoraConfig(r=3, target_modules=["q"])), {}, "expected 3 rows"),
    "target": (lambda a, c: (a, lx.LoraConfig(r=2, target_modules=["v"])), {}, "where target_modules has them"),
    "name": (lambda a, c: ({"../q": a["q"]}, c), {}, "dotted names"),
    "saved": (lambda a, c: (a, c), {"saved": {"head.weight": ones(2, 2)}}, "no keys but those"),
    "sites": (lambda a, c: (a, c), {"sites": {}}, "sites: expected one for each adapter"),
    "embedding": (
        lambda a, c: ({"embed_tokens": a["q"]}, lx.LoraConfig(r=2, target_modules=["embed_tokens"])),
        {},
        "sites: expected the Site of 'embed_tokens', which may be an embedding's",
    ),
    "NaN": (lambda a, c: ({"q": lx.Adapter(a["q"].A * np.nan, a["q"].B)}, c), {}, "finite numbers"),
    "integer": (lambda a, c: (a, c), {"saved": {"q.bias": np.ones(4, "float32")}}, "no keys but those"),
    "start": (
        lambda a, c: (a, lx.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa")),
        {},
        "residual_base=True",
    ),
    "exotic": (lambda a, c: (a, lx.LoraConfig(r=2, use_qalora=True)), {}, "use_qalora"),
    "metadata": (lambda a, c: (a, c), {"metadata": {"a": 1}}, "metadata"),
}


@pytest.mark.parametrize("name", BAD_SAVES)
def test_a_save_that_fails_leaves_what_was_there(tmp_path, name):
    spoil, given, pattern = BAD_SAVES[name]
    adapters, config = one()
    save_adapter(tmp_path / "a", adapters, config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises((lx.ConfigError, lx.FormatError), match=pattern) as caught:
        save_adapter(tmp_path / "a", *spoil(adapters, config), **given)
    assert "\n" not in str(caught.value)
    assert ".part" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save_adapter(tmp_path / "a", *one())
    before = (tmp_path / "a" / WEIGHTS).read_bytes()
    from lorax_np.io import writer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_pwrite", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(tmp_path / "a", *one(3))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(lx.FormatError, match="a place for a directory, got a file"):
        save_adapter(tmp_path / "a", *one())
    assert (tmp_path / "a").read_text() == "mine"


def test_without_exchange_the_old_one_comes_back_on_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(replace, "exchange", lambda one, other: False)
    save_adapter(tmp_path / "a", *one())
    save_adapter(tmp_path / "a", *one(3))
    assert load_adapter(tmp_path / "a").sites["q"].r == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    rename = Path.rename

    def broken(self, target):
        if self.suffix == ".part" and Path(target).name == "a":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="Input/output"):
        save_adapter(tmp_path / "a", *one(4))
    monkeypatch.undo()
    assert load_adapter(tmp_path / "a").sites["q"].r == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


LOOP = """
import itertools, sys
import numpy as np
import lorax_np as lx
from lorax_np.io.peft import save_adapter
for i in itertools.count():
    r = 2 + i % 2
    A, B = np.full((r, 20000), float(r), "float32"), np.full((40000, r), float(r), "float32")
    save_adapter(sys.argv[1], {"q": lx.Adapter(A, B)}, lx.LoraConfig(r=r, target_modules=["q"]))
    print(r, flush=True)
"""


def test_killed_at_any_moment_an_adapter_is_the_old_or_the_new(tmp_path):
    """kill -9 in the midst of saves that replace one adapter by another, a handful of times."""
    rng, folder = np.random.default_rng(0), tmp_path / "a"
    seen = set()
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", LOOP, folder], stdout=subprocess.PIPE)
        process.stdout.readline()  # one is there
        time.sleep(float(rng.uniform(0, 0.08)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        files = load_adapter(folder)  # the config's rank and the weights' fit each other
        (adapter,), r = files.adapters.values(), files.sites["q"].r
        assert np.all(r == adapter.A)
        assert np.all(r == adapter.B)
        assert adapter.B.shape == (40000, r)
        seen.add(r)
    assert seen <= {2, 3}
    left = [path.name for path in tmp_path.iterdir() if path.name != "a"]
    assert all(re.fullmatch(r"\.a\.[0-9a-f]{8}\.part", name) for name in left)


# ---- regular expressions -----------------------------------------------------------------------------------

ATOMS = (
    "a",
    "b",
    ".",
    r"\d",
    "[ab]",
    "[^a]",
    "1",
    r"\.",
    "$",
    "^",
    r"\b",
    r"\B",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
    r"\w",
)
atoms = st.sampled_from(ATOMS)
repeats = st.sampled_from(("", "", "*", "+", "?", "{1,2}", "{2}", "*?", "{2,}"))
patterns = st.recursive(
    atoms,
    lambda part: st.tuples(st.lists(part, min_size=1, max_size=3), repeats, st.booleans()).map(
        lambda given: "(" + ("|" if given[2] else "").join(given[0]) + ")" + given[1]
    ),
    max_leaves=8,
)


@given(st.lists(patterns, max_size=3).map("".join), st.text("ab1.", max_size=7))
def test_regular_expressions_answer_as_re_does(pattern, text):
    try:
        known = re.compile(pattern)
    except re.error:
        with pytest.raises(lx.ConfigError):
            Regex(pattern)
        return
    regex = Regex(pattern)
    assert regex.match(text) == bool(known.match(text))
    assert regex.fullmatch(text) == bool(known.fullmatch(text))


@pytest.mark.parametrize(
    "pattern", ["(a)\\1", "(?>a)b", "a*+", "(?i)a", "(?i:a)b", "(?a)a", "(?(1)a|b)", "a" * 4001]
)
def test_what_is_not_followed_is_refused(pattern):
    with pytest.raises(lx.ConfigError, match="regular expression: expected") as caught:
        Regex(pattern).match("ab")
    assert "\n" not in str(caught.value)


def test_steps_are_counted():
    with pytest.raises(lx.ConfigError, match="fewer steps"):
        Regex("((a|b)*c|d*)*x", Budget(1000)).match("abcd" * 100)


# ---- faults by the thousand --------------------------------------------------------------------------------


def test_hostile_directories_are_refused_or_read_rightly():
    """A few hundred of what tests/io/fuzz_adapters.py tries, in a process whose memory is watched."""
    script = HERE / "fuzz_adapters.py"
    done = subprocess.run([sys.executable, script, "300", "7"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'FormatError'" in done.stdout
    assert "'loaded'" in done.stdout
