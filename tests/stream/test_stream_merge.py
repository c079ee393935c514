"""A checkpoint merged file by file, against lorax_np.merge of each weight as a whole."""

import json
from fractions import Fraction

import numpy as np
import pytest
from checkers import nearest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import DTYPES, content, factors, read, weights, write_adapter, write_checkpoint

import lorax_np as lx
from lorax_np import open_safetensors
from lorax_np.backend import cast
from lorax_np.io.checkpoint import open_checkpoint
from lorax_np.io.gguf_writer import write_gguf
from lorax_np.stream import work
from lorax_np.stream.merge import merge_checkpoint, unmerge_checkpoint
from lorax_np.stream.update import DEEPEST, Scratch, adding, rounded

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
S = 5 / 3


def sites(tensors, ends=PROJECTIONS):
    return [
        name.removesuffix(".weight") for name in tensors if name.endswith(tuple(f"{e}.weight" for e in ends))
    ]


def same(got, want):
    """Equal, bit for bit, dtype included."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    return got.tobytes() == np.ascontiguousarray(want).tobytes()


def pair(
    tmp_path, dtype="bfloat16", *, seed=0, shards=1, dora=False, bB=False, adapter_dtype=np.float32, **more
):
    """A checkpoint, an adapter on all its projections, and what merge makes of them."""
    rng = np.random.default_rng(seed)
    tensors = weights(rng, dtype, **more)
    parts = {
        site: factors(
            rng,
            tensors[f"{site}.weight"].shape,
            3,
            dtype=adapter_dtype,
            dora=dora,
            bB=bB,
        )
        for site in sites(tensors)
    }
    base = write_checkpoint(tmp_path / "base", tensors, shards=shards)
    adapter = write_adapter(
        tmp_path / "adapter", parts, target_modules=PROJECTIONS, use_dora=dora, lora_bias=bB, lora_alpha=5
    )
    want = dict(tensors)
    for site, part in parts.items():
        record = lx.Adapter(
            part["lora_A.weight"],
            part["lora_B.weight"],
            m=part.get("lora_magnitude_vector"),
            bB=part.get("lora_B.bias"),
        )
        merged = lx.merge(lx.Linear(tensors[f"{site}.weight"], tensors.get(f"{site}.bias")), record, scaling=S)
        want[f"{site}.weight"] = merged.W
        if f"{site}.bias" in tensors:
            want[f"{site}.bias"] = merged.b
    return base, adapter, want


@pytest.fixture(params=[1 << 17, 200], ids=["whole", "blocks"])
def blocks(request, monkeypatch):
    """Weights in one block, and in blocks of a few rows, several to a unit."""
    monkeypatch.setattr(work, "BLOCK", request.param)
    monkeypatch.setattr(work, "UNIT", 4 * request.param if request.param < 1000 else work.UNIT)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_values_are_those_of_merge(tmp_path, blocks, dtype, dora, shards):
    base, adapter, want = pair(tmp_path, dtype, dora=dora, bB=not dora, shards=shards)
    before = content(base)
    found = merge_checkpoint(base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    assert list(got) == list(read(base))
    assert [name for name in want if not same(got[name], want[name])] == []
    assert content(base) == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == set(before) == set(found.files)
    for name in ("config.json", "tokenizer.json"):
        assert content(tmp_path / "out")[name] == before[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


# ---- other kinds of sites, each against merge of the weight seen as a linear layer's ------------------------


def merged(W, part, s=S):
    """What merge makes of a weight (d_out, d_in)."""
    A, B = part["A"], part["B"]
    return lx.merge(lx.Linear(W), lx.Adapter(A, B, m=part.get("m")), scaling=s).W


def close(got, want, dtype):
    """Equal bit for bit; in float64 within the roundings that norms summed in another order may differ by."""
    if dtype == "float64":
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2**-49)
        return True
    return same(got, want)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(tmp_path, blocks, dtype, dora):
    rng = np.random.default_rng(1)
    tensors = weights(rng, dtype)
    vocab, dim = tensors["model.embed_tokens.weight"].shape
    part = {
        "lora_embedding_A": rng.standard_normal((3, vocab)).astype(np.float32),
        "lora_embedding_B": rng.standard_normal((dim, 3)).astype(np.float32),
    }
    if dora:
        part["lora_magnitude_vector"] = rng.uniform(0.5, 2, dim).astype(np.float32)
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = write_adapter(
        tmp_path / "adapter", {"model.embed_tokens": part}, target_modules=["embed_tokens"], use_dora=dora
    )
    merge_checkpoint(base, adapter, tmp_path / "out")
    A, B, m = (part.get(key) for key in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"))
    want = merged(tensors["model.embed_tokens.weight"].T, {"A": A, "B": B, "m": m}).T
    got = read(tmp_path / "out")
    assert close(got["model.embed_tokens.weight"], want, dtype if dora else "")
    assert same(got["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv1d_lies_the_other_way(tmp_path, blocks, dtype, dora):
    """GPT-2's Conv1D: (d_in, d_out) on the disk; the prefix of a model with a head is not in the checkpoint."""
    rng = np.random.default_rng(2)
    tensors = {
        "h.0.attn.c_attn.weight": rng.standard_normal((24, 72)).astype(DTYPES[dtype]),
        "h.0.attn.c_attn.bias": rng.standard_normal(72).astype(DTYPES[dtype]),
        "wte.weight": rng.standard_normal((10, 24)).astype(DTYPES[dtype]),
    }
    part = factors(rng, (72, 24), 3, dora=dora, bB=not dora)
    base = write_checkpoint(tmp_path / "base", tensors, config={"architectures": ["GPT2LMHeadModel"]})
    adapter = write_adapter(
        tmp_path / "adapter",
        {"transformer.h.0.attn.c_attn": part},
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        use_dora=dora,
        lora_bias=not dora,
    )
    found = merge_checkpoint(base, adapter, tmp_path / "out")
    record = lx.Adapter(
        part["lora_A.weight"],
        part["lora_B.weight"],
        part.get("lora_magnitude_vector"),
        bB=part.get("lora_B.bias"),
    )
    want = lx.merge(
        lx.Linear(tensors["h.0.attn.c_attn.weight"].T, tensors["h.0.attn.c_attn.bias"]), record, scaling=S
    )
    got = read(tmp_path / "out")
    assert close(got["h.0.attn.c_attn.weight"], want.W.T, dtype if dora else "")
    assert same(got["h.0.attn.c_attn.bias"], want.b)
    assert "tie_word_embeddings" not in (tmp_path / "out" / "config.json").read_text()
    assert set(found.changed) == {"h.0.attn.c_attn.weight"} | (set() if dora else {"h.0.attn.c_attn.bias"})


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 1, 3)])
def test_convolutions(tmp_path, blocks, kernel, dora):
    rng = np.random.default_rng(3)
    W = rng.standard_normal((16, 5, *kernel)).astype(np.float32)
    ones = (1,) * len(kernel)
    A, B = rng.standard_normal((3, 5, *kernel)), rng.standard_normal((16, 3, *ones))
    part = {"lora_A.weight": A.astype(np.float32), "lora_B.weight": B.astype(np.float32)}
    m = rng.uniform(0.5, 2, 16).astype(np.float32)
    if dora:
        part["lora_magnitude_vector"] = m.reshape(1, 16, *ones)
    base = write_checkpoint(tmp_path / "base", {"down.conv.weight": W, "other": np.ones(3, np.float32)})
    adapter = write_adapter(tmp_path / "adapter", {"down.conv": part}, target_modules=["conv"], use_dora=dora)
    merge_checkpoint(base, adapter, tmp_path / "out")
    flat = {"A": part["lora_A.weight"].reshape(3, -1), "B": part["lora_B.weight"].reshape(16, 3)}
    want = merged(W.reshape(16, -1), flat | ({"m": m} if dora else {})).reshape(W.shape)
    assert same(read(tmp_path / "out")["down.conv.weight"], want)


def test_a_convolution_in_groups_is_refused(tmp_path):
    rng = np.random.default_rng(4)
    W = rng.standard_normal((8, 2, 3)).astype(np.float32)  # four input channels in two groups
    A, B = rng.standard_normal((4, 4, 3)), rng.standard_normal((8, 2, 1))
    base = write_checkpoint(tmp_path / "base", {"conv.weight": W})
    part = {"lora_A.weight": A.astype(np.float32), "lora_B.weight": B.astype(np.float32)}
    adapter = write_adapter(tmp_path / "adapter", {"conv": part}, target_modules=["conv"], r=4)
    with pytest.raises(lx.ConfigError, match=r"conv: groups: expected 1 to merge, .*, got 2"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(tmp_path, blocks, dtype, transposed):
    rng = np.random.default_rng(5)
    E, d_out, d_in, r = 4, 24, 16, 3
    W = rng.standard_normal((E, d_in, d_out) if transposed else (E, d_out, d_in)).astype(DTYPES[dtype])
    A = rng.standard_normal((r * E, d_in)).astype(np.float32)
    B = rng.standard_normal((d_out, r * E)).astype(np.float32)
    base = write_checkpoint(tmp_path / "base", {"mlp.experts.gate_up_proj": W})
    part = {"lora_A.weight": A, "lora_B.weight": B}
    adapter = write_adapter(
        tmp_path / "adapter",
        {"mlp.experts": part},
        target_modules=[],
        target_parameters=["experts.gate_up_proj"],
    )
    merge_checkpoint(base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")["mlp.experts.gate_up_proj"]
    for e in range(E):  # A is expert-slowest, B expert-fastest
        one = {"A": A.reshape(E, r, d_in)[e], "B": B.reshape(d_out, r, E)[:, :, e]}
        want = merged(W[e].T if transposed else W[e], one)
        assert same(got[e], want.T if transposed else want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("r", [1, 16, 130, 400])
@pytest.mark.parametrize("with_blas", [True, False])
def test_a_power_of_two_as_scaling(tmp_path, monkeypatch, blocks, r, dtype, with_blas):
    """A product that is added where it is made has the bits of one that is written down before."""
    if not with_blas:
        monkeypatch.setattr("lorax_np.stream.update.adding", lambda: None)
    rng = np.random.default_rng(r)
    tensors = weights(rng, dtype, layers=1)
    site = "model.layers.0.mlp.up_proj"
    part = factors(rng, (40, 24), r)
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = write_adapter(
        tmp_path / "adapter", {site: part}, target_modules=["up_proj"], r=r, lora_alpha=2 * r
    )
    merge_checkpoint(base, adapter, tmp_path / "out")
    record = lx.Adapter(part["lora_A.weight"], part["lora_B.weight"])
    want = lx.merge(lx.Linear(tensors[f"{site}.weight"]), record, scaling=2.0).W
    assert same(read(tmp_path / "out")[f"{site}.weight"], want)


def test_adding_a_product_has_the_bits_of_two_steps_up_to_the_rank_that_is_said():
    """Beyond some rank a BLAS cuts sums in two, which the bound keeps away from."""
    multiply = adding()
    if multiply is None:  # a BLAS whose bits are others, or that cannot be reached: two steps are taken
        return
    draw = np.random.default_rng(0).standard_normal
    for rows, cols in ((2, 2), (8, 33), (41, 130), (64, 512)):
        for r in (1, 2, 7, 64, DEEPEST):
            for L, R in ((draw((rows, r)), draw((r, cols))), (draw((r, rows)).T, draw((cols, r)).T)):
                V = draw((rows, cols))
                want = V + L @ R
                multiply(L, R, V, 1.0, 1.0)
                assert np.array_equal(V, want), (rows, cols, r)


# ---- what stands in, and what is tied ----------------------------------------------------------------------


def test_saved_modules_biases_and_a_new_head(tmp_path):
    rng = np.random.default_rng(6)
    tensors = weights(rng)
    q = "model.layers.0.self_attn.q_proj"
    parts = {
        q: factors(rng, (24, 24), 3) | {"base_layer.bias": rng.standard_normal(24).astype(np.float32)},
        "lm_head.weight": rng.standard_normal((56, 24)).astype(np.float32),
        "score.weight": rng.standard_normal((2, 24)).astype(np.float32),
    }
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = write_adapter(
        tmp_path / "adapter",
        parts,
        target_modules=["layers.0.self_attn.q_proj"],
        modules_to_save=["lm_head", "score"],
        bias="lora_only",
    )
    found = merge_checkpoint(base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    bf16 = DTYPES["bfloat16"]
    assert same(got["lm_head.weight"], parts["lm_head.weight"].astype(bf16))
    assert same(got["score.weight"], parts["score.weight"].astype(bf16))
    assert same(got[f"{q}.bias"], parts[q]["base_layer.bias"].astype(bf16))
    record = {"A": parts[q]["lora_A.weight"], "B": parts[q]["lora_B.weight"]}
    assert same(got[f"{q}.weight"], merged(tensors[f"{q}.weight"], record))
    assert any("score.weight" in note for note in found.notes)


def test_trained_rows_of_an_embedding(tmp_path, blocks):
    rng = np.random.default_rng(7)
    tensors = weights(rng)
    rows = rng.standard_normal((3, 24)).astype(np.float32)
    parts = {
        "model.layers.0.self_attn.q_proj": factors(rng, (24, 24), 3),
        "model.embed_tokens.token_adapter.trainable_tokens_delta": rows,
    }
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = write_adapter(
        tmp_path / "adapter",
        parts,
        target_modules=["layers.0.self_attn.q_proj"],
        trainable_token_indices=[40, 3, 17],
    )
    merge_checkpoint(base, adapter, tmp_path / "out")
    want = tensors["model.embed_tokens.weight"].copy()
    want[[40, 3, 17]] = rows.astype(want.dtype)
    assert same(read(tmp_path / "out")["model.embed_tokens.weight"], want)


@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {"architectures": ["LlamaForCausalLM"]}])
@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("shards", [1, 2])
def test_two_ends_that_were_one_tensor(tmp_path, end, said, shards):
    """The end that the adapter leaves alone keeps its values: the model computes what base and adapter did."""
    rng = np.random.default_rng(8)
    tensors = weights(rng, head=False)
    old = tensors["model.embed_tokens.weight"]
    if end == "lm_head":
        part = factors(rng, old.shape, 3)
        parts, want = {end: part}, merged(old, {"A": part["lora_A.weight"], "B": part["lora_B.weight"]})
    else:
        A, B = rng.standard_normal((3, 56)).astype(np.float32), rng.standard_normal((24, 3)).astype(np.float32)
        parts = {f"model.{end}": {"lora_embedding_A": A, "lora_embedding_B": B}}
        want = merged(old.T, {"A": A, "B": B}).T
    base = write_checkpoint(tmp_path / "base", tensors, config=said, shards=shards)
    adapter = write_adapter(tmp_path / "adapter", parts, target_modules=[end])
    found = merge_checkpoint(base, adapter, tmp_path / "out")
    got = read(tmp_path / "out")
    assert same(got["lm_head.weight"], want if end == "lm_head" else old)
    assert same(got["model.embed_tokens.weight"], old if end == "lm_head" else want)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.config == {"model_type": "llama", "torch_dtype": "x", **said, "tie_word_embeddings": False}
    assert any("they are two now" in note for note in found.notes)


def stacks(rng, prefix="", head=False, sides=("encoder", "decoder"), own=()):
    """A small model of two stacks that share their input embedding."""
    shapes = {f"{prefix}shared.weight": (56, 24)} | ({"lm_head.weight": (56, 24)} if head else {})
    shapes |= {f"{prefix}{side}.block.0.q.weight": (24, 24) for side in sides}
    made = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    return made | {f"{prefix}{side}.embed_tokens.weight": made[f"{prefix}shared.weight"] for side in own}


def embedding(rng):
    """A and B of an embedding's adapter."""
    A, B = rng.standard_normal((3, 56)).astype(np.float32), rng.standard_normal((24, 3)).astype(np.float32)
    return {"lora_embedding_A": A, "lora_embedding_B": B}


STACKS = [  # prefix, config, the module that is adapted, which names the change reaches, tied head
    ("", {"model_type": "t5"}, "encoder.embed_tokens", {"encoder.embed_tokens"}, True),
    (
        "",
        {"model_type": "t5", "tie_word_embeddings": True},
        "decoder.embed_tokens",
        {"decoder.embed_tokens"},
        True,
    ),
    ("", {"model_type": "umt5"}, "shared", {"shared", "encoder.embed_tokens", "decoder.embed_tokens"}, True),
    ("", {"model_type": "mt5"}, "lm_head", {"lm_head"}, True),
    ("", {"model_type": "udop"}, "lm_head", {"lm_head"}, True),
    (
        "",
        {"model_type": "t5", "tie_word_embeddings": False},
        "encoder.embed_tokens",
        {"encoder.embed_tokens"},
        False,
    ),
    ("", {"model_type": "t5", "tie_word_embeddings": False}, "lm_head", {"lm_head"}, False),
    ("model.", {"model_type": "bart"}, "model.decoder.embed_tokens", {"model.decoder.embed_tokens"}, True),
    ("model.", {"model_type": "bart", "tie_word_embeddings": True}, "lm_head", {"lm_head"}, True),
]


@pytest.mark.parametrize("own", [(), ("encoder", "decoder")], ids=["once", "copies"])
@pytest.mark.parametrize(("prefix", "said", "module", "reached", "tied"), STACKS)
def test_two_stacks_that_share_their_embedding(tmp_path, prefix, said, module, reached, tied, own):
    """What the adapter does not reach keeps its values, and the way back is to the byte."""
    rng = np.random.default_rng(4)
    tensors = stacks(rng, prefix, head=not tied, own=own)
    said = {"architectures": ["XForConditionalGeneration"], **said}
    base = write_checkpoint(tmp_path / "base", tensors, config=said)
    part = factors(rng, (56, 24), 3) if module == "lm_head" else embedding(rng)
    adapter = write_adapter(tmp_path / "adapter", {module: part}, target_modules=[module])
    found = merge_checkpoint(base, adapter, tmp_path / "out")
    got, shared = read(tmp_path / "out"), tensors[f"{prefix}shared.weight"]
    names = ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]
    for name in [*(prefix + name for name in names), "lm_head"]:
        old = tensors.get(f"{name}.weight", shared)
        if name in reached and module == "lm_head":
            old = merged(old, {"A": part["lora_A.weight"], "B": part["lora_B.weight"]})
        elif name in reached:
            old = merged(old.T, {"A": part["lora_embedding_A"], "B": part["lora_embedding_B"]}).T
        if f"{name}.weight" in got or tied:
            assert same(got[f"{name}.weight"], old), name
        else:
            assert name not in reached
    config = open_checkpoint(tmp_path / "out").config
    if tied and said["model_type"] != "udop":
        assert config["tie_word_embeddings"] is False
        assert config.get("scale_decoder_outputs") is (True if said["model_type"] in ("t5", "umt5") else None)
    else:
        assert config == {"torch_dtype": "x", **said}
    assert any(f"the adapter changes {module}.weight: they are" in note for note in found.notes) == (
        tied or module != "lm_head"
    )
    unmerge_checkpoint(tmp_path / "out", adapter, tmp_path / "back", original=base)
    assert content(tmp_path / "back")["model.safetensors"] == content(base)["model.safetensors"]


def test_what_two_stacks_share_may_change_alone_for_both(tmp_path):
    """With a head of its own nothing is told apart; an encoder has no head to keep."""
    rng = np.random.default_rng(5)
    for name, sides, head, said in (
        ("v1_1", ("encoder", "decoder"), True, {"model_type": "t5", "tie_word_embeddings": False}),
        ("encoder", ("encoder",), False, {"tie_word_embeddings": True, "architectures": ["T5EncoderModel"]}),
    ):
        tensors = stacks(rng, head=head, sides=sides)
        base = write_checkpoint(tmp_path / name / "base", tensors, config=said)
        part = {"shared": embedding(rng)}
        adapter = write_adapter(tmp_path / name / "adapter", part, target_modules=["shared"])
        merge_checkpoint(base, adapter, tmp_path / name / "out")
        got = read(tmp_path / name / "out")
        assert got.keys() == tensors.keys()
        assert not same(got["shared.weight"], tensors["shared.weight"])
        assert content(tmp_path / name / "out")["config.json"] == content(base)["config.json"]


def test_ends_that_are_tied_and_untouched_stay_so(tmp_path):
    rng = np.random.default_rng(9)
    tensors = weights(rng, head=False)
    base = write_checkpoint(tmp_path / "base", tensors, config={"tie_word_embeddings": True})
    q = "model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "adapter", {q: factors(rng, (24, 24), 3)}, target_modules=["q_proj"])
    found = merge_checkpoint(base, adapter, tmp_path / "out")
    assert content(tmp_path / "out")["config.json"] == content(base)["config.json"]
    assert "lm_head.weight" not in read(tmp_path / "out")
    assert found.notes == ()


# ---- another dtype, other files ----------------------------------------------------------------------------


@pytest.mark.parametrize("new", DTYPES)
def test_another_dtype_takes_one_rounding(tmp_path, new):
    base, adapter, _ = pair(tmp_path, "float32")
    merge_checkpoint(base, adapter, tmp_path / "wide", dtype="float64")
    merge_checkpoint(base, adapter, tmp_path / "out", dtype=new)
    wide, got = read(tmp_path / "wide"), read(tmp_path / "out")
    for name, value in wide.items():
        want = value if value.dtype == np.int64 else cast(value, new)
        assert same(got[name], np.asarray(want)), name
    assert open_checkpoint(tmp_path / "out").config["torch_dtype"] == new


@pytest.mark.parametrize("size", [6000, "6 KB", "0.006MB"])
def test_other_shards(tmp_path, size):
    base, adapter, want = pair(tmp_path)
    merge_checkpoint(base, adapter, tmp_path / "out", max_shard_size=size)
    found = open_checkpoint(tmp_path / "out")
    assert len(found.shards) > 2
    assert [*found.shards] == [
        f"model-{i + 1:05d}-of-{len(found.shards):05d}.safetensors" for i in range(len(found.shards))
    ]
    held = [sum(file.place(name)[1] for name in file.names) for file in found.shards.values()]
    assert max(held) <= 6000
    got = read(tmp_path / "out")
    assert all(same(got[name], want[name]) for name in want)
    merge_checkpoint(
        tmp_path / "out", write_adapter(tmp_path / "none", NOTHING), tmp_path / "one", max_shard_size="1GB"
    )
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert all(same(value, got[name]) for name, value in read(tmp_path / "one").items())


NOTHING = {
    "model.layers.0.self_attn.q_proj": {
        "lora_A.weight": np.zeros((3, 24), np.float32),
        "lora_B.weight": np.zeros((24, 3), np.float32),
    }
}


def test_an_index_is_written_as_it_was_read(tmp_path):
    base, adapter, _ = pair(tmp_path, shards=3)
    merge_checkpoint(base, adapter, tmp_path / "out")
    old, new = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, tmp_path / "out")
    )
    assert new == old
    for name, raw in content(tmp_path / "out").items():
        if name.endswith(".safetensors"):
            assert open_safetensors(base / name).metadata == open_safetensors(tmp_path / "out" / name).metadata
            assert len(raw) == (base / name).stat().st_size


def test_a_file_alone(tmp_path):
    base, adapter, want = pair(tmp_path)
    (base / "notes.txt").write_text("mine")
    merge_checkpoint(base / "model.safetensors", adapter, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    got = read(tmp_path / "out")
    assert all(same(got[name], want[name]) for name in want)


def test_infinity_in_the_base_is_copied_and_cast_but_not_made(tmp_path):
    base, adapter, _ = pair(tmp_path, "float32")
    tensors = read(base)
    tensors["mask"] = np.array([0, -np.inf, np.nan], np.float32)
    write_checkpoint(tmp_path / "masked", tensors)
    for dtype in (None, "float16", "bfloat16", "float64"):
        merge_checkpoint(tmp_path / "masked", adapter, tmp_path / f"out {dtype}", dtype=dtype)
        got = read(tmp_path / f"out {dtype}")["mask"].astype(float)
        np.testing.assert_array_equal(got, [0, -np.inf, np.nan])
    tensors["mask"][0] = 1e39 if tensors["mask"].dtype == np.float64 else 1e30
    write_checkpoint(tmp_path / "large", tensors)
    with pytest.raises(lx.ConfigError, match="'mask': expected finite numbers"):
        merge_checkpoint(tmp_path / "large", adapter, tmp_path / "no", dtype="float16")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = np.inf
    write_checkpoint(tmp_path / "broken", tensors)
    with pytest.raises(lx.ConfigError, match=r"q_proj\.weight': expected finite numbers"):
        merge_checkpoint(tmp_path / "broken", adapter, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_row_without_direction_is_named(tmp_path, blocks):
    base, adapter, _ = pair(tmp_path, "float32", dora=True)
    site = "model.layers.1.mlp.up_proj"
    tensors = read(base)
    tensors[f"{site}.weight"][17] = 0
    parts = {name.removeprefix("base_model.model."): np.array(a) for name, a in adapter_of(adapter).items()}
    parts[f"{site}.lora_B.weight"][17] = 0
    write_checkpoint(tmp_path / "zero", tensors)
    write_adapter(tmp_path / "still", parts, target_modules=PROJECTIONS, use_dora=True)
    with pytest.raises(lx.ConfigError, match=rf"{site}: rows from \d+ on: .*expected a direction.*got 1 rows"):
        merge_checkpoint(tmp_path / "zero", tmp_path / "still", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def adapter_of(folder):
    return open_safetensors(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("V", "dtype"),
    [
        ([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 - 2.0**-9 - 2.0**-45], "bfloat16"),
        ([-1 - 2.0**-8 - 2.0**-40, 1 + 3 * 2.0**-8, 2.0**-134 * (1 + 2.0**-30), 2.0**-133 * 1.5], "bfloat16"),
        ([(2 - 2.0**-8) * 2.0**127 * (1 - 2.0**-40), -(2 - 2.0**-7) * 2.0**127], "bfloat16"),
        ([1 + 2.0**-11 + 2.0**-40, 65519.99, 2.0**-25 * (1 + 2.0**-30)], "float16"),
        ([1 + 2.0**-24 + 2.0**-50, -(2.0**-149) / 2 * (1 + 2.0**-40)], "float32"),
    ],
)
@pytest.mark.parametrize("copies", [1, 300])
def test_one_rounding_at_ties_and_edges(V, dtype, copies):
    """A tie of two roundings is no tie of one; and at the ends of the range, the smallest and the largest."""
    V = np.array(V * copies).reshape(copies, -1)
    want = [[nearest(Fraction(v), dtype) for v in row] for row in V]
    got = rounded(V.copy(), dtype, "here", Scratch())
    assert got.astype(float).tolist() == want
    if dtype == "bfloat16":  # what the straight way makes of it, so that the test is known to see something
        straight = V.astype(np.float32).astype(got.dtype).astype(float)
        assert straight.tolist() != want


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan, 1.79e308])
def test_what_is_not_finite_is_refused(dtype, value):
    V = np.ones((3, 5))
    V[1, 2] = value
    if dtype != "float64" or not np.isfinite(value):
        with pytest.raises(lx.ConfigError, match="here: expected finite numbers, got NaN or infinity"):
            rounded(V, dtype, "here", Scratch())


@settings(max_examples=200)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1, max_size=20))
def test_rounding_to_bfloat16_is_that_of_cast(values):
    V = np.array([values]) * np.array([[1.0]])
    with np.errstate(over="ignore"):
        want = np.asarray(cast(V.copy(), "bfloat16"))
    if np.isfinite(want.astype(float)).all():
        assert rounded(V, "bfloat16", "", Scratch()).tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_gguf_file(tmp_path, blocks, dtype):
    """Names, rows of q and k, and the config as Hugging Face has them; and safetensors come out."""
    rng = np.random.default_rng(0)
    heads, d, ff, vocab = 4, 24, 40, 56
    shapes = {"token_embd.weight": (vocab, d), "output_norm.weight": (d,)}
    shapes |= {f"blk.0.attn_{p}.weight": (d, d) for p in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm.weight": (d,), "blk.0.ffn_norm.weight": (d,), "blk.0.ffn_gate.weight": (ff, d)}
    shapes |= {"blk.0.ffn_up.weight": (ff, d), "blk.0.ffn_down.weight": (d, ff)}
    sizes = {"embedding_length": d, "feed_forward_length": ff, "block_count": 1, "context_length": 64}
    sizes |= {"attention.head_count": heads, "attention.head_count_kv": heads}
    said = {"general.architecture": ("string", "llama")}
    said |= {f"llama.{name}": ("uint32", n) for name, n in sizes.items()}
    said["llama.attention.layer_norm_rms_epsilon"] = ("float32", 1e-6)
    (tmp_path / "base").mkdir()
    path = tmp_path / "base" / "m.gguf"
    write_gguf(
        path, said, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    )
    base = open_checkpoint(path)
    q = "model.layers.0.self_attn.q_proj"
    part = factors(rng, (d, d), 3)
    adapter = write_adapter(tmp_path / "adapter", {q: part}, target_modules=["q_proj"])
    merge_checkpoint(path, adapter, tmp_path / "out", dtype=dtype)
    got = open_checkpoint(tmp_path / "out")
    assert set(got) == set(base)
    assert got.config == base.config | {"torch_dtype": dtype or "float32"}
    assert got.config["model_type"] == "llama"
    record = lx.Adapter(part["lora_A.weight"], part["lora_B.weight"])
    for name, value in base.items():
        want = np.asarray(value)
        if name == f"{q}.weight":
            want = lx.merge(lx.Linear(want.astype(np.float64)), record, scaling=S).W
        assert same(np.array(got[name]), np.asarray(cast(want, dtype or "float32")))
