"""Optimisers, groups of parameters, clipping and schedules.  Derivation: specs/optim.md.

Parameters and gradients are dictionaries of arrays by dotted name. A state is a plain dictionary of arrays and
integers, which a file can hold.
"""

from .adamw import adamw_start, adamw_step
from .clipping import clip, clip_into
from .flat import adamw_flat_start, adamw_flat_step, flat_state, named_state
from .grouping import Group, group_rates, group_table, groups
from .lora_fa import Inverses, lora_fa_gradients, lora_fa_inverses
from .schedules import SCHEDULES, schedule
from .sgd import sgd_start, sgd_step
from .state import State, check_state

__all__ = [
    "SCHEDULES",
    "Group",
    "Inverses",
    "State",
    "adamw_flat_start",
    "adamw_flat_step",
    "adamw_start",
    "adamw_step",
    "check_state",
    "clip",
    "clip_into",
    "flat_state",
    "group_rates",
    "group_table",
    "groups",
    "lora_fa_gradients",
    "lora_fa_inverses",
    "named_state",
    "schedule",
    "sgd_start",
    "sgd_step",
]
