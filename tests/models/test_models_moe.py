"""Mixtures of experts: every gradient against a complex step; routing, files, upcycling.  See specs/moe.md."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from family_laws import (
    alone,
    assert_adds_up,
    assert_any_library,
    assert_computed_again,
    assert_kept_is_counted,
    assert_narrow_storage_is_computed_wide,
)
from whole import AGREES, Step, adapted, all_whole, batch_of, leaves, model_of, worst

import lorax_np as lx
from lorax_np.models import load, moe
from lorax_np.models.llama_config import llama_settings, llama_shapes
from lorax_np.models.moe_config import moe_settings, moe_shapes
from lorax_np.models.pairs import PAIRS
from lorax_np.models.passes import Pass
from lorax_np.models.records import Rows, Trained
from lorax_np.models.tasks import loss_and_gradients, outputs
from lorax_np.models.upcycle import upcycle
from tests.strategies import LIBRARIES

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 10,
    "intermediate_size": 7,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 13,
    "num_local_experts": 5,
}
QWEN = {
    **CONFIG,
    "model_type": "qwen3_moe",
    "intermediate_size": 99,
    "moe_intermediate_size": 7,
    "num_experts": 5,
    "num_experts_per_tok": 3,
}
LABELS = np.array([4, 7, -100, -100, 1, 9, 0, 3, -100])
MODULES = ["q_proj", "k_proj", "o_proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
TASK = "CAUSAL_LM"


def step_of(config=CONFIG, *, whole=False, parameters=PARAMETERS) -> Step:
    model, batch = model_of(config, TASK), batch_of(13, LABELS)
    if whole:
        return Step(model, {}, all_whole(model), batch, TASK)
    trained, sites = adapted(model, targets=MODULES, target_parameters=parameters)
    return Step(model, sites, trained, batch, TASK)


KINDS = {
    "mixtral": CONFIG,
    "one expert": {**CONFIG, "num_experts_per_tok": 1},
    "every expert": {**CONFIG, "num_experts_per_tok": 5},
    "qwen": QWEN,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_model_that_trains_whole(kind):
    off, name = worst(step_of(KINDS[kind], whole=True))
    assert off <= AGREES, name


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
def test_every_adapter_of_experts_routers_and_attention(kind):
    step = step_of(KINDS[kind])
    kinds = {name: site.kind for name, site in step.sites.items()}
    assert kinds["model.layers.1.mlp.experts.down_proj"] == kinds["model.layers.0.mlp.gate.weight"] == "experts"
    off, name = worst(step)
    assert off <= AGREES, name


def test_a_router_may_be_called_a_linear_layer():
    """The same function and gradients, whichever of its names the adapter goes by; then it may drop too."""
    step = step_of(parameters=["gate.weight"])
    adapters, sites = {}, {}
    for name, adapter in step.trained.adapters.items():
        module = name.removesuffix(".weight")
        kind = "linear" if module.endswith("gate") else step.sites[name].kind
        adapters[module], sites[module] = adapter, replace(step.sites[name], name=module, kind=kind)
    other = step._replace(trained=Trained(adapters, {}), sites=sites)
    (one, want), (two, got) = step.gradients(), other.gradients()
    assert float(one) == float(two)
    for name, g in want.adapters.items():
        for part in ("A", "B"):
            a, b = (getattr(found, part) for found in (g, got.adapters[name.removesuffix(".weight")]))
            assert np.abs(a - b).max() <= 1e-14 * np.abs(a).max(), name


FAULTS = {
    "experts_backward": lambda right: lambda at, name, *more: 1.001 * right(at, name, *more),
    "topk_softmax_backward": lambda right: (
        lambda gw, saved: 0 * right(gw, saved)
    ),  # as if weights were constants
    "swiglu_backward": lambda right: lambda gy, saved: right(gy, saved)[::-1],
    "_gate_back": lambda right: lambda at, name, gz, *more: 1.001 * right(at, name, gz, *more),
    "ordered": lambda right: lambda ids, E: right(ids, E)._replace(back=np.arange(ids.size)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name):
    """Those of the way back alone: order is wrong there, and right in the forward."""
    right, forward = getattr(moe, name), moe.mixture_forward

    def unplanted(*args):
        with mock.patch.object(moe, name, right):
            h, saved = forward(*args)
        return h, saved._replace(order=getattr(moe, name)(saved.router.ids, 5)) if name == "ordered" else saved

    half = moe.EXPERTS._replace(forward=unplanted)
    with mock.patch.object(moe, name, FAULTS[name](right)), mock.patch.object(moe, "EXPERTS", half):
        off, _ = worst(step_of(whole=True))
    assert off > 1e6 * AGREES


# ---- routing -----------------------------------------------------------------------------------------------


def by_loops(weights, config, b, normalised):
    """The mixture of each row, one expert after another."""
    mlp, k = "model.layers.0.mlp", config["num_experts_per_tok"]
    found = np.zeros_like(b)
    for n, row in enumerate(b):
        z = weights[f"{mlp}.gate.weight"] @ row
        best = sorted(range(len(z)), key=lambda e: (-z[e], e))[:k]
        among = best if normalised else range(len(z))
        for e in best:
            w = np.exp(z[e]) / sum(np.exp(z[i]) for i in among)
            u, up = np.split(weights[f"{mlp}.experts.gate_up_proj"][e] @ row, 2)
            found[n] += w * weights[f"{mlp}.experts.down_proj"][e] @ (u / (1 + np.exp(-u)) * up)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixture_is_that_of_explicit_loops(kind):
    """Of equal logits the lowest expert is taken: here those of 1 and 3 are equal, and best in some rows."""
    model = model_of(KINDS[kind], TASK)
    gate = np.array(model.weights["model.layers.0.mlp.gate.weight"])
    gate[3] = gate[1]
    weights = {**model.weights, "model.layers.0.mlp.gate.weight": gate}
    h = np.random.default_rng(3).standard_normal((40, 10))
    at = Pass(replace(model, weights=weights), {}, Trained({}, {}))
    got, saved = moe.mixture_forward(at, 0, h, Rows((0, 40), (0,)))
    b, _ = at.rms_norm("model.layers.0.post_attention_layernorm", h, 1e-5 if kind != "qwen" else 1e-6)
    want = h + by_loops(weights, model.config, b, kind != "qwen")
    assert np.abs(got - want).max() <= 1e-14 * np.abs(want).max()
    first = saved.router.ids[:, 0].tolist()
    assert 1 in first
    assert 3 not in first


def test_an_expert_without_rows_has_no_gradient():
    """In both blocks the fifth expert's logit is made too small for it ever to be chosen."""
    step, forward = step_of(whole=True), moe.topk_softmax_forward

    def never(z, k):
        ids, w, saved = forward(np.where(np.arange(5) == 4, -50.0, z), k)
        assert 4 not in ids
        return ids, w, saved

    with mock.patch.object(moe, "topk_softmax_forward", never):
        _, got = step.gradients()
    for part in ("gate_up_proj", "down_proj"):
        g = got.saved[f"model.layers.1.mlp.experts.{part}"]
        assert not g[4].any()
        assert g[:4].any(axis=(1, 2)).sum() >= 3
    assert not got.saved["model.layers.1.mlp.gate.weight"][4].any()


# ---- what may not matter -----------------------------------------------------------------------------------


def test_micro_batches_add_up():
    step = step_of()
    assert_adds_up(step, alone(step.batch, by_row=True))


def test_blocks_computed_again_give_the_same_bits():
    assert_computed_again(step_of())


def test_float32_and_a_batch_of_nothing():
    step = step_of()
    low = replace(step.model, weights={n: w.astype("float32") for n, w in step.model.weights.items()})
    adapters = {
        name: replace(a, A=a.A.astype("float32"), B=a.B.astype("float32"))
        for name, a in step.trained.adapters.items()
    }
    value, got = step._replace(model=low, trained=Trained(adapters, {})).gradients(engine="fast")
    assert value.dtype == np.float32
    assert all(g.dtype == np.float32 for g in leaves(got).values())
    assert float(value) == pytest.approx(float(step.gradients()[0]), rel=1e-5)
    nothing = np.zeros(0, "int64")
    empty = replace(step.batch, ids=nothing, labels=nothing, starts=(0,), index=())
    value, got = loss_and_gradients(step.model, step.sites, step.trained, empty, task=TASK, n=4)
    assert float(value) == 0.0
    assert not any(g.any() for g in leaves(got).values())


def test_narrow_storage_is_computed_in_float32():
    assert_narrow_storage_is_computed_wide(step_of())


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
def test_any_array_library_computes_it(library, kind):
    assert_any_library(step_of(KINDS[kind]), library)


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
@pytest.mark.parametrize("engine", PAIRS)
@pytest.mark.parametrize(
    "parameters", [PARAMETERS, ["1.mlp.experts.down_proj"], ["gate.weight"], None], ids=str
)
def test_what_is_kept_is_what_was_counted(engine, kind, parameters):
    """(moe.16) and (models.27), to the number; where parameters are none, some train whole."""
    step, whole = step_of(KINDS[kind], parameters=parameters), {}
    if parameters is None:
        names = "1.mlp.gate.weight", "0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"
        whole = {f"model.layers.{name}": step.model.weights[f"model.layers.{name}"] for name in names}
    step = step._replace(trained=Trained(step.trained.adapters, whole))
    assert_kept_is_counted(step, engine, moe.moe_forward)


# ---- files -------------------------------------------------------------------------------------------------


def tensors(config=CONFIG):
    rng = np.random.default_rng(0)
    found = {name: rng.standard_normal(shape) for name, shape in moe_shapes(moe_settings(config, "")).items()}
    return found | {"lm_head.weight": rng.standard_normal((13, 10))}


def apart(fused, names=("w1", "w3", "w2"), mlp="block_sparse_moe"):
    """The same, each expert's tensors by themselves."""
    found = {}
    for name, value in fused.items():
        layer, experts, part = name.partition(".mlp.experts.")
        if not experts:
            found[name.replace(".mlp.", f".{mlp}.")] = value
            continue
        for e, W in enumerate(value):
            halves = np.split(W, 2) if part == "gate_up_proj" else [W]
            for which, half in zip(names[:2] if part == "gate_up_proj" else names[2:], halves, strict=True):
                found[f"{layer}.{mlp}.experts.{e}.{which}.weight"] = half
    return found


class Watched(dict):
    """Tensors, and which of them were read."""

    def __init__(self, given):
        super().__init__(given)
        self.read = []

    def shape(self, name):
        return dict.__getitem__(self, name).shape

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize(
    ("config", "names", "mlp"),
    [(CONFIG, ("w1", "w3", "w2"), "block_sparse_moe"), (QWEN, ("gate_proj", "up_proj", "down_proj"), "mlp")],
    ids=["mixtral", "qwen"],
)
def test_experts_that_lie_apart_are_stacked_when_asked_for(config, names, mlp):
    fused = tensors(config)
    weights = Watched(apart(fused, names, mlp))
    model = load.model_of(weights, config, path="model", task=TASK)
    assert not weights.read
    assert set(model.weights) == set(fused)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert np.array_equal(model.weights[name], fused[name])
    assert len(weights.read) == 10
    assert all(
        ".layers.1." in read and read.endswith((f"{names[0]}.weight", f"{names[1]}.weight"))
        for read in weights.read
    )
    assert all(np.array_equal(model.weights[name], value) for name, value in fused.items())
    assert not model.weights[name].flags.writeable
    bare = {name.removeprefix("model."): value for name, value in weights.items() if "lm_head" not in name}
    assert np.array_equal(load.model_of(bare, config, path="model").weights[name], fused[name])


def test_experts_that_do_not_fit_are_named():
    weights = apart(tensors())
    one = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    cases = [
        ({one: None}, "model: model.layers.1.mlp: expected down of expert 3, got none"),
        (
            {one: np.ones((10, 8))},
            f"model: {one}: expected (10, 7), of one of 5 experts set by the config, got (10, 8)",
        ),
        (
            {one.replace(".3.", ".5."): weights[one]},
            "experts.5.w2.weight: expected (10, 7), of one of 5 experts set",
        ),
        (
            {one.replace("w2", "w4"): weights[one]},
            "expected no tensor that a mixtral of this config.json does not have",
        ),
    ]
    for change, message in cases:
        some = {name: value for name, value in (weights | change).items() if value is not None}
        with pytest.raises(lx.FormatError) as refused:
            load.model_of(some, CONFIG, path="model")
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok: expected at most num_local_experts=5, got 6"),
        ({"num_local_experts": 0}, "num_local_experts: expected a whole number of at least 1, got 0"),
        ({"output_router_logits": True}, "output_router_logits: expected False, since no balance of experts"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise: expected 0.0, since a router adds no noise here"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({**QWEN, "decoder_sparse_step": 2}, "decoder_sparse_step: expected 1, since every layer has experts"),
        ({**QWEN, "mlp_only_layers": [1]}, "mlp_only_layers: expected none, since every layer has experts"),
        ({**QWEN, "use_sliding_window": True}, "use_sliding_window: expected False"),
        ({**QWEN, "norm_topk_prob": 1}, "norm_topk_prob: expected true or false, got 1"),
    ],
    ids=str,
)
def test_configs_that_are_refused(change, match):
    with pytest.raises(lx.ConfigError, match=f"^config.json: {match}"):
        load.model_of(tensors(), {**CONFIG, **change}, file="config.json")


def test_defaults_are_mixtrals():
    sizes = {"model_type": "mixtral", "vocab_size": 9, "hidden_size": 32, "intermediate_size": 5}
    found = moe_settings({**sizes, "num_hidden_layers": 1, "num_attention_heads": 16}, "")
    names = "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "windows"
    assert [found[name] for name in names] == [8, 8, 2, 1e-5, (None,)]
    assert found["rope_parameters"]["rope_theta"] == 1e6


# ---- a dense model upcycled --------------------------------------------------------------------------------

DENSE = {name: value for name, value in CONFIG.items() if name != "num_local_experts"}


def dense(kind="llama", **changed):
    config = {**DENSE, "model_type": kind, **changed}
    rng, shapes = np.random.default_rng(1), llama_shapes(llama_settings(config, ""))
    weights = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    if not config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = rng.standard_normal((13, 10))
    return load.model_of(Watched(weights), config, path="model")


@pytest.mark.parametrize(
    "kind",
    [("llama", {"tie_word_embeddings": True}), ("mistral", {"sliding_window": 3}), ("qwen3", {})],
    ids=str,
)
def test_an_upcycled_model_starts_as_the_dense_one(kind):
    one = dense(kind[0], **kind[1])
    b, none = batch_of(13, LABELS), Trained({}, {})
    want = outputs(one, {}, none, b, task=TASK)
    for experts, k in ((4, 2), (1, 1), (3, 3)):
        mixture = upcycle(one, experts, k, rng=np.random.default_rng(experts))
        assert mixture.family == "moe"
        assert mixture.config["num_local_experts"] == experts
        got = outputs(mixture, {}, none, b, task=TASK)
        assert np.abs(got - want).max() <= 1e-14 * np.abs(want).max()
    routed = [mixture.weights[f"model.layers.{i}.mlp.gate.weight"] for i in range(2)]
    assert [gate.shape for gate in routed] == [(3, 10), (3, 10)]
    assert routed[0].any()
    assert not np.array_equal(*routed)


def test_upcycling_reads_and_copies_no_more_than_it_must():
    one = dense()
    under = one.weights.under
    mixture = upcycle(one, 6)
    assert set(under.read) == {"model.embed_tokens.weight"}  # for its dtype and library
    names = [name for name in mixture.weights if ".experts." in name]
    assert len(names) == 4
    for name in names:
        W = mixture.weights[name]
        assert (W.shape[0], W.strides[0]) == (6, 0)
        assert mixture.weights[name] is W
        assert mixture.weights.shape(name) == W.shape
    assert mixture.weights["model.layers.0.mlp.experts.down_proj"][5] is not None
    assert np.shares_memory(
        mixture.weights["model.layers.0.mlp.experts.down_proj"],
        one.weights["model.layers.0.mlp.down_proj.weight"],
    )
    assert "model.layers.0.mlp.up_proj.weight" not in mixture.weights
    assert len(mixture.weights) == len(list(mixture.weights)) == len(one.weights) - 6 + 6
    again = upcycle(one, 6)
    gate = "model.layers.1.mlp.gate.weight"
    assert np.array_equal(again.weights[gate], mixture.weights[gate])


def test_an_upcycled_model_trains_and_its_experts_part():
    """Adapters of experts get gradients of their own, and so does a router, once experts are not alike."""
    mixture = upcycle(dense(), rng=np.random.default_rng(7))
    trained, sites = adapted(mixture, targets=["q_proj"], target_parameters=PARAMETERS)
    step = Step(mixture, sites, trained, batch_of(13, LABELS), TASK)
    off, name = worst(step)
    assert off <= AGREES, name
    _, got = step.gradients()
    B = got.adapters["model.layers.0.mlp.experts.gate_up_proj"].B.reshape(14, 3, 4)
    assert len({B[:, :, e].tobytes() for e in range(4)}) == 4
    assert got.adapters["model.layers.0.mlp.gate.weight"].B.any()


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (lambda: dense("qwen2"), {}, "model: expected one of llama, mistral, qwen3, got 'qwen2'"),
        (lambda: model_of(CONFIG, TASK), {}, "model: expected one of llama, mistral, qwen3, got 'mixtral'"),
        (lambda: dense(mlp_bias=True), {}, "mlp_bias: expected False, got True"),
        (lambda: dense(attention_bias=True), {}, "attention_bias: expected False, got True"),
        (dense, {"experts": 2, "top_k": 3}, "top_k: expected at most experts=2, got 3"),
        (dense, {"experts": 0}, "experts: expected a whole number of at least 1, got 0"),
        (dense, {"top_k": True}, "top_k: expected a whole number of at least 1, got True"),
    ],
)
def test_what_is_not_upcycled(make, options, match):
    with pytest.raises(lx.ConfigError, match=match):
        upcycle(make(), **options)
