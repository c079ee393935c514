"""GGUF models under Hugging Face's names: the table, the order of rows, the config, and what is refused."""

import re

import numpy as np
import pytest

from lorax_np.errors import FormatError
from lorax_np.io.gguf import open_gguf
from lorax_np.io.gguf_names import (
    FAMILIES,
    LAYER,
    TOP,
    ggml_module,
    heads_of,
    hf_module,
    hf_weights,
    to_ggml_rows,
    to_hf_rows,
)
from lorax_np.io.gguf_writer import write_gguf

HEADS, KV, HEAD, D, FF, VOCAB = 4, 2, 6, 10, 14, 17
SHAPES = {
    "attn_q.weight": (HEADS * HEAD, D),
    "attn_k.weight": (KV * HEAD, D),
    "attn_v.weight": (KV * HEAD, D),
    "attn_output.weight": (D, HEADS * HEAD),
    "attn_norm.weight": (D,),
    "ffn_norm.weight": (D,),
    "ffn_gate.weight": (FF, D),
    "ffn_up.weight": (FF, D),
    "ffn_down.weight": (D, FF),
}


def metadata(architecture="llama", **changes):
    found = {
        "general.architecture": ("string", architecture),
        f"{architecture}.embedding_length": ("uint32", D),
        f"{architecture}.feed_forward_length": ("uint32", FF),
        f"{architecture}.block_count": ("uint32", 2),
        f"{architecture}.attention.head_count": ("uint32", HEADS),
        f"{architecture}.attention.head_count_kv": ("uint32", KV),
        f"{architecture}.attention.key_length": ("uint32", HEAD),
        f"{architecture}.context_length": ("uint32", 64),
        f"{architecture}.attention.layer_norm_rms_epsilon": ("float32", 1e-6),
    } | changes
    return {key: pair for key, pair in found.items() if pair is not None}


def tensors(**more):
    draw = np.random.default_rng(1).standard_normal
    shapes = {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,)}
    shapes |= {f"blk.{n}.{name}": shape for n in range(2) for name, shape in SHAPES.items()} | more
    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items() if shape}


def model(folder, pairs=None, arrays=None):
    write_gguf(
        folder / "m.gguf", metadata() if pairs is None else pairs, tensors() if arrays is None else arrays
    )
    return hf_weights(open_gguf(folder / "m.gguf"))


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_the_table_is_the_gguf_packages(architecture):
    gguf = pytest.importorskip("gguf", reason="the oracle gguf is not installed")
    arch = gguf.MODEL_ARCH[architecture.upper()]
    table = gguf.get_tensor_name_map(arch, 12)
    ours = {f"blk.11.{name}": f"model.layers.11.{theirs}" for name, theirs in LAYER.items()} | TOP
    known = {table.get_name(theirs): theirs for theirs in ours.values() if table.get_name(theirs)}
    assert len(known) >= len(ours) - 2  # q_norm and k_norm are qwen3's
    for name, theirs in known.items():
        assert ours[name] == theirs
        assert hf_module(name) == theirs
        assert ggml_module(theirs) == name


def test_other_names_have_none():
    for name in (
        "blk.0.ffn_gate_exps",
        "blk.x.attn_q",
        "blk.0.attn_q.weight",
        "rope_freqs",
        "blk.٣.attn_q",
        "",
    ):
        assert hf_module(name) is None
    for name in ("model.layers.0.mlp.experts", "model.layers.0.q_proj", "model.layers.٣.mlp.up_proj", "blk.0"):
        assert ggml_module(name) is None


@pytest.mark.parametrize(("heads", "half"), [(1, 1), (3, 2), (4, 5)])
@pytest.mark.parametrize("tail", [(), (7,), (3, 2)])
def test_partners_become_neighbours(heads, half, tail):
    """(gguf.4), said another way: row j of head n comes from i = j//2 in the half j % 2."""
    rows = np.random.default_rng(0).standard_normal((heads * 2 * half, *tail))
    rows.flags.writeable = False
    got = to_ggml_rows(rows, heads)
    for n in range(heads):
        for j in range(2 * half):
            assert np.array_equal(got[n * 2 * half + j], rows[n * 2 * half + (j % 2) * half + j // 2])
    assert np.array_equal(to_hf_rows(got, heads), rows)


@pytest.mark.parametrize(("rows", "heads"), [(8, 3), (6, 2), (4, 0), (4, 8)])
def test_rows_that_are_no_heads_are_refused(rows, heads):
    for turn in (to_ggml_rows, to_hf_rows):
        with pytest.raises(
            FormatError, match=rf"^rows: expected {heads} heads of one even size, got {rows} rows$"
        ):
            turn(np.ones(rows), heads)


def test_rotary_scores_are_the_same_in_both_orders():
    """(gguf.4): neighbours turned in ggml's order give the scores that halves turned in Hugging Face's do."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 2 * HEAD))
    angles = rng.uniform(0, 3, HEAD // 2)
    turn = np.exp(1j * angles)

    def halves(x):
        x = x.reshape(2, 2, HEAD // 2)
        z = (x[:, 0] + 1j * x[:, 1]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    def neighbours(x):
        x = x.reshape(2, HEAD // 2, 2)
        z = (x[..., 0] + 1j * x[..., 1]) * turn
        return np.stack([z.real, z.imag], axis=2).reshape(2, HEAD)

    want = np.sum(halves(q) * k.reshape(2, HEAD), axis=1)
    got = np.sum(neighbours(to_ggml_rows(q, 2)) * to_ggml_rows(k, 2).reshape(2, HEAD), axis=1)
    wrong = np.sum(neighbours(q) * k.reshape(2, HEAD), axis=1)
    assert np.abs(got - want).max() <= 8 * HEAD * np.finfo(float).eps * np.abs(q).max() * np.abs(k).max()
    assert np.abs(wrong - want).max() > 0.1


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_q_and_k_and_their_biases_are_permuted_in_llama_alone(tmp_path, architecture):
    arrays = tensors(**{"blk.0.attn_q.bias": (HEADS * HEAD,), "blk.0.attn_k.bias": (KV * HEAD,)})
    weights = model(tmp_path, metadata(architecture), arrays)
    for name in weights:
        source, got = weights.source(name), weights[name]
        want = arrays[source]
        heads = {"attn_q": HEADS, "attn_k": KV}.get(source.split(".")[-2])
        if heads and architecture == "llama":
            assert np.array_equal(to_ggml_rows(got, heads), want)
            assert not np.array_equal(got, want)
        else:
            assert np.array_equal(got, want)
        assert got.shape == weights.shape(name)
        assert not got.flags.writeable
    assert weights.config["attention_bias"] is True
    assert weights.config["architectures"] == [FAMILIES[architecture].name]


def test_the_config(tmp_path):
    weights = model(tmp_path)
    assert len(weights) == len(weights.names) == 2 + 2 * len(SHAPES)
    assert "model.norm.weight" in weights
    assert weights.config["rms_norm_eps"] == 1e-6
    assert weights.config["rope_theta"] == 10000.0
    assert weights.config["vocab_size"] == VOCAB
    assert weights.config["head_dim"] == HEAD
    assert weights.config["tie_word_embeddings"] is True
    assert "rope_scaling" not in weights.config
    with pytest.raises(KeyError, match=r"no tensor named 'lm_head\.weight'"):
        _ = weights["lm_head.weight"]


def test_untied_models_and_scaled_positions(tmp_path):
    arrays = tensors(**{"output.weight": (VOCAB, D), "rope_freqs.weight": (HEAD // 2,)})
    weights = model(tmp_path, None, arrays)
    assert weights.config["tie_word_embeddings"] is False
    assert np.array_equal(weights["lm_head.weight"], arrays["output.weight"])
    assert weights.left == ("rope_freqs.weight",)
    assert weights.config["rope_scaling"] == {"rope_type": "gguf"}
    linear = {"llama.rope.scaling.type": ("string", "linear"), "llama.rope.scaling.factor": ("float32", 2.5)}
    assert model(tmp_path, metadata(**linear)).config["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}


def test_no_heads_of_keys_means_as_many_as_heads(tmp_path):
    changes = {"llama.attention.head_count_kv": None, "llama.attention.key_length": None}
    changes["llama.rope.dimension_count"] = ("uint32", HEAD)
    arrays = tensors(**{f"blk.{n}.attn_{x}.weight": (HEADS * HEAD, D) for n in range(2) for x in "kv"})
    weights = model(tmp_path, metadata(**changes), arrays)
    assert weights.config["num_key_value_heads"] == HEADS
    assert weights.config["head_dim"] == HEAD
    assert heads_of("model.layers.0.self_attn.v_proj", weights.config) is None


@pytest.mark.parametrize(
    ("pairs", "more", "words"),
    [
        ({"general.type": ("string", "adapter")}, {}, "general.type: expected a model, got 'adapter'"),
        ({"split.count": ("uint16", 2)}, {}, "split.count: expected a whole model in one file, got 2"),
        ({"general.architecture": ("string", "gemma")}, {}, "expected one of llama, qwen2, qwen3, got 'gemma'"),
        ({"general.architecture": None}, {}, "expected one of llama, qwen2, qwen3, got None"),
        (
            {},
            {"blk.0.ffn_gate_exps.weight": (2, 3, 4)},
            "'blk.0.ffn_gate_exps.weight': expected a tensor of llama",
        ),
        ({}, {"blk.0.attn_q.scale": (3,)}, "'blk.0.attn_q.scale': expected a tensor of llama that has a name"),
        ({"llama.block_count": None}, {}, "llama.block_count: expected a number, got none"),
        ({"llama.block_count": ("string", "2")}, {}, "llama.block_count: expected a number, got '2'"),
        ({"llama.attention.head_count": ("array of uint32", [4, 4])}, {}, "expected a number, got [4, 4]"),
        ({"llama.rope.freq_base": ("float32", float("inf"))}, {}, "rope.freq_base: expected a number, got inf"),
        (
            {"llama.attention.head_count": ("uint32", 0)},
            {},
            "'blk.0.attn_q.weight': expected 0 heads of 6 rows",
        ),
        (
            {"llama.attention.head_count": ("uint32", 3)},
            {},
            "'blk.0.attn_q.weight': expected 3 heads of 6 rows",
        ),
        ({"llama.attention.head_count_kv": ("uint32", 4)}, {}, "'blk.0.attn_k.weight': expected 4 heads of 6"),
    ],
)
def test_what_has_no_table_is_refused(tmp_path, pairs, more, words):
    with pytest.raises(FormatError, match=re.escape(words)) as caught:
        model(tmp_path, metadata(**pairs), tensors(**more))
    assert str(caught.value).startswith(f"{tmp_path / 'm.gguf'}: ")
