"""Adapters that are damaged, foreign or hostile: each parser refuses in one line, and writes nothing."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorax_np.errors import FormatError
from lorax_np.io.convert import FORMATS, convert, detect
from lorax_np.io.gguf_writer import write_gguf
from lorax_np.io.writer import write_safetensors

A, B = np.ones((2, 3), "f4"), np.ones((4, 2), "f4")
X = "model.layers.0.mlp.up_proj"
MLX = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def refusal(folder, path, words, **options):
    with pytest.raises(FormatError) as caught:
        convert(path, "peft", folder / "out", **options)
    message = str(caught.value)
    assert words in message, message
    assert message.isprintable()
    assert len(message) < 700 + 2 * len(str(folder))
    assert ": expected " in message
    assert ", got " in message
    assert not (folder / "out").exists()


def tensors(folder, arrays, name="a.safetensors"):
    write_safetensors(folder / name, arrays)
    return folder / name


# ---- which format ------------------------------------------------------------------------------------------


def test_formats_are_told_by_names(tmp_path):
    for end, wanted in {
        f"{X}.lora_A.weight": "peft",
        "base_model.model.embed.lora_embedding_A": "peft",
        "lora_unet_x.lora_down.weight": "kohya",
        "layers.0.mlp.w1.lora_a.weight": "torchtune",
        f"{X}.lora_a": "mlx",
        f"{X}.lora_A": "loralib",
    }.items():
        found = detect(tensors(tmp_path, {end: A}))
        assert found == (wanted, f"a.safetensors has {end!r}")
    folder = tmp_path / "d"
    folder.mkdir()
    tensors(folder, {f"{X}.lora_a": A}, "adapters.safetensors")
    assert detect(folder).format == "mlx"
    write_gguf(tmp_path / "x", {"general.type": ("string", "adapter")}, {})
    assert detect(tmp_path / "x") == ("gguf", "x begins with GGUF")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"lora_A": 1}))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(
            FormatError, match=r"got a pickle, .*save_file\(torch.load\(path, weights_only=True\)"
        ):
            detect(path)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FormatError, match="expected a directory with adapters"):
        detect(tmp_path)
    with pytest.raises(FormatError, match=r"expected tensors named \.\.\..*, got none of them"):
        detect(tensors(tmp_path, {"model.norm.weight": A}))
    with pytest.raises(FileNotFoundError):
        detect(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(FormatError, match="at least 10 bytes"):
        detect(tmp_path / "junk")


@pytest.mark.parametrize("word", ["PEFT", "", "lora", "safetensors"])
def test_an_unknown_format_is_refused_by_name(tmp_path, word):
    with pytest.raises(FormatError, match=r"^target_format: expected one of peft, mlx"):
        convert(tmp_path, word, tmp_path / "out")
    with pytest.raises(FormatError, match=r"^source_format: expected one of peft, mlx"):
        convert(tmp_path, "peft", tmp_path / "out", source_format=word)


# ---- each parser -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "arrays", "words"),
    [
        (
            {},
            {f"{X}.lora_a": A.T},
            "lora_parameters: expected an object with rank, scale and dropout, got None",
        ),
        (
            MLX | {"fine_tune_type": "full"},
            {f"{X}.lora_a": A.T},
            "fine_tune_type: expected lora or dora, got 'full'",
        ),
        (MLX | {"lora_parameters": {"rank": 2}}, {f"{X}.lora_a": A.T}, "scale: expected a number, got None"),
        (MLX | {"lora_parameters": {"scale": "2"}}, {f"{X}.lora_a": A.T}, "scale: expected a number, got '2'"),
        (MLX | {"lora_parameters": {"scale": 0}}, {f"{X}.lora_a": A.T, f"{X}.lora_b": B.T}, "lora_alpha"),
        (
            MLX | {"lora_parameters": {"scale": 1, "dropout": 2}},
            {f"{X}.lora_a": A.T, f"{X}.lora_b": B.T},
            "dropout",
        ),
        (MLX, {f"{X}.lora_a": A.T}, "expected B beside A, got none"),
        (MLX, {f"{X}.lora_a": A.T, f"{X}.lora_b": B.T, f"{X}.weight": A}, "expected names that end in .lora_a"),
        (
            MLX,
            {f"{X}.lora_a": A.T, f"{X}.lora_b": B.T, f"{X}.m": A[0]},
            "expected no magnitude, as fine_tune_type",
        ),
        (
            MLX | {"fine_tune_type": "dora"},
            {f"{X}.lora_a": A.T, f"{X}.lora_b": B.T},
            "expected a magnitude, as fine_",
        ),
        (MLX, {f"{X}.lora_a": A[None], f"{X}.lora_b": B[None]}, "one for each expert (LoRASwitchLinear)"),
        (MLX, {f"{X}.lora_a": A.T, f"{X}.lora_b": B}, "r=2 set by A, got"),
        (MLX, {f"{X}.lora_a": A[0], f"{X}.lora_b": B}, "A: expected two axes, got the shape (3,)"),
        (MLX, {".lora_a": A}, "expected names that end in"),
        (
            MLX | {"fine_tune_type": "dora"},
            {"embed_tokens.lora_a": A.T, "embed_tokens.lora_b": B.T, "embed_tokens.m": np.ones(3, "f4")},
            "DoRAEmbedding, whose m has one entry a token, not a column",
        ),
    ],
)
def test_mlx(tmp_path, config, arrays, words):
    (tmp_path / "a").mkdir()
    tensors(tmp_path / "a", arrays, "adapters.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    refusal(tmp_path, tmp_path / "a", words, source_format="mlx")


def test_mlx_config_that_is_no_json(tmp_path):
    (tmp_path / "a").mkdir()
    tensors(tmp_path / "a", {f"{X}.lora_a": A.T, f"{X}.lora_b": B.T}, "adapters.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    refusal(tmp_path, tmp_path / "a", "expected a JSON object")


KOHYA = {"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": B}
C = np.ones((2, 3, 3, 3), "f4")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (KOHYA | {"lora_unet_x.lora_mid.weight": A}, "got LoCon's lora_mid, a third factor between A and B"),
        (
            KOHYA | {"lora_unet_x.dora_scale": A},
            "got dora_scale, a magnitude that sd-scripts itself does not know",
        ),
        (KOHYA | {"lora_unet_y.hada_w1_a": A}, "got LoHa, a product of two updates"),
        (KOHYA | {"lora_unet_y.lokr_w1": A}, "got LoKr, a Kronecker product"),
        (KOHYA | {"lora_unet_y.diff": A}, "got a full difference of a weight"),
        (KOHYA | {"lora_unet_y.bias": A}, "got 'lora_unet_y.bias'"),
        (KOHYA | {"plain": A}, "expected lora_down.weight, lora_up.weight and alpha"),
        ({"lora_unet_x.lora_down.weight": A}, "expected lora_up.weight beside A, got none"),
        (KOHYA | {"lora_unet_x.lora_up.weight": B.T}, "expected A (r, d_in[, k, k]) and B (d_out, r[, 1, 1])"),
        ({"lora_unet_x.lora_down.weight": C, "lora_unet_x.lora_up.weight": C}, "expected A (r, d_in[, k, k])"),
        (KOHYA | {"lora_unet_x.alpha": A}, "alpha: expected one number, got the shape (2, 3)"),
        (KOHYA | {"lora_unet_x.alpha": np.array(np.nan, "f4")}, "alpha: expected a finite number, got nan"),
        ({f"other_{key}": value for key, value in KOHYA.items()}, "expected modules of one part"),
    ],
)
def test_kohya(tmp_path, arrays, words):
    refusal(tmp_path, tensors(tmp_path, arrays), words, names={"x": "x"})


W1 = {"layers.0.mlp.w1.lora_b.weight": B}
W9 = {"layers.0.mlp.w9.lora_a.weight": A, "layers.0.mlp.w9.lora_b.weight": B}


@pytest.mark.parametrize(
    ("arrays", "config", "words"),
    [
        ({}, {"lora_alpha": 4}, "expected B beside A, got none"),
        (
            W1 | W9,
            {"lora_alpha": 4},
            "a name that is not in its table",
        ),
        ({"layers.0.mlp.w1.lora_b.weight": B}, {}, "lora_alpha: expected a number, got None"),
        ({"layers.0.mlp.w1.lora_b.weight": B}, {"lora_alpha": True}, "lora_alpha: expected a number, got True"),
        ({"layers.0.mlp.w1.lora_b.weight": B}, None, "expected adapter_config.json beside it, or α (--alpha)"),
        ({"layers.0.mlp.w1.lora_b.weight": B.T}, {"lora_alpha": 4}, "r=2 set by A"),
    ],
)
def test_torchtune(tmp_path, arrays, config, words):
    (tmp_path / "a").mkdir()
    tensors(tmp_path / "a", {"layers.0.mlp.w1.lora_a.weight": A} | arrays, "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    refusal(tmp_path, tmp_path / "a", words, source_format="torchtune")


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ({"x.lora_A": A, "x.lora_B": B}, {}, "expected α (--alpha), which loralib does not keep in its files"),
        ({"x.lora_A": A}, {"alpha": 2.0}, "expected B beside A"),
        ({"x.lora_A": A, "x.lora_B": B, "x.weight": A}, {"alpha": 2.0}, "expected names that end in .lora_A"),
        ({"x.lora_A": C, "x.lora_B": B}, {"alpha": 2.0}, "A: expected two axes"),
        (
            {"x.lora_A": A, "x.lora_B": np.ones((4, 3), "f4")},
            {"alpha": 2.0},
            "expected lora_A of 0 groups of rank 3",
        ),
        (
            {"x.lora_A": np.ones((4, 3), "f4"), "x.lora_B": B},
            {"alpha": 2.0, "enable_lora": [True, True, True]},
            "expected lora_A of 3 groups of rank 2 (--enable-lora says which parts have one), got (4, 3) and",
        ),
    ],
)
def test_loralib(tmp_path, arrays, options, words):
    refusal(tmp_path, tensors(tmp_path, arrays), words, source_format="loralib", **options)


@pytest.mark.parametrize("shape", [(4, 5, 3, 2), (4, 5, 3), (4, 3, 3, 3), (4, 5, 1, 1), (4, 5, 3, 3, 3)])
def test_loralib_convolutions_that_do_not_fit(tmp_path, shape):
    path = tensors(tmp_path, {"x.lora_A": np.ones((6, 15), "f4"), "x.lora_B": np.ones((12, 6), "f4")})
    write_safetensors(tmp_path / "b.safetensors", {"x.weight": np.zeros(shape, "f4")})
    refusal(tmp_path, path, "x: expected", alpha=2.0, base=tmp_path / "b.safetensors")


GGUF = {
    "general.architecture": ("string", "llama"),
    "general.type": ("string", "adapter"),
    "adapter.type": ("string", "lora"),
    "adapter.lora.alpha": ("float32", 4.0),
}
PAIR = {"blk.0.ffn_up.weight.lora_a": A, "blk.0.ffn_up.weight.lora_b": B}


@pytest.mark.parametrize(
    ("pairs", "arrays", "words"),
    [
        ({"general.type": ("string", "model")}, PAIR, "expected general.type adapter and adapter.type lora"),
        ({"adapter.type": ("string", "x\n")}, PAIR, "got 'adapter' and 'x\\n'"),
        ({"general.architecture": ("string", "gemma3")}, PAIR, "got 'gemma3'"),
        (
            {"adapter.lora.alpha": ("string", "4")},
            PAIR,
            "adapter.lora.alpha: expected a finite number, got '4'",
        ),
        ({"adapter.lora.alpha": ("float32", float("nan"))}, PAIR, "alpha: expected a finite number, got nan"),
        (
            {"adapter.alora.invocation_tokens": ("array of uint32", [1])},
            PAIR,
            "expected a LoRA that is always on",
        ),
        ({}, PAIR | {"blk.0.attn_norm.weight": A[0]}, "another, a norm, which llama.cpp leaves out in silence"),
        (
            {},
            PAIR | {"blk.0.ffn_up.lora_a": A},
            "expected a name that ends in .weight.lora_a or .weight.lora_b",
        ),
        ({}, {"blk.0.ffn_up.weight.lora_a": A}, "expected lora_a and lora_b, got lora_a alone"),
        (
            {},
            {"blk.0.ffn_up_exps.weight.lora_a": A, "blk.0.ffn_up_exps.weight.lora_b": B},
            "expected a module of llama",
        ),
        ({}, PAIR | {"blk.0.ffn_up.weight.lora_b": B.T}, "r=2 set by A"),
        ({}, PAIR | {"blk.0.ffn_up.weight.lora_b": B[0]}, "B: expected two axes, got the shape (2,)"),
        (
            {},
            {name.replace("ffn_up", "attn_q"): value for name, value in PAIR.items()},
            "expected a base (--base)",
        ),
        ({}, {f"token_embd.weight.lora_{x}": v for x, v in (("a", A.T), ("b", B))}, "expected an untied model"),
    ],
)
def test_gguf(tmp_path, pairs, arrays, words):
    write_gguf(tmp_path / "a.gguf", GGUF | pairs, arrays)
    refusal(tmp_path, tmp_path / "a.gguf", words)


def test_an_adapter_of_nothing_is_refused(tmp_path):
    for source_format in ("kohya", "loralib"):
        path = tensors(tmp_path, {})
        refusal(
            tmp_path, path, "expected an adapter's tensors, got none", source_format=source_format, alpha=1.0
        )
    write_gguf(tmp_path / "a.gguf", GGUF, {})
    refusal(tmp_path, tmp_path / "a.gguf", "expected an adapter's tensors, got none")


@pytest.mark.parametrize("source_format", sorted(set(FORMATS) - {"gguf"}))
@one_folder
@given(raw=st.binary(max_size=64))
def test_bytes_of_any_kind_are_refused_or_another_error_of_the_system(tmp_path, source_format, raw):
    folder = tmp_path / "a"
    folder.mkdir(exist_ok=True)
    for name in ("adapters.safetensors", "adapter_model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(raw)
    config = (
        {"peft_type": "LORA", "target_modules": ["x"]} if source_format == "peft" else MLX | {"lora_alpha": 2}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path = folder if source_format in ("peft", "mlx", "torchtune") else folder / "adapters.safetensors"
    with pytest.raises(FormatError):
        convert(path, "peft", tmp_path / "out", source_format=source_format, alpha=1.0)
    assert not (tmp_path / "out").exists()


def test_a_table_that_gives_one_name_twice_is_refused(tmp_path):
    path = tensors(tmp_path, KOHYA | {key.replace("_x", "_y"): value for key, value in KOHYA.items()})
    refusal(
        tmp_path, path, "'lora_unet_y': expected one module for x, got a second", names={"x": "x", "y": "x"}
    )
    refusal(tmp_path, path, "names: expected dotted names by kohya's, got 1", names={"x": "x", "y": 1})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["peft", "mlx", "loralib"])
def test_numbers_that_are_none_are_refused_from_any_format(tmp_path, bad, target):
    changed = B.copy()
    changed[3, 1] = bad
    path = tensors(tmp_path, {"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": changed})
    with pytest.raises(FormatError, match=r"x: B: expected finite numbers, got NaN or infinity$"):
        convert(path, target, tmp_path / "out", names={"x": "x"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source_format", ["kohya", "loralib"])
@pytest.mark.parametrize("dtype", ["i1", "u8", "?"])
def test_integers_are_no_adapter(tmp_path, source_format, dtype):
    a, b = A.astype(dtype), B.astype(dtype)
    names = (
        ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight")
        if source_format == "kohya"
        else ("x.lora_A", "x.lora_B")
    )
    path = tensors(tmp_path, dict(zip(names, (a, b), strict=True)))
    refusal(tmp_path, path, "expected parts that fit each other, got DtypeError", names={"x": "x"}, alpha=2.0)


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf")])
def test_an_alpha_that_scales_nothing_is_refused(tmp_path, alpha):
    path = tensors(tmp_path, {"x.lora_A": A, "x.lora_B": B})
    refusal(tmp_path, path, "lora_alpha: expected a finite number other than 0", alpha=alpha)


@pytest.mark.parametrize("scale", [float("nan"), -0.0])
def test_a_scale_that_is_no_number_is_refused(tmp_path, scale):
    (tmp_path / "a").mkdir()
    tensors(tmp_path / "a", {f"{X}.lora_a": A.T, f"{X}.lora_b": B.T}, "adapters.safetensors")
    config = MLX | {"lora_parameters": {"rank": 2, "scale": scale}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    refusal(tmp_path, tmp_path / "a", "lora_alpha: expected a finite number other than 0")


@pytest.mark.parametrize("value", [float("inf"), 10**400, -(10**400), [2.0], {}, "x" * 200])
def test_what_is_no_number_is_refused_in_short(tmp_path, value):
    (tmp_path / "a").mkdir()
    tensors(tmp_path / "a", {f"{X}.lora_a": A.T, f"{X}.lora_b": B.T}, "adapters.safetensors")
    for part in ("scale", "dropout"):
        config = MLX | {"lora_parameters": {"rank": 2, "scale": 1.0} | {part: value}}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        refusal(tmp_path, tmp_path / "a", f"lora_parameters: {part}: expected a number, got ")
    arrays = {"layers.0.mlp.w1.lora_a.weight": A, "layers.0.mlp.w1.lora_b.weight": B}
    tensors(tmp_path / "a", arrays, "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"lora_alpha": value}))
    path = tmp_path / "a" / "adapter_model.safetensors"
    refusal(tmp_path, path, "lora_alpha: expected a number, got ", source_format="torchtune")
