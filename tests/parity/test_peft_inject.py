"""Injection as PEFT's: the same places, ranks and scalings for drawn configs, the same counts, the same bits.

Where ours refuses what PEFT lets pass, the refusal is one of REFUSALS; where the two differ otherwise, one of
the tests at the end says how.  Source: specs/inject.md.
"""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lorax_np import ConfigError, LoraConfig, torch_generator
from lorax_np.config import Plan
from lorax_np.config.tree import grown
from lorax_np.inject import inject, plan
from tests.parity.peft_models import MAKERS, MOE, Carrier, Injected, Model, injected, model, torch

pytestmark = pytest.mark.peft

# What ours refuses and PEFT does not, by id: how the message starts.
REFUSALS = {
    "target-unmatched": r"target_modules: expected names of modules, got '.*', which fits none of \d+",
    "exclude-unmatched": r"exclude_modules: expected names of modules, got .* which fits none of \d+",
    "saved-unmatched": r"modules_to_save: expected names of modules, got .* which fits none of \d+",
    "parameter-unmatched": r"target_parameters: expected names of parameters, got .* which fits none of \d+",
    "pattern-unmatched": r"(rank|alpha)_pattern: expected keys that fit sites, got .* which fits none of \d+",
    "pattern-twice": r"(rank|alpha)_pattern: expected one value for",
    "layer-unmatched": r"layers_to_transform: expected numbers of layers",
    "layers-pattern-unmatched": r"layers_pattern: expected names of modules, got .* which fits none of \d+",
    "dropout-embeddings": r"lora_dropout: expected 0.0 where all sites are embeddings",
}


def ours(found: Model, names: dict[str, Any] | None = None, **fields: Any) -> Plan:
    """Plan on shapes alone."""
    return plan(Carrier(names or found.shapes, found.model), LoraConfig(**fields), groups=found.groups)


def resolved(plan: Plan) -> dict[str, tuple[int, float, float]]:
    return {name: (site.r, site.alpha, site.scaling) for name, site in plan.sites.items()}


# ---- the same places ---------------------------------------------------------------------------------------


def ends(names: list[str]) -> list[str]:
    """What names end in: their last part, and their last two."""
    return sorted({".".join(name.split(".")[-n:]) for name in names for n in (1, 2)})


@st.composite
def fields(draw: st.DrawFn, found: Model) -> dict[str, Any]:
    """A config's fields for one model: mostly names that are there, sometimes one that is not."""
    places = [name for name in found.kinds if not re.search(r"experts|gate|router|qa_outputs|\.\d+$", name)]
    name = st.sampled_from([*ends(places), *draw(st.sampled_from([[], ["nowhere"]]))])
    names = st.lists(name, min_size=1, max_size=4, unique=True)
    d: dict[str, Any] = {"r": draw(st.integers(1, 5)), "lora_alpha": draw(st.integers(1, 9))}
    how = draw(st.sampled_from(["list", "list", "full", "regex", "all", "none"]))
    if how == "full":
        d["target_modules"] = draw(st.lists(st.sampled_from(places), min_size=1, max_size=25, unique=True))
    elif how == "regex":
        stems = "|".join(sorted({place.rpartition(".")[2] for place in draw(names)}))
        d["target_modules"] = draw(
            st.sampled_from([rf".*\.({stems})", rf".*[02468]\..*({stems})", rf"({stems})"])
        )
    elif how == "all" and found.name not in MOE:
        d["target_modules"] = draw(st.sampled_from(["all-linear", "ALL-Linear"]))
    elif how == "none" and found.name not in MOE:
        d["target_modules"] = None
    else:
        d["target_modules"] = draw(names)
    maybe = lambda strategy: draw(st.one_of(st.none(), st.none(), strategy))  # noqa: E731
    d["exclude_modules"] = maybe(st.one_of(names, st.sampled_from([r".*\.1\..*", r".*encoder.*"])))
    d["modules_to_save"] = maybe(st.lists(st.sampled_from(WHOLE), max_size=2, unique=True))
    if isinstance(d["target_modules"], list) and not set(d["target_modules"]) & found.kinds.keys():
        d["layers_to_transform"] = maybe(st.one_of(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1)))
        if d["layers_to_transform"] is not None:
            d["layers_pattern"] = maybe(st.sampled_from(["layers", "layer", "h", "block", "blocks"]))
    keys = st.one_of(name, st.sampled_from([r".*\.1\..*", r"q_proj|query", r"layers\.0\..*"]))
    d["rank_pattern"] = draw(st.dictionaries(keys, st.integers(1, 6), max_size=2))
    d["alpha_pattern"] = draw(st.dictionaries(keys, st.integers(1, 6), max_size=2))
    d["bias"] = draw(st.sampled_from(["none", "none", "all", "lora_only"]))
    d["use_rslora"], d["use_dora"] = draw(st.booleans()), draw(st.booleans())
    d["lora_bias"] = draw(st.booleans()) and not d["use_dora"]
    d["lora_dropout"] = draw(st.sampled_from([0.0, 0.1]))
    d["task_type"] = TASKS.get(found.name, draw(st.sampled_from([None, "FEATURE_EXTRACTION"])))
    return d


WHOLE = ("lm_head", "classifier", "ln_f", "ln", "embed_tokens", "wte")
TASKS = {"bert-cls": "SEQ_CLS", "bert-qa": "QUESTION_ANS", "roberta-tokens": "TOKEN_CLS", "llama": "CAUSAL_LM"}
TASKS |= {"t5": "SEQ_2_SEQ_LM", "toy": None}


def compared(found: Model, d: dict[str, Any]) -> list[str]:
    """Say how it went: refusals by id, then same or refused by both; AssertionError where the two differ.

    What PEFT passes over in silence is taken out of ours, refusal by refusal, and left in PEFT's: if the rest
    is the same, then PEFT did pass over it.
    """
    mine, ids, d = None, [], dict(d)
    theirs = attempted(found, d)
    while mine is None:
        try:
            mine = ours(found, **d)
        except ConfigError as refused:
            if theirs is None:
                return [*ids, "both refuse"]
            ids.append(name_of(str(refused)))
            if (d := without(d, ids[-1], str(refused))) is None:
                return ids
    assert theirs is not None, f"PEFT refuses {d}"
    assert resolved(mine) == theirs.sites
    tuner = theirs.model.base_model
    assert list(mine.sites) == tuner.targeted_module_names + tuner.targeted_parameter_names
    assert (mine.trainable, mine.total) == theirs.model.get_nb_trainable_parameters()
    return [*ids, "same"]


def attempted(found: Model, d: dict[str, Any]) -> Injected | None:
    try:
        return injected(found, **d)
    except Exception:  # of many classes
        return None


def name_of(refusal: str) -> str:
    names = [name for name, start in REFUSALS.items() if re.match(start, refusal)]
    assert names, refusal
    return names[0]


def without(d: dict[str, Any], name: str, refusal: str) -> dict[str, Any] | None:
    """The fields without what was refused; None where that leaves nothing to compare."""
    field = refusal.partition(":")[0]
    if name.endswith("-unmatched") and name != "layer-unmatched":
        key = re.search(r"got '(.*?)', which", refusal)[1].replace("\\\\", "\\")
        value = d[field]
        if isinstance(value, dict):
            left = {k: v for k, v in value.items() if k != key}
        else:
            left = [] if isinstance(value, str) else [k for k in value if k != key]
        return (
            {**d, field: left or ({} if isinstance(value, dict) else None)}
            if field != "target_modules" or left
            else None
        )
    if name == "layer-unmatched" and isinstance(d[field], list):
        unused = eval(re.search(r"got (\[.*\])$", refusal)[1])
        left = [layer for layer in d[field] if layer not in unused]
        return {**d, field: left} if left else None
    return {**d, "lora_dropout": 0.0} if name == "dropout-embeddings" else None


@pytest.mark.parametrize("name", MAKERS)
def test_places_ranks_and_counts_are_those_of_peft(name):
    found, seen = model(name), []

    @given(d=fields(found))
    @settings(max_examples=15, phases=(Phase.generate,))
    def one(d):
        seen.append(compared(found, d))

    one()
    print(name, Counter(how for hows in seen for how in hows))
    assert sum("same" in hows for hows in seen) >= 5, seen


@pytest.mark.parametrize("name", MAKERS)
def test_kinds_layouts_and_order_are_torchs(name):
    """From names and shapes alone; in the order of a state_dict, and in the alphabet's, as files have them."""
    found = model(name)
    modules = dict(found.torch.named_modules())
    for names in (found.shapes, sorted(found.shapes)):
        tree = grown(names, found.shapes.__getitem__, model_type=found.model.get("model_type"))
        of = [name for name in tree.sites() if name in modules]
        assert {name: tree.kind(name) for name in of} == found.kinds
        for name in of:
            is_conv1d = type(modules[name]).__name__ == "Conv1D"
            assert tree.transposed(name, declared=False) == is_conv1d
        if found.name != "roberta-tokens" and (names is found.shapes or found.name != "toy"):
            assert of == list(found.kinds)


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("targets", [["q_proj"], []])
def test_parameters_of_experts_are_those_of_peft(name, targets):
    found = model(name)
    d = {
        "target_modules": targets, "target_parameters": ["experts.gate_up_proj", "mlp.experts.down_proj"],
        "r": 2, "lora_alpha": 3, "rank_pattern": {"experts.down_proj": 5, r".*\.1\..*": 4},
        "alpha_pattern": {"gate_up_proj": 7}, "use_rslora": True,
    }  # fmt: skip
    d["rank_pattern"] = {"experts.down_proj": 5}
    for names in (found.shapes, {name: found.shapes[name] for name in sorted(found.shapes)}):
        mine, theirs = ours(found, names, **d), injected(found, **d)
        assert resolved(mine) == theirs.sites
        tuner = theirs.model.base_model
        assert list(mine.sites) == tuner.targeted_module_names + tuner.targeted_parameter_names
        assert (mine.trainable, mine.total) == theirs.model.get_nb_trainable_parameters()
        assert {site.transposed for site in mine.sites.values() if site.kind == "experts"} == {
            name == "gpt_oss"
        }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(("llama", [1, 3]), ("llama", {"embed_tokens": [0, 2, 49]}), ("gpt2", [4]), ("qwen2", [1, 3])),
        *(("bert", {"word_embeddings": [1], "position_embeddings": [0, 2]}), ("t5", {"shared": [7]})),
    ],
)
def test_rows_of_embeddings_are_those_of_peft(name, said):
    d = {"target_modules": "all-linear", "trainable_token_indices": said}
    mine, theirs = ours(model(name), **d), injected(model(name), **d)
    assert (mine.trainable, mine.total) == theirs.model.get_nb_trainable_parameters()


# ---- the same bits -----------------------------------------------------------------------------------------

BITS = {
    "llama": {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\..*": 5}},
    "mistral": {"target_modules": None},
    "gemma2": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "bert-cls": {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "lora_bias": True},
    "gpt2": {"target_modules": ["wpe", "c_attn", "c_proj", "c_fc"], "use_dora": True},
    "t5": {"target_modules": "all-linear"},
    "whisper": {"target_modules": r".*\.(conv1|q_proj|fc1)"},
    "bloom": {"target_modules": ["dense", "query_key_value"], "bias": "all"},
    "vit": {"target_modules": ["projection", "q_proj"], "lora_bias": True},
    "convnext": {"target_modules": ["dwconv", "pwconv1"], "rank_pattern": {}},
    "mixtral": {"target_modules": ["v_proj"], "target_parameters": ["gate_up_proj", "experts.down_proj"]},
    "gpt_oss": {"target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"]},
    "toy": {"target_modules": ["embedding", "conv1", "conv3", "up", "down", "net.0", "net.2"]},
}


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("seed", [0, 3407])
def test_a_seed_gives_the_bits_of_peft_at_every_site(name, seed):
    """In the order of a state_dict, and of a file. Normals have torch's bits with AVX2; else they are near."""
    found, d = model(name), {"r": 3, "lora_alpha": 5, **BITS[name]}
    if name == "convnext":
        d["rank_pattern"] = {r"stages\.0\..*dwconv": 4, r"stages\.1\..*dwconv": 8}
    theirs = injected(found, seed=seed, **d)
    for names in (list(found.weights), sorted(found.weights))[: 1 if name == "toy" else 2]:
        weights = Carrier({name: found.weights[name] for name in names}, found.model)
        new, adapters, sites = inject(weights, LoraConfig(**d), torch_generator(seed), groups=found.groups)
        assert new is weights
        tuner = theirs.model.base_model
        assert list(sites) == tuner.targeted_module_names + tuner.targeted_parameter_names
        for site, layer in theirs.layers.items():
            check_start(adapters[site], sites[site].kind, layer, bool(d.get("use_dora")))


def check_start(adapter: Any, kind: str, layer: Any, dora: bool) -> None:
    """A and B beside PEFT's, and m, whose sums round in another order."""
    embedding = kind == "embedding"
    A, B = (layer.lora_embedding_A, layer.lora_embedding_B) if embedding else (layer.lora_A, layer.lora_B)
    A, B = (getattr(part["default"], "weight", part["default"]).detach().numpy() for part in (A, B))
    np.testing.assert_array_equal(adapter.A, A)
    np.testing.assert_allclose(adapter.B, B, rtol=1e-5 if embedding else 0)
    assert (adapter.bB is not None) == bool(layer.lora_bias["default"])
    if dora:
        m = layer.lora_magnitude_vector["default"].weight.detach().numpy()
        np.testing.assert_allclose(adapter.m, m.reshape(-1), rtol=2e-6)


def test_the_trained_biases_are_those_of_peft():
    found = model("bert-cls")
    for bias in ("all", "lora_only"):
        d = {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": bias}
        theirs = injected(found, **d).model
        trained = {
            key.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".bias")
            for key, value in theirs.named_parameters()
            if value.requires_grad and key.endswith(".bias") and "modules_to_save" not in key
        }
        _, adapters, sites = inject(Carrier(found.weights, found.model), LoraConfig(**d), torch_generator(0))
        assert {name for name, adapter in adapters.items() if adapter.b is not None} == trained
        assert all((adapters[name].A is None) == (name not in sites) for name in adapters)


def test_the_line_is_the_one_that_peft_prints(capsys):
    d = {"target_modules": "all-linear", "r": 7}
    injected(model("llama"), **d).model.print_trainable_parameters()
    assert capsys.readouterr().out.strip() == str(ours(model("llama"), **d))


# ---- where the two differ ----------------------------------------------------------------------------------


def test_saved_endswith():
    """PEFT trains whole whatever ends in a name, in the middle of a word too: norm is input_layernorm."""
    d = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    mine, theirs = ours(model("llama"), **d), injected(model("llama"), **d)
    whole = {key for key, _ in theirs.model.named_modules() if key.endswith("modules_to_save")}
    assert len(whole) == 23  # 11 layers of two norms, and the last
    assert mine.saved == ("model.norm.weight",)


def test_layers_full_names():
    """PEFT does not hold a module listed by its whole name to layers_to_transform."""
    name = "model.layers.1.self_attn.q_proj"
    d = {"target_modules": [name, "v_proj"], "layers_to_transform": [0]}
    assert name in injected(model("llama"), **d).sites
    assert list(ours(model("llama"), **d).sites) == ["model.layers.0.self_attn.v_proj"]


def test_layers_at_start():
    """PEFT sees no layer in h.0.attn: a model without a head has its layers there."""
    shapes = {f"h.{i}.attn.c_attn.weight": (4, 12) for i in range(3)}
    d = {"target_modules": ["c_attn"], "layers_to_transform": [1]}
    assert list(plan(shapes, LoraConfig(**d)).sites) == ["h.1.attn.c_attn"]
    bare = model("gpt2")._replace(torch=model("gpt2").torch.transformer)
    with pytest.raises(ValueError, match="not found in the base model"):
        injected(bare, **d)


def test_all_linear_plain():
    """PEFT knows a head by the model's own word, ours by its name, which a plain module may have too."""
    plain = torch.nn.ModuleDict({"up": torch.nn.Linear(3, 3), "lm_head": torch.nn.Linear(3, 2)})
    shapes = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    found = Model("plain", plain, shapes, {}, {}, {})
    assert set(injected(found, target_modules="all-linear").sites) == {"up", "lm_head"}
    assert set(ours(found, target_modules="all-linear").sites) == {"up"}


def test_moe_v5():
    """PEFT rewrites Mixtral's config for fused experts; ours takes names as the checkpoint has them."""
    d = {"target_modules": "all-linear", "r": 2, "lora_alpha": 4}
    theirs = injected(model("mixtral"), **d).sites
    mine = resolved(ours(model("mixtral"), **d))
    more = {key.rpartition("mlp.")[2]: theirs[key] for key in theirs.keys() - mine.keys()}
    assert more == {
        "experts.gate_up_proj": (4, 8, 2.0),
        "experts.down_proj": (2, 4, 2.0),
        "gate.weight": (2, 4, 2.0),
    }
    said = {
        "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
        "rank_pattern": {"gate_up_proj": 4},
        "alpha_pattern": {"gate_up_proj": 8},
    }
    assert resolved(ours(model("mixtral"), **d, **said)) == theirs
    with pytest.raises(Exception, match=r".+"):  # what None stands for is lost on the way
        injected(model("mixtral"), target_modules=None)
    assert len(ours(model("mixtral"), target_modules=None).sites) == 4


def test_invisible_modules():
    """PEFT refuses an expression that means a module without weights; names of tensors do not show it."""
    d = {"target_modules": r".*mlp\.(c_fc|act)"}
    with pytest.raises(ValueError, match="is not supported"):
        injected(model("gpt2"), **d)
    assert len(ours(model("gpt2"), **d).sites) == 2


def test_qa_outputs():
    """PEFT targets qa_outputs before it learns that it is to be saved whole, and fails."""
    d = {"target_modules": ["query", "qa_outputs"], "task_type": "QUESTION_ANS"}
    with pytest.raises(Exception, match=r".+"):
        injected(model("bert-qa"), **d)
    assert "qa_outputs" not in ours(model("bert-qa"), **d).sites


def test_fan_in_fan_out():
    """PEFT puts the field right by the module's class; ours knows model_type's layout, else follows it."""
    d = {"target_modules": ["q_proj"], "fan_in_fan_out": True}
    assert len(injected(model("llama"), **d).sites) == 11
    with pytest.raises(ConfigError, match="fan_in_fan_out: expected False for model_type 'llama'"):
        ours(model("llama"), **d)
    gpt2 = ours(model("gpt2"), target_modules=["c_attn"], fan_in_fan_out=False)
    assert all(site.transposed for site in gpt2.sites.values())
