"""ms-swift's names for LoRA's arguments, with its defaults.

Source: modelscope/ms-swift, its page of command-line parameters, and its TunerArguments, from version 3.0.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..kinds import FLAG, Kind, content, name_of, nearest, or_none, problem, read, refuse, regex, word
from .fields import ALPHA, DROPOUT, NAMES, RANK, RATIO, STARTS, TARGETS, start_name

DTYPES = {None: "base", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
TASKS = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS"}
FLAGS = {"true": True, "false": False}
GA = {"lora_ga_direction": "direction", "lora_ga_scale": "scale", "lora_ga_stable_gamma": "stable_gamma"}


def _start(value: Any) -> str:
    """A start in our spelling: lora-ga is lora_ga."""
    return str(value).replace("-", "_")


INIT = Kind(
    f"true, false or one of {', '.join(STARTS)} (k = 0, 1, ...)",
    lambda v: (
        isinstance(v, bool)
        or (isinstance(v, str) and v != "pissa_niter_k" and (v in FLAGS or start_name(_start(v)) in STARTS))
    ),
    (*FLAGS, *STARTS),
)


class Name(NamedTuple):
    """What one of ms-swift's arguments means: the field, ms-swift's default, what it may hold."""

    field: str
    default: Any
    kind: Kind


_UNSAID = object()  # a second name of a field that has its default from the first

SWIFT: Mapping[str, Name] = {
    "lora_rank": Name("r", 8, RANK),
    "lora_alpha": Name("lora_alpha", 32, ALPHA),
    "lora_dropout": Name("lora_dropout", 0.05, DROPOUT),
    "lora_bias": Name("bias", "none", word("none", "all")),
    "lora_dtype": Name(
        "adapter_dtype", None, or_none(word("fp16", "bf16", "fp32", "float16", "bfloat16", "float32"))
    ),
    "lorap_lr_ratio": Name("loraplus_lr_ratio", None, or_none(RATIO)),
    "use_rslora": Name("use_rslora", False, FLAG),
    "use_dora": Name("use_dora", False, FLAG),
    "target_modules": Name("target_modules", "all-linear", TARGETS),
    "target_regex": Name("target_modules", _UNSAID, or_none(Kind("a regular expression", regex))),
    "target_parameters": Name("target_parameters", None, or_none(NAMES)),
    "modules_to_save": Name("modules_to_save", None, or_none(NAMES)),
    "init_weights": Name("init_lora_weights", "true", INIT),
    "init_lora_weights": Name("init_lora_weights", _UNSAID, INIT),
    **{
        name: Name("lora_ga_config", _UNSAID, kind)
        for name, kind in (
            ("lora_ga_direction", word("ArBr", "A2rBr", "ArB2r", "random")),
            ("lora_ga_scale", word("stable", "weight_svd", "gd_scale", "unit")),
            ("lora_ga_stable_gamma", RANK),
        )
    },
    "task_type": Name("task_type", None, or_none(word(*TASKS))),
    "train_type": Name("peft_type", "lora", word("lora")),
    "tuner_type": Name("peft_type", _UNSAID, word("lora")),
}


def read_swift(d: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of LoraConfig that ms-swift's arguments mean; ConfigError for what is not in SWIFT."""
    given = content("ms-swift arguments", d)
    unknown = [
        f"{name_of(name)}: expected one of {', '.join(SWIFT)}{nearest(name, SWIFT)}"
        for name in given
        if name not in SWIFT
    ]
    defaults = {name: known.default for name, known in SWIFT.items() if known.default is not _UNSAID}
    said = {name: given[name] for name in SWIFT if name in given}
    values, unfit = read({name: (SWIFT[name].kind, value) for name, value in (defaults | said).items()})
    refuse(unknown + unfit)
    return _fields(values, given)


def _fields(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of ms-swift's arguments, all checked, as fields: target_regex wins, and two names must agree."""
    start, older = values.pop("init_weights"), values.pop("init_lora_weights", None)
    if older is not None and "init_weights" in given and older != start:
        refuse([problem("init_lora_weights", f"{start!r}, set by init_weights, its name since 3.0", older)])
    start = start if older is None else older
    ga = {GA[name]: values.pop(name) for name in GA if name in values}
    pattern = values.pop("target_regex", None)
    fields = {SWIFT[name].field: value for name, value in values.items()}
    fields["init_lora_weights"] = FLAGS.get(start, _start(start)) if isinstance(start, str) else start
    fields["lora_ga_config"] = ga or None
    fields["peft_type"] = "LORA"  # train_type, for which there is one word
    fields["adapter_dtype"] = DTYPES.get(fields["adapter_dtype"], fields["adapter_dtype"])
    fields["task_type"] = TASKS.get(fields["task_type"])
    if fields["target_modules"] == ("all-linear",):
        fields["target_modules"] = "all-linear"
    if pattern:
        fields["target_modules"] = pattern
    return fields
