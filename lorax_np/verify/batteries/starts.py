"""Checks of starts: A's distribution, identity, what PiSSA takes of W, the layer before its first step."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from math import erf, log, sqrt
from typing import Any

import numpy as np

from ... import LoraConfig
from ..bounds.worst import bounds
from ..cases import PROFILES, UNIT, HostArray, draw, under
from ..conventions import spec_of
from ..report import Check
from .edges import Checks, law, off
from .laws import Law, lawful
from .tensors import Crash, answer, ask, by_name, chosen

STARTS: tuple[bool | str, ...] = (True, "gaussian", "pissa", "pissa_niter_4", False)
CHANCE = 1e-9  # with which a sound start fails the test of its distribution


def battery_start(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """The laws of every start: distribution, identity, and what PiSSA takes out of W."""
    if not hasattr(subject, "init"):
        return
    dtype = PROFILES[profile]
    rng = np.random.default_rng((seed, 4))
    for d_out, d_in in ((24, 40), (40, 24)):
        W = rng.standard_normal((d_out, d_in)).astype(dtype)
        for i, (start, dora) in enumerate(product(STARTS, (False, True))):
            config = LoraConfig(r=8, lora_alpha=11, init_lora_weights=start, use_dora=dora)
            laws = _start_laws(subject, W, config, seed + i)
            for j, (words, run) in enumerate(laws.items()):
                id = f"start/{start}{'-dora' * dora}-{d_out}x{d_in}/{j}"
                if chosen(id, only):
                    yield [lawful(id, "start", "dora" if dora else "lora", f"{start!s:<14}{words}", run)]


def start_of(subject: Any, W: HostArray, config: LoraConfig, seed: int) -> dict[str, HostArray]:
    """What a subject's init makes at W, in float64; W itself where it returns no other base."""
    got = by_name("init", ask(subject, "init", W.copy(), config, seed), ("W", "A", "B", "m", "bB"))
    return {name: value.astype(np.float64) for name, value in fitting(got, W, config).items()}


def fitting(got: dict[str, HostArray], W: HostArray, config: LoraConfig) -> dict[str, HostArray]:
    """What a start returned, W itself where it has no other base; Crash where shapes or dtypes do not fit."""
    got = {"W": W} | got
    shapes = {"A": (config.r, W.shape[1]), "B": (W.shape[0], config.r), "W": W.shape}
    for name, shape in (shapes | {"m": W.shape[:1]} if config.use_dora else shapes).items():
        if name not in got or got[name].shape != shape or got[name].dtype.kind != "f":
            came = f"{got[name].dtype} {got[name].shape}" if name in got else "none"
            raise Crash(f"init: expected {name} as floating {shape}, got {came}")
    return got


def _start_laws(subject: Any, W: HostArray, config: LoraConfig, seed: int) -> dict[str, Law]:
    """The laws that one start keeps, as functions that look at a fresh draw of it."""
    start, s, r = config.init_lora_weights, config.scaling, config.r
    d_in = W.shape[1]
    u = UNIT[W.dtype.name]

    drawn = partial(start_of, subject, W, config, seed)

    def same_map() -> str | None:
        got = drawn()
        A, B = got["A"], got["B"]
        error = np.abs(got["W"] + s * B @ A - W)
        bound = 4 * u * (np.abs(W) + s * np.abs(B) @ np.abs(A))
        return None if (error <= bound).all() else f"W + s·BA is off by {error.max():.2g}"

    def magnitude() -> str | None:
        got = drawn()
        V = got["W"] + s * got["B"] @ got["A"]
        off = np.abs(got["m"] / np.linalg.norm(V, axis=1) - 1).max()
        return None if off <= (d_in + r + 12) * u else f"m/n is off 1 by {off:.2g}"

    def distribution() -> str | None:
        values = np.sort(drawn()["A"].ravel() * (r if start == "gaussian" else sqrt(d_in)))
        if start == "gaussian":
            chance = [0.5 * (1 + erf(value / sqrt(2))) for value in values.tolist()]
        else:
            chance = [min(max((value + 1) / 2, 0.0), 1.0) for value in values.tolist()]
        away = float(np.abs(np.arange(1, values.size + 1) / values.size - chance).max())
        limit = sqrt(log(2 / CHANCE) / (2 * values.size)) + 1 / values.size  # Dvoretzky, Kiefer, Wolfowitz
        return None if away <= limit else f"A is {away:.2f} away from its distribution"

    def nothing() -> str | None:
        return "B is not 0" if np.any(drawn()["B"]) else None

    def principal() -> str | None:
        S, residual = np.linalg.svd(W.astype(np.float64), compute_uv=False), drawn()["W"]
        if not np.isfinite(residual).all():
            return "the residual is not finite"
        rest = float(np.linalg.norm(residual, 2))
        slack = 200 * u * S[0]
        if S[r] - slack <= rest <= S[r] + slack:
            return None
        return f"the residual's largest singular value is {rest:.6g}, singular value r + 1 of W is {S[r]:.6g}"

    laws: dict[str, Law] = {}
    if start is True or start == "gaussian":
        laws["B = 0, and A is of its distribution"] = lambda: nothing() or distribution()
    if start is False:
        laws["A is of its distribution"] = distribution
    else:
        laws["base and update give W back"] = same_map
    if str(start).startswith("pissa"):
        laws["the residual's norm is singular value r + 1 of W"] = principal
    if config.use_dora:
        laws["m/n is 1"] = magnitude
    return laws


def battery_moments(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """A's largest entry, mean, variance and rank, and PiSSA's singular values on both sides."""
    if not hasattr(subject, "init"):
        return
    for i, start in enumerate(STARTS):
        id = f"moments/{start}/{i}"
        if chosen(id, only):
            config = LoraConfig(r=8, lora_alpha=11, init_lora_weights=start)
            W = np.random.default_rng((seed, i, 33)).standard_normal((48, 192)).astype(PROFILES[profile])
            check = _principal if str(start).startswith("pissa") else _moments
            run = partial(_looked_at, check, subject, config, W, seed)
            yield law(id, "moments", "lora", f"{start!s:<14}moments, rank", run)


def _looked_at(check: Any, subject: Any, config: LoraConfig, W: HostArray, seed: int) -> str | None:
    found: str | None = check(config, W, start_of(subject, W, config, seed))
    return found


def _moments(config: LoraConfig, W: HostArray, got: dict[str, HostArray]) -> str | None:
    A, r, d_in = got["A"], config.r, W.shape[1]
    normal = config.init_lora_weights == "gaussian"
    top, deviation = (7.5 / r, 1 / r) if normal else (1 / sqrt(d_in), 1 / sqrt(3 * d_in))
    away = sqrt(2 * log(4 / CHANCE) / A.size)  # Hoeffding: a mean strays by √3 of it at most, in deviations
    if np.abs(A).max() > top * (1 + 1e-6):
        return f"|A| reaches {np.abs(A).max():.3g}, more than {top:.3g}"
    if abs(A.mean()) > sqrt(3) * away * deviation:
        return f"the mean of A is {A.mean():.3g}"
    if not abs((A * A).mean() / deviation**2 - 1) <= 3 * away:  # Hoeffding 1.5, and 1.6 for normals
        return f"the variance of A is {(A * A).mean():.3g}, expected {deviation**2:.3g}"
    if np.linalg.matrix_rank(A) < r:
        return f"the rank of A is {np.linalg.matrix_rank(A)}"
    if config.init_lora_weights is not False and np.any(got["B"]):
        return "the update is not 0"
    return None


def _principal(config: LoraConfig, W: HostArray, got: dict[str, HostArray]) -> str | None:
    A, B, s, r = got["A"], got["B"], config.scaling, config.r
    S = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    slack = 2 * max(W.shape) * UNIT[W.dtype.name] * S[0]  # of singular values that LAPACK computes
    if config.init_lora_weights == "pissa":
        if np.abs(np.linalg.svd(s * B @ A, compute_uv=False)[:r] - S[:r]).max() > slack:
            return "the singular values of s·BA are not the first of W"
    elif np.linalg.norm(s * B @ A, 2) < 0.9 * S[0]:  # a sketch finds the largest to within its power iterations
        return "the largest singular value of s·BA is not that of W"
    rows, columns = np.sum(A * A, axis=1), np.sum(B * B, axis=0)
    if np.abs(rows - columns).max() > slack:
        return "A and B do not share the singular values evenly"
    return None


def battery_distribution(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """A's distribution on so many entries that a normal one is told from a uniform one of its variance."""
    if not hasattr(subject, "init"):
        return
    starts: tuple[bool | str, ...] = (True, "gaussian", False)
    for i, start in enumerate(starts):
        id = f"distribution/{start}/{i}"
        if chosen(id, only):
            config = LoraConfig(r=12, lora_alpha=11, init_lora_weights=start)
            W = np.random.default_rng((seed, i, 36)).standard_normal((12, 1024)).astype(PROFILES[profile])
            run = partial(_distributed, subject, W, config, seed + i)
            yield law(id, "distribution", "lora", f"{start!s:<14}12,288 entries of A", run)


def _distributed(subject: Any, W: HostArray, config: LoraConfig, seed: int) -> str | None:
    normal = config.init_lora_weights == "gaussian"
    A = start_of(subject, W, config, seed)["A"]
    values = np.sort(A.ravel() * (config.r if normal else sqrt(W.shape[1])))
    if normal:
        chance = np.array([0.5 * (1 + erf(value / sqrt(2))) for value in values.tolist()])
    else:
        chance = np.clip((values + 1) / 2, 0, 1)
    away = float(np.abs(np.arange(1, values.size + 1) / values.size - chance).max())
    limit = sqrt(log(2 / CHANCE) / (2 * values.size)) + 1 / values.size  # Dvoretzky, Kiefer, Wolfowitz
    return (
        None if away <= limit else f"A is {away:.3f} away from its distribution, expected {limit:.3f} at most"
    )


def battery_orthogonal(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """What PiSSA leaves of W is orthogonal to what it takes: residual·Aᵀ = 0 and Bᵀ·residual = 0."""
    if not hasattr(subject, "init"):
        return
    for i, (d_out, d_in) in enumerate(((20, 31), (31, 20), (16, 16))):
        id = f"orthogonal/pissa/{i}"
        if chosen(id, only):
            config = LoraConfig(r=6, lora_alpha=11, init_lora_weights="pissa")
            W = np.random.default_rng((seed, i, 37)).standard_normal((d_out, d_in)).astype(PROFILES[profile])
            run = partial(_orthogonal, subject, W, config, seed + i)
            yield law(id, "orthogonal", "lora", "pissa         the residual is orthogonal", run)


def _orthogonal(subject: Any, W: HostArray, config: LoraConfig, seed: int) -> str | None:
    got = start_of(subject, W, config, seed)
    top = float(np.linalg.norm(W.astype(np.float64), 2))
    limit = (
        2 * sum(W.shape) * UNIT[W.dtype.name] * top * sqrt(top)
    )  # the backward error of an SVD, and roundings
    for name, left in (("residual·Aᵀ", got["W"] @ got["A"].T), ("Bᵀ·residual", got["B"].T @ got["W"])):
        if not np.abs(left).max() <= limit:
            return f"{name} reaches {np.abs(left).max():.2g}, expected {limit:.2g} at most"
    return None


def battery_first_step(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """A layer at its start computes what it did before, through the subject's own forward."""
    if not hasattr(subject, "init"):
        return
    dtype, dora = PROFILES[profile], False in spec_of(subject).norm_gradient
    for i, (start, with_dora) in enumerate(
        (s, d) for s in STARTS for d in ((False, True) if dora else (False,))
    ):
        id = f"first-step/{'dora' if with_dora else 'lora'}/{i}"
        if chosen(id, only):

            def run(start: Any = start, with_dora: bool = with_dora, i: int = i) -> str | None:
                config = LoraConfig(r=5, lora_alpha=7, init_lora_weights=start, use_dora=with_dora)
                return _as_before(subject, config, dtype, (seed, i, 34))

            yield law(id, "first step", "dora" if with_dora else "lora", f"{start!s:<14}same map at first", run)


def _as_before(subject: Any, config: LoraConfig, dtype: str, seed: tuple[int, ...]) -> str | None:
    case = under(
        draw("", "dora" if config.use_dora else "lora", (16, 24, 5, (6,)), dtype, seed), spec_of(subject)
    )
    got = {name: value.astype(dtype) for name, value in start_of(subject, case.W, config, 3).items()}
    at = replace(case, config=config, W=got["W"], A=got["A"], B=got["B"], m=got.get("m"))
    y = answer(subject, at)["y"]
    W = case.W.astype(np.float64)
    if config.init_lora_weights is False:  # no identity: the layer without its magnitude
        W = got["W"] + config.scaling * got["B"].astype(np.float64) @ got["A"].astype(np.float64)
    limit = (
        2 * bounds(at, UNIT[dtype])["y"]
    )  # of the answer, and of m, W and the factors, which were rounded too
    return off("y", y, case.x.astype(np.float64) @ W.T + (0 if case.b is None else case.b), limit)
