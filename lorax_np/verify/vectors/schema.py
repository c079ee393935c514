"""The schema of a vectors directory's manifest.json, and a validator for the few keywords that it uses."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

SCHEMA_NAME = "lora_linear_v1.json"
GENERATOR = "1.0"  # of the groups; a change of any tensor changes it
SEMANTICS = "1"
COMPARED = "PEFT 0.21.2"
PROFILES = ("fp32", "tf32", "bf16", "fp16")
OUTPUTS = ("y", "gx", "gA", "gB", "gW", "gm", "gb", "gbB", "merged_W", "merged_b")
INPUTS = ("x", "W", "b", "A", "B", "bB", "m", "mask", "mask2", "gy", "s")

_WORD = {"type": "string", "pattern": r"^[A-Za-z][A-Za-z0-9]*$"}
_TEXT = {"type": "string", "pattern": r"\S"}
_ID = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
_FILE = {"type": "string", "pattern": r"^(bugs/)?[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors$"}


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
        "additionalProperties": False,
    }


def _list(items: Any, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "uniqueItems": True}


_TEST = _object(
    {
        "tcId": _ID,
        "id": {"type": "string", "pattern": r"^[\x21-\x7e]+$"},
        "r": {"type": "integer", "minimum": 0},
        "alpha": {"type": "number"},
        "rslora": {"type": "boolean"},
        "p": {"type": "number"},
        "bias": {"enum": ["absent", "frozen", "trained"]},
        "lora_bias": {"type": "boolean"},
        "dora": {"enum": [None, "detached", "full"]},
        "flags": _list(_WORD, 1),
        "result": {"enum": ["valid", "invalid", "acceptable"]},
        "profiles": _list({"enum": list(PROFILES)}),
    },
    {"comment": _TEXT, "instead": _ID},
)
_GROUP = _object(
    {
        "type": {"enum": ["LoraLinear", "LoraMerge"]},
        "name": {"type": "string", "pattern": r"^[a-z0-9][a-z0-9-]*$"},
        "compare": {"enum": ["bitwise", "sigma"]},
        "file": _FILE,
        "tests": _list(_TEST, 1),
    },
    {"text": {"type": "string", "pattern": r"^[a-z0-9][a-z0-9-]*\.txt$"}},
)
_BUG = _object({"id": _TEXT, "bugType": _TEXT, "description": _TEXT, "file": _FILE, "shownBy": _list(_ID, 1)})
_NOTE = _object({"bugType": _TEXT, "description": _TEXT}, {"effect": _TEXT, "compare": _TEXT})
_CONVENTIONS = ("scale", "W", "A", "B", "mask", "dora", "reduction", "layer", "tensors")

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Golden vectors of LoRA linear layers, version 1",
    **_object(
        {
            "schema": {"const": SCHEMA_NAME},
            "generatorVersion": {"type": "string", "pattern": r"^[0-9]+\.[0-9]+$"},
            "semantics": {"const": SEMANTICS},
            "comparedWith": _TEXT,
            "seed": {"type": "integer", "minimum": 0},
            "numberOfTests": {"type": "integer", "minimum": 1},
            "notes": {"type": "object", "additionalProperties": _NOTE},
            "conventions": _object(dict.fromkeys(_CONVENTIONS, _TEXT)),
            "testGroups": _list(_GROUP, 1),
            "bugs": _list(_BUG),
        }
    ),
}

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
KEYWORDS = {"$schema", "title", "type", "required", "properties", "additionalProperties", "items", "minItems"}
KEYWORDS |= {"uniqueItems", "enum", "const", "pattern", "minimum", "maximum"}


def schema_faults(data: Any, schema: Mapping[str, Any], where: str = "manifest") -> Iterator[str]:
    """What in some data is not as a schema has it, a line each.

    >>> list(schema_faults({"r": -1}, {"type": "object", "properties": {"r": {"minimum": 0}}}))
    ['manifest.r: expected at least 0, got -1']
    """
    if "type" in schema:
        wrong_bool = isinstance(data, bool) and schema["type"] != "boolean"
        if wrong_bool or not isinstance(data, TYPES[schema["type"]]):  # type: ignore[arg-type]
            yield f"{where}: expected {schema['type']}, got {type(data).__name__}"
            return
    if "const" in schema and not _same(data, schema["const"]):
        yield f"{where}: expected {schema['const']!r}, got {_short(data)}"
    if "enum" in schema and not any(_same(data, value) for value in schema["enum"]):
        yield f"{where}: expected one of {schema['enum']}, got {_short(data)}"
    if "pattern" in schema and not re.search(schema["pattern"].replace("$", r"\Z"), data):
        yield f"{where}: expected text like {schema['pattern']}, got {_short(data)}"
    if "minimum" in schema and data < schema["minimum"]:
        yield f"{where}: expected at least {schema['minimum']}, got {data}"
    if "maximum" in schema and data > schema["maximum"]:
        yield f"{where}: expected at most {schema['maximum']}, got {data}"
    if isinstance(data, dict):
        yield from _object_faults(data, schema, where)
    if isinstance(data, list):
        if len(data) < schema.get("minItems", 0):
            yield f"{where}: expected {schema['minItems']} or more items, got {len(data)}"
        if schema.get("uniqueItems") and any(_same(a, b) for i, a in enumerate(data) for b in data[:i]):
            yield f"{where}: expected items that differ, got one twice"
        for i, item in enumerate(data):
            yield from schema_faults(item, schema.get("items", {}), f"{where}[{i}]")


def _object_faults(data: dict[str, Any], schema: Mapping[str, Any], where: str) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name in schema.get("required", ()):
        if name not in data:
            yield f"{where}: expected {name}, got none"
    for name, value in data.items():
        if name in properties or others is not False:
            yield from schema_faults(value, properties.get(name, others), f"{where}.{name}")
        else:
            yield f"{where}: expected no {_short(name)}"


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
