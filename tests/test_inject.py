"""Injection: where a config acts on a model's weights, what is refused there, and what is started."""

import re
import time
from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lorax_np import (
    Adapter,
    ConfigError,
    ConvAdapter,
    DtypeError,
    Linear,
    LoraConfig,
    init_adapter,
    open_safetensors,
    torch_generator,
)
from lorax_np.config.tree import fits, grown, ordered
from lorax_np.inject import inject, plan, saved_tensors
from tests.strategies import LIBRARIES, seeds

# ---- models ------------------------------------------------------------------------------------------------


def llama(layers: int = 3, d: int = 6) -> dict[str, tuple[int, ...]]:
    """Shapes of a small llama whose query and value have biases, in the order of a state_dict."""
    shapes = {"model.embed_tokens.weight": (11, d)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, out in (("q", d), ("k", 3), ("v", 3)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, d)
            if name != "k":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (d, d)
        for name, shape in (("gate", (8, d)), ("up", (8, d)), ("down", (d, 8))):
            shapes[f"{at}.mlp.{name}_proj.weight"] = shape
        shapes[f"{at}.input_layernorm.weight"] = (d,)
        shapes[f"{at}.input_layernorm.bias"] = (d,)
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (11, d)}


MIXED = {
    "embedding.weight": (11, 6), "conv.weight": (8, 6, 3), "conv.bias": (8,), "dw.weight": (8, 1, 3),
    "plane.weight": (4, 2, 3, 3), "attn.in_proj_weight": (18, 6), "attn.in_proj_bias": (18,),
    "attn.out_proj.weight": (6, 6), "attn.out_proj.bias": (6,), "norm.weight": (6,), "norm.bias": (6,),
    "causal.bias": (1, 1, 9, 9), "experts.gate_up_proj": (3, 10, 6), "experts.down_proj": (3, 6, 5),
    "head.0.weight": (6, 6), "head.2.weight": (4, 6), "classifier.weight": (2, 4), "classifier.bias": (2,),
}  # fmt: skip


def filled(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Normals of these shapes, which nobody may write to."""
    rng = np.random.default_rng(seed)
    made = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    for value in made.values():
        value.flags.writeable = False
    return made


class Watched(Mapping):
    """Weights that tell shapes apart from values, and note what was read."""

    def __init__(self, values, config=None):
        self.values_, self.read, self.config = values, [], config or {}

    def shape(self, name):
        return self.values_[name].shape

    def __getitem__(self, name):
        self.read.append(name)
        return self.values_[name]

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


def names(found):
    return list(found.sites)


# ---- where -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"target_modules": ["q_proj"]}, 3),
        ({"target_modules": ["q_proj", "mlp.up_proj"]}, 6),
        ({"target_modules": ["model.layers.1.self_attn.o_proj"]}, 1),
        ({"target_modules": r".*\.[02]\..*_proj"}, 14),
        ({"target_modules": "all-linear"}, 21),
        ({"target_modules": "ALL-linear", "exclude_modules": ["mlp.down_proj", "self_attn"]}, 18),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, 14),
        ({"target_modules": "all-linear", "modules_to_save": ["mlp"]}, 12),
        ({"target_modules": ["lm_head", "embed_tokens"]}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, 1),
        ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 2]}, 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["model.layers"]}, 1),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, 3),
    ],
)
def test_places(fields, count):
    found = plan(llama(), LoraConfig(**fields))
    assert len(found.sites) == count
    assert all(site.name == name and site.weight == f"{name}.weight" for name, site in found.sites.items())


def test_none_stands_for_what_is_known_of_the_models_type():
    assert len(plan(llama(), LoraConfig(), model_type="llama").sites) == 6
    weights = Watched(filled(llama()), {"model_type": "llama"})
    assert len(plan(weights, LoraConfig()).sites) == 6
    assert len(plan(weights, LoraConfig(target_modules=["q_proj"]), model_type="gpt2").sites) == 3


def test_patterns_are_resolved_at_each_site():
    config = LoraConfig(
        4, 8, use_rslora=True, target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 16, r"layers\.0\.self_attn\.q_proj": 1},
        alpha_pattern={r".*\.[12]\..*": 2},
    )  # fmt: skip
    found = plan(llama(), config).sites
    assert {name: (site.r, site.scaling) for name, site in found.items() if ".1." in name} == {
        "model.layers.1.self_attn.q_proj": (4, 1.0),
        "model.layers.1.self_attn.v_proj": (16, 0.5),
    }
    assert found["model.layers.0.self_attn.q_proj"].scaling == 8.0
    assert found["model.layers.0.self_attn.v_proj"].scaling == 2.0


def test_kinds_are_read_off_shapes_and_names():
    config = LoraConfig(
        2, target_modules=["embedding", "conv", "plane", "0", "out_proj"], target_parameters=["gate_up_proj"]
    )
    found = plan(MIXED, config)
    assert {name: site.kind for name, site in found.sites.items()} == {
        "embedding": "embedding", "conv": "conv", "plane": "conv", "attn.out_proj": "linear",
        "head.0": "linear",
        "experts.gate_up_proj": "experts",
    }  # fmt: skip
    said = plan(MIXED, LoraConfig(target_modules=["0"]), kinds={"head.0": "embedding"})
    assert said.sites["head.0"].kind == "embedding"
    assert plan(
        {"patch_embedding.weight": (3, 4), "patch_embedding.bias": (3,)},
        LoraConfig(target_modules="all-linear"),
    ).sites


def test_experts_lie_as_their_models_type_says():
    config = LoraConfig(target_modules=[], target_parameters=["experts.down_proj", "gate_up_proj"])
    for model_type, transposed in (("gpt_oss", True), ("mixtral", False), (None, False)):
        found = plan(MIXED, config, model_type=model_type).sites
        assert {name: site.transposed for name, site in found.items()} == {
            "experts.gate_up_proj": transposed,
            "experts.down_proj": transposed,
        }


def test_a_router_beside_fused_experts_is_no_linear_module():
    shapes = {
        f"mlp.{name}": shape
        for name, shape in (("gate.weight", (3, 6)), ("experts.down_proj", (3, 6, 5)), ("up.weight", (4, 6)))
    }
    assert names(plan(shapes, LoraConfig(target_modules="all-linear"))) == ["mlp.up"]
    del shapes["mlp.experts.down_proj"]
    assert names(plan(shapes, LoraConfig(target_modules="all-linear"))) == ["mlp.gate", "mlp.up"]


@pytest.mark.parametrize(
    ("model_type", "declared", "transposed"),
    [
        ("gpt2", False, True),
        ("gpt2", True, True),
        ("llama", False, False),
        (None, True, True),
        (None, False, False),
        ("vit", True, True),
    ],
)
def test_layout(model_type, declared, transposed):
    found = plan(
        {"h.0.c_attn.weight": (4, 4)},
        LoraConfig(fan_in_fan_out=declared, target_modules=["c_attn"]),
        model_type=model_type,
    )
    assert found.sites["h.0.c_attn"].transposed == transposed


TASKS = {
    "SEQ_CLS": ["classifier.bias", "classifier.weight"], "TOKEN_CLS": ["classifier.bias", "classifier.weight"],
    "QUESTION_ANS": [], "CAUSAL_LM": [], "SEQ_2_SEQ_LM": [], "FEATURE_EXTRACTION": [], None: [],
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_heads_of_tasks_are_trained_whole_and_never_targeted(task):
    found = plan(MIXED, LoraConfig(target_modules="all-linear", task_type=task))
    assert sorted(found.saved) == TASKS[task]
    assert ("classifier" in found.sites) == (not TASKS[task])
    assert names(
        plan(
            {"qa_outputs.weight": (2, 4), "q.weight": (4, 4)},
            LoraConfig(target_modules="all-linear", task_type="QUESTION_ANS"),
        )
    ) == ["q"]


def test_rows_of_embeddings():
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 1])
    found = plan(llama(), config)
    assert found.tokens == {"model.embed_tokens": (3, 1)}
    assert found.trainable == plan(llama(), LoraConfig(target_modules=["q_proj"])).trainable + 2 * 6
    said = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [0]})
    assert plan(llama(), said).tokens == {"lm_head": (0,)}


# ---- what is refused ---------------------------------------------------------------------------------------


def test_an_attention_module_is_two_sites_with_the_same_numbers():
    config = LoraConfig(2, 3, target_modules=["attn"], rank_pattern={"attn": 4}, bias="lora_only")
    found = plan(MIXED, config)
    assert [(s.name, s.weight, s.r, s.scaling) for s in found.sites.values()] == [
        ("attn", "attn.in_proj_weight", 4, 0.75),
        ("attn.out_proj", "attn.out_proj.weight", 4, 0.75),
    ]
    assert found.biases == ("attn.out_proj",)
    assert found.trainable == 4 * (6 + 18) + 4 * (6 + 6) + 6  # (inject.1), (inject.5)
    alone = plan(MIXED, LoraConfig(2, target_modules=["out_proj"]))
    assert list(alone.sites) == ["attn.out_proj"]
    with pytest.raises(ConfigError, match="got attn, an attention module without its out_proj"):
        plan({name: shape for name, shape in MIXED.items() if not name.startswith("attn.out")}, config)


@pytest.mark.parametrize("start", [True, False, "gaussian", "pissa", "orthogonal"])
def test_what_is_drawn_for_an_attention_module(start):
    """PEFT draws the output's factors once before those of q, k and v, and once behind; SVDs draw nothing."""
    weights = filled(MIXED)
    new, adapters, _ = inject(
        weights, LoraConfig(2, 3, target_modules=["attn"], init_lora_weights=start), torch_generator(5)
    )
    again, source = {}, torch_generator(5)
    order = ["attn.out_proj", "attn", "attn.out_proj"] if start in (True, False, "gaussian") else list(adapters)
    for name in order:
        W = weights["attn.in_proj_weight" if name == "attn" else f"{name}.weight"]
        again[name] = init_adapter(Linear(W), LoraConfig(2, 3, init_lora_weights=start), rng=source)
    for name, adapter in adapters.items():
        assert np.array_equal(adapter.A, again[name][1].A)
        assert np.array_equal(adapter.B, again[name][1].B)
    assert np.array_equal(new["attn.in_proj_weight"], again["attn"][0].W)


REFUSED = [
    (
        {"target_modules": ["q_porj"]},
        r"target_modules: .* of modules, got 'q_porj', which fits none of 38 \(did you mean 'q_proj'\?\)",
    ),
    (
        {"target_modules": ["q_proj", "nothing"]},
        "target_modules: expected names of modules, got 'nothing', which fits none of 38$",
    ),
    ({"target_modules": ["proj"]}, "target_modules: expected names of modules, got 'proj', which fits none"),
    (
        {"target_modules": "q_proj"},
        r"got 'q_proj', which fits none of 38 \(did you mean the list \['q_proj'\], or r'.\*\\.q_proj'\?\)",
    ),
    (
        {"target_modules": r".*\.nowhere"},
        "target_modules: expected names of modules, got '.*nowhere', which fits none of 38",
    ),
    (
        {"target_modules": ["self_attn"]},
        r"got model.layers.0.self_attn, which has no weight \(below it: model.layers.0.self_attn.q_proj, ",
    ),
    ({"target_modules": ["norm"]}, "got model.norm, whose weight has 1 axes"),
    ({"target_modules": r".*layers\.0.*"}, "got model.layers.0, which has no weight"),
    (
        {},
        "target_modules: expected names, or 'all-linear', among 23 modules, .* model_type None, got None",
    ),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ["k_porj"]},
        "exclude_modules: .* got 'k_porj', .*did you mean 'k_proj'",
    ),
    ({"target_modules": ["q_proj"], "exclude_modules": "k_proj"}, r"exclude_modules: .*the list \['k_proj'\]"),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "target_modules: expected some module to be left, got 3 that",
    ),
    (
        {"target_modules": ["q_proj"], "modules_to_save": ["lmhead"]},
        "modules_to_save: .* got 'lmhead', .*did you mean 'lm_head'",
    ),
    (
        {"target_modules": ["q_proj"], "modules_to_save": ["orm"]},
        "modules_to_save: .* got 'orm', which fits none",
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
        r"layers_to_transform: expected numbers of layers, 0 to 2, got \[3\]",
    ),
    (
        {"target_modules": ["lm_head"], "layers_to_transform": 0},
        r"layers_to_transform: .*of which no target has one, got \[0\]",
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["layer"]},
        "layers_pattern: .* got 'layer', .*did you mean 'layers'",
    ),
    (
        {"target_modules": ["q_proj"], "rank_pattern": {"qproj": 4}},
        "rank_pattern: expected keys that fit sites, got 'qproj', which fits none of 3 .*'q_proj'",
    ),
    (
        {"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 4}},
        "alpha_pattern: expected keys that fit sites, got 'v_proj', which fits none of 3",
    ),
    (
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4, r".*\.1\..*": 2}},
        "rank_pattern: expected one value for model.layers.1.self_attn.q_proj",
    ),
    (
        {"target_parameters": ["up"]},
        "target_parameters: expected names of parameters, got 'up', which fits none of 36",
    ),
    (
        {"target_parameters": ["norm.weight"]},
        r"target_parameters: expected 2 or 3 axes, got model.norm.weight of \(6,\)",
    ),
    (
        {"target_modules": ["lm_head"], "target_parameters": ["lm_head.weight"]},
        "target_parameters: expected none of a module in target_modules or",
    ),
    (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_token": [1]}},
        "trainable_token_indices: .* got 'embed_token', .*'embed_tokens'",
    ),
    (
        {"target_modules": ["q_proj"], "trainable_token_indices": [11]},
        "trainable_token_indices: expected rows below 11 of model.embed_tokens, got 11",
    ),
    (
        {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]},
        "trainable_token_indices: expected no embedding of target_modules, got model.embed",
    ),
    (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]},
        "trainable_token_indices: expected no embedding of modules_to_save",
    ),
    (
        {"target_modules": ["embed_tokens"], "lora_dropout": 0.1},
        "lora_dropout: expected 0.0 where all sites are embeddings",
    ),
    (
        {"target_modules": ["embed_tokens", "q_proj"], "lora_bias": True},
        "lora_bias: expected False at model.embed_tokens, of kind embedding",
    ),
    (
        {"target_modules": ["k_proj"], "r": 4, "init_lora_weights": "pissa"},
        "r: expected at most 3, the smaller axis of model.layers.0.self_attn.k_proj.weight",
    ),
    (
        {"target_modules": ["k_proj"], "rank_pattern": {"k_proj": 4}, "r": 2, "init_lora_weights": "olora"},
        "r: expected at most 3",
    ),
    (
        {"target_modules": ["v_proj"], "fan_in_fan_out": True},
        r"fan_in_fan_out: expected False or another model_type, since model.*v_proj.weight is \(3, 6\)",
    ),
    (
        {"target_modules": ["q_proj"], "use_qalora": True},
        "use_qalora: expected False, since this version only carries the field",
    ),
    ({"target_modules": ["q_proj"], "extra": {"new_field": 1}}, "new_field: expected a known field"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_fits_nothing_is_refused_by_plan_and_by_inject(fields, message):
    config = LoraConfig(**fields)
    for act in (lambda: plan(llama(), config), lambda: inject(filled(llama()), config, torch_generator(0))):
        with pytest.raises(ConfigError, match=message) as refused:
            act()
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        (
            {"target_modules": ["attn"], "use_dora": True},
            {},
            "use_dora: expected False at attn, an attention module, got True",
        ),
        (
            {"target_modules": ["attn"], "lora_bias": True},
            {},
            "lora_bias: expected False at attn, an attention",
        ),
        (
            {"target_modules": ["attn", "out_proj"]},
            {},
            r"target_modules: expected no attn\.out_proj, which is adapted with attn, an attention module",
        ),
        (
            {"target_modules": ["attn"], "exclude_modules": ["out_proj"]},
            {},
            "exclude_modules: expected no attn.out",
        ),
        (
            {"target_modules": ["attn"], "modules_to_save": ["out_proj"]},
            {},
            "modules_to_save: expected no attn.out",
        ),
        (
            {"target_modules": ["attn"], "rank_pattern": {"out_proj": 1}},
            {},
            "rank_pattern: expected keys that fit sites, got 'out_proj', which fits none",
        ),
        ({"target_modules": ["dw"]}, {}, r"groups: expected \{'dw': n\}, since a weight of \(8, 1, 3\) may be"),
        (
            {"target_modules": ["dw"], "r": 4},
            {"groups": {"dw": 8}},
            "r: expected a multiple of groups=8 at dw, got 4",
        ),
        (
            {"target_modules": ["conv"]},
            {"kinds": {"cnv": "conv"}},
            r"kinds: expected names of modules, got 'cnv' \(did you mean 'conv'\?\)",
        ),
        (
            {"target_modules": ["conv"]},
            {"kinds": {"conv": "experts"}},
            r"kinds\['conv'\]: expected one of linear, embedding, conv, got 'experts'",
        ),
        (
            {"target_modules": ["norm"]},
            {"kinds": {"norm": "linear"}},
            r"kinds: expected a weight of 2 axes for one of kind linear, got norm.weight of \(6,\)",
        ),
        (
            {"target_modules": ["conv"]},
            {"groups": {"conv": 0}},
            r"groups\['conv'\]: expected an int of at least 1, got 0",
        ),
        (
            {"target_modules": ["conv"]},
            {"groups": {"conv": True}},
            r"groups\['conv'\]: expected an int of at least 1, got True",
        ),
        (
            {"target_modules": ["out_proj"]},
            {"model_type": "mamba"},
            "expected no out_proj of mamba, whose kernel reads its weight past",
        ),
        (
            {"target_modules": ["0"], "fan_in_fan_out": True},
            {"model_type": "llama"},
            "fan_in_fan_out: expected False for model_type 'llama'",
        ),
        ({}, {"model_type": "lama"}, r"known for model_type 'lama' \(did you mean 'llama'\?\)"),
        (
            {"target_modules": ["0"], "trainable_token_indices": [1]},
            {},
            "trainable_token_indices: expected a mapping from the embedding's name",
        ),
    ],
)
def test_what_a_model_cannot_have_is_refused(fields, arguments, message):
    with pytest.raises(ConfigError, match=message):
        plan(MIXED, LoraConfig(**fields), **arguments)


def test_what_a_start_refuses_names_the_site():
    weights = filled(llama())
    broken = {
        **weights,
        "model.layers.1.self_attn.q_proj.weight": np.diag([1.0, 0, 1, 0, 0, 1]).astype("float32"),
    }
    config = LoraConfig(2, use_dora=True, target_modules=["q_proj"])
    with pytest.raises(
        ConfigError,
        match=r"^model.layers.1.self_attn.q_proj: W .*got 3 rows of zeros .first: 1, 3, 4.*exclude_modules",
    ):
        inject(broken, config, torch_generator(0))
    inject(
        broken,
        LoraConfig(2, use_dora=True, target_modules=["q_proj"], exclude_modules=r".*\.1\..*"),
        torch_generator(0),
    )
    with pytest.raises(
        ConfigError, match=r"^model.layers.0.self_attn.q_proj: rng: expected a numpy.random.Generator"
    ):
        inject(weights, LoraConfig(target_modules=["q_proj"]))
    ints = {"up.weight": np.ones((3, 3), "int8")}
    with pytest.raises(DtypeError, match=r"^up: W: expected one of"):
        inject(ints, LoraConfig(target_modules=["up"]), torch_generator(0))


# ---- what is read, and what comes back ---------------------------------------------------------------------


def test_nothing_is_read_that_is_not_adapted(tmp_path):
    """Neither by plan, which reads nothing, nor by inject, also where shapes come with the arrays alone."""
    weights = Watched(filled(llama()))
    config = LoraConfig(2, target_modules=["v_proj", "lm_head"], layers_to_transform=None, bias="lora_only")
    found = plan(weights, config)
    assert weights.read == []
    _, adapters, sites = inject(weights, config, torch_generator(0))
    wanted = [site.weight for site in sites.values()] + [f"{name}.bias" for name in sites if "v_proj" in name]
    assert sorted(weights.read) == sorted(wanted)
    assert sites == found.sites
    assert list(adapters) == names(found)
    save_file(dict(weights.values_), tmp_path / "w.safetensors")
    with_file = inject(open_safetensors(tmp_path / "w.safetensors"), config, torch_generator(0))[1]
    for name, adapter in adapters.items():
        np.testing.assert_array_equal(with_file[name].A, adapter.A)  # whatever the file's order


def test_the_weights_come_back_themselves_where_a_start_leaves_no_residual():
    weights = MappingProxyType(filled(llama()))
    for start in (True, False, "gaussian", "orthogonal"):
        config = LoraConfig(2, target_modules="all-linear", init_lora_weights=start)
        assert inject(weights, config, torch_generator(0))[0] is weights


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_residual_lies_over_the_weights_as_they_are_stored(start, model_type):
    shapes = {"h.0.c_attn.weight": (4, 9), "h.0.c_proj.weight": (3, 4), "ln.weight": (4,)}
    weights = Watched(filled(shapes, dtype="float64"), {"model_type": model_type, "tie_word_embeddings": True})
    before = {name: np.array(value) for name, value in weights.values_.items()}
    config = LoraConfig(
        2, 3, target_modules=["c_attn", "c_proj"], init_lora_weights=start, rank_pattern={"c_proj": 1},
        alpha_pattern={"c_proj": 7},
    )  # fmt: skip
    new, adapters, sites = inject(weights, config, torch_generator(0))
    assert list(new) == list(weights)
    assert len(new) == 3
    assert "ln.weight" in new
    assert "ln" not in new
    assert new.config == weights.config
    assert new["ln.weight"] is weights["ln.weight"]
    with pytest.raises(KeyError):
        new["nothing"]
    for name, site in sites.items():
        assert site.transposed == (model_type == "gpt2")
        delta = site.scaling * adapters[name].B @ adapters[name].A
        whole = new[site.weight] + (delta.T if site.transposed else delta)
        assert new.shape(site.weight) == shapes[site.weight]
        np.testing.assert_allclose(whole, before[site.weight], atol=1e-13)
        assert np.abs(new[site.weight] - before[site.weight]).max() > 1e-3
        np.testing.assert_array_equal(weights.values_[site.weight], before[site.weight])
    again = inject(new, LoraConfig(2, target_modules=["c_attn"]), torch_generator(0))
    assert again[0] is new


def test_biases():
    weights = filled(llama(2) | {"mask.bias": (1, 1, 3, 3), "bias": (6,)})
    trained = {}
    for bias in ("none", "all", "lora_only"):
        config = LoraConfig(
            2, target_modules=["q_proj", "k_proj"], bias=bias, modules_to_save=["layers.1.input_layernorm"]
        )
        _, adapters, sites = inject(weights, config, torch_generator(0))
        trained[bias] = [name for name, adapter in adapters.items() if adapter.b is not None]
        for name in trained[bias]:
            whole = f"{name}.bias" if name else "bias"
            np.testing.assert_array_equal(adapters[name].b, weights[whole])
            assert adapters[name].b is not weights[whole]
            assert adapters[name].b.flags.writeable
            assert (adapters[name].A is None) == (name not in sites)
        shapes = {name: value.shape for name, value in weights.items()}
        assert set(plan(shapes, config).biases) == set(trained[bias])
    q, v = (f"model.layers.{{}}.self_attn.{name}_proj" for name in "qv")
    assert trained["none"] == []
    assert trained["lora_only"] == [q.format(0), q.format(1)]
    assert set(trained["all"]) == {
        "",
        *(name.format(i) for name in (q, v) for i in (0, 1)),
        "model.layers.0.input_layernorm",
    }


def test_records_by_kind():
    config = LoraConfig(2, 3, target_modules=["embedding", "conv", "0"], target_parameters=["gate_up_proj"])
    _, adapters, _ = inject(filled(MIXED), config, torch_generator(0))
    assert {name: (type(found), found.A.shape, found.B.shape) for name, found in adapters.items()} == {
        "embedding": (Adapter, (2, 11), (6, 2)), "conv": (ConvAdapter, (2, 6, 3), (8, 2, 1)),
        "head.0": (Adapter, (2, 6), (6, 2)), "experts.gate_up_proj": (Adapter, (6, 6), (10, 6)),
    }  # fmt: skip
    fused = LoraConfig(2, target_modules=[], target_parameters=["gate_up_proj"])
    _, adapters, _ = inject(filled(MIXED), fused, torch_generator(0), model_type="gpt_oss")
    turned = adapters["experts.gate_up_proj"]
    assert (turned.A.shape, turned.B.shape) == ((6, 10), (6, 6))
    grouped = LoraConfig(8, target_modules=["dw"])
    _, adapters, _ = inject(filled(MIXED), grouped, torch_generator(0), groups={"dw": 8})
    assert (adapters["dw"].A.shape, adapters["dw"].B.shape) == ((8, 8, 3), (8, 1, 1))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_what_trains_beside_the_adapters_starts_as_copies(library):
    host = filled(llama(1))
    weights = {name: library.place(value) for name, value in host.items()}
    said = {"model.embed_tokens": [3, 0, 10]}
    config = LoraConfig(2, target_modules=["q_proj"], modules_to_save=["mlp"], trainable_token_indices=said)
    made = saved_tensors(weights, plan(weights, config))
    wanted = {name: value for name, value in host.items() if "mlp" in name}
    wanted["model.embed_tokens.token_adapter.trainable_tokens_delta"] = host["model.embed_tokens.weight"][
        [3, 0, 10]
    ]
    assert made.keys() == wanted.keys()
    for name, value in made.items():
        np.testing.assert_array_equal(library.host(value), wanted[name])
        assert value is not weights.get(name)


def test_thousands_of_modules_are_planned_in_a_blink():
    """A mixture of 256 experts a layer: what is quadratic in the names would take minutes."""
    shapes = {f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight": (2, 2)
              for i in range(4) for e in range(256) for name in ("gate", "up", "down")}  # fmt: skip
    everything = [name.removesuffix(".weight") for name in shapes]
    for targets in ("all-linear", everything, ["up_proj", "down_proj"], r".*\.(up|down)_proj"):
        start = time.perf_counter()
        found = plan(
            sorted_shapes(shapes), LoraConfig(2, target_modules=targets, rank_pattern={r".*\.7\..*up_proj": 1})
        )
        assert len(found.sites) == (3072 if len(targets) in (10, 3072) else 2048)
        assert time.perf_counter() - start < 10


def sorted_shapes(shapes):
    return {name: shapes[name] for name in sorted(shapes)}


def test_counts_are_those_of_the_records():
    config = LoraConfig(
        2, 3, lora_bias=True, target_modules=["conv", "0"], bias="all", modules_to_save=["classifier"]
    )
    for fields in ({}, {"lora_bias": False, "use_dora": True}):
        config = LoraConfig(
            2,
            3,
            target_modules=["conv", "0"],
            bias="all",
            modules_to_save=["classifier"],
            **{"lora_bias": True, **fields},
        )
        found = plan(MIXED, config)
        _, adapters, _ = inject(filled(MIXED), config, torch_generator(0))
        parts = [getattr(a, f) for a in adapters.values() for f in ("A", "B", "m", "b", "bB")]
        numbers = sum(part.size for part in parts if part is not None) + 2 * 4 + 2
        assert found.trainable == numbers
    assert str(plan({"w.weight": (2000, 3000)}, LoraConfig(target_modules=["w"]))) == (
        "trainable params: 40,000 || all params: 6,040,000 || trainable%: 0.6623"
    )


@pytest.mark.parametrize(
    ("shapes", "fields", "model_type"),
    [
        ({"c_fc.weight": (4, 9)}, {"target_modules": ["c_fc"], "use_dora": True}, "gpt2"),
        ({"wte.weight": (11, 4)}, {"target_modules": ["wte"], "use_dora": True}, None),
        (MIXED, {"target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"]}, "gpt_oss"),
        (MIXED, {"target_modules": [], "target_parameters": ["gate_up_proj", "0.weight"]}, None),
    ],
)
def test_counts_by_kind(shapes, fields, model_type):
    """(inject.1) to (inject.4), for weights of either layout."""
    config = LoraConfig(2, 3, rank_pattern={".*gate_up_proj": 3} if len(shapes) > 1 else {}, **fields)
    found = plan(shapes, config, model_type=model_type)
    _, adapters, _ = inject(filled(shapes), config, torch_generator(0), model_type=model_type)
    parts = [getattr(a, f) for a in adapters.values() for f in ("A", "B", "m")]
    assert found.trainable == sum(part.size for part in parts if part is not None)


def test_what_has_two_names_counts_once():
    """A head tied to its embedding, where config.json says so, and a bias that its parent owns."""
    shapes = {"wte.weight": (11, 4), "q.weight": (4, 4), "lm_head.weight": (11, 4)}
    config = LoraConfig(2, target_modules=["q"])
    tied = plan(Watched(filled(shapes), {"tie_word_embeddings": True}), config)
    assert (plan(shapes, config).total, tied.total) == (11 * 4 * 2 + 16 + 16, 11 * 4 + 16 + 16)
    head = {"q.weight": (4, 4), "cls.predictions.bias": (9,), "cls.predictions.decoder.weight": (9, 4)}
    head["cls.predictions.decoder.bias"] = (9,)
    found = plan(head, LoraConfig(2, target_modules=["q"], bias="all"))
    assert found.biases == ("cls.predictions",)
    assert (found.trainable, found.total) == (16 + 9, 16 + 16 + 9 + 36)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_starts_that_need_data_leave_their_residual(start):
    weights, rng = filled(llama(1, 8), dtype="float64"), np.random.default_rng(1)
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("up", "down")]
    given = {
        "corda": {"inputs": {name: rng.standard_normal((40, 8)) for name in names}},
        "lora_ga": {"gradients": {name: rng.standard_normal((8, 8)) for name in names}},
        "loftq": {},
    }[start]
    settings = {"loftq_config": {"loftq_bits": 8, "loftq_iter": 1}} if start == "loftq" else {}
    config = LoraConfig(2, 3, target_modules=["up_proj", "down_proj"], init_lora_weights=start, **settings)
    new, adapters, sites = inject(weights, config, torch_generator(0), **given)
    for name, site in sites.items():
        whole = new[site.weight] + site.scaling * adapters[name].B @ adapters[name].A
        off = np.abs(whole - weights[site.weight]).max()
        assert off < (0.05 if start == "loftq" else 1e-6)
        assert np.abs(new[site.weight] - weights[site.weight]).max() > 1e-4


def test_inputs_and_gradients_go_to_their_sites():
    weights, rng = filled(llama(1)), np.random.default_rng(0)
    x = {f"model.layers.0.self_attn.{name}_proj": rng.standard_normal((40, 6)) for name in "qv"}
    config = LoraConfig(2, target_modules=["q_proj", "v_proj"], init_lora_weights="eva")
    _, adapters, _ = inject(weights, config, inputs=x)
    for name, adapter in adapters.items():
        _, _, Vh = np.linalg.svd(x[name] - x[name].mean(0), full_matrices=False)
        np.testing.assert_allclose(np.abs(np.sum(adapter.A * Vh[:2], axis=1)), 1, rtol=1e-5)
    with pytest.raises(ConfigError, match="inputs: expected names of sites, got 'q_proj'"):
        inject(weights, config, inputs={"q_proj": x[next(iter(x))]})
    with pytest.raises(
        ConfigError, match=r"^model.layers.0.self_attn.v_proj: inputs: expected a layer's inputs"
    ):
        inject(
            weights, config, inputs={"model.layers.0.self_attn.q_proj": x["model.layers.0.self_attn.q_proj"]}
        )
    with pytest.raises(ConfigError, match=r"gradients: expected names of sites, got 'lm_head'"):
        inject(weights, config, inputs=x, gradients={"lm_head": weights["lm_head.weight"]})


STARTED = [library for library in LIBRARIES if library.name != "guarded"]  # a start looks at W on the host


@pytest.mark.parametrize("library", STARTED, ids=lambda library: library.name)
def test_adapters_live_where_the_weights_do(library):
    host = filled(llama(1))
    weights = {name: library.place(value) for name, value in host.items()}
    config = LoraConfig(2, target_modules=["q_proj", "embed_tokens"], bias="all", use_dora=True)
    _, adapters, _ = inject(weights, config, torch_generator(0))
    _, plain, _ = inject(host, config, torch_generator(0))
    for name, adapter in adapters.items():
        for field in ("A", "B", "m", "b"):
            part, same = getattr(adapter, field), getattr(plain[name], field)
            assert (part is None) == (same is None)
            if part is not None:
                assert type(part) is type(weights["lm_head.weight"]) or library.xp is np
                np.testing.assert_allclose(library.host(part), same, rtol=1e-6)


def test_dtypes_of_the_base():
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in filled(llama(1)).items()}
    for said, dtype in ((None, "float32"), ("base", "bfloat16"), ("float64", "float64")):
        config = LoraConfig(2, target_modules=["q_proj"], adapter_dtype=said)
        _, adapters, _ = inject(weights, config, torch_generator(0))
        assert adapters["model.layers.0.self_attn.q_proj"].A.dtype == dtype


# ---- names -------------------------------------------------------------------------------------------------

parts = st.sampled_from(["a", "b", "ab", "q", "0", "1"])
dotted = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(
    keys=st.lists(dotted, min_size=1, max_size=4, unique=True),
    places=st.lists(dotted, min_size=1, max_size=6, unique=True),
)
def test_a_list_of_names_means_whole_names_and_ends_after_a_dot(keys, places):
    """By the definition, name by name: equal, or ending in a dot and the key."""
    shapes = {f"{name}.weight": (2, 3) for name in places}
    wanted = [name for name in places if any(name == key or name.endswith("." + key) for key in keys)]
    config = LoraConfig(2, target_modules=keys)
    within = {".".join(name.split(".")[:n]) for name in places for n in range(1, 5)}
    listed = [name for name in within if any(name == key or name.endswith("." + key) for key in keys)]
    used = all(any(name == key or name.endswith("." + key) for name in within) for key in keys)
    if used and set(listed) <= set(places):
        assert set(plan(shapes, config).sites) == set(wanted)
    else:
        with pytest.raises(ConfigError, match=r"fits none|has no weight"):
            plan(shapes, config)
    assert not fits("in", "model.lin")
    assert fits("in", "model.in")


@given(seed=seeds)
def test_files_order_is_undone(seed):
    """Sorted by names, a checkpoint gives the order of registration, and so the same A everywhere."""
    shapes = llama(12)
    rng = np.random.default_rng(seed)
    order = grown(shapes, shapes.__getitem__).sites()
    assert order[:3] == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    assert grown(sorted(shapes), shapes.__getitem__).sites() == order
    halves = rng.permutation(12)  # layers as shards may split them: each shard sorted
    listed = [name for i in sorted(halves[:6]) for name in sorted(shapes) if f"layers.{i}." in name]
    listed += [name for name in sorted(shapes) if name not in listed]
    q = [name for name in grown(listed, shapes.__getitem__).sites() if name.endswith("_proj")]
    within = [re.sub(r"\d+", "i", name) for name in q]
    assert within == within[:7] * 12


def test_a_name_of_thousands_of_parts_is_refused():
    deep = ".".join("a" * 100)
    assert names(plan({f"{deep}.weight": (2, 3)}, LoraConfig(1, target_modules=[deep]))) == [deep]
    with pytest.raises(ConfigError, match=r"weights: expected names of at most 100 parts, got 5000 in .a.a.a"):
        plan({f"{'.'.join('a' * 5000)}.weight": (2, 3)}, LoraConfig(1, target_modules=["a"]))


@given(st.lists(parts, min_size=1, max_size=6, unique=True))
def test_ordered_is_a_permutation_and_settles(siblings):
    once = ordered(siblings)
    assert sorted(once) == sorted(siblings)
    assert ordered(once) == once
