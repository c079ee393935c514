"""adapter_config.json: read without trust, written as PEFT writes it."""

import json
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from ...config import LoraConfig, check_usable
from ...config.regexes import Regex, plain
from ...errors import ConfigError, FormatError
from ..safetensors import _unique, show

CONFIG = "adapter_config.json"
MOST = 1 << 24  # bytes of the file
WHOLE = 500_000  # characters of regular expressions
KEYS = 10_000  # of patterns; a tenth of it may be more than names
EXPRESSIONS = "target_modules", "exclude_modules"  # regular expressions where they are text
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe may have no writer
PATTERNS = "rank_pattern", "alpha_pattern"  # regular expressions as keys


def read_config(path: Path) -> LoraConfig:
    """Read one file into a config that can be used as it stands.

    Raises FormatError where the file is no JSON object of a LoRA adapter, ConfigError, with the path in front,
    for a field that is wrong, unknown, or asks for what this version does not do; the system's OSError.
    """
    content = read_object(path)
    if content.get("peft_type") != "LORA":
        came = show(content["peft_type"]) if "peft_type" in content else "none"
        raise FormatError(f"{path}: peft_type: expected 'LORA', got {came}")
    content.pop("runtime_config", None)  # never meant to be in a file, and never read from one
    _check_expressions(path, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # re's, of an expression that a later Python may read otherwise
            config = LoraConfig.from_dict(content)
        check_usable(config, starting=False)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def _check_expressions(path: Path, content: Mapping[str, Any]) -> None:
    """No regular expression is compiled that is not also one to be matched in bounded time."""
    said = [content.get(name) for name in EXPRESSIONS]
    for name in PATTERNS:
        said += content[name] if isinstance(content.get(name), dict) else ()
    texts = [value for value in said if isinstance(value, str)]
    expressions = [text for text in texts if not plain(text)]
    for most, came, what in (
        (WHOLE, sum(map(len, texts)), "characters of regular expressions"),
        (KEYS, len(texts), "keys in patterns"),
        (KEYS // 10, len(expressions), "keys in patterns that are no names"),
    ):
        if came > most:
            raise FormatError(f"{path}: expected at most {most} {what}, got {came}")
    for text in expressions:
        try:
            Regex(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a regular file that holds one JSON object: strict, each key once, every number finite."""
    with os.fdopen(os.open(path, READ), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise FormatError(f"{path}: expected a JSON file, got a device, pipe or socket")
        raw = file.read(MOST + 1)
    if len(raw) > MOST:
        raise FormatError(f"{path}: expected at most {MOST} bytes, got more")
    try:
        found = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float
        )
    except RecursionError:
        raise FormatError(f"{path}: expected a JSON object, got one nested too deep") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: expected a JSON object in UTF-8, got {reason}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, got {show(found)}")
    return found


def _constant(word: str) -> float:
    raise ValueError(f"the number {word}")


def _float(digits: str) -> float:
    if not isfinite(value := float(digits)):
        raise ValueError(f"the number {show(digits)}")
    return value


def config_bytes(config: LoraConfig) -> bytes:
    """Return the bytes of the file: ASCII, indented by 2, sorted, no line break at the end, as PEFT has it.

    inference_mode is true in a file, whatever the config says: who goes on training says so when loading.

    >>> config_bytes(LoraConfig(r=4))[:33]
    b'{\\n  "alora_invocation_tokens": nu'
    """
    content = replace(config, inference_mode=True).to_dict()
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False).encode("ascii")
