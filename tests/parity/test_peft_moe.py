"""Mixtures of experts against torch's autograd through transformers and PEFT.  See specs/moe.md."""

import warnings

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.models.load import load_model
from lorax_np.models.records import Trained
from lorax_np.models.tasks import count, loss_and_gradients, outputs
from lorax_np.models.upcycle import upcycle
from tests.parity.encoder_oracle import distances
from tests.parity.llama_oracle import T, adapted, batch, causal, gradients, logits, ours, same, trained
from tests.parity.llama_oracle import tiny as tiny_llama
from tests.parity.moe_oracle import exact, tiny
from tests.parity.peft_layers import peft, torch

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]

EXACT = 1e-12  # float64: of each tensor's largest entry
TASK = "CAUSAL_LM"
LENGTHS = 3, 1, 9, 2
KINDS = {
    "mixtral": ("mixtral", {}),
    "mixtral, tied, windows": ("mixtral", {"tie_word_embeddings": True, "sliding_window": 3}),
    "mixtral, one expert a token": ("mixtral", {"num_experts_per_tok": 1}),
    "qwen, weights as they are": ("qwen3_moe", {}),
    "qwen, weights divided by their sum": ("qwen3_moe", {"norm_topk_prob": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter(kind):
    name, changed = KINDS[kind]
    model, b = tiny(name, **changed), batch(LENGTHS, 29)
    mine, n = ours(model), count(TASK, batch(LENGTHS, 29).labels)
    assert mine.family == "moe"
    value, found = loss_and_gradients(
        mine, {}, Trained({}, dict(mine.weights)), b, task=TASK, n=n, engine="reference"
    )
    want = causal(model, b, n)
    want.backward()
    got = dict(found.saved)
    if mine.config["tied"]:
        got["model.embed_tokens.weight"] = got["model.embed_tokens.weight"] + got.pop("lm_head.weight")
    grads = {key: p.grad.numpy() for key, p in model.named_parameters()}
    assert got.keys() == grads.keys(), got.keys() ^ grads.keys()
    off = distances(got, grads)
    assert abs(float(value) / float(want) - 1) <= 1e-13
    assert max(off.values()) <= EXACT, max(off, key=lambda key: off[key])
    z = outputs(mine, {}, Trained({}, {}), b, task=TASK)
    theirs = logits(model, b).detach().numpy()
    assert np.abs(z - theirs).max() <= 1e-13 * np.abs(theirs).max()


EAGER = {"attn_implementation": "sdpa", "experts_implementation": "eager"}  # the default one refuses float64
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "experts, router, attention": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "target_parameters": [*EXPERTS, "gate.weight"],
    },
    "router alone, rslora": {
        "target_modules": [],
        "target_parameters": ["mlp.gate.weight"],
        "use_rslora": True,
    },
    "parameters of all layers, attention of one": {  # as PEFT reads it
        "target_modules": ["k_proj"],
        "target_parameters": ["experts.down_proj", "gate.weight"],
        "layers_to_transform": [2],
    },
    "one parameter, last layers": {
        "target_modules": r".*layers\.2\..*k_proj",
        "target_parameters": ["model.layers.1.mlp.experts.down_proj", "model.layers.2.mlp.experts.down_proj"],
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters(tmp_path, kind, case):
    """Through PEFT's files: the parameters of one module nest in them, and in its names of parameters."""
    model, b = tiny(kind), batch(LENGTHS, 29)
    mine = ours(model)
    theirs = exact(adapted(model, tmp_path, r=3, lora_alpha=5, task_type=TASK, **CASES[case]))
    sites, train = trained(tmp_path)
    n = count(TASK, b.labels)
    want = causal(theirs, b, n)
    want.backward()
    for checkpoint in (False, True):
        value, got = loss_and_gradients(mine, sites, train, b, task=TASK, n=n, checkpoint=checkpoint)
        off = same(got, _named(gradients(theirs), theirs))
        assert abs(float(value) / float(want) - 1) <= 1e-13
        assert max(off.values()) <= EXACT, max(off, key=lambda key: off[key])
    assert any(site.kind == "experts" for site in sites.values())


def _named(found, model):
    """PEFT's gradients by the names of parameters: of wrappers in one another the inner one comes later."""
    named = {}
    for (name, part), g in found.items():
        module = model.get_submodule(f"base_model.model.{name}")
        parameter = getattr(module, "parameter_name", None)
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        named[f"{name}.{parameter}" if parameter else name, part] = g
    return named


def test_files_that_hold_each_expert_apart(tmp_path):
    """Mixtral's files, which transformers still writes, name experts one by one: w1, w3 and w2."""
    model = tiny("mixtral")
    model.save_pretrained(tmp_path)
    names = set(lx.open_checkpoint(tmp_path))
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names, sorted(names)
    mine, b = load_model(tmp_path, task=TASK), batch(LENGTHS, 29)
    theirs = logits(model, b).detach().numpy()
    got = outputs(mine, {}, Trained({}, {}), b, task=TASK)
    assert np.abs(got - theirs).max() <= 1e-13 * np.abs(theirs).max()


def test_an_upcycled_model_is_one_of_transformers(tmp_path):
    """Its tensors, loaded by transformers as a Mixtral, give the dense model's logits."""
    dense, b = tiny_llama("mistral", sliding_window=4), batch(LENGTHS, 29)
    mixture = upcycle(ours(dense), experts=3, rng=np.random.default_rng(2))
    config = {k: v for k, v in mixture.config.items() if k not in ("windows", "tied")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = T.MixtralForCausalLM(T.MixtralConfig(**config, **EAGER)).double().eval()
    tensors = {name: torch.from_numpy(np.array(mixture.weights[name])) for name in mixture.weights}
    theirs.load_state_dict(tensors)
    with torch.no_grad():
        got, want = (logits(llama, b).numpy() for llama in (exact(theirs), exact(dense)))
    assert np.abs(got - want).max() <= 1e-13 * np.abs(want).max()
    z = outputs(mixture, {}, Trained({}, {}), b, task=TASK)
    assert np.abs(z - want).max() <= 1e-13 * np.abs(want).max()


def test_a_router_is_a_parameter():
    """PEFT takes its module's name, of old files, for the parameter's; here the parameter is asked for."""
    theirs = peft.get_peft_model(tiny("mixtral"), peft.LoraConfig(target_modules=["gate"]))
    assert theirs.peft_config["default"].target_parameters == {"gate.weight"}
    model = ours(tiny("mixtral"))
    with pytest.raises(lx.ConfigError, match=r"got model.layers.0.mlp.gate, whose weight has 2 axes"):
        lx.inject(model.weights, lx.LoraConfig(target_modules=["gate"]), np.random.default_rng(0))


def test_peft_reads_what_is_trained_here(tmp_path):
    """Of adapters of experts, routers and attention, started and saved here, PEFT makes the same logits."""
    model, b = tiny("mixtral"), batch(LENGTHS, 29)
    mine = ours(model)
    config = lx.LoraConfig(r=2, lora_alpha=6, task_type=TASK, **CASES["experts, router, attention"])
    _, adapters, sites = lx.inject(mine.weights, config, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    moved = {
        name: lx.Adapter(*(part + 0.2 * rng.standard_normal(part.shape) for part in (a.A, a.B)))
        for name, a in adapters.items()
    }
    lx.save_adapter(tmp_path, moved, config)
    theirs = exact(peft.PeftModel.from_pretrained(model, tmp_path).eval())
    want = logits(theirs, b).detach().numpy()
    got = outputs(mine, sites, Trained(moved, {}), b, task=TASK)
    assert np.abs(got - want).max() <= 1e-13 * np.abs(want).max()
    assert np.abs(got - outputs(mine, {}, Trained({}, {}), b, task=TASK)).max() > 0.01 * np.abs(want).max()
