"""PEFT before a conversion and after one there and back: the same outputs of a small Llama, bit for bit."""

import json
import warnings

import numpy as np
import pytest

from lorax_np.io.convert import convert
from lorax_np.io.writer import write_safetensors

pytestmark = pytest.mark.peft

torch = pytest.importorskip("torch", reason="the peft extra is not installed")
peft = pytest.importorskip("peft", reason="the peft extra is not installed")
transformers = pytest.importorskip("transformers", reason="the peft extra is not installed")

SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 6, "vocab_size": 31, "tie_word_embeddings": False}
FILES = {"gguf": "a.gguf", "kohya": "k.safetensors", "loralib": "l.safetensors"}
IDS = torch.arange(14).reshape(2, 7) * 5 % 31


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, max_position_embeddings=32)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    return folder


def adapted(model, folder, **config):
    """An adapter directory that PEFT has saved, with every tensor drawn."""
    wanted = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**wanted | config))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter += 0.4 * torch.randn(parameter.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    wrapped.unload()


def outputs(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing, or that it does not know
        warnings.filterwarnings("ignore", category=FutureWarning)  # transformers of itself
        wrapped = peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        found = wrapped(IDS).logits.numpy()
    wrapped.unload()
    return found


@pytest.mark.parametrize(
    ("target", "config"),
    [
        *((target, {}) for target in ("mlx", "loralib", "kohya", "torchtune", "gguf")),
        ("mlx", {"use_dora": True}),
        ("torchtune", {"use_dora": True}),
        ("kohya", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}}),
        ("gguf", {"rank_pattern": {"down_proj": 4}}),
        ("loralib", {"alpha_pattern": {"k_proj": 20}}),
    ],
)
def test_peft_computes_the_same_after_a_conversion(model, checkpoint, tmp_path, target, config):
    adapted(model, tmp_path / "peft", **config)
    path = tmp_path / FILES.get(target, target)
    convert(tmp_path / "peft", target, path, base=checkpoint)
    convert(path, "peft", tmp_path / "back", base=checkpoint)
    with torch.no_grad():
        plain = model(IDS).logits.numpy()
    want, got = outputs(model, tmp_path / "peft"), outputs(model, tmp_path / "back")
    assert np.abs(want - plain).max() > 0.1
    assert np.array_equal(got, want)


def scalings(model, folder):
    """s of every layer as PEFT has it, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, folder)
    found = {
        n: m.scaling["default"] for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    wrapped.unload()
    return found


@pytest.mark.parametrize(
    ("target", "unit"),
    [("mlx", 2**-52), ("torchtune", 2**-52), ("loralib", 2**-52), ("gguf", 2**-24), ("kohya", 2**-24)],
)
def test_rank_stabilised_scalings_move_by_one_rounding(model, checkpoint, tmp_path, target, unit):
    """α·√r is kept as a double, or as a float32; s = α/√r again, in PEFT's own layers."""
    adapted(model, tmp_path / "peft", use_rslora=True)
    path = tmp_path / FILES.get(target, target)
    convert(tmp_path / "peft", target, path, base=checkpoint)
    convert(path, "peft", tmp_path / "back", base=checkpoint)
    want, got = scalings(model, tmp_path / "peft"), scalings(model, tmp_path / "back")
    assert want.keys() == got.keys()
    assert len(want) == 9
    assert set(want.values()) == {5 / 3**0.5}
    assert all(abs(got[name] / s - 1) <= unit for name, s in want.items())


def test_peft_loads_what_no_base_was_asked_for(model, checkpoint, tmp_path):
    adapted(model, tmp_path / "peft", layers_to_transform=[1], target_modules=["v_proj", "o_proj"])
    convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    convert(tmp_path / "mlx", "peft", tmp_path / "back")
    assert np.array_equal(outputs(model, tmp_path / "back"), outputs(model, tmp_path / "peft"))
