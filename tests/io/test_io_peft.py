"""Adapter directories, read: what comes of them, what is refused and in which words, and what is noted."""

import json
import os
import pickle
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
from lorax_np.io.peft import load_adapter, save_adapter
from lorax_np.io.peft.keys import key_of, plain_key

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
HERE = Path(__file__).parent


def refused(folder, pattern, error=lx.FormatError, **given):
    with pytest.raises(error, match=pattern) as caught:
        load_adapter(folder, **given)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


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
    "bias of B's length": (
        Q | {"lora_bias": True},
        linear("q", **{"lora_B.bias": normals(5)}),
        r"lora_B.bias': expected \(4,\), got \(5,\)",
    ),
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
    "patterns by sites": (
        Q | {"rank_pattern": {f"k{i}": 2 for i in range(9999)}},
        {key: a for i in range(2001) for key, a in linear(f"{i}.q", d_in=1, d_out=1).items()},
        "fewer keys in patterns for 2001 sites, got 9999",
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
    "a name twice": (
        Q | {"bias": "all"},
        linear("q") | {f"{PREFIX}n.bias": normals(4), f"{PREFIX}n.base_layer.bias": normals(4)},
        "expected 'n.bias' once, got .*n.base_layer.bias' and .*n.bias'",
    ),
    "a part twice": (Q, linear("q") | embedding("q"), "'q': expected one A, got .*lora_A.* and .*embedding_A"),
    "base_layer without a wrapper": (
        Q,
        linear("x.base_layer.q"),
        "expected the key 'base_model.model.x.q.lora_A.weight', got 'base_model.model.x.base_layer.q",
    ),
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
    "many keys": (
        json.dumps({"peft_type": "LORA", "rank_pattern": {f"k{i}": 2 for i in range(10_001)}}),
        "at most 10000 keys in patterns, got 10001",
    ),
    "many expressions": (
        json.dumps({"peft_type": "LORA", "rank_pattern": {f"k{i}.*": 2 for i in range(1001)}}),
        "at most 1000 keys in patterns that are no names",
    ),
    "many characters": (
        json.dumps({"peft_type": "LORA", "alpha_pattern": {"k" * 3999 + str(i): 2 for i in range(130)}}),
        "at most 500000 characters of regular expressions",
    ),
    "large": (
        '{"peft_type": "LORA", "auto_mapping": {"a": "' + "x" * (1 << 24) + '"}}',
        "at most 16777216 bytes",
    ),
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
    (folder / WEIGHTS).rename(folder / "adapter_model.pt")
    refused(folder / "adapter_model.pt", r"adapter directory, got a pickle.*torch.load\(weights_only=True\)")
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


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_starts_that_leave_another_base_want_it(tmp_path, start):
    loftq = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if start == "loftq" else {}
    said = Q | {"init_lora_weights": start} | loftq
    folder = write(tmp_path / "alone", said, linear("q"))
    refused(
        folder, rf"init_lora_weights='{start}': expected the base weights that this start left, got none at 'q'"
    )
    assert load_adapter(folder, residual_base=True).sites
    files = load_adapter(write(tmp_path / "both", said, linear("q", **{"base_layer.weight": normals(4, 5)})))
    assert list(files.saved) == ["q.weight"]


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_other_starts_are_right_beside_the_original(tmp_path, start):
    assert load_adapter(write(tmp_path, Q | {"init_lora_weights": start}, linear("q"))).sites


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


# ---- faults by the thousand --------------------------------------------------------------------------------


def test_hostile_directories_are_refused_or_read_rightly():
    """A few hundred of what tests/io/fuzz_adapters.py tries, in a process whose memory is watched."""
    script = HERE / "fuzz_adapters.py"
    done = subprocess.run([sys.executable, script, "300", "7"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'FormatError'" in done.stdout
    assert "'loaded'" in done.stdout
