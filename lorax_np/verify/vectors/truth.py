"""The tests of a vectors directory proved again, by formulas other than those that made them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ... import Adapter, Linear, lora_linear_backward, lora_linear_forward, merge
from ..bounds.worst import bounds, merged_bounds
from ..cases import UNIT, HostArray
from ..layers import plain
from .case import TENSOR_OF, Group, Vector, config_of, outputs_of, sigma_of, to_case, widened
from .special import roundings, steps_of, with_all

_HALF = UNIT["float32"]  # the truths are rounded to float32
_STEP = 2.0**-7  # of σ, which is rounded up to 8 bits


def vector_problems(vector: Vector, group: Group, others: Mapping[str, Vector], same: bool) -> Iterator[str]:
    """What is wrong with one test: numbers that are not finite, arrays that lack, a truth or a σ that is none.

    others : every test by id;  same : whether the directory is of this generator version, whose σ is known here
    """
    if not all(np.isfinite(v).all() for v in (*vector.inputs.values(), *vector.outputs.values())):
        yield "expected finite numbers"
        return
    if vector.result == "invalid":
        if vector.outputs or refusal(vector) is None:
            yield "expected a layer that is refused, got one that is computed"
        return
    try:
        with np.errstate(all="ignore"):
            merged = group.type == "LoraMerge"
            yield from _merge_problems(vector) if merged else _layer_problems(vector, group, same)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        yield f"expected a layer that can be computed, got {type(error).__name__}: {error}"
    if vector.instead:
        ours = others[vector.instead]
        lanes = {name for name in vector.inputs if name != "mask2"}
        alike = lanes == ours.inputs.keys() and ours.settings == vector.settings
        if not alike or any(not np.array_equal(vector.inputs[name], ours.inputs[name]) for name in lanes):
            yield f"expected the inputs of {ours.id}, got others"


def _layer_problems(vector: Vector, group: Group, same: bool) -> Iterator[str]:
    settings = vector.settings if vector.settings["p"] != 1 else {**vector.settings, "p": 0.5}
    given = to_case(replace(vector, settings=settings))
    yield from _odd_settings(vector, given.scaling)
    if vector.outputs.keys() != set(outputs_of(given)):
        yield f"expected outputs {', '.join(outputs_of(given))}, got {', '.join(vector.outputs)}"
        return
    case, steps = widened(given), steps_of(vector)
    y, gradients = plain.run(case, case.gy, steps)
    found = {name: {"y": y, **gradients}[TENSOR_OF[name]] for name in vector.outputs}
    cases = (given,) if steps is None else with_all(given)
    most = [bounds(widened(c), UNIT["float64"]) for c in cases]
    bound = {name: np.sum([m[TENSOR_OF[name]] for m in most], axis=0) for name in found}
    exact = group.compare == "bitwise"
    for name, value in found.items():
        slack = 0.0 if exact else bound[name] + _HALF * np.abs(value)
        yield from _unlike(name, vector.outputs[name], value, slack)
    if bool(vector.sigma) == exact:
        yield "expected sigma of the profiles where the truth is not exact, and only there"
    for profile, named in vector.sigma.items():
        want = sigma_of(cases, vector.outputs, profile) if same else named
        for name in vector.outputs:
            if name not in named or named[name].shape != vector.outputs[name].shape:
                yield f"sigma.{profile}.{name}: expected one number for each of {name}"
            else:
                yield from _unlike(f"sigma.{profile}.{name}", named[name], want[name], _STEP * want[name])


def _merge_problems(vector: Vector) -> Iterator[str]:
    d_out, d_in = vector.inputs["W"].shape
    none = {"x": np.zeros((0, d_in), np.float32), "gy": np.zeros((0, d_out), np.float32)}
    case = to_case(replace(vector, inputs={**vector.inputs, **none}))
    yield from _odd_settings(vector, case.scaling)
    if "StoredBf16" in vector.flags:
        way = next((flag for flag in ("MergeOnce", "MergeTwice", "MergeLow") if flag in vector.flags), "none")
        found, slack = {"merged_W": roundings(vector.inputs)[way.removeprefix("Merge").lower()]}, 0.0
    else:
        base, adapter = _layer(vector, np.float64)
        merged = merge(base, adapter, scaling=case.scaling)
        found = {"merged_W": np.asarray(merged.W)}
        found |= {} if merged.b is None else {"merged_b": np.asarray(merged.b)}
        slack = max(float(np.max(bound)) for bound in merged_bounds(case, UNIT["float64"]).values())
    if vector.outputs.keys() != found.keys():
        yield f"expected outputs {', '.join(found)}, got {', '.join(vector.outputs)}"
        return
    for name, value in found.items():
        yield from _unlike(name, vector.outputs[name], value, slack)


def _odd_settings(vector: Vector, s: float) -> Iterator[str]:
    """Where the manifest's settings and the arrays are of two layers."""
    v, settings = vector.inputs, vector.settings
    if np.float32(s) != v["s"]:
        yield f"s: expected {np.float32(s)}, got {v['s']}"
    for name, wanted in (
        ("b", settings["bias"] != "absent"),
        ("bB", settings["lora_bias"]),
        ("m", settings["dora"] is not None),
    ):
        if (name in v) != wanted:
            yield f"{name}: expected " + ("an array, got none" if wanted else "none, got an array")


def _unlike(name: str, got: HostArray, want: HostArray, slack: Any) -> Iterator[str]:
    if got.shape != want.shape:
        yield f"{name}: expected shape {want.shape}, got {got.shape}"
    elif not (np.abs(got - want.astype(np.float64)) <= slack).all():
        at = tuple(int(i) for i in np.argwhere(~(np.abs(got - want.astype(np.float64)) <= slack))[0])
        yield f"{name}: expected {want[at]:.9g} at {list(at)}, got {got[at]:.9g}"


def _layer(vector: Vector, dtype: Any = np.float32) -> tuple[Linear, Adapter]:
    v = {name: value.astype(dtype) for name, value in vector.inputs.items()}
    return Linear(v["W"], v.get("b")), Adapter(v["A"], v["B"], v.get("m"), None, v.get("bB"))


def refusal(vector: Vector) -> str | None:
    """What the engine says against a test's layer, in one line, or None where it computes it."""
    v = vector.inputs
    try:
        s = config_of(vector.settings).scaling
        base, adapter = _layer(vector)
        merge(base, adapter, scaling=s)
        _, saved = lora_linear_forward(v["x"], base, adapter, scaling=s, mask=v.get("mask"))
        lora_linear_backward(v["gy"], saved, base, adapter, scaling=s)
    except (ValueError, TypeError) as error:
        return str(error).splitlines()[0]
    return None
