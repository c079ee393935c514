"""Settings of a file, JSON or YAML, as whoever wrote it meant them."""

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import BackendError, FormatError
from ..io.checkpoint import read_json
from ..kinds import shown

PLAIN = (  # what YAML may say without quotes and have read as no word: nothing, true or false, a number
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
)


class Told(dict[str, Any]):
    """What a file says by names, and the line that each stands in."""

    lines: Mapping[str, int] = MappingProxyType({})


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a JSON file, or a YAML one where PyYAML is there. Raises FormatError, BackendError.

    Of YAML, what is not plainly nothing, true, false or a number is a word, and read as a flag's would be: no,
    on and 010 as they stand, where YAML 1.1 has False, True and 8; and so is 1:30, for which it has 90.
    """
    if path.suffix == ".json":
        return read_json(path)
    try:
        yaml: Any = import_module("yaml")
    except ImportError:
        wanted = "PyYAML for a file that is not .json"
        raise BackendError(f"{path}: expected {wanted}, got none; pip install 'lorax-np[yaml]'") from None
    raw = path.read_bytes()
    try:
        root = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
        found = yaml.load(raw, Loader=_plain(yaml))  # which is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path}: expected YAML in UTF-8, got {reason}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected names with values, got {shown(found)}")
    seen: set[str] = set()
    for key, _ in root.value:  # of which the last would count
        if key.value in seen:
            line = key.start_mark.line + 1
            raise FormatError(f"{path}:{line}: expected each name once, got {key.value!r} again")
        seen.add(key.value)
    told = Told(found)
    told.lines = {key.value: value.start_mark.line + 1 for key, value in root.value}
    return told


def _plain(yaml: Any) -> Any:
    """PyYAML's safe loader, which makes a word of whatever PLAIN does not know."""
    found: Any = type("Plain", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    for tag, pattern, first in PLAIN:
        found.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), list(first))
    return found
