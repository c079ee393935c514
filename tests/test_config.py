"""LoraConfig: PEFT's names and defaults, what it refuses, and the way to a file and back."""

import copy
import json
import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_np.config import FIELDS, OURS, STARTS, TIERS, LoraConfig, check_usable, settings_of
from lorax_np.config.settings import SETTINGS
from lorax_np.errors import ConfigError


def refusal(**bad: Any) -> str:
    """Return the message with which LoraConfig refuses these fields: always one line."""
    message = said(LoraConfig, **bad)
    assert len(message.splitlines()) == 1
    return message


def said(f: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Return the message of the ConfigError that f raises, or nothing where it raises none."""
    try:
        f(*args, **kwargs)
    except ConfigError as refused:
        return str(refused)
    return ""


# ---- What is refused ---------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG = {
    "r": (0, -1, True, 8.0, "8", None, np.float32(8), 1 << 63, np.array([1, 2])),
    "lora_alpha": (0, 0.0, -0.0, NAN, INF, -INF, True, "16", None, 10**400, 1j, np.float32("nan")),
    "lora_dropout": (-0.1, 1, 1.0, 1.5, NAN, INF, 1 - 2**-17, 1 - 2**-20, "0", None, False),
    "bias": ("lora-only", "foo_only", "None", "", None, True, False, 0, ["none"]),
    "use_rslora": (1, 0, None, "true", np.True_),
    "use_dora": (1, None, "false"),
    "lora_bias": (1, None, "none", "all", "lora_only"),
    "init_lora_weights": (
        *("Gaussian", "OLORA", "PISSA", "pissa_niter_-1", "pissa_niter_", "pissa_niter_k", "pissa_niter_1.5"),
        *(
            "pissa_niter_4\n",
            "pissa_niter_٣",
            "kaiming",
            "true",
            "",
            None,
            1,
            0,
            {"name": "pissa"},
            ["pissa"],
        ),
    ),
    "fan_in_fan_out": ("yes", None),
    "target_modules": ("(", 3, True, [1], ["q", None], {"q": 1}, [], set(), object()),
    "exclude_modules": ("*", 3, [1], {"q": 1}),
    "modules_to_save": ("head", 3, [1], {"q": 1}),
    "layers_to_transform": (-1, True, 1.0, "1", [0, -1], [True], ["1"]),
    "layers_pattern": (3, [1], "layers"),
    "rank_pattern": ({"q": 0}, {"q": True}, {"q": 2.0}, {"(": 4}, {1: 4}, [("q", 4)], 4),
    "alpha_pattern": ({"q": 0}, {"q": NAN}, {"q": INF}, {"q": "8"}, {"(": 4}, {1: 4}, 4),
    "target_parameters": ("experts.w1", 3, [1]),
    "trainable_token_indices": (3, [-1], ["1"], {"embed": 3}, {"embed": [-1]}, {1: [1]}),
    "loftq_config": ({"loftq_bits": 4}, [1], 4),
    "eva_config": ([1], "eva", object(), {"x": object()}),
    "corda_config": ([1], True),
    "lora_ga_config": ([1], 0),
    "peft_type": ("ADALORA", "lora", None),
    "task_type": ("causal_lm", "TOKEN_CLASSIFICATION", "", 1),
    "base_model_name_or_path": (3, ["a"]),
    "revision": (3,),
    "auto_mapping": ("x", [1]),
    "inference_mode": (1, None),
    "peft_version": (0.21,),
    "megatron_core": (1,),
    "ensure_weight_tying": (1, None),
    "use_qalora": (1, None),
    "qalora_group_size": (0, True, 1.5, None),
    "velora_config": (object(), {1: 2}, {1, "a"}),
    "adapter_dtype": ("fp16", "float8", "", 32, True),
    "loraplus_lr_ratio": (0, -1.0, NAN, INF, True, "16"),
    "extra": (None, [1], {1: 2}, {"r": 4}, {"adapter_dtype": "base"}, {"x": object()}),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_bad_value_is_refused_by_name(name, value):
    message = refusal(**{name: value})
    assert message.startswith(f"{name}: expected ")
    assert ", got " in message
    assert "; " not in message  # nothing else is at fault


TOGETHER = [
    ({"lora_bias": True, "use_dora": True}, "lora_bias: expected False with use_dora=True, got True"),
    (
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        "lora_bias: expected False with init_lora_weights='ga",
    ),
    (
        {"lora_alpha": -8, "init_lora_weights": "pissa"},
        "lora_alpha: expected a number above 0 with init_lora",
    ),
    ({"lora_alpha": -8, "init_lora_weights": "pissa_niter_4"}, "lora_alpha: expected a number above 0"),
    ({"lora_alpha": -8, "init_lora_weights": "corda"}, "lora_alpha: expected a number above 0"),
    ({"alpha_pattern": {"q": -8}, "init_lora_weights": "pissa"}, "alpha_pattern: expected numbers above 0"),
    ({"lora_alpha": 5e-324, "r": 64}, "lora_alpha: expected a number whose alpha/r is not 0, got 5e-324"),
    (
        {"loftq_config": {"loftq_bits": 4}},
        "loftq_config: expected {} with init_lora_weights=True, since only",
    ),
    ({"init_lora_weights": "loftq"}, "loftq_config: expected loftq_bits and loftq_iter with"),
    (
        {"target_parameters": ["w"], "lora_dropout": 0.1},
        "lora_dropout: expected 0.0 with target_parameters, got 0.1",
    ),
    (
        {"target_parameters": ["w"], "use_dora": True},
        "use_dora: expected False with target_parameters, got True",
    ),
    ({"target_parameters": ["w"], "lora_bias": True}, "lora_bias: expected False with target_parameters"),
    ({"target_parameters": ["w"], "fan_in_fan_out": True}, "fan_in_fan_out: expected False with target_par"),
    ({"target_modules": []}, "target_modules: expected names, since target_parameters has none, got []"),
    ({"layers_pattern": "h"}, "layers_pattern: expected None without layers_to_transform, got 'h'"),
    (
        {"layers_pattern": ["h"], "layers_to_transform": []},
        "layers_pattern: expected None without layers_to_tr",
    ),
    (
        {"layers_to_transform": 0, "target_modules": "q"},
        "layers_to_transform: expected None with a regular exp",
    ),
    (
        {"layers_to_transform": [1], "target_modules": "all-linear"},
        "layers_to_transform: expected None with a",
    ),
    ({"extra": {"r": 4}}, "extra: expected names that are no fields of LoraConfig, got {'r': 4}"),
]


@pytest.mark.parametrize(("fields", "start"), TOGETHER)
def test_fields_that_do_not_go_together_are_refused(fields, start):
    assert refusal(**fields).startswith(start)


GOOD = [
    {"lora_dropout": 1 - 2**-16},
    {"lora_dropout": math.nextafter(1 - 2**-17, 0)},
    {"lora_alpha": -8},
    {"lora_alpha": -8, "init_lora_weights": "olora"},
    {"lora_alpha": 1e308},
    {"lora_bias": True, "init_lora_weights": False},
    {"init_lora_weights": "pissa_niter_0"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    {"target_modules": [], "target_parameters": ["experts.w1"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"layers_to_transform": 0, "layers_pattern": "h"},
    {"layers_to_transform": [], "target_modules": "q"},
    {"layers_to_transform": [3, 1], "layers_pattern": ["h"]},
    {"trainable_token_indices": {"embed": [1, 0]}},
    {"rank_pattern": {r"^layers\.0\.q": 4}, "alpha_pattern": {"q": -0.5}},
    {"rank_pattern": None, "alpha_pattern": None, "loftq_config": None},
    {"loraplus_lr_ratio": 16, "adapter_dtype": "base"},
    *({"init_lora_weights": name} for name in STARTS if name not in ("pissa_niter_k", "loftq")),
]


@pytest.mark.parametrize("fields", GOOD)
def test_a_config_at_the_edge_is_made_and_survives_the_file(fields):
    config = LoraConfig(**fields)
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_nearest_word_is_named():
    assert refusal(bias="lora-only") == (
        "bias: expected one of none, all, lora_only, got 'lora-only' (did you mean 'lora_only'?)"
    )
    assert "(did you mean 'gaussian'?)" in refusal(init_lora_weights="Gausian")
    assert "(did you mean 'olora'?)" in refusal(init_lora_weights="OLORA")
    assert "(did you mean 'CAUSAL_LM'?)" in refusal(task_type="causal-lm")
    assert "(did you mean 'bfloat16'?)" in refusal(adapter_dtype="bfloat_16")
    assert "did you mean" not in refusal(bias="zzz")


def test_a_word_in_lora_bias_points_to_from_swift():
    assert "LoraConfig.from_swift" in refusal(lora_bias="none")
    assert "LoraConfig.from_swift" in refusal(lora_bias="all")


def test_all_faults_come_in_one_message_of_one_line():
    message = refusal(r=0, bias="some\nthing", task_type="x\u2028y", lora_bias=True, use_dora=True)
    assert [part.split(":")[0] for part in message.split("; ")] == ["r", "bias", "task_type", "lora_bias"]


def test_a_message_shows_the_entry_at_fault_and_stays_short():
    many = {f"layers.{i}.q_proj": 4 for i in range(500)}
    assert "got {'bad': 0}" in refusal(rank_pattern=many | {"bad": 0})
    assert "got [7]" in refusal(target_modules=["q_proj"] * 500 + [7])
    assert len(refusal(bias="x" * 100_000)) < 300


class Loud:
    def __repr__(self) -> str:
        return "two\nlines\u2028three"


def test_an_int_of_5000_digits_cannot_break_the_message():
    assert refusal(r=10**5000).startswith(
        "r: expected an int of at least 1 (and below 2**63), got a value of type int"
    )


def test_a_stranger_object_cannot_break_the_message():
    assert "two lines three" in refusal(bias=Loud())


def test_endless_and_deep_content_is_refused():
    loop: dict[str, Any] = {}
    loop["again"] = loop
    assert refusal(eva_config=loop).startswith("eva_config: expected JSON content without deep nesting")
    with pytest.raises(ConfigError, match="extra: expected JSON content without deep nesting"):
        LoraConfig.from_dict({"unknown": loop})


# ---- What is kept ------------------------------------------------------------------------------------------


def test_scaling_is_a_python_float():
    assert LoraConfig(16, 8).scaling == 0.5
    assert LoraConfig(16, 8, use_rslora=True).scaling == 2.0
    assert LoraConfig(r=3, lora_alpha=7).scaling == 7 / 3
    assert LoraConfig(r=3, lora_alpha=7, use_rslora=True).scaling == 7 / math.sqrt(3)
    assert LoraConfig(r=8, lora_alpha=-8).scaling == -1.0
    for alpha in (8, 8.0, np.int64(8), np.float32(8), np.float16(8)):
        assert type(LoraConfig(8, alpha).scaling) is float


def test_numpy_scalars_become_python_numbers():
    config = LoraConfig(
        np.int32(4), np.float32(0.5), lora_dropout=np.float64(0.25), rank_pattern={"q": np.uint8(2)}
    )
    assert [type(v) for v in (config.r, config.lora_alpha, config.lora_dropout)] == [int, float, float]
    assert type(LoraConfig(8, np.int64(16)).lora_alpha) is int
    assert type(LoraConfig(lora_dropout=0).lora_dropout) is float
    assert json.loads(json.dumps(config.to_dict()))["rank_pattern"] == {"q": 2}


def test_a_word_of_an_enum_becomes_a_plain_str():
    class Task(str, Enum):  # noqa: UP042 - as PEFT's TaskType
        CAUSAL_LM = "CAUSAL_LM"

    assert type(LoraConfig(task_type=Task.CAUSAL_LM).task_type) is str
    assert LoraConfig(task_type=Task.CAUSAL_LM).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_target_sets_have_one_order(name, kind):
    config = LoraConfig(**{name: kind(["v", "q", "v", "k"])})
    assert getattr(config, name) == ("k", "q", "v")
    assert config.to_dict()[name] == ["k", "q", "v"]


def test_other_lists_keep_their_order():
    config = LoraConfig(modules_to_save=["score", "head"], layers_to_transform=[3, 1], layers_pattern="h")
    assert config.to_dict()["modules_to_save"] == ["score", "head"]
    assert config.to_dict()["layers_to_transform"] == [3, 1]
    assert LoraConfig(modules_to_save={"score", "head"}).modules_to_save == ("head", "score")


def test_nobody_outside_can_change_a_config():
    names, ranks, nested = ["q"], {"q": 4}, {"new": {"list": [1]}}
    config = LoraConfig(target_modules=names, rank_pattern=ranks, extra=nested)
    before = config.to_dict()
    names.append("v")
    ranks["v"] = 1
    nested["new"]["list"].append(2)
    out = config.to_dict()
    out["new"]["list"].append(3)
    out["target_modules"].append("k")
    out["rank_pattern"]["k"] = 9
    with pytest.raises(FrozenInstanceError):
        config.r = 3
    with pytest.raises(TypeError):
        config.rank_pattern["q"] = 1
    with pytest.raises(TypeError):
        config.extra["new"]["list"] = ()
    assert config.to_dict() == before
    assert LoraConfig().rank_pattern == {}


def test_a_config_is_copied_compared_hashed_and_shown():
    config = LoraConfig(16, target_modules=["q"], rank_pattern={"q": 4}, extra={"x": [{"y": 1}]})
    for twin in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        replace(config),
    ):
        assert twin == config
        assert hash(twin) == hash(config)
    assert eval(repr(config)) == config
    assert config != replace(config, r=8)
    assert replace(config, r=4).r == 4
    assert repr(LoraConfig()) == "LoraConfig()"
    with pytest.raises(ConfigError, match=r"^r: "):
        replace(config, r=0)


# ---- To a file and back ------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
unknown = st.dictionaries(st.text().filter(lambda name: name not in TIERS), json_values, max_size=5)


@given(extra=unknown)
def test_unknown_fields_survive_the_round_trip(extra):
    d = {"peft_type": "LORA", "r": 4} | extra
    before = copy.deepcopy(d)
    config = LoraConfig.from_dict(d)
    assert d == before
    assert config.to_dict() == LoraConfig(r=4).to_dict() | extra
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert LoraConfig.from_dict(config.to_dict()) == config


@given(extra=unknown, bad=json_values)
def test_whatever_comes_a_refusal_is_one_line(extra, bad):
    for name in FIELDS:
        message = said(LoraConfig.from_dict, extra | {name: bad})
        assert len(message.splitlines()) <= 1
        assert not message or message.startswith((f"{name}:", "layers_pattern:", "loftq_config:"))
    assert len(said(check_usable, LoraConfig.from_dict(extra)).splitlines()) <= 1


def test_a_file_may_have_a_field_named_extra():
    assert LoraConfig.from_dict({"extra": 3}).extra == {"extra": 3}
    assert LoraConfig.from_dict({"extra": 3}).to_dict()["extra"] == 3


def test_the_fields_of_ours_are_written_only_where_they_say_something():
    assert not set(OURS) & LoraConfig().to_dict().keys()
    config = LoraConfig(adapter_dtype="base", loraplus_lr_ratio=16.0)
    assert {name: config.to_dict()[name] for name in OURS} == {
        "adapter_dtype": "base",
        "loraplus_lr_ratio": 16.0,
    }
    assert LoraConfig.from_dict(config.to_dict()) == config


def test_runtime_config_is_never_written():
    config = LoraConfig.from_dict({"runtime_config": {"ephemeral_gpu_offload": True}})
    assert config.runtime_config == {"ephemeral_gpu_offload": True}
    assert "runtime_config" not in config.to_dict()


def test_a_start_in_a_file_is_lower_cased():
    assert LoraConfig.from_dict({"init_lora_weights": "Gaussian"}).init_lora_weights == "gaussian"
    with pytest.raises(ConfigError, match="init_lora_weights: expected True, False or one of"):
        LoraConfig.from_dict({"init_lora_weights": "Gausian"})


def test_the_dictionary_is_sorted_and_keeps_provenance():
    d = LoraConfig.from_dict({"zeta": 1, "peft_version": "0.18.0", "inference_mode": True}).to_dict()
    assert list(d) == sorted(d)
    assert (d["peft_version"], d["inference_mode"], d["zeta"]) == ("0.18.0", True, 1)
    assert LoraConfig().to_dict()["peft_version"] is None


@pytest.mark.parametrize("read", [LoraConfig.from_dict, LoraConfig.from_swift])
@pytest.mark.parametrize("d", [None, [("r", 4)], "r", 3, {4: 4}, {None: 1, "r": 4}])
def test_only_a_mapping_from_str_is_read(read, d):
    with pytest.raises(ConfigError, match=r"expected a mapping|expected only str as keys"):
        read(d)


def test_any_mapping_is_read():
    assert LoraConfig.from_dict(OrderedDict(r=4)).r == 4


# ---- ms-swift ----------------------------------------------------------------------------------------------


def test_swift_names_and_defaults():
    assert LoraConfig.from_swift({}) == LoraConfig(
        8, 32, lora_dropout=0.05, bias="none", adapter_dtype="base", target_modules="all-linear"
    )
    given = {
        "lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.0, "lora_bias": "all", "lorap_lr_ratio": 16.0,
        "use_rslora": True, "use_dora": True, "lora_dtype": "bf16", "train_type": "lora",
        "target_modules": ["q_proj"], "modules_to_save": ["head"],
    }  # fmt: skip
    before = copy.deepcopy(given)
    assert LoraConfig.from_swift(given) == LoraConfig(
        4, 16, bias="all", use_rslora=True, use_dora=True, adapter_dtype="bfloat16", loraplus_lr_ratio=16.0,
        target_modules=["q_proj"], modules_to_save=["head"],
    )  # fmt: skip
    assert given == before


@pytest.mark.parametrize(
    ("word", "dtype"),
    [(None, "base"), ("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("float16", "float16"),
     ("bfloat16", "bfloat16"), ("float32", "float32")],
)  # fmt: skip
def test_swift_dtypes(word, dtype):
    assert LoraConfig.from_swift({"lora_dtype": word}).adapter_dtype == dtype


def test_swift_lists_all_linear_as_one_word():
    assert LoraConfig.from_swift({"target_modules": ["all-linear"]}).target_modules == "all-linear"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lora_rank", 0), ("lora_alpha", 0), ("lora_dropout", 1.0), ("lora_bias", "lora_only")),
        *(("lora_bias", True), ("lorap_lr_ratio", 0), ("use_rslora", 1), ("use_dora", None)),
        *(("lora_dtype", "fp64"), ("lora_dtype", "None"), ("lora_dtype", {}), ("train_type", "full")),
        *(("train_type", None), ("modules_to_save", "head")),
    ],
)
def test_a_bad_swift_value_is_refused_by_its_swift_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: expected .*, got ") as caught:
        LoraConfig.from_swift({name: value})
    assert "; " not in str(caught.value)


def test_an_unknown_swift_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"lora_rnk: .*lora_rank, lora_alpha.*\(did you mean 'lora_rank'\?\)"):
        LoraConfig.from_swift({"lora_rnk": 4})
    with pytest.raises(ConfigError, match=r"^r: expected one of .*; lora_alpha: expected"):
        LoraConfig.from_swift({"r": 4, "lora_alpha": 0})


@pytest.mark.parametrize(
    ("said", "start"),
    [("true", True), ("false", False), (True, True), (False, False), ("gaussian", "gaussian"),
     ("pissa", "pissa"), ("pissa_niter_4", "pissa_niter_4"), ("olora", "olora"),
     ("lora-ga", "lora_ga"), ("lora_ga", "lora_ga")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["init_weights", "init_lora_weights"])
def test_swift_starts_by_both_names(name, said, start):
    assert LoraConfig.from_swift({name: said}).init_lora_weights == start


def test_swift_newer_names():
    config = LoraConfig.from_swift({
        "tuner_type": "lora", "target_regex": r".*\.q_proj", "target_parameters": None, "task_type": "seq_cls",
        "init_weights": "lora-ga", "lora_ga_direction": "ArBr", "lora_ga_stable_gamma": 8,
        "modules_to_save": [],
    })  # fmt: skip
    assert (config.target_modules, config.task_type, config.init_lora_weights) == (
        r".*\.q_proj",
        "SEQ_CLS",
        "lora_ga",
    )
    assert config.lora_ga_config == {"direction": "ArBr", "stable_gamma": 8}
    assert config.modules_to_save == ()
    assert LoraConfig.from_swift({"target_regex": None}).target_modules == "all-linear"
    fused = LoraConfig.from_swift(
        {"target_parameters": ["experts.w1"], "lora_dropout": 0.0, "target_modules": []}
    )
    assert (fused.target_parameters, fused.target_modules) == (("experts.w1",), ())


@pytest.mark.parametrize(
    ("d", "message"),
    [
        ({"tuner_type": "longlora"}, r"^tuner_type: expected one of lora, got 'longlora'"),
        ({"train_type": "lora", "tuner_type": "full"}, r"^tuner_type: expected one of lora, got 'full'$"),
        (
            {"init_weights": "guassian"},
            r"^init_weights: expected .*, got 'guassian' \(did you mean 'gaussian'\?\)",
        ),
        ({"init_weights": "pissa_niter_k"}, r"^init_weights: expected "),
        (
            {"init_weights": "true", "init_lora_weights": "pissa"},
            r"^init_lora_weights: expected 'true', set by",
        ),
        ({"target_regex": "("}, r"^target_regex: expected a regular expression, or None, got '\('"),
        ({"lora_ga_direction": "arbr"}, r"^lora_ga_direction: .*did you mean 'ArBr'"),
        (
            {"task_type": "CAUSAL_LM"},
            r"^task_type: expected one of causal_lm, seq_cls, or None, got 'CAUSAL_LM'",
        ),
        ({"freeze_vit": True}, r"^freeze_vit: expected one of lora_rank, "),
    ],
)
def test_what_swift_says_otherwise_is_refused(d, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig.from_swift(d)


# ---- unsloth -----------------------------------------------------------------------------------------------

PASTED = {  # as its notebooks have it
    "r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_alpha": 16, "lora_dropout": 0, "bias": "none", "use_gradient_checkpointing": "unsloth",
    "random_state": 3407, "use_rslora": False, "loftq_config": None,
}  # fmt: skip


def test_what_people_paste_from_unsloth():
    before = copy.deepcopy(PASTED)
    config, training = LoraConfig.from_unsloth(PASTED)
    assert before == PASTED
    assert config == LoraConfig(16, 16, target_modules=PASTED["target_modules"], task_type="CAUSAL_LM")
    assert training == {"use_gradient_checkpointing": "unsloth", "random_state": 3407}
    assert LoraConfig.from_unsloth({}) == (config, {"random_state": 3407})
    check_usable(config)


def test_unsloths_arguments_act_or_come_back():
    config, training = LoraConfig.from_unsloth({
        "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "all", "use_rslora": True, "use_dora": True,
        "target_modules": ["q_proj", "embed_tokens", "lm_head"], "rank_pattern": {"q_proj": 2},
        "max_seq_length": 2048,
        "layers_to_transform": [0], "init_lora_weights": "gaussian", "random_state": 1, "task_type": "SEQ_CLS",
        "temporary_location": "x", "use_gradient_checkpointing": True, "qat_scheme": None,
        "ensure_weight_tying": False,
    })  # fmt: skip
    assert config == LoraConfig(
        4, 8, lora_dropout=0.1, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"],
        bias="all", use_rslora=True, use_dora=True, rank_pattern={"q_proj": 2}, layers_to_transform=[0],
        init_lora_weights="gaussian", task_type="SEQ_CLS",
    )  # fmt: skip
    assert training == {
        "random_state": 1, "max_seq_length": 2048, "temporary_location": "x", "use_gradient_checkpointing": True
    }  # fmt: skip
    loftq, _ = LoraConfig.from_unsloth({"init_lora_weights": "loftq"})
    assert loftq.loftq_config == {"loftq_bits": 4, "loftq_iter": 1}
    assert LoraConfig.from_unsloth({"target_modules": "all-linear"})[0].target_modules == "all-linear"
    both, _ = LoraConfig.from_unsloth(
        {"target_modules": ["embed_tokens", "q"], "modules_to_save": ("embed_tokens",)}
    )
    assert both.modules_to_save == ("embed_tokens",)


@pytest.mark.parametrize(
    ("d", "message"),
    [
        ({"r": 0}, r"^r: expected an int"),
        ({"r": 4, "lora_r": 8}, r"^lora_r: expected 4, set by r, got 8$"),
        ({"lora_r": 0}, r"^r: expected an int"),
        ({"random_state": "x"}, r"^random_state: expected an int from 0, got 'x'"),
        (
            {"use_gradient_checkpointing": "yes"},
            r"^use_gradient_checkpointing: expected True, False or 'unsloth'",
        ),
        (
            {"qat_scheme": "int4"},
            r"^qat_scheme: expected None, since this version does not train through a quantiser",
        ),
        (
            {"finetune_mlp_modules": True},
            r"^finetune_mlp_modules: expected nothing, but target_modules that name",
        ),
        ({"use_gradient_checkpoint": True}, r"did you mean 'use_gradient_checkpointing'"),
        ({"lora_rank": 4}, r"^lora_rank: expected an argument of unsloth's get_peft_model"),
        ({"extra": {}}, r"^extra: expected an argument"),
        ({"bias": "al", "r": 0}, r"^r: .*; bias: expected one of none, all, lora_only, got 'al'"),
        ([1], r"^unsloth arguments: expected a mapping"),
    ],
)
def test_what_unsloth_says_otherwise_is_refused(d, message):
    with pytest.raises(ConfigError, match=message) as refused:
        LoraConfig.from_unsloth(d)
    assert len(str(refused.value).splitlines()) == 1


# ---- Use ---------------------------------------------------------------------------------------------------


def test_a_known_config_is_usable():
    quiet = {"a": None, "b": False, "c": {}, "d": []}
    for config in (
        LoraConfig(),
        LoraConfig.from_dict(LoraConfig().to_dict() | quiet),
        LoraConfig(use_dora=True, bias="all", target_modules=["q"], eva_config={"rho": 2.0}),
        LoraConfig(corda_config={"verbose": False, "cache_file": None}),
        LoraConfig(init_lora_weights="eva", eva_config={"rho": 1.5, "tau": 0.9, "use_label_mask": False}),
        LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 8, "loftq_iter": 5}),
        *(LoraConfig(init_lora_weights=start) for start in ("olora", "orthogonal", "eva", "corda", "lora_ga")),
        *(LoraConfig(init_lora_weights=start) for start in (False, "gaussian", "pissa", "pissa_niter_16")),
    ):
        check_usable(config)


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "", "x", [0], {"a": None}])
def test_an_unknown_field_that_says_something_is_not_usable(value):
    with pytest.raises(
        ConfigError, match=r"^use_dorra: expected a known field, got .*\(did you mean 'use_dora'\?\)$"
    ):
        check_usable(LoraConfig.from_dict({"use_dorra": value}), starting=False)


LOUD = {
    "layer_replication": [[0, 4]], "megatron_config": {"a": 1}, "megatron_core": "other",
    "alora_invocation_tokens": [1], "ensure_weight_tying": True, "velora_config": {"scale": 1},
    "monteclora_config": {"a": 1}, "use_bdlora": {"a": 1}, "arrow_config": {"a": 1}, "kasa_config": {"a": 1},
    "use_qalora": True, "qalora_group_size": 32, "runtime_config": {"a": 1},
}  # fmt: skip


def test_every_exotic_field_is_carried_and_not_usable():
    assert LOUD.keys() == {name for name, tier in TIERS.items() if tier == "exotic"}
    for name, value in LOUD.items():
        config = LoraConfig(**{name: value})
        assert name == "runtime_config" or config.to_dict()[name] == value
        for starting in (True, False):
            with pytest.raises(ConfigError, match=f"^{name}: expected .* since this version only carries"):
                check_usable(config, starting=starting)


def test_a_start_that_is_not_built_says_what_is():
    """mica is the only one that is no plain LoRA once it has started."""
    assert [name for name, tier in STARTS.items() if tier == "exotic"] == ["mica"]
    built = "True, False, gaussian, pissa, pissa_niter_k, olora, loftq, orthogonal, eva, corda, lora_ga"
    for starting in (True, False):
        message = said(check_usable, LoraConfig(init_lora_weights="mica"), starting=starting)
        assert message == f"init_lora_weights: this version builds {built}, got 'mica'"


# ---- Settings of starts ------------------------------------------------------------------------------------

WRONG_SETTINGS = {
    "loftq_config": {"loftq_bits": (2, 5, 4.0, True, "4", None), "loftq_iter": (0, -1, 1.5, True)},
    "eva_config": {
        "rho": (0.99, NAN, INF, "2", None),
        "tau": (-0.1, 1.1, NAN, None),
        "use_label_mask": (1, None),
        "label_mask_value": (0.5, True, None),
        "whiten": (0, "yes"),
        "adjust_scaling_factors": (1, None),
    },
    "corda_config": {
        "cache_file": (3, False),
        "covariance_file": (["a"],),
        "corda_method": ("IPM", "spm", None),
        "verbose": (1,),
        "use_float16_for_covariance": ("no",),
        "prune_temporary_fields": (None,),
    },
    "lora_ga_config": {
        "direction": ("arb2r", "ArB3r", None),
        "scale": ("gd", "Stable", 1),
        "stable_gamma": (0, -1, NAN, "16", None),
    },
}


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [(f, n, v) for f, names in WRONG_SETTINGS.items() for n, values in names.items() for v in values],
)
def test_a_setting_that_does_not_fit_is_refused_when_the_config_is_made(field, name, value):
    start = SETTINGS[field][0]
    assert refusal(init_lora_weights=start, **{field: {name: value}}).startswith(f"{field}: {name}: expected ")


def test_every_setting_has_values_that_are_refused():
    assert {f: set(names) for f, (_, names) in SETTINGS.items()} == {
        f: set(n) for f, n in WRONG_SETTINGS.items()
    }


def test_the_nearest_setting_is_named():
    """Unknown names stay in the config, as a file's do, and are refused where a start would read them."""
    for field, said_so, hint in (
        ("loftq_config", {"loftq_bit": 8}, "(did you mean 'loftq_bits'?)"),
        ("eva_config", {"rhoo": 3}, "(did you mean 'rho'?)"),
        ("corda_config", {"method": "kpm"}, "(did you mean 'corda_method'?)"),
        ("lora_ga_config", {"stable-gamma": 4}, "(did you mean 'stable_gamma'?)"),
    ):
        config = LoraConfig(init_lora_weights=SETTINGS[field][0], **{field: said_so})
        assert LoraConfig.from_dict(config.to_dict()) == config
        message = said(check_usable, config)
        assert message.startswith(f"{field}: expected names among ")
        assert message.endswith(hint)
        check_usable(config, starting=False)
    assert "(did you mean 'ArB2r'?)" in refusal(
        init_lora_weights="lora_ga", lora_ga_config={"direction": "ArB2rr"}
    )


@pytest.mark.parametrize(
    ("start", "field", "given"),
    [
        ("corda", "corda_config", {"cache_file": "a.pt"}),
        ("corda", "corda_config", {"covariance_file": "a.pt"}),
        ("corda", "corda_config", {"use_float16_for_covariance": True}),
        (True, "eva_config", {"rho": 1.0}),
        ("pissa", "corda_config", {"corda_method": "kpm"}),
        ("eva", "lora_ga_config", {"direction": "random"}),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused_by_who_starts(start, field, given):
    config = LoraConfig(init_lora_weights=start, **{field: given})
    assert said(check_usable, config).startswith(f"{field}: ")
    check_usable(config, starting=False)


@pytest.mark.peft
def test_settings_and_their_defaults_are_those_of_peft(peft):
    from dataclasses import fields

    lora = peft.tuners.lora.config
    classes = {"loftq_config": lora.LoftQConfig, "eva_config": lora.EvaConfig}
    classes |= {"corda_config": lora.CordaConfig, "lora_ga_config": lora.LoraGAConfig}
    for field, theirs in classes.items():
        assert settings_of(field, None) == {f.name: f.default for f in fields(theirs)}


# ---- The page of all fields -------------------------------------------------------------------------------

ROOT = Path(__file__).parent


def rows(page: str) -> dict[str, list[str]]:
    """The table of fields: name -> default, tier, what it does, the tests."""
    lines = [re.split(r" *\| *", line) for line in page.splitlines() if line.startswith("| `")]
    return {cells[1].strip("`"): cells[2:6] for cells in lines if len(cells) == 7}


def page_faults(page: str) -> list[str]:
    """What is wrong with the table: fields missing or unknown, other defaults or tiers, tests not there."""
    table = rows(page)
    faults = [f"{name}: not in the table" for name in FIELDS.keys() - table.keys()]
    faults += [f"{name}: no field" for name in table.keys() - FIELDS.keys()]
    for name in table.keys() & FIELDS.keys():
        default, tier, _, tests = table[name]
        if eval(default) != FIELDS[name].metadata["default"] or tier != TIERS.get(name, ""):
            faults.append(f"{name}: another default or tier")
        file, _, test = tests.strip("`").partition("::")
        if not (ROOT / file).is_file() or f"def {test}(" not in (ROOT / file).read_text():
            faults.append(f"{name}: {tests} does not exist")
    return faults


def test_the_page_of_fields_is_complete():
    page = (ROOT.parent / "specs" / "config.md").read_text()
    assert page_faults(page) == []
    for planted in (
        page.replace("| `use_dora` |", "| `use_dorra` |"),
        page.replace("| 16 | exotic |", "| 17 | exotic |"),
        page.replace("| `revision` | None | family |", "| `revision` | None | core |"),
        page.replace("test_inject.py::test_layout", "test_inject.py::test_lay"),
    ):
        assert page_faults(planted)


# ---- Against PEFT itself -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="needs the peft extra: torch and PEFT 0.21.2")


def content(config: Any, path: Any) -> dict[str, Any]:
    """Return what PEFT writes for its config, with the target sets in our order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.save_pretrained(path)
    d = json.loads((path / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules"):
        d[name] = sorted(d[name]) if isinstance(d[name], list) else d[name]
    return d


@pytest.mark.peft
def test_names_and_defaults_are_those_of_peft(peft, tmp_path):
    from dataclasses import fields

    assert {f.name for f in fields(peft.LoraConfig)} == FIELDS.keys() - {"extra", *OURS}
    theirs = content(peft.LoraConfig(), tmp_path)
    assert theirs.pop("peft_version") == peft.__version__
    ours = LoraConfig().to_dict()
    assert ours.pop("peft_version") is None
    assert ours == theirs
    types = {name: type(value) for name, value in ours.items()}
    assert types == {name: type(value) for name, value in theirs.items()}  # 8 and not 8.0


def peft_configs(peft: Any) -> list[dict[str, Any]]:
    lora = peft.tuners.lora.config
    return [
        {},
        {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "use_rslora": True, "bias": "lora_only"},
        {
            "target_modules": ["v_proj", "q_proj"],
            "exclude_modules": ["lm_head"],
            "modules_to_save": ["score", "a"],
        },
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": True, "inference_mode": True},
        {"target_modules": ["q"], "layers_to_transform": [3, 1], "layers_pattern": "layers"},
        {"rank_pattern": {"q": 4, "a": 2}, "alpha_pattern": {"q": 0.5}, "task_type": peft.TaskType.SEQ_CLS},
        {"rank_pattern": None, "alpha_pattern": None, "loftq_config": None, "megatron_core": None},
        {"target_modules": [], "target_parameters": ["experts.w2", "experts.w1"]},
        {"trainable_token_indices": {"embed": [3, 1]}, "lora_bias": True, "ensure_weight_tying": True},
        {"init_lora_weights": "eva", "eva_config": lora.EvaConfig(rho=1.0)},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": True, "corda_config": lora.CordaConfig()},
        {"init_lora_weights": "lora_ga", "lora_ga_config": lora.LoraGAConfig()},
        {"init_lora_weights": "pissa_niter_4", "lora_alpha": 0.5},
        {
            "layer_replication": [(0, 4), (2, 5)],
            "arrow_config": lora.ArrowConfig(),
            "kasa_config": lora.KasaConfig(),
        },
        {
            "velora_config": lora.VeloraConfig(),
            "use_bdlora": lora.BdLoraConfig(),
            "alora_invocation_tokens": [1, 2],
        },
        {"monteclora_config": lora.MontecloraConfig(), "use_qalora": True, "qalora_group_size": 32},
        {"auto_mapping": {"base_model_class": "A", "parent_library": "b"}, "revision": "main"},
    ]


@pytest.mark.peft
@pytest.mark.parametrize("case", range(18))
def test_every_file_of_peft_survives_and_ours_loads_in_peft(peft, tmp_path, case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.LoraConfig(**peft_configs(peft)[case])
    written = content(theirs, tmp_path / "theirs")
    config = LoraConfig.from_dict(written)
    assert config.extra == {}
    assert config.to_dict() == written

    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "adapter_config.json").write_text(json.dumps(config.to_dict(), indent=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftConfig.from_pretrained(str(ours))
    assert type(back) is peft.LoraConfig
    assert content(back, tmp_path / "back") == written


@pytest.mark.peft
def test_scaling_is_that_of_a_peft_layer(peft):
    import torch

    for settings in ({"r": 3, "lora_alpha": 7}, {"r": 3, "lora_alpha": 7, "use_rslora": True}):
        model = torch.nn.Sequential(torch.nn.Linear(5, 5))
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **settings))
        assert adapted.base_model.model[0].scaling["default"] == LoraConfig(**settings).scaling
