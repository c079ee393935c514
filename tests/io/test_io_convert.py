"""Conversions: each format by its own formula, there and back bit for bit, and what has no place refused."""

import json
import math
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from convert_samples import (
    EMBED,
    HEADS,
    KV,
    SHAPES,
    assert_same,
    base,
    conv_files,
    default_config,
    delta,
    files,
    saved,
)

from lorax_np.errors import FormatError
from lorax_np.io.convert import FORMATS, convert, detect, plan_adapter
from lorax_np.io.convert.model import Base, Options, base_of
from lorax_np.io.convert.scales import is_embedding
from lorax_np.io.gguf import open_gguf
from lorax_np.io.peft import load_adapter
from lorax_np.io.safetensors import open_safetensors
from lorax_np.io.writer import write_safetensors

NAMES = sorted(SHAPES)
ONE = "model.layers.1.self_attn.q_proj"


def there(folder, what, target, **options):
    """Write a PEFT directory and convert it; the path of what came out."""
    source = saved(folder / "peft", what)
    dest = folder / {"gguf": "a.gguf", "kohya": "a.safetensors", "loralib": "b.safetensors"}.get(target, target)
    done = convert(source, target, dest, **options)
    assert (done.source_format, done.target_format, done.sites) == ("peft", target, len(what.adapters))
    assert all(path.is_file() for path in done.files)
    return dest, done


def back(folder, path, target, **options):
    """Convert to a PEFT directory; the directory."""
    done = convert(path, "peft", folder / "back", **options)
    assert (done.source_format, done.target_format) == (target, "peft")
    return folder / "back"


def refusal(call, words):
    with pytest.raises(FormatError) as caught:
        call()
    message = str(caught.value)
    assert words in message, message
    assert message.isprintable()
    assert ": expected " in message
    assert ", got " in message
    return message


def options(checkpoint=None, **more):
    return Options(base=base_of(checkpoint) if checkpoint else None, **more)


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


# ---- each by its own formula -------------------------------------------------------------------------------


def test_mlx_by_its_formula(tmp_path):
    """y = x W^T + scale (x lora_a) lora_b, and an embedding's rows + scale lora_a[i] lora_b."""
    what = files([ONE, "lm_head"], default_config(lora_dropout=0.25), embedding=True)
    path, _ = there(tmp_path, what, "mlx", base=base(tmp_path / "base"))
    config = json.loads((path / "adapter_config.json").read_text())
    scale = config["lora_parameters"]["scale"]
    assert config["fine_tune_type"] == "lora"
    assert config["lora_parameters"]["rank"] == 3
    assert config["lora_parameters"]["dropout"] == 0.25
    arrays = open_safetensors(path / "adapters.safetensors")
    for name in what.adapters:
        a, b = arrays[f"{name}.lora_a"].astype(np.float64), arrays[f"{name}.lora_b"].astype(np.float64)
        product = scale * a @ b
        want = delta(what, name)
        assert np.abs((product if name == EMBED else product.T) - want).max() <= 1e-14 * np.abs(want).max()


def test_mlx_keys_name_exactly_the_layers(tmp_path):
    """num_layers counts from the last layer; names within a layer, or whole names where the layers differ."""
    some = [f"model.layers.{n}.{part}" for n in (1, 2) for part in ("self_attn.q_proj", "mlp.up_proj")]
    checkpoint = base(tmp_path / "base")

    def keys(folder, names, **options):
        path, _ = there(folder, files(names, default_config()), "mlx", **options)
        found = json.loads((path / "adapter_config.json").read_text())
        return found["num_layers"], found["lora_parameters"]["keys"]

    for place in ("a", "b", "c", "d", "e"):
        (tmp_path / place).mkdir()
    grid = keys(tmp_path / "a", [*some, "lm_head"], base=checkpoint)
    assert grid == (2, ["lm_head", "mlp.up_proj", "self_attn.q_proj"])
    assert keys(tmp_path / "b", some[1:], base=checkpoint) == (-1, sorted(some[1:]))
    assert keys(tmp_path / "c", some) == (-1, sorted(some))
    assert keys(tmp_path / "d", ["model.layers.0.mlp.up_proj"], base=checkpoint)[0] == -1
    two = base(tmp_path / "two", num_hidden_layers=2)  # a base that has no layer 2
    ends = [f"model.layers.{n}.mlp.up_proj" for n in (0, 2)]
    assert keys(tmp_path / "e", ends, base=two) == (-1, ends)


def test_gguf_by_its_formula(tmp_path):
    """(gguf.4): s = alpha/r of lora_b; rows of Q and K as ggml pairs them; lora_a of token_embd on its side."""
    names = [ONE, "model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj", "lm_head"]
    what = files(names, default_config(rank_pattern={"lm_head": 2}), embedding=True)
    path, _ = there(tmp_path, what, "gguf", base=base(tmp_path / "base"))
    file = open_gguf(path)
    assert dict(file.metadata) == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 5.0,
    }
    assert file.metadata.word("adapter.lora.alpha") == "float32"
    theirs = ["blk.1.attn_q", "blk.0.attn_k", "blk.2.ffn_down", "output", "token_embd"]
    assert sorted(file) == sorted(f"{name}.weight.{part}" for name in theirs for part in ("lora_a", "lora_b"))
    for name, module in zip([*names, EMBED], theirs, strict=True):
        a, b = (file[f"{module}.weight.{part}"].astype(np.float64) for part in ("lora_a", "lora_b"))
        s, want = 5.0 / b.shape[1], delta(what, name)
        got = s * (a @ b.T if module == "token_embd" else b @ a)
        heads = {"blk.1.attn_q": HEADS, "blk.0.attn_k": KV}.get(module)
        if heads:  # row 2i + h of a head there is row i + h·half here
            half = got.shape[0] // heads // 2
            here = np.empty_like(got)
            for row in range(got.shape[0]):
                head, inside = divmod(row, 2 * half)
                here[head * 2 * half + inside // 2 + (inside % 2) * half] = got[row]
            assert not np.array_equal(here, got)
            got = here
        assert np.abs(got - want).max() <= 1e-14 * np.abs(want).max()


def test_the_gguf_package_reads_the_adapter(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the oracle gguf is not installed")
    what = files(["lm_head"], default_config())
    path, _ = there(tmp_path, what, "gguf", base=base(tmp_path / "base"))
    reader = gguf.GGUFReader(path)
    assert reader.get_field(gguf.Keys.General.TYPE).contents() == gguf.GGUFType.ADAPTER
    assert reader.get_field(gguf.Keys.Adapter.TYPE).contents() == "lora"
    assert reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents() == 5.0
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(found["output.weight.lora_a"], what.adapters["lm_head"].A)
    assert np.array_equal(found["output.weight.lora_b"], what.adapters["lm_head"].B)


def test_kohya_by_its_formula(tmp_path):
    """W + (alpha/dim) up·down, a convolution's as up over the channels of down."""
    shapes = {"a.conv": (7, 5, 3, 3), "a.point": (6, 4, 1, 1), "b_c.d": (4, 6)}
    what = conv_files(shapes, default_config(rank_pattern={"a.point": 2}))
    path, _ = there(tmp_path, what, "kohya", prefix="lora_te1")
    arrays = open_safetensors(path)
    assert arrays.metadata == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "5",
    }
    for name in shapes:
        key = "lora_te1_" + name.replace(".", "_")
        down, up = (arrays[f"{key}.lora_{part}.weight"].astype(np.float64) for part in ("down", "up"))
        alpha = arrays[f"{key}.alpha"]
        assert alpha.shape == ()
        got = float(alpha) / down.shape[0] * np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
        want = delta(what, name)
        assert got.shape == want.shape == shapes[name]
        assert np.abs(got - want).max() <= 1e-14 * np.abs(want).max()
    table = {name.replace(".", "_"): name for name in shapes}
    again = back(tmp_path, path, "kohya", names=table)
    assert_same(load_adapter(again), what)


def test_torchtune_by_its_formula(tmp_path):
    """Its Llama pairs neighbours, so rows of B and of the magnitude move with those of Q and K."""
    names = [
        ONE,
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.o_proj",
    ]
    what = files(names, default_config(use_dora=True))
    path, _ = there(tmp_path, what, "torchtune", base=base(tmp_path / "base"))
    arrays = open_safetensors(path / "adapter_model.safetensors")
    theirs = ["layers.1.attn.q_proj", "layers.0.mlp.w1", "layers.0.mlp.w2", "layers.0.attn.output_proj"]
    assert sorted(arrays) == sorted(
        f"{name}.{part}" for name in theirs for part in ("lora_a.weight", "lora_b.weight", "magnitude")
    )
    for name, module in zip(names, theirs, strict=True):
        adapter = what.adapters[name]
        for part, want in (("lora_b.weight", adapter.B), ("magnitude", adapter.m)):
            if module.endswith("q_proj"):
                half = want.shape[0] // HEADS // 2
                want = want.reshape(HEADS, 2, half, -1).swapaxes(1, 2).reshape(want.shape)
            assert np.array_equal(arrays[f"{module}.{part}"], want)
        assert np.array_equal(arrays[f"{module}.lora_a.weight"], adapter.A)
    config = json.loads((path / "adapter_config.json").read_text())
    wanted = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["output_proj", "q_proj", "w1", "w2"],
        "peft_type": "LORA",
    }
    assert config == wanted


def test_torchtune_leaves_qwen2_as_it_is(tmp_path):
    what = files([ONE], default_config())
    path, _ = there(tmp_path, what, "torchtune", base=base(tmp_path / "base", model_type="qwen2"))
    arrays = open_safetensors(path / "adapter_model.safetensors")
    assert np.array_equal(arrays["layers.1.attn.q_proj.lora_b.weight"], what.adapters[ONE].B)


# ---- loralib's other layers --------------------------------------------------------------------------------


def merged_delta(A, B, enabled, s):
    """What MergedLinear adds: group j of B times group j of A, in the part of the j-th enabled."""
    g = sum(enabled)
    products = [b @ a for a, b in zip(np.split(A, g), np.split(B, g), strict=True)]
    empty = np.zeros_like(products[0])
    order = iter(products)
    return s * np.concatenate([next(order) if on else empty for on in enabled])


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True), (False, True), (True,)])
def test_merged_linear_becomes_one_adapter_with_zeros(tmp_path, enabled):
    g, r, rows, d_in = sum(enabled), 2, 5, 7
    draw = np.random.default_rng(4).standard_normal
    A, B = draw((g * r, d_in)), draw((rows * g, r))
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"attn.c_attn.lora_A": A, "attn.c_attn.lora_B": B})
    checkpoint = tmp_path / "base.safetensors"
    write_safetensors(checkpoint, {"attn.c_attn.weight": np.zeros((d_in, rows * len(enabled)), "f4")})
    got = load_adapter(back(tmp_path, path, "loralib", alpha=3.0, enable_lora=enabled, base=checkpoint))
    want = merged_delta(A, B, enabled, 3.0 / r)
    assert np.abs(delta(got, "attn.c_attn") - want).max() <= 1e-14 * np.abs(want).max()
    assert got.sites["attn.c_attn"].r == g * r
    assert got.config.fan_in_fan_out is (len(enabled) * rows != d_in)


@pytest.mark.parametrize("square", [1, 3])
def test_a_loralib_convolution_is_seen_in_the_shape_of_the_weight(tmp_path, square):
    """(conversions.2): rank r·k² here is what rank r is there."""
    d_out, d_in, k, r = 4, 5, square, 2
    draw = np.random.default_rng(6).standard_normal
    A, B = draw((r * k, d_in * k)), draw((d_out * k, r * k))
    path, checkpoint = tmp_path / "c.safetensors", tmp_path / "base.safetensors"
    write_safetensors(path, {"net.0.lora_A": A, "net.0.lora_B": B})
    write_safetensors(checkpoint, {"net.0.conv.weight": np.zeros((d_out, d_in, k, k), "f4")})
    got = load_adapter(back(tmp_path, path, "loralib", alpha=3.0, base=checkpoint))
    want = 3.0 / r * (B @ A).reshape(d_out, d_in, k, k)
    assert np.abs(delta(got, "net.0") - want).max() <= 1e-14 * np.abs(want).max()
    assert got.sites["net.0"].r == r * k * k


def test_a_convolution_goes_to_loralib_and_back_at_its_rank(tmp_path):
    """(conversions.1): B with an identity, whose product seen in W's shape is the convolution's update."""
    what = conv_files({"net.0": (4, 5, 3, 3)}, default_config())
    path, _ = there(tmp_path, what, "loralib")
    arrays = open_safetensors(path)
    A, B = (arrays[f"net.0.lora_{part}"].astype(np.float64) for part in "AB")
    assert (A.shape, B.shape) == ((9, 15), (12, 9))
    want = delta(what, "net.0")
    assert np.abs(5 / 3 * (B @ A).reshape(4, 5, 3, 3) - want).max() <= 1e-14 * np.abs(want).max()
    checkpoint = tmp_path / "base.safetensors"
    write_safetensors(checkpoint, {"net.0.weight": np.zeros((4, 5, 3, 3), "f4")})
    assert_same(load_adapter(back(tmp_path, path, "loralib", base=checkpoint)), what)


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


# ---- what has no place -------------------------------------------------------------------------------------


def with_part(**parts):
    what = files([ONE], default_config())
    return what._replace(adapters={ONE: replace(what.adapters[ONE], **parts)})


EVERY = sorted(set(FORMATS) - {"peft"})
ROWS = SHAPES[ONE][0]


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize(
    ("what", "words"),
    [
        (with_part(bB=np.ones(ROWS, "f4")), f"{ONE}: expected no bias of B, for which the format has no place"),
        (
            files([ONE], default_config())._replace(saved={"lm_head.weight": np.ones((17, 10), "f4")}),
            "got 'lm_head.weight' besides",
        ),
    ],
)
def test_biases_and_saved_modules_have_no_place(tmp_path, target, what, words):
    refusal(lambda: plan_adapter(what, target, options(base(tmp_path / "base"))), words)


@pytest.mark.parametrize("target", sorted(set(EVERY) - {"loralib"}))
def test_trained_biases_have_a_place_in_loralib_alone(tmp_path, target):
    what = with_part(b=np.ones(ROWS, "f4"))
    words = f"{ONE}: expected no trained bias, for which the format has no place"
    refusal(lambda: plan_adapter(what, target, options(base(tmp_path / "base"))), words)


@pytest.mark.parametrize("target", ["gguf", "kohya", "loralib"])
def test_dora_has_no_place(tmp_path, target):
    what = files([ONE], default_config(use_dora=True))
    words = f"{target}: {ONE}: expected no magnitude, for which the format has no place, got DoRA's m"
    refusal(lambda: there(tmp_path, what, target, base=base(tmp_path / "base")), words)


@pytest.mark.parametrize("target", ["mlx", "torchtune", "gguf"])
def test_convolutions_have_no_place(tmp_path, target):
    what = conv_files({"net.0": (4, 5, 3, 3)}, default_config())
    words = "got conv, for which the format has no place"
    refusal(lambda: there(tmp_path, what, target, base=base(tmp_path / "base")), words)


@pytest.mark.parametrize("target", ["kohya", "torchtune"])
def test_embeddings_have_no_place(tmp_path, target):
    what = files([ONE], default_config(), embedding=True)
    words = "got embedding, for which the format has no place"
    refusal(lambda: there(tmp_path, what, target, base=base(tmp_path / "base")), words)


@pytest.mark.parametrize("target", ["mlx", "torchtune"])
def test_several_ranks_have_no_place(tmp_path, target):
    what = files(NAMES, default_config(rank_pattern={"lm_head": 2}))
    words = f"{target}: lm_head: expected rank 3 for all sites, as the format has one, got 2"
    refusal(lambda: there(tmp_path, what, target, base=base(tmp_path / "base")), words)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_factors_of_a_changed_base_do_not_travel(tmp_path, target, start):
    what = files([ONE], default_config())
    what = what._replace(config=replace(what.config, init_lora_weights=start))
    words = f"{target}: init_lora_weights: expected a start that leaves the base as it is, got '{start}'"
    refusal(lambda: plan_adapter(what, target, options(base(tmp_path / "base"))), words)


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        (
            "gguf",
            None,
            "gguf: expected a base (--base), for its architecture and the heads of Q and K, got none",
        ),
        (
            "gguf",
            {"model_type": "gemma"},
            "model_type of the base: expected one of llama, mistral, qwen2, qwen3",
        ),
        ("gguf", {"num_attention_heads": None}, "got one that does not say its num_attention_heads"),
        ("gguf", {"num_attention_heads": 5}, "rows: expected 5 heads of one even size, got 24 rows"),
        ("torchtune", None, f"torchtune: {ONE}: expected a base of llama, mistral, qwen2, whose order"),
        ("torchtune", {"model_type": "phi3"}, "got 'phi3'"),
    ],
)
def test_rows_of_q_need_a_base_that_is_known(tmp_path, target, changes, words):
    checkpoint = None if changes is None else base(tmp_path / "base", **changes)
    refusal(lambda: there(tmp_path, files([ONE], default_config()), target, base=checkpoint), words)


@pytest.mark.parametrize("target", ["mlx", "gguf"])
@pytest.mark.parametrize(("tied", "came"), [(True, "one that is tied"), (None, "a base that does not say")])
def test_a_tied_embedding_means_another_model_there(tmp_path, target, tied, came):
    what = files([ONE], default_config(), embedding=True)
    checkpoint = base(tmp_path / "base", tie_word_embeddings=tied)
    refusal(lambda: there(tmp_path, what, target, base=checkpoint), f"got {came}")


def test_torchtune_scales_biases_that_peft_does_not(tmp_path):
    what = files([ONE], default_config(use_dora=True))
    checkpoint = base(tmp_path / "base", bias=ONE)
    words = (
        "expected a layer without a bias, which torchtune's DoRA scales and PEFT's does not, got one with it"
    )
    refusal(lambda: there(tmp_path, what, "torchtune", base=checkpoint), words)


@pytest.mark.parametrize("target", ["torchtune", "gguf"])
def test_names_outside_the_tables_are_refused(tmp_path, target):
    what = files([ONE], default_config())
    what = what._replace(
        adapters={"h.0.attn": what.adapters[ONE]}, sites={"h.0.attn": replace(what.sites[ONE], name="h.0.attn")}
    )
    refusal(
        lambda: plan_adapter(what, target, options(base(tmp_path / "base"))), "h.0.attn: expected a module of"
    )


def test_gguf_has_no_float64(tmp_path):
    what = files([ONE], default_config(), dtype=np.float64)
    words = "expected one of float32, float16, bfloat16, got float64, which would be rounded"
    refusal(lambda: there(tmp_path, what, "gguf", base=base(tmp_path / "base")), words)


# ---- kohya's names -----------------------------------------------------------------------------------------


def test_kohya_names_need_a_base_or_a_table(tmp_path):
    path, _ = there(tmp_path, files([ONE], default_config()), "kohya")
    words = (
        "expected a base (--base) or a table (--names), by which dots are told from underscores, got neither"
    )
    refusal(lambda: back(tmp_path, path, "kohya"), words)
    refusal(lambda: back(tmp_path, path, "kohya", names={"a_b": "a.b"}), "got a name that is in neither")
    names = {ONE.replace(".", "_"): ONE}
    assert set(load_adapter(back(tmp_path, path, "kohya", names=names)).adapters) == {ONE}


def test_kohya_names_that_mean_two_modules_are_refused(tmp_path):
    path = tmp_path / "k.safetensors"
    A, B = np.ones((2, 3), "f4"), np.ones((3, 2), "f4")
    write_safetensors(path, {"lora_unet_a_b.lora_down.weight": A, "lora_unet_a_b.lora_up.weight": B})
    checkpoint = tmp_path / "base.safetensors"
    write_safetensors(checkpoint, {"a.b.weight": np.ones((3, 3), "f4"), "a_b.weight": np.ones((3, 3), "f4")})
    refusal(
        lambda: back(tmp_path, path, "kohya", base=checkpoint), "expected one module of the base by this name"
    )
    what = conv_files({"a.b": (3, 3), "a_b": (3, 3)}, default_config())
    refusal(lambda: there(tmp_path, what, "kohya"), "expected names that underscores keep apart")


def test_kohya_parts_are_chosen_by_prefix(tmp_path):
    A, B = np.ones((2, 3), "f4"), np.ones((3, 2), "f4")
    both = {
        f"lora_{x}_a_b.lora_{side}.weight": v for x in ("te", "unet") for side, v in (("down", A), ("up", B))
    }
    path = tmp_path / "k.safetensors"
    write_safetensors(path, both)
    table = {"a_b": "a.b"}
    refusal(lambda: back(tmp_path, path, "kohya", names=table), "expected modules of one part")
    refusal(lambda: back(tmp_path, path, "kohya", names=table, prefix="lora_te2"), "modules named lora_te2_...")
    done = convert(path, "peft", tmp_path / "back", names=table, prefix="lora_te")
    assert done.notes == ("1 modules with another prefix are left out",)
    assert done.sites == 1


def test_kohya_alpha_that_is_missing_or_zero_is_the_rank(tmp_path):
    A, B = np.ones((2, 3), "f4"), np.ones((3, 2), "f4")
    arrays = {f"lora_unet_{x}.lora_{side}.weight": v for x in "ab" for side, v in (("down", A), ("up", B))}
    path = tmp_path / "k.safetensors"
    write_safetensors(path, arrays | {"lora_unet_a.alpha": np.zeros((), "f2")})
    got = load_adapter(back(tmp_path, path, "kohya", names={"a": "a", "b": "b"}))
    assert {site.scaling for site in got.sites.values()} == {1.0}


def test_a_point_convolution_is_a_matrix_where_the_base_has_one(tmp_path):
    what = conv_files({"a.in": (6, 4, 1, 1), "a.out": (5, 4)}, default_config())
    path, _ = there(tmp_path, what, "kohya")
    checkpoint = tmp_path / "base.safetensors"
    other = {"a.in.weight": np.zeros((6, 4), "f4"), "a.out.weight": np.zeros((5, 4, 1, 1), "f4")}
    write_safetensors(checkpoint, other)
    got = load_adapter(back(tmp_path, path, "kohya", base=checkpoint))
    assert got.sites["a.in"].kind == "linear"
    assert got.sites["a.out"].kind == "conv"
    assert np.array_equal(got.adapters["a.in"].A, what.adapters["a.in"].A[:, :, 0, 0])
    assert np.array_equal(got.adapters["a.out"].B[:, :, 0, 0], what.adapters["a.out"].B)


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
