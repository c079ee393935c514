"""The arguments of unsloth's get_peft_model: which of them are the adapter, and which say how to train.

Source: unsloth, models/llama.py and models/vision.py, get_peft_model.
"""

from collections.abc import Mapping
from typing import Any

from ..kinds import FLAG, Kind, content, name_of, nearest, or_none, problem, read, refuse, silent, text, whole
from .fields import RANK

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULTS: Mapping[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "target_modules": TARGETS,
    "task_type": "CAUSAL_LM",
}
TRAINING: Mapping[str, Kind] = {  # handed back
    "random_state": Kind("an int from 0", whole),
    "use_gradient_checkpointing": Kind("True, False or 'unsloth'", lambda v: FLAG.fits(v) or v == "unsloth"),
    "max_seq_length": or_none(RANK),
    "temporary_location": Kind("a str", text),
}
SEED = 3407
# Refused unless they say nothing: they change what is trained, by the model or by rounding within training.
REFUSED: Mapping[str, str] = {
    "qat_scheme": "None, since this version does not train through a quantiser",
    **dict.fromkeys(
        (
            "finetune_vision_layers",
            "finetune_language_layers",
            "finetune_attention_modules",
            "finetune_mlp_modules",
        ),
        "nothing, but target_modules that name the modules, since what it selects depends on the model",
    ),
}


def read_unsloth(d: Mapping[str, Any], kinds: Mapping[str, Kind]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of LoraConfig that unsloth's arguments mean, and the arguments that say how to train.

    kinds : what each field of LoraConfig may hold
    """
    given = dict(content("unsloth arguments", d))
    problems = _renamed(given)
    training, unfit = read({k: (TRAINING[k], given.pop(k)) for k in TRAINING if k in given})
    problems += unfit
    for name, wanted in REFUSED.items():
        if name in given and not silent(given[name], None):
            problems.append(problem(name, wanted, given[name]))
        given.pop(name, None)
    known = (*kinds.keys() - {"extra"}, *TRAINING)
    problems += [
        f"{name_of(name)}: expected an argument of unsloth's get_peft_model{nearest(name, known)}"
        for name in given
        if name not in known
    ]
    refuse(problems)
    return _fields(dict(DEFAULTS) | given), {"random_state": SEED} | training


def _renamed(given: dict[str, Any]) -> list[str]:
    """Read lora_r, which people write for r, in place; a sentence where both are there and differ."""
    if "lora_r" not in given:
        return []
    r = given.pop("lora_r")
    if given.setdefault("r", r) != r:
        return [problem("lora_r", f"{given['r']!r}, set by r", r)]
    return []


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """What unsloth makes of its arguments before it calls PEFT."""
    if values["target_modules"] is None:
        values["target_modules"] = DEFAULTS["target_modules"]
    if values.get("loftq_config", {}) is None:
        values["loftq_config"] = {}
    if values.get("init_lora_weights") == "loftq" and not values.get("loftq_config"):
        values["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
    targets = values["target_modules"]
    if isinstance(targets, (list, tuple, set, frozenset)) and "embed_tokens" in targets:
        saved = list(values.get("modules_to_save") or ())
        values["target_modules"] = [name for name in targets if name != "embed_tokens"]
        values["modules_to_save"] = saved if "embed_tokens" in saved else [*saved, "embed_tokens"]
    return values
