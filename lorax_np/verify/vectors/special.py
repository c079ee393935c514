"""Tests with more than one right answer, or none: other conventions, merges, and input that must be refused."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..batteries.lattice import lattice
from ..cases import Case, HostArray, draw
from ..layers import plain
from .case import (
    TENSOR_OF,
    Group,
    Vector,
    from_case,
    inputs_of,
    settings_of,
    sigma_of,
    single,
    traits,
    widened,
)

# Where DoRA's dropout and bias stand elsewhere, as replaced steps of the layer.
UNDROPPED: Mapping[str, plain.Step] = {
    "P": lambda t: t.x @ t.W.T,
    "gx_dora": lambda t: (t.G * (t.k - 1)) @ t.W,
    "gW": lambda t: (t.G * t.k).T @ t.x + t.gV,
}
SCALED_BIAS: Mapping[str, plain.Step] = {
    **UNDROPPED,
    "P": lambda t: t.x @ t.W.T + t.b,
    "gb": lambda t: t.Gk.sum(axis=0),
}


def two_masks(other: HostArray) -> Mapping[str, plain.Step]:
    """The base term under a mask of its own; other : (N, d_in)."""
    return {
        "P": lambda t: (t.x * other) @ t.W.T,
        "gx_dora": lambda t: ((t.G * (t.k - 1)) @ t.W) * other,
        "gW": lambda t: t.G.T @ t.x + (t.G * (t.k - 1)).T @ (t.x * other) + t.gV,
    }


def steps_of(vector: Vector) -> Mapping[str, plain.Step] | None:
    """The steps of the convention that a test's flags name, or None."""
    if "DoraTwoMasks" in vector.flags:
        return two_masks(plain.rows(vector.inputs["mask2"].astype(np.float64)))
    steps = {"DoraUndroppedBase": UNDROPPED, "DoraScaledBias": SCALED_BIAS}
    return next((steps[flag] for flag in vector.flags if flag in steps), None)


def with_all(case: Case) -> tuple[Case, Case]:
    """The case, and the case with every lane kept: other conventions drop elsewhere."""
    mask = case.mask
    return case, replace(case, mask=None if mask is None else np.full_like(mask, np.max(mask)))


# ---- conventions -------------------------------------------------------------------------------------------


def convention_group(seed: int) -> Group:
    """DoRA with dropout and a trained bias, as others define it, and p = 1."""
    vectors: list[Vector] = []
    for i, shape in enumerate(((5, 7, 3, (2, 2)), (4, 3, 6, (3,)))):
        case = draw(
            f"convention/{i}/ours",
            "dora, dropout",
            shape,
            "float32",
            (seed, 9, i),
            alpha=(5.3, 11.9)[i],
            p=0.2,
            bias="trained",
        )
        ours = from_case(case, ("Generic",), ("fp32", "tf32"))
        mask = np.asarray(case.mask)
        other = np.roll(mask.reshape(-1), 3).reshape(mask.shape)
        vectors += [
            ours,
            _otherwise(ours, case, "undropped_base", "DoraUndroppedBase"),
            _otherwise(ours, case, "scaled_bias", "DoraScaledBias"),
            _otherwise(ours, case, "two_masks", "DoraTwoMasks", other),
        ]
    return Group("conventions", (*vectors, _all_dropped(seed)), "sigma")


def _otherwise(ours: Vector, case: Case, name: str, flag: str, mask2: HostArray | None = None) -> Vector:
    """The same layer under another convention; σ is of what is allowed with dropout and without, together."""
    inputs = {**ours.inputs, **({} if mask2 is None else {"mask2": mask2})}
    made = replace(ours, id=ours.id.replace("/ours", f"/{name}"), inputs=inputs, flags=(flag, *ours.flags))
    y, gradients = plain.run(widened(case), case.gy.astype(np.float64), steps_of(made))
    found = {"y": y, **gradients}
    outputs = {out: single(found[TENSOR_OF[out]]) for out in ours.outputs}
    sigma = {profile: sigma_of(with_all(case), outputs, profile) for profile in ours.sigma}
    return replace(made, outputs=outputs, sigma=sigma, result="acceptable", instead=ours.id)


def _all_dropped(seed: int) -> Vector:
    """p = 1 leaves no lane: an error, or a branch that is exactly zero."""
    case = draw("convention/p1", "lora, dropout", (5, 7, 3, (4,)), "float32", (seed, 10), p=0.2, bias="frozen")
    case = replace(case, mask=np.zeros_like(np.asarray(case.mask)))
    vector = from_case(case, ("DropEverything", "Generic"), ("fp32", "tf32"))
    return replace(
        vector,
        settings={**vector.settings, "p": 1.0},
        result="acceptable",
        comment="refuse p = 1, or give these outputs: the adapter's branch is zero",
    )


# ---- merges ------------------------------------------------------------------------------------------------


def merge_group(seed: int) -> Group:
    """Merged weights and biases of exact layers; dropout and the token arrays play no part."""
    cases = [item.case for item in lattice(seed)]
    vectors = [_merge(case) for case in cases if case.W.size <= 200 and not case.norm_gradient]
    return Group("merge", tuple(vectors), "bitwise", "LoraMerge", text=True)


def _merge(case: Case) -> Vector:
    v = {name: value.astype(np.float64) for name, value in case.arrays().items()}
    V = v["W"] + case.scaling * (v["B"] @ v["A"])
    if "m" in v:
        V = (v["m"] / np.sqrt((V * V).sum(axis=1)))[:, None] * V
    found = {"merged_W": V}
    if "b" in v or "bB" in v:
        found["merged_b"] = v.get("b", 0.0) + case.scaling * v.get("bB", np.zeros(len(V)))
    id = f"merge/{case.id}"
    inputs = {name: value for name, value in inputs_of(case).items() if name not in ("x", "gy", "mask")}
    flags = tuple(
        flag for flag in traits(case) if flag not in ("OneToken", "NoTokens", "LeadingAxes", "Dropout")
    )
    outputs = {name: single(value, id, True) for name, value in found.items()}
    return Vector(id, settings_of(case), inputs, outputs, ("ExactLattice", "Merge", *flags))


def rounding_group(seed: int) -> Group:
    """A bfloat16 weight merged with a float32 update: rounded once, and the two worse ways that are in use."""
    vectors = []
    for i, shape in enumerate(((6, 10, 4, ()), (9, 5, 3, ()))):
        case = draw("", "lora", shape, "float32", (seed, 11, i), alpha=(5.3, 11.9)[i], bias="absent")
        W, A, B = of_8_bits(case.W), case.A, case.B
        s = float(np.float32(case.scaling))
        inputs = {"W": W, "A": A, "B": B, "s": np.array(s, np.float32)}
        for way, value in roundings(inputs).items():
            ours = f"merge-rounding/{i}/once"
            vectors.append(
                Vector(
                    f"merge-rounding/{i}/{way}",
                    settings_of(case),
                    inputs,
                    {"merged_W": value},
                    (f"Merge{way.capitalize()}", "Merge", "StoredBf16"),
                    "valid" if way == "once" else "acceptable",
                    instead="" if way == "once" else ours,
                )
            )
    return Group("merge-rounding", tuple(vectors), "bitwise", "LoraMerge")


def roundings(inputs: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """The merged weight by the way it is rounded to 8 bits, in float32."""
    W, A, B, s = (inputs[name].astype(np.float64) for name in ("W", "A", "B", "s"))
    ways = {
        "once": W + s * (B @ A),
        "twice": W + _to_8_bits(s * (B @ A)),
        "low": W + _to_8_bits(s * (_to_8_bits(B) @ _to_8_bits(A))),
    }
    return {way: _to_8_bits(value).astype(np.float32) for way, value in ways.items()}


def _to_8_bits(value: HostArray) -> HostArray:
    """Round float64 to the nearest number of 8 bits, ties to even, once."""
    fraction, exponent = np.frexp(value)
    rounded: HostArray = np.ldexp(np.rint(np.ldexp(fraction, 8)), exponent - 8) + 0.0
    return rounded


def of_8_bits(value: HostArray) -> HostArray:
    """Round float32 to 8 bits, ties to even, and to multiples of 2⁻²⁴, as float16's numbers are."""
    exponent = np.frexp(value)[1]
    step = np.maximum(exponent - 8, -24)
    rounded: HostArray = np.ldexp(np.rint(np.ldexp(value, -step)), step).astype(np.float32)
    return rounded + np.float32(0)


# ---- input that must be refused ----------------------------------------------------------------------------


def invalid_group(seed: int) -> Group:
    """Layers that have no meaning: whoever computes one of them instead of refusing it hides a mistake."""
    vectors = []
    for name, (flag, comment, case, arrays, settings) in _invalid(seed).items():
        inputs = {**inputs_of(case), **arrays}
        vectors.append(
            Vector(
                f"invalid/{name}",
                {**settings_of(case), **settings},
                inputs,
                {},
                (flag,),
                "invalid",
                comment=comment,
            )
        )
    return Group("invalid", tuple(vectors), "bitwise")


Invalid = tuple[str, str, Case, dict[str, HostArray], dict[str, Any]]


def _invalid(seed: int) -> dict[str, Invalid]:
    """By name: flag, what is wrong, a right layer, and the arrays and settings that spoil it."""
    lora = draw(
        "", "lora, dropout", (3, 5, 2, (4,)), "float32", (seed, 12), p=0.2, bias="frozen", lora_bias=True
    )
    dora = draw("", "dora", (3, 5, 2, (4,)), "float32", (seed, 13), bias="frozen")
    ones = {n: np.ones(n, np.float32) for n in (1, 2, 4, 6)}

    def two(*shape: int) -> HostArray:
        return np.ones(shape, np.float32)

    found: dict[str, Invalid] = {}
    shapes: Iterator[tuple[str, str, Case, dict[str, HostArray]]] = iter(
        (
            ("a-d-in", "A has another d_in than W", lora, {"A": two(2, 6)}),
            ("a-transposed", "A is (d_in, r)", lora, {"A": two(5, 2)}),
            ("b-rank", "B has another rank than A", lora, {"B": two(3, 4)}),
            ("b-d-out", "B has another d_out than W", lora, {"B": two(4, 2)}),
            ("x-d-in", "x has another d_in than W", lora, {"x": two(4, 6), "mask": two(4, 6)}),
            ("mask-shape", "the mask has fewer rows than x", lora, {"mask": two(3, 5)}),
            ("gy-d-out", "gy has another d_out than W", lora, {"gy": two(4, 4)}),
            ("gy-tokens", "gy has fewer tokens than x", lora, {"gy": two(3, 3)}),
            ("bias-size", "b has another d_out than W", lora, {"b": ones[4]}),
            ("bias-of-b-size", "bB has another d_out than W", lora, {"bB": ones[2]}),
            ("magnitude-size", "m has another d_out than W", dora, {"m": ones[4]}),
            ("magnitude-one", "m has one entry, which broadcasting would repeat", dora, {"m": ones[1]}),
        )
    )
    for name, comment, case, arrays in shapes:
        found[f"shape/{name}"] = ("ShapeMismatch", comment, case, arrays, {})
    empty = {"A": np.zeros((0, 5), np.float32), "B": np.zeros((3, 0), np.float32)}
    found["rank-0"] = ("RankZero", "r = 0: there is no update, and α/r has no value", lora, empty, {"r": 0})
    for name, p in (("negative", -0.1), ("past-1", 1.5)):
        found[f"dropout/{name}"] = ("BadDropout", f"p = {p} is no probability", lora, {}, {"p": p})
    found["alpha-0"] = (
        "BadAlpha",
        "α = 0 turns the adapter off",
        lora,
        {"s": np.zeros((), np.float32)},
        {"alpha": 0.0},
    )
    row = np.array([[0.0], [1.0], [1.0]], np.float32)
    zero = {"W": dora.W * row, "B": dora.B * row}
    found["dora-zero-row"] = ("ZeroRow", "row 0 of W + s·BA is 0: m/n has no value", dora, zero, {})
    bias = {"bB": np.ones(3, np.float32)}
    found["dora-bias-of-b"] = ("DoraLoraBias", "DoRA has no bias of B", dora, bias, {"lora_bias": True})
    return found
