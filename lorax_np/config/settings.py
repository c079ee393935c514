"""The settings of a config that only some starts read: names, kinds and defaults are PEFT's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..kinds import FLAG, Kind, finite, name_of, nearest, or_none, problem, read, shown, text, whole, word


class Setting(NamedTuple):
    """One name within a field of settings: PEFT's default, what it may be; whether another value is refused."""

    default: Any
    kind: Kind
    carried: str = ""  # why this version uses it at its default only


PATH = or_none(Kind("a str", text))
ONE_OR_MORE = Kind("an int of at least 1", lambda v: whole(v) and v > 0)
ABOVE_ZERO = Kind("a finite number above 0", lambda v: finite(v) and v > 0)
NO_FILE = "since what a start has seen of the inputs is handed to it"

# field -> the start that reads it, and its settings by name
SETTINGS: Mapping[str, tuple[str, Mapping[str, Setting]]] = {
    "loftq_config": (
        "loftq",
        {
            "loftq_bits": Setting(4, Kind("4 or 8", lambda v: whole(v) and v in (4, 8))),
            "loftq_iter": Setting(1, ONE_OR_MORE),
        },
    ),
    "eva_config": (
        "eva",
        {
            "rho": Setting(2.0, Kind("a finite number of at least 1", lambda v: finite(v) and v >= 1)),
            # these three tell whoever collects the inputs which rows to take, and when to stop
            "tau": Setting(0.99, Kind("a number from 0 to 1", lambda v: finite(v) and 0 <= v <= 1)),
            "use_label_mask": Setting(True, FLAG),
            "label_mask_value": Setting(
                -100, Kind("an int", lambda v: isinstance(v, int) and not isinstance(v, bool))
            ),
            "whiten": Setting(False, FLAG),
            "adjust_scaling_factors": Setting(True, FLAG),
        },
    ),
    "corda_config": (
        "corda",
        {
            "cache_file": Setting(None, PATH, NO_FILE),
            "covariance_file": Setting(None, PATH, NO_FILE),
            "corda_method": Setting("ipm", word("ipm", "kpm")),
            "verbose": Setting(False, FLAG),
            "use_float16_for_covariance": Setting(False, FLAG, "since sums of squares are kept in float64"),
            "prune_temporary_fields": Setting(True, FLAG),
        },
    ),
    "lora_ga_config": (
        "lora_ga",
        {
            "direction": Setting("ArB2r", word("ArBr", "A2rBr", "ArB2r", "random")),
            "scale": Setting("stable", word("stable", "weight_svd", "gd_scale", "unit")),
            "stable_gamma": Setting(16, ABOVE_ZERO),
        },
    ),
}


def setting_problems(field: str, given: Mapping[str, Any]) -> list[str]:
    """A sentence for each known setting of a field whose value does not fit; unknown ones are for later."""
    known = SETTINGS[field][1]
    named = {f"{field}: {name}": (known[name].kind, value) for name, value in given.items() if name in known}
    return read(named)[1]


def unused_settings(field: str, given: Mapping[str, Any], start: object) -> list[str]:
    """A sentence for each setting that a start would have to ignore: it reads others, or knows no such name.

    A setting at its default asks for nothing.
    """
    reader, known = SETTINGS[field]
    said = {name: v for name, v in given.items() if name not in known or v != known[name].default}
    if start != reader and said:
        return [problem(field, f"None with init_lora_weights={start!r}, since only {reader!r} reads it", said)]
    found = []
    for name, value in said.items():
        if name not in known:
            names, hint = ", ".join(known), nearest(name, known)
            found.append(f"{field}: expected names among {names}, got {name_of(name)}={shown(value)}{hint}")
        elif known[name].carried:
            wanted = f"{known[name].default}, {known[name].carried}"
            found.append(problem(f"{field}: {name}", wanted, value))
    return found


def settings_of(field: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """All settings of a field, the defaults where nothing is said.

    >>> settings_of("lora_ga_config", {"scale": "unit"})
    {'direction': 'ArB2r', 'scale': 'unit', 'stable_gamma': 16}
    """
    return {name: setting.default for name, setting in SETTINGS[field][1].items()} | dict(given or {})
