"""Checks of starts: moments and distribution of A, what PiSSA takes, the layer before its first step."""

from dataclasses import replace
from functools import partial
from math import erf, log, sqrt
from typing import Any

import numpy as np

from ... import LoraConfig
from ..bounds.worst import bounds
from ..cases import PROFILES, UNIT, HostArray, draw, under
from ..conventions import spec_of
from .edges import Checks, law, off
from .laws import CHANCE, STARTS, start_of
from .tensors import answer, chosen


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
    for name, product in (("residual·Aᵀ", got["W"] @ got["A"].T), ("Bᵀ·residual", got["B"].T @ got["W"])):
        if not np.abs(product).max() <= limit:
            return f"{name} reaches {np.abs(product).max():.2g}, expected {limit:.2g} at most"
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
