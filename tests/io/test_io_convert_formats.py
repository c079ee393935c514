"""Each format by its own formula and its own names: mlx-lm, GGUF, torchtune, loralib, kohya."""

import json

import numpy as np
import pytest
from convert_samples import EMBED, HEADS, KV, assert_same, base, conv_files, default_config, delta, files
from converting import ONE, back, refusal, there

from lorax_np.io.convert import convert
from lorax_np.io.gguf import open_gguf
from lorax_np.io.peft import load_adapter
from lorax_np.io.safetensors import open_safetensors
from lorax_np.io.writer import write_safetensors

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
