"""Fields of LoraConfig against each other: what one may hold, given others."""

from functools import partial
from typing import Any, NamedTuple

from ..kinds import Test
from .fields import ROOTS, start_name


class Rule(NamedTuple):
    """What a field must be, given others: those it reads, itself first; the words; the test of a fault."""

    reads: str
    wanted: str  # {0} is the config
    broken: Test


def _with_target_parameters(name: str, c: Any) -> Any:
    return c.target_parameters and getattr(c, name)


_ROOT = "above 0 with init_lora_weights={0.init_lora_weights!r}, which scales by the root of S/s"

RULES = (
    Rule("lora_alpha r use_rslora", "a number whose alpha/r is not 0", lambda c: c.scaling == 0),
    Rule(
        "lora_alpha init_lora_weights",
        f"a number {_ROOT}",
        lambda c: start_name(c.init_lora_weights) in ROOTS and c.lora_alpha < 0,
    ),
    Rule(
        "alpha_pattern init_lora_weights",
        f"numbers {_ROOT}",
        lambda c: (
            start_name(c.init_lora_weights) in ROOTS and any(a < 0 for a in (c.alpha_pattern or {}).values())
        ),
    ),
    Rule(
        "lora_bias init_lora_weights",
        "False with init_lora_weights={0.init_lora_weights!r}, since bB starts only with True or False",
        lambda c: c.lora_bias and isinstance(c.init_lora_weights, str),
    ),
    Rule("lora_bias use_dora", "False with use_dora=True", lambda c: c.lora_bias and c.use_dora),
    Rule(
        "loftq_config init_lora_weights",
        "{{}} with init_lora_weights={0.init_lora_weights!r}, since only 'loftq' reads it",
        lambda c: c.loftq_config and c.init_lora_weights != "loftq",
    ),
    Rule(
        "loftq_config init_lora_weights",
        "loftq_bits and loftq_iter with init_lora_weights='loftq'",
        lambda c: not c.loftq_config and c.init_lora_weights == "loftq",
    ),
    *(
        Rule(
            f"{name} target_parameters",
            f"{default} with target_parameters",
            partial(_with_target_parameters, name),
        )
        for name, default in (
            ("lora_dropout", 0.0),
            ("use_dora", False),
            ("lora_bias", False),
            ("fan_in_fan_out", False),
        )
    ),
    Rule(
        "target_modules target_parameters",
        "names, since target_parameters has none",
        lambda c: c.target_modules == () and not c.target_parameters,
    ),
    Rule(
        "layers_pattern layers_to_transform",
        "None without layers_to_transform",
        lambda c: c.layers_pattern and c.layers_to_transform in (None, ()),
    ),
    Rule(
        "layers_to_transform target_modules",
        "None with a regular expression in target_modules, which can name the layers itself",
        lambda c: isinstance(c.target_modules, str) and c.layers_to_transform not in (None, ()),
    ),
    Rule(
        "extra",
        "names that are no fields of LoraConfig",
        lambda c: c.extra.keys() & (vars(c).keys() - {"extra"}),
    ),
)
