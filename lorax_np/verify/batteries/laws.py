"""The checks that are no single tensor's: a layer's conduct, and the laws that its starts keep."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import product
from math import erf, log, sqrt
from typing import Any

import numpy as np

from ... import LoraConfig
from ..bounds.widths import bounds, width
from ..cases import PROFILES, UNIT, Case, HostArray, draw, under
from ..conventions import spec_of
from ..precision import PRECISIONS
from ..report import Check
from .tensors import Absent, Crash, answer, ask, by_name, chosen

Law = Callable[[], str | None]
STARTS: tuple[bool | str, ...] = (True, "gaussian", "pissa", "pissa_niter_4", False)
OF_TOKENS = ("x", "gy", "mask", "base_mask")  # arrays with a row for each token
CHANCE = 1e-9  # with which a sound start fails the test of its distribution


def battery_protocol(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """What a layer must do besides computing: no token, its inputs untouched, the same again, any layout."""
    dtype, spec = PROFILES[profile], spec_of(subject)
    kinds = ("lora, dropout", "dora, dropout") if False in spec.norm_gradient else ("lora, dropout",)
    for kind in kinds:
        case = under(draw("", kind, (5, 7, 3, (2, 2)), dtype, (seed, 3), bias="trained"), spec)
        bound = bounds(case, width(PRECISIONS[profile]))
        name = kind.partition(",")[0]
        laws: dict[str, Law] = {
            "zero tokens give empty y and gx, and gradients of 0": partial(_empty, subject, case),
            "no argument is written to": partial(_untouched, subject, case),
            "asked twice, the answer is the same": partial(_twice, subject, case, bound),
            "leading axes only stack tokens": partial(_stacked, subject, case, bound),
        }
        if spec.strided:
            laws["strided and read-only arrays give the same"] = partial(_layouts, subject, case, bound)
        for i, (law, run) in enumerate(laws.items()):
            id = f"protocol/{name}/{i}"
            if chosen(id, only):
                yield [lawful(id, "protocol", kind, law, run)]


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
            for j, (law, run) in enumerate(laws.items()):
                id = f"start/{start}{'-dora' * dora}-{d_out}x{d_in}/{j}"
                if chosen(id, only):
                    yield [lawful(id, "start", "dora" if dora else "lora", f"{start!s:<14}{law}", run)]


# ---- laws: None, or what is wrong in one line ------------------------------------------------------------


def lawful(id: str, battery: str, kind: str, law: str, run: Law) -> Check:
    """The check that a law is kept."""
    try:
        wrong = run()
    except Absent as error:
        return Check(id, battery, kind, law, "not run", note=str(error))
    except Crash as error:
        return Check(id, battery, kind, law, "crash", note=str(error))
    return Check(id, battery, kind, law, "fail" if wrong else "pass", note=wrong or "")


def floating(value: HostArray) -> bool:
    """Whether these are floating numbers; bfloat16 are, which NumPy does not know for such."""
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"


def differs(got: dict[str, HostArray], want: dict[str, HostArray], bound: dict[str, HostArray]) -> str | None:
    """Where two answers to one question differ by more than both their roundings."""
    for name, value in want.items():
        if name not in bound:
            continue  # nobody asked for it
        if name not in got or got[name].shape != value.shape:
            return f"{name}: expected shape {value.shape}, got {got[name].shape if name in got else 'none'}"
        if not (floating(got[name]) and floating(value)):
            return f"{name}: expected floating numbers, got {got[name].dtype}"
        if value.shape != bound[name].shape:
            return f"{name}: expected shape {bound[name].shape}, got {value.shape}"
        if not (np.abs(got[name].astype(np.float64) - value) <= 2 * bound[name]).all():
            return f"{name} differs"
    return None


def resized(case: Case, lead: tuple[int, ...]) -> Case:
    """The case with its tokens repeated, or cut, to other leading axes."""

    def to(value: HostArray) -> HostArray:
        return np.resize(value, (*lead, value.shape[-1])).astype(value.dtype)

    tokens: Any = {name: to(value) for name, value in case.arrays().items() if name in OF_TOKENS}
    return replace(case, **tokens)


def _empty(subject: Any, case: Case) -> str | None:
    none = resized(case, (2, 0))
    got = answer(subject, none)
    for name in ("y", *case.wanted):
        shape = none.gy.shape if name == "y" else getattr(none, name).shape
        if name in got and got[name].shape != shape:
            return f"{name}: expected shape {shape}, got {got[name].shape}"
        if name in got and np.any(got[name]):
            return f"{name}: expected 0, got {got[name].flat[0]}"
    return None


def hashes(case: Case) -> dict[str, str]:
    """A digest of every array of a case."""
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in case.arrays().items()}


def _untouched(subject: Any, case: Case) -> str | None:
    mine = case.copy()
    if hasattr(subject, "run"):
        ask(subject, "run", mine, mine.gy)
    else:
        ask(subject, "forward", mine)
        ask(subject, "backward", mine, mine.gy)
    before, after = hashes(case), hashes(mine)
    changed = [name for name in before if before[name] != after[name]]
    return f"written to: {', '.join(changed)}" if changed else None


def _twice(subject: Any, case: Case, bound: dict[str, HostArray]) -> str | None:
    return differs(answer(subject, case), answer(subject, case), bound)


def _stacked(subject: Any, case: Case, bound: dict[str, HostArray]) -> str | None:
    N = int(np.prod(case.x.shape[:-1]))
    flat, want = answer(subject, resized(case, (N,))), answer(subject, case)
    for name in ("y", "x"):
        if name in want and want[name].shape == bound[name].shape:
            want[name] = want[name].reshape(N, -1)
    bound = bound | {name: bound[name].reshape(N, -1) for name in ("y", "x")}
    return differs(flat, want, bound)


class AsGiven(Case):
    """A case that hands out its own arrays, whatever their layout."""

    def copy(self) -> Case:
        """Return the case itself."""
        return self


def _layouts(subject: Any, case: Case, bound: dict[str, HostArray]) -> str | None:
    def strided(value: HostArray) -> HostArray:
        view = np.repeat(value, 2, axis=-1)[..., ::-1][..., ::-2]
        view.flags.writeable = False
        return view

    mine: Any = {field.name: getattr(case, field.name) for field in fields(case)}
    mine |= {name: strided(value) for name, value in case.arrays().items()}
    return differs(answer(subject, AsGiven(**mine)), answer(subject, case), bound)


def start_of(subject: Any, W: HostArray, config: LoraConfig, seed: int) -> dict[str, HostArray]:
    """What a subject's init makes at W, in float64; W itself where it returns no other base."""
    got = by_name("init", ask(subject, "init", W.copy(), config, seed), ("W", "A", "B", "m", "bB"))
    got.setdefault("W", W)
    shapes = {"A": (config.r, W.shape[1]), "B": (W.shape[0], config.r), "W": W.shape}
    for name, shape in (shapes | {"m": W.shape[:1]} if config.use_dora else shapes).items():
        if name not in got or got[name].shape != shape or got[name].dtype.kind != "f":
            came = f"{got[name].dtype} {got[name].shape}" if name in got else "none"
            raise Crash(f"init: expected {name} as floating {shape}, got {came}")
    return {name: value.astype(np.float64) for name, value in got.items()}


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
