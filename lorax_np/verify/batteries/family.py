"""Checks of starts of more than a draw, where there is init_from: by definition, and by what they do."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ... import LoraConfig
from ..bounds.worst import bounds
from ..cases import PROFILES, UNIT, HostArray, draw, under
from ..conventions import spec_of
from .edges import Checks, law, off
from .family_laws import DEFINITIONS, LAWS, Look, R, Seen
from .starts import fitting
from .tensors import answer, ask, by_name, chosen

ALPHA = 7
LOFTQ, CORDA, GA = "loftq_config", "corda_config", "lora_ga_config"
WAYS: Mapping[str, dict[str, Any]] = {  # an id -> what stands in the config besides
    "orthogonal": {},
    "olora": {},
    "loftq/1": {LOFTQ: {"loftq_bits": 4, "loftq_iter": 1}},
    "loftq/3": {LOFTQ: {"loftq_bits": 4, "loftq_iter": 3}},
    "loftq/8": {LOFTQ: {"loftq_bits": 8, "loftq_iter": 2}},
    "eva": {},
    "corda/ipm": {CORDA: {"corda_method": "ipm"}},
    "corda/kpm": {CORDA: {"corda_method": "kpm"}},
    "lora_ga/ArB2r": {GA: {"direction": "ArB2r", "scale": "stable"}},
    "lora_ga/A2rBr": {GA: {"direction": "A2rBr", "scale": "gd_scale"}},
    "lora_ga/ArBr": {GA: {"direction": "ArBr", "scale": "unit"}},
}


def battery_started(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Each start against its definition, written out in float64 by NumPy's factorisations of everything."""
    yield from _looked_at(subject, profile, seed, only, "started", "by definition", DEFINITIONS)


def battery_starting(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Each start by what it leaves of W and what it does, without its definition; and the first forward."""
    yield from _looked_at(subject, profile, seed, only, "starting", "by what it does", LAWS)
    if not hasattr(subject, "init_from"):
        return
    dora = (False, True) if False in spec_of(subject).norm_gradient else (False,)
    for i, (way, with_dora) in enumerate((w, d) for w in WAYS if not w.startswith("loftq") for d in dora):
        id = f"starting/{'dora' if with_dora else 'lora'}/{way.replace('/', '-')}"
        if chosen(id, only):
            run = partial(_as_before, subject, way, with_dora, profile, (seed, i, 92))
            yield law(id, "starting", "dora" if with_dora else "lora", f"{way:<14}same map at first", run)


def _looked_at(
    subject: Any, profile: str, seed: int, only: str, battery: str, words: str, looks: Mapping[str, Look]
) -> Iterator[Any]:
    if not hasattr(subject, "init_from"):
        return
    for i, way in enumerate(WAYS):
        for j, shape in enumerate(((20, 128), (64, 20))):
            id = f"{battery}/{way.replace('/', '-')}/{j}"
            if chosen(id, only):
                look = looks[way.partition("/")[0]]
                run = partial(_one, subject, way, shape, profile, (seed, i, j, 91), look)
                yield law(id, battery, "lora", f"{way:<14}{words}", run)


def _one(
    subject: Any, way: str, shape: tuple[int, int], profile: str, seed: tuple[int, ...], look: Look
) -> str | None:
    return look(begun(subject, way, _drawn(shape, PROFILES[profile], seed), seed[0], PROFILES[profile]))


def _drawn(shape: tuple[int, int], dtype: str, seed: tuple[int, ...]) -> dict[str, HostArray]:
    """W, inputs with a mean, and a gradient: their singular values fall, which determines single vectors."""
    rng = np.random.default_rng(seed)

    def falling(rows: int, columns: int, rate: float) -> HostArray:
        n = min(rows, columns)
        U, V = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in (rows, columns))
        return np.asarray(np.sqrt(columns) * (U * rate ** np.arange(n)) @ V.T)

    found = {
        "W": falling(*shape, 0.85),
        "inputs": falling(150, shape[1], 0.9),
        "gradient": falling(*shape, 0.8),
    }
    found["inputs"] += 0.5 * rng.standard_normal(shape[1])
    return {name: value.astype(dtype) for name, value in found.items()}


def begun(
    subject: Any, way: str, at: Mapping[str, HostArray], seed: int, dtype: str, dora: bool = False
) -> Seen:
    """What a subject's init_from makes of these arrays."""
    found, config = _asked(subject, way, at, seed, dora)
    wide = {name: value.astype(np.float64) for name, value in (dict(at) | found).items()}
    return Seen(
        way, config, at["W"].astype(np.float64), wide["inputs"], wide["gradient"], wide["A"], wide["B"],
        wide["W"], UNIT[dtype],
    )  # fmt: skip


def _asked(
    subject: Any, way: str, at: Mapping[str, HostArray], seed: int, dora: bool
) -> tuple[dict[str, HostArray], LoraConfig]:
    start = way.partition("/")[0]
    config = LoraConfig(r=R, lora_alpha=ALPHA, init_lora_weights=start, use_dora=dora, **WAYS[way])
    takes = {"eva": "inputs", "corda": "inputs", "lora_ga": "gradient"}.get(start)
    given = {} if takes is None else {takes: at[takes].copy()}
    got = by_name(
        "init_from", ask(subject, "init_from", at["W"].copy(), config, seed, given), ("W", "A", "B", "m")
    )
    return fitting(got, at["W"], config), config


def _as_before(subject: Any, way: str, dora: bool, profile: str, seed: tuple[int, ...]) -> str | None:
    """The layer with what a start made computes what W alone does."""
    dtype = PROFILES[profile]
    case = under(draw("", "dora" if dora else "lora", (16, 24, R, (6,)), dtype, seed), spec_of(subject))
    at = _drawn((16, 24), dtype, seed) | {"W": case.W}
    found, config = _asked(subject, way, at, 3, dora)
    found = {name: value.astype(dtype) for name, value in found.items()}
    there = replace(case, config=config, W=found["W"], A=found["A"], B=found["B"], m=found.get("m"))
    y, limit = answer(subject, there)["y"], 2 * bounds(there, UNIT[dtype])["y"]
    want = case.x.astype(np.float64) @ case.W.astype(np.float64).T + (0 if case.b is None else case.b)
    return off("y", y, want, limit)
