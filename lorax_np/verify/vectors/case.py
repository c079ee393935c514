"""One test of a vectors directory: arrays in, arrays out, and how it is made of a Case and back."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ... import LoraConfig
from ..batteries.lattice import Lattice
from ..bounds.sigma import THRESHOLD, deviations
from ..cases import Case, HostArray
from ..precision import PRECISIONS
from ..truths import exact

TENSOR_OF = {"y": "y"} | {
    f"g{name}": name for name in ("x", "A", "B", "W", "m", "b", "bB")
}  # in file: in a Case


@dataclass(frozen=True, eq=False)
class Vector:
    """One test: arrays in, arrays out, all float32.

    id : never given to other data;  tcId, made of it, is its number
    settings : r, alpha, rslora, p, bias (absent, frozen, trained), lora_bias, dora (None, detached, full)
    sigma : by profile and output, an eighth of the error that roundings of that profile explain
    result : valid; invalid, to be refused; or acceptable: another convention's, the test `instead` having ours
    """

    id: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, HostArray]
    outputs: Mapping[str, HostArray]
    flags: tuple[str, ...]
    result: str = "valid"
    sigma: Mapping[str, Mapping[str, HostArray]] = field(default_factory=dict)
    comment: str = ""
    instead: str = ""

    @property
    def tcId(self) -> int:
        """The test's number, made of its id: it stays, whatever is added before it."""
        return number_of(self.id)


@dataclass(frozen=True, eq=False)
class Group:
    """The tests of one file. compare: bitwise, or sigma, |got − truth| ≤ 8σ; type: LoraLinear, LoraMerge."""

    name: str
    vectors: tuple[Vector, ...]
    compare: str
    type: str = "LoraLinear"
    text: bool = False  # whether it has a twin in text


def number_of(id: str) -> int:
    """1 to 2³¹ − 1, from 31 bits of the SHA-256 of a test's id."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:4], "big") % (2**31 - 1) + 1


def allowed(case: Case, profile: str) -> dict[str, HostArray]:
    """The largest error that roundings of a profile explain, by the names of a Case and y, in float64."""
    return {name: THRESHOLD * value for name, value in deviations(case, PRECISIONS[profile]).items()}


# ---- from a case to a vector -------------------------------------------------------------------------------


def from_lattice(item: Lattice) -> Vector:
    """A valid test of exact data, and its exact truth."""
    case, names = item.case, outputs_of(item.case)
    outputs = {name: single(item.want[TENSOR_OF[name]], case.id, must_be_exact=True) for name in names}
    return Vector(case.id, settings_of(case), inputs_of(case), outputs, ("ExactLattice", *traits(case)))


def from_case(case: Case, flags: tuple[str, ...], profiles: tuple[str, ...]) -> Vector:
    """A valid test of any small case: its truth in 640 bits, rounded once, and σ for each profile."""
    names = outputs_of(case)
    found = {name: exact.to_float(value) for name, value in exact.truth(case).items()}
    outputs = {name: single(found[TENSOR_OF[name]]) for name in names}
    sigma = {profile: sigma_of((case,), outputs, profile) for profile in profiles}
    return Vector(case.id, settings_of(case), inputs_of(case), outputs, (*flags, *traits(case)), sigma=sigma)


def outputs_of(case: Case) -> list[str]:
    """The names of the outputs that a test of a case has."""
    return [name for name, tensor in TENSOR_OF.items() if tensor in ("y", "W", *case.wanted)]


def widened(case: Case) -> Case:
    """The case in float64."""
    return replace(case, **{name: value.astype(np.float64) for name, value in case.arrays().items()})  # type: ignore[arg-type]


def single(value: HostArray, id: str = "", must_be_exact: bool = False) -> HostArray:
    """Round to float32; no zero is negative. Refuse to round what must be exact."""
    rounded = value.astype(np.float32) + np.float32(0)
    if must_be_exact and not np.array_equal(rounded, value):
        raise ValueError(f"{id}: expected a truth of 24 bits, got one that needs more")
    return rounded


def sigma_of(cases: tuple[Case, ...], outputs: Mapping[str, HostArray], profile: str) -> dict[str, HostArray]:
    """σ of each output in a profile, from what is allowed on one case or on several together."""
    most = [allowed(case, profile) for case in cases]
    return {name: eighth(sum(m[TENSOR_OF[name]] for m in most), value) for name, value in outputs.items()}  # type: ignore[arg-type]


def eighth(most: HostArray, output: HostArray) -> HostArray:
    """σ : an eighth of the largest error and of the truth's own rounding, up to the next number of 8 bits."""
    whole = most + 2.0**-24 * np.abs(output.astype(np.float64))
    fraction, exponent = np.frexp(whole / THRESHOLD)
    sigma: HostArray = np.ldexp(np.ceil(fraction * 256) / 256, exponent).astype(np.float32)
    return sigma


def settings_of(case: Case) -> dict[str, Any]:
    """The numbers behind a case, as the manifest has them."""
    c = case.config
    norm = "full" if case.norm_gradient else "detached"
    return {
        "r": c.r,
        "alpha": c.lora_alpha,
        "rslora": c.use_rslora,
        "p": c.lora_dropout,
        "bias": "absent" if case.b is None else "trained" if case.train_b else "frozen",
        "lora_bias": case.bB is not None,
        "dora": None if case.m is None else norm,
    }


def inputs_of(case: Case) -> dict[str, HostArray]:
    """The arrays of a case and its scaling s, which has no axis."""
    return {**case.arrays(), "s": np.array(case.scaling, dtype=np.float32)}


def to_case(vector: Vector) -> Case:
    """The case of a valid test of a layer, as a subject is given it."""
    s = vector.settings
    config = config_of(s)
    norm = {None: "", "detached": "", "full": " full norm"}[s["dora"]]
    kind = f"{'dora' if s['dora'] else 'lora'}{norm}{', dropout' * ('mask' in vector.inputs)}"
    arrays: Any = {name: value for name, value in vector.inputs.items() if name not in ("s", "mask2")}
    return Case(
        id=vector.id,
        kind=kind,
        config=config,
        train_b=s["bias"] == "trained",
        norm_gradient=s["dora"] == "full",
        **arrays,
    )


def config_of(settings: Mapping[str, Any]) -> LoraConfig:
    """The configuration of a test. Raises ConfigError where there is none such."""
    return LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["p"],
        bias="all" if settings["bias"] == "trained" else "none",
        use_rslora=settings["rslora"],
        use_dora=settings["dora"] is not None,
        lora_bias=settings["lora_bias"],
    )


def traits(case: Case) -> tuple[str, ...]:
    """The flags that a case's shape and parts earn it."""
    (d_out, d_in), r, N = case.W.shape, case.config.r, case.x[..., 0].size
    earned = {
        "RankTail": r % 4 != 0,
        "RankOne": r == 1,
        "RankGtMin": r > min(d_out, d_in),
        "OneOutput": d_out == 1,
        "OneToken": N == 1,
        "NoTokens": N == 0,
        "LeadingAxes": case.x.ndim > 2,
        "Dropout": case.mask is not None,
        "RsLora": case.config.use_rslora,
        "TrainedBias": case.train_b,
        "LoraBias": case.bB is not None,
        "DoraDetached": case.m is not None and not case.norm_gradient,
        "DoraFullNorm": case.m is not None and case.norm_gradient,
    }
    return tuple(name for name, true in earned.items() if true)
