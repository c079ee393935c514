"""Adapter directories against PEFT 0.21.2, both ways, after every trainable tensor has moved.

PEFT saves, and the files read here, folded into the base by a formula of the test's own, give PEFT's output;
they are saved again, byte for byte the same weights, and PEFT loads them and gives its output.
"""

import copy
import json
import re

import numpy as np
import pytest
from peft_everything import Everything, applied, base, ids, move, nn, output, peft, torch, trained, weights_of
from peft_layers import ml_dtypes

import lorax_np as lx
from lorax_np.io.peft import load_adapter, save_adapter

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]  # PEFT warns of much

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "linear": {"target_modules": ["up", "square"]},
    "start random": {"target_modules": ["up"], "init_lora_weights": False},
    "start gaussian": {"target_modules": ["up"], "init_lora_weights": "gaussian"},
    "start orthogonal": {"target_modules": ["up", "square"], "init_lora_weights": "orthogonal"},
    "rslora": {"target_modules": ["up"], "use_rslora": True},
    "patterns": {
        "target_modules": ["up", "square", "line"],
        "rank_pattern": {"up": 3, ".*quare": 1},
        "alpha_pattern": {"up": 5.5, "line": -3},
        "use_rslora": True,
    },
    "regex": {"target_modules": r".*(up|quare)$", "exclude_modules": ["attention"]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["head", "gpt", "out_proj"]},
    "conv1d of gpt": {"target_modules": ["gpt"]},
    "conv1d, then linear": {"target_modules": ["gpt", "head"]},
    "dora": {"target_modules": ["up", "gpt", "embed"], "use_dora": True},
    "dora conv": {"target_modules": ["line", "plane", "space"], "use_dora": True},
    "embedding": {"target_modules": ["embed", "up"]},
    "conv 1d": {"target_modules": ["line"]},
    "conv 2d": {"target_modules": ["plane"]},
    "conv 3d": {"target_modules": ["space"]},
    "bias of B": {"target_modules": ["up", "line", "gpt"], "lora_bias": True},
    "bias lora_only": {"target_modules": ["up", "line", "embed"], "bias": "lora_only"},
    "bias all": {"target_modules": ["up", "square", "line"], "bias": "all"},
    "both biases": {"target_modules": ["up", "line"], "bias": "lora_only", "lora_bias": True},
    "modules to save": {"target_modules": ["up"], "modules_to_save": ["head", "norm", "experts"]},
    "token rows": {"target_modules": ["up"], "trainable_token_indices": {"embed": [1, 3, 7]}},
    "token rows, a list": {"target_modules": ["up"], "trainable_token_indices": [0, 10]},
    "experts": {"target_modules": [], "target_parameters": FUSED},
    "experts, ranks": {"target_modules": [], "target_parameters": FUSED, "rank_pattern": {"down_proj": 4}},
    "experts, other order": {"target_modules": ["up"], "target_parameters": FUSED[::-1]},
    "one parameter": {"target_modules": ["up"], "target_parameters": FUSED[1:]},
    "a matrix": {"target_modules": ["square"], "target_parameters": ["up.weight"], "bias": "lora_only"},
}


def config_of(case):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 7, **case})


def forward(model):
    with torch.no_grad():
        return model(ids()).numpy()


def same(path, other):
    assert (path / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    first, second = (json.loads((folder / CONFIG).read_text()) for folder in (path, other))
    for content in (first, second):
        for field in ("target_modules", "exclude_modules"):
            if isinstance(content[field], list):
                content[field] = set(content[field])
    assert first == second


def close(got, want, scale=1e-12):
    """By columns, each of which is one output of one layer, relative to what that layer gives at most."""
    size = np.abs(want).max(0, keepdims=True) + np.abs(got).max(0, keepdims=True)
    assert np.all(np.abs(got - want) <= scale * np.maximum(size, 1))


@pytest.mark.parametrize("name", CASES)
def test_peft_saves_and_we_load(tmp_path, name):
    model, adapted = trained(config_of(CASES[name]))
    want = forward(adapted)
    adapted.save_pretrained(tmp_path / "peft")
    files = load_adapter(tmp_path / "peft", weights=weights_of(model))
    close(output(model, applied(files, weights_of(model))), want)
    assert np.abs(want - forward(model)).max() > 0.01  # the adapter does something

    plain = load_adapter(tmp_path / "peft")
    save_adapter(tmp_path / "ours", plain.adapters, plain.config, sites=plain.sites, saved=plain.saved)
    same(tmp_path / "peft", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert np.array_equal(forward(again), want)


@pytest.mark.parametrize("name", ["linear", "dora", "both biases", "bias all"])
def test_our_layer_gives_what_pefts_gives(tmp_path, name):
    """lora_linear_forward on the loaded records, beside the hooked layer."""
    model, adapted = trained(config_of(CASES[name]))
    adapted.save_pretrained(tmp_path)
    weights = weights_of(model)
    files = load_adapter(tmp_path, weights=weights)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = adapted.base_model.model.up(x).numpy()
    linear = lx.Linear(weights["up.weight"], weights["up.bias"])
    got, _ = lx.lora_linear_forward(x.numpy(), linear, files.adapters["up"], scaling=files.sites["up"].scaling)
    close(got, want)


def test_experts_stored_the_other_way_are_seen_by_their_shapes(tmp_path):
    model, adapted = trained(config_of(CASES["experts"]), transposed=True)
    adapted.save_pretrained(tmp_path)
    files = load_adapter(tmp_path, weights=weights_of(model))
    assert all(site.transposed for site in files.sites.values())
    close(output(model, applied(files, weights_of(model))), forward(adapted))


def test_grouped_convolutions_keep_their_bytes(tmp_path):
    """There is no update to fold, so the loaded factors are run as two convolutions here."""
    model, adapted = trained(config_of({"target_modules": ["grouped"], "bias": "lora_only"}))
    adapted.save_pretrained(tmp_path / "peft")
    files = load_adapter(tmp_path / "peft", weights=weights_of(model))
    adapter, site = files.adapters["grouped"], files.sites["grouped"]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    A, B, b = (torch.from_numpy(np.array(part)) for part in (adapter.A, adapter.B, adapter.b))
    with torch.no_grad():
        want = adapted.base_model.model.grouped(x)
        z = nn.functional.conv2d(nn.functional.conv2d(x, A), B, groups=2)
        y = nn.functional.conv2d(x, model.grouped.weight, b, groups=2) + site.scaling * z
    close(y.numpy().reshape(2, -1), want.numpy().reshape(2, -1))
    save_adapter(tmp_path / "ours", files.adapters, files.config, sites=files.sites)
    same(tmp_path / "peft", tmp_path / "ours")


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_attention_out_proj_is_added_twice_by_peft(tmp_path, bias):
    """peft-0.21.2/attention-out-twice: merging before each forward, it adds out_proj's update, and again."""
    model, adapted = trained(config_of({"target_modules": ["attention", "up"], "bias": bias}))
    want = forward(adapted)
    adapted.save_pretrained(tmp_path / "peft")
    files = load_adapter(tmp_path / "peft", weights=weights_of(model))
    assert files.sites["attention"].weight == "attention.in_proj_weight"
    once = applied(files, weights_of(model))
    out = "attention.out_proj.weight"
    twice = once | {out: 2 * once[out] - weights_of(model)[out]}
    close(output(model, twice), want)
    assert np.abs(output(model, once) - want).max() > 0.01
    save_adapter(tmp_path / "ours", files.adapters, files.config, sites=files.sites, saved=files.saved)
    same(tmp_path / "peft", tmp_path / "ours")


def test_copies_of_a_bias_that_nothing_reads_are_left_out(tmp_path):
    """peft-0.21.2/bias-copies: with bias="all" PEFT writes a saved module's bias three times, and reads one."""
    case = {"target_modules": ["up", "embed"], "bias": "all", "modules_to_save": ["head"]}
    model, adapted = trained(config_of(case))
    adapted.save_pretrained(tmp_path / "peft")
    files = load_adapter(tmp_path / "peft", weights=weights_of(model))
    close(output(model, applied(files, weights_of(model))), forward(adapted))
    save_adapter(tmp_path / "ours", files.adapters, files.config, sites=files.sites, saved=files.saved)
    theirs, ours = (set(lx.open_safetensors(tmp_path / f / WEIGHTS)) for f in ("peft", "ours"))
    copies = {f"base_model.model.head.{where}.bias" for where in ("modules_to_save", "original_module")}
    assert theirs - ours == copies
    assert ours < theirs
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    close(forward(again), forward(adapted))


def test_an_adapter_of_another_name_lies_below(tmp_path):
    model, adapted = trained(config_of({"target_modules": ["up"], "modules_to_save": ["head"]}), name="other")
    adapted.save_pretrained(tmp_path / "peft")
    with pytest.raises(lx.FormatError, match=r"directories below: other$"):
        load_adapter(tmp_path / "peft")
    files = load_adapter(tmp_path / "peft" / "other")
    save_adapter(tmp_path / "ours" / "other", files.adapters, files.config, saved=files.saved)
    same(tmp_path / "peft" / "other", tmp_path / "ours" / "other")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours" / "other").eval()
    assert np.array_equal(forward(again), forward(adapted))


def test_two_adapters_of_one_model_are_two_directories(tmp_path):
    _, adapted = trained(config_of({"target_modules": ["up"]}))
    adapted.add_adapter("second", config_of({"target_modules": ["square"], "r": 3}))
    adapted.double()
    adapted.save_pretrained(tmp_path)
    assert set(load_adapter(tmp_path).adapters) == {"up"}
    assert load_adapter(tmp_path / "second").sites["square"].r == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_are_kept(tmp_path, dtype):
    _, adapted = trained(config_of({"target_modules": ["up", "square", "line"]}), dtype=dtype)
    adapted.save_pretrained(tmp_path / "peft")
    files = load_adapter(tmp_path / "peft")
    made = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    assert files.adapters["up"].A.dtype == np.dtype(made)
    save_adapter(tmp_path / "ours", files.adapters, files.config, sites=files.sites)
    same(tmp_path / "peft", tmp_path / "ours")


def test_float32_layers_agree_within_rounding(tmp_path):
    """Each side is off by at most γ_c·T: T of the terms' absolute values, c the longest way of roundings."""
    model, adapted = trained(config_of({"target_modules": ["up"]}), dtype="float32")
    adapted.save_pretrained(tmp_path)
    weights = weights_of(model)
    files = load_adapter(tmp_path, weights=weights)
    adapter, s = files.adapters["up"], files.sites["up"].scaling
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = adapted.base_model.model.up(x).numpy()
    got, _ = lx.lora_linear_forward(
        x.numpy(), lx.Linear(weights["up.weight"], weights["up.bias"]), adapter, scaling=s
    )
    X, W, b, A, B = (
        np.abs(part).astype("float64") for part in (x.numpy(), *linear_parts(weights), adapter.A, adapter.B)
    )
    T = X @ W.T + b + s * (X @ A.T) @ B.T
    c = 6 + 2 + 3  # d_in and r terms, then times s, plus the base, plus its bias
    assert np.all(np.abs(got.astype("float64") - want) <= 2 * c * 2.0**-24 / (1 - c * 2.0**-24) * T)


def linear_parts(weights):
    return weights["up.weight"], weights["up.bias"]


# ---- starts that change the base ---------------------------------------------------------------------------

RESIDUAL = ("pissa", "pissa_niter_4", "olora")


def residual(start):
    """The base, PEFT's trained model, and the adapter's own base, as it stands in PEFT's model."""
    model = base(dtype="float32")  # which these starts want, and whose numbers are float64's too
    config = config_of({"target_modules": ["up"], "init_lora_weights": start})
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    first = copy.deepcopy(adapted).double()
    move(adapted, 1)
    return model, first, adapted.double()


@pytest.mark.parametrize("start", RESIDUAL)
def test_a_start_that_changes_the_base_is_refused_without_it(tmp_path, start):
    _, _, adapted = residual(start)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(lx.FormatError, match=r"init_lora_weights=.*rank 2r.*residual_base=True"):
        load_adapter(tmp_path)
    files = load_adapter(tmp_path, residual_base=True)
    with pytest.raises(lx.FormatError, match="residual_base"):
        save_adapter(tmp_path / "ours", files.adapters, files.config)
    assert not (tmp_path / "ours").exists()
    save_adapter(tmp_path / "ours", files.adapters, files.config, residual_base=True)
    same(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize("start", RESIDUAL)
def test_the_residual_base_travels_with_the_adapter(tmp_path, start):
    """Saved as the base_layer's weight, which PEFT loads over what its own start computes again."""
    model, _, adapted = residual(start)
    want = forward(adapted)
    adapted.float().save_pretrained(tmp_path / "peft")
    files = load_adapter(tmp_path / "peft", residual_base=True)
    left = adapted.base_model.model.up.base_layer.weight.detach().numpy()
    save_adapter(tmp_path / "ours", files.adapters, files.config, saved={"up.weight": left})
    again = load_adapter(tmp_path / "ours", weights=weights_of(model))
    close(output(model, applied(again, weights_of(model) | {"up.weight": again.saved["up.weight"]})), want)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    close(forward(loaded.double()), want)


@pytest.mark.parametrize("start", RESIDUAL)
def test_an_adapter_that_peft_converted_is_a_plain_one(tmp_path, start):
    model, first, adapted = residual(start)
    want = forward(adapted)
    first.peft_config["default"].init_lora_weights = True
    first.save_pretrained(tmp_path / "first")
    adapted.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    files = load_adapter(tmp_path / "peft", weights=weights_of(model))
    assert files.sites["up"].r == 4
    # PEFT computes the residual in float32, so that W − sB₀A₀ is off by its rounding
    close(output(model, applied(files, weights_of(model))), want, 1e-5)


# ---- what is written here first ----------------------------------------------------------------------------


def test_peft_loads_what_is_made_here(tmp_path):
    """Records made here, not by PEFT: the config's bytes are PEFT's form, and its own loader agrees."""
    model = base()
    rng = np.random.default_rng(0)
    config = lx.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["up", "square"])
    adapters = {
        "up": lx.Adapter(rng.normal(size=(3, 6)), rng.normal(size=(10, 3)), m=rng.normal(size=10)),
        "square": lx.Adapter(rng.normal(size=(3, 10)), rng.normal(size=(10, 3)), m=rng.normal(size=10)),
    }
    save_adapter(tmp_path, adapters, config)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval().double()
    files = load_adapter(tmp_path, weights=weights_of(model))
    close(forward(adapted), output(model, applied(files, weights_of(model))), 1e-6)  # PEFT makes them float32
    text = (tmp_path / CONFIG).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    adapted.save_pretrained(tmp_path / "again")
    first, second = (json.loads((f / CONFIG).read_text()) for f in (tmp_path, tmp_path / "again"))
    differs = {key for key in first | second if first.get(key) != second.get(key)}
    assert differs <= {"target_modules", "auto_mapping", "peft_version"}  # PEFT's own marks


def test_transformers_embeddings_are_saved_with_the_adapter(tmp_path):
    """A targeted embed_tokens comes with its base weight, and a targeted head too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).double().eval()
    config = config_of({"target_modules": ["embed_tokens", "q_proj", "lm_head"], "task_type": "CAUSAL_LM"})
    adapted = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    move(adapted, 1)
    adapted.save_pretrained(tmp_path / "peft")
    weights = weights_of(model)
    files = load_adapter(tmp_path / "peft", weights=weights)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(files.saved)
    tokens = torch.arange(12).reshape(2, 6)
    new = {name: torch.from_numpy(array) for name, array in applied(files, weights).items()}
    plain = copy.deepcopy(model)
    plain.load_state_dict(new)
    with torch.no_grad():
        got, want = (m(tokens).logits.numpy().reshape(2, -1) for m in (plain, adapted))
    close(got, want)
    save_adapter(tmp_path / "ours", files.adapters, files.config, sites=files.sites, saved=files.saved)
    same(tmp_path / "peft", tmp_path / "ours")


def test_every_kind_of_layer_is_here():
    """The cases name every layer of the model that PEFT adapts."""
    said = json.dumps(CASES) + "grouped attention"
    layers = {name for name, _ in Everything().named_children()}
    assert {name for name in layers if not re.search(rf"\b{name}\b", said)} == set()
