"""What a run is told: by flags, by a file, by the run that it goes on with; names with their kinds, checked."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from ..backend import BACKENDS
from ..config.fields import BIAS
from ..kinds import nearest, refuse, shown
from ..models.codes import WAYS
from ..text.rows import TASKS
from .config import TrainConfig

Settings = dict[str, Any]
ALL = "all-linear"
NONE = "none"
HELD = (NONE, *WAYS)  # ways to hold a base
DTYPES = "float32", "float16", "bfloat16"
NAME = re.compile(r"[\w.-]+")
MOST = 1 << 16  # layers, and a rank; a number beyond is a slip
DIGITS = re.compile(r"-?\d+(_\d+)*")


class Setting(NamedTuple):
    """One name: what it may be, what it is where nothing is said, and a line for --help."""

    read: Callable[[Any], Any]
    default: Any
    about: str
    flag: bool = False  # given without a value on a command line
    words: tuple[str, ...] = ()  # that it may be


def text(value: Any) -> str:
    """A word."""
    if not isinstance(value, str) or not value:
        raise ValueError("a word")
    return value


def one_of(words: tuple[str, ...], default: str | None, about: str) -> "Setting":
    """A setting that is one of these words."""

    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return str(value)

    return Setting(read, default, about, words=words)


def integer(value: Any) -> int:
    """A whole number, or the digits of one.

    >>> integer("010"), integer("1_000")
    (10, 1000)
    """
    if isinstance(value, str) and DIGITS.fullmatch(value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value


def rank(value: Any) -> int:
    """A whole number that some matrix may have as its rank."""
    if (found := integer(value)) >= MOST:
        raise ValueError(f"a whole number below {MOST}")
    return found


def number(value: Any) -> float:
    """A number, or how one is written."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("a number") from None


def flag(value: Any) -> bool:
    """True or False, or a word for it.

    >>> flag("off"), flag("Yes")
    (False, True)
    """
    known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    found = known.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError("true or false")
    return found


def names(value: Any) -> Any:
    """A list of names, or names with commas between; what has other signs than a name's is an expression."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if len(parts) == 1 and parts[0].lower() == ALL:
            return ALL
        return parts[0] if len(parts) == 1 and not NAME.fullmatch(parts[0]) else parts
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value) and value:
        return list(value)
    raise ValueError("names with commas between")


def several(value: Any) -> list[str]:
    """A list of names in every case."""
    found = names(value)
    return [found] if isinstance(found, str) else found


def layers(value: Any) -> list[int]:
    """Numbers of layers: 3, or 3,5,7, or 20-29, or a list."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, str)) for item in value) and value:
        return [layer for item in value for layer in layers(item)]
    found: list[int] = []
    for part in value.split(",") if isinstance(value, str) else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError("layers as in 3,5,7 or 20-29")
        if not int(first) <= int(last or first) < MOST:
            raise ValueError(f"layers as in 3,5,7 or 20-29, the first first, below {MOST}")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise ValueError("layers as in 3,5,7 or 20-29")
    return found


def beginning(value: Any) -> bool | str:
    """true, false, or the name of a start."""
    try:
        return flag(value)
    except ValueError:
        return text(value)


def _type(name: str) -> str:
    """The type of a field of TrainConfig, in words: int, float | None."""
    found = TrainConfig.__dataclass_fields__[name].type
    return found.__name__ if isinstance(found, type) else str(found)


def _trained(name: str) -> Callable[[Any], Any]:
    """How a field of TrainConfig is read; its own checks follow."""
    kind = _type(name)
    if kind == "int | str":
        return lambda value: integer(value) if str(value).isdecimal() else text(value)
    for word, read in (("bool", flag), ("float", number), ("int", integer)):
        if kind.startswith(word):
            return read
    return text


RUN: Mapping[str, Setting] = {
    "model": Setting(text, None, "the base: a Hugging Face directory or a .gguf file"),
    "data": Setting(text, None, "rows: a .jsonl file, or a directory of train, valid and test.jsonl"),
    "task": Setting(text, "causal-lm", "what is learned", words=tuple(TASKS)),
    "valid": Setting(text, None, "rows to evaluate on (default: valid.jsonl beside train.jsonl)"),
    "adapter_path": Setting(text, "adapters", "where the adapter and its record are written"),
    "resume_adapter_file": Setting(text, None, "an adapter to train on, PEFT's or ours"),
    "mask_prompt": Setting(flag, True, "whether prompts carry no labels", flag=True),
    "quantize": one_of(HELD, NONE, "how the base is held"),
    "lora_dtype": one_of(DTYPES, DTYPES[0], "what the adapter is saved in; it trains in float32"),
    "backend": one_of(BACKENDS, None, "where it is computed"),
}
LORA: Mapping[str, Setting] = {
    "r": Setting(rank, 16, "rank"),
    "lora_alpha": Setting(number, None, "α (default: twice r)"),
    "lora_dropout": Setting(number, None, "probability of dropping an input of A (0.05; parameters have none)"),
    "target_modules": Setting(names, ALL, "ends of modules' names, a regular expression, or all-linear"),
    "target_parameters": Setting(several, None, "ends of parameters' names, such as experts.down_proj"),
    "exclude_modules": Setting(names, None, "ends of modules' names that are left alone"),
    "modules_to_save": Setting(several, None, "modules that train whole"),
    "layers_to_transform": Setting(layers, None, "layers that get adapters, as in 20-29"),
    "num_layers": Setting(integer, None, "the last so many layers get adapters"),
    "init_lora_weights": Setting(beginning, True, "true, gaussian, pissa, olora, orthogonal, ..."),
    "bias": one_of(BIAS.words, NONE, "biases that train"),
    "use_dora": Setting(flag, False, "with a magnitude a row", flag=True),
    "use_rslora": Setting(flag, False, "s = α/√r", flag=True),
}
TRAIN: Mapping[str, Setting] = {
    f.name: Setting(
        *(_trained(f.name), f.default, f.metadata["about"]),
        flag=_type(f.name) == "bool",
        words=f.metadata["kind"].words,
    )
    for f in fields(TrainConfig)
}
SETTINGS: Mapping[str, Setting] = {**RUN, **LORA, **TRAIN}
THEIRS = {  # what other programs call it, where its letters would lead elsewhere
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    **dict.fromkeys(("steps", "max_steps", "num_steps"), "iters"),
    **dict.fromkeys(("output", "output_dir", "out", "save_dir"), "adapter_path"),
    **dict.fromkeys(("eval_steps", "eval_every"), "steps_per_eval"),
    **dict.fromkeys(("train_file", "train_data", "dataset"), "data"),
    **dict.fromkeys(("valid_file", "validation_file", "valid_data"), "valid"),
    **{"lr": "learning_rate", "logging_steps": "steps_per_report", "per_device_train_batch_size": "batch_size"},
}


def like(name: str) -> str:
    """The hint at the known name that an unknown one means, or an empty str."""
    return f" (did you mean {THEIRS[name]!r}?)" if name in THEIRS else nearest(name, SETTINGS)


def resolved(*said: tuple[str, Mapping[str, Any]]) -> Settings:
    """Return every setting: of several sources, each with what it is called, the last that says something.

    Names may have hyphens or underscores. Raises ConfigError, one line, for names that there are not, with the
    nearest, and for values of another kind.

    >>> resolved(("FILE", {"r": 4}), ("the command line", {"r": "8"}))["r"]
    8
    >>> resolved(("FILE", {"rank": 4}))
    Traceback (most recent call last):
    lorax_np.errors.ConfigError: FILE: expected a known name, got 'rank' (did you mean 'r'?)
    """
    found: Settings = {name: setting.default for name, setting in SETTINGS.items()}
    for where, given in said:
        problems, seen = [], set[str]()
        for name, value in given.items():
            own = str(name).replace("-", "_")
            if own not in SETTINGS:
                problems.append(f"{where}: expected a known name, got {name!r}{like(own)}")
            elif own in seen:
                problems.append(f"{where}: expected each name once, got {own} with hyphens and without")
            elif value is None:
                found[own] = SETTINGS[own].default
            else:
                try:
                    found[own] = SETTINGS[own].read(value)
                except ValueError as wanted:
                    hint = nearest(value, SETTINGS[own].words)
                    line = getattr(given, "lines", {}).get(name)  # of a file that has lines
                    place = where if line is None else f"{where}:{line}"
                    problems.append(f"{place}: {name}: expected {wanted}, got {shown(value)}{hint}")
            seen.add(own)
        refuse(problems)
    return found


def train_config(settings: Settings) -> TrainConfig:
    """The part that says how the run goes."""
    return TrainConfig(**{name: settings[name] for name in TRAIN})


def changed(before: Settings, now: Settings, but: Iterable[str]) -> None:
    """Raise ConfigError, by names, where a run that goes on is told otherwise than it began."""
    free = set(but)
    refuse(
        [
            f"{name}: expected {before.get(name)!r}, as the run began, got {now[name]!r}"
            for name in (*RUN, *LORA)
            if name not in free and before.get(name, SETTINGS[name].default) != now[name]
        ]
    )


def stored(settings: Settings) -> bytes:
    """Settings as a file that read_file reads."""
    return (json.dumps(settings, indent=1, ensure_ascii=False) + "\n").encode()
