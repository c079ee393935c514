"""Gradients against long steps of the subject's own forward: no truth is asked, and any dtype will do.

y is affine in x, A, B, bB, b, W and m, one at a time, so that a step of any length has no truncation error.
DoRA's A, B and W enter through a norm besides: there m is moved along, m·n(θ±)/n(θ), which holds k still and
makes y affine again. The difference is then the gradient with the norm held constant; what a gradient through
the norm has beyond it is a rate along m, where y is affine too: so it takes a second long step, and no gm.
Derivation: specs/lattice.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import fsum
from typing import Any, Literal

import numpy as np

from ..bounds.widths import Width, bounds, width
from ..cases import ALPHAS, DROPS, UNIT, Case, HostArray, draw, under
from ..conventions import Spec, spec_of
from ..layers.plain import whole
from ..precision import PRECISIONS, Precision
from ..report import Check
from .lattice import cast
from .tensors import (
    GRADIENTS,
    NOT_OFFERED,
    Absent,
    Crash,
    Unlike,
    answer,
    ask,
    by_name,
    chosen,
    offers,
    refusal,
)

DIRECTIONS = 4
LENGTH = 8  # of a step, in units of the argument: y's own roundings count for less beside a long one
THROUGH_NORM = ("A", "B", "W")  # DoRA's n depends on these
#         kind                        shape                bias     bB     rsLoRA
POINTS = (
    ("lora", (13, 11, 5, (2, 3)), "trained", True, False),
    ("lora, dropout", (11, 17, 6, (7,)), "absent", False, True),
    ("lora, dropout", (5, 7, 11, (1, 4)), "frozen", True, False),
    ("dora", (7, 10, 3, (5,)), "trained", False, False),
    ("dora, dropout", (6, 9, 2, (2, 3)), "frozen", False, True),
    ("dora full norm", (7, 10, 3, (5,)), "absent", False, True),
    ("dora full norm, dropout", (6, 9, 2, (2, 3)), "trained", False, False),
)
Norm = Literal["detached", "full", "neither"]


@dataclass(frozen=True)
class Secant:
    """One direction: the difference of y, what the gradient says of it, and the error that roundings explain.

    through : what a gradient through the norm says beyond one that holds it constant; 0 where m stays
    """

    rise: float
    slope: float
    through: float
    limit: float
    through_limit: float


def points(profile: str, seed: int, spec: Spec) -> list[Case]:
    """The layers of the battery, in the profile's dtype."""
    cases = []
    for i, (kind, shape, bias, lora_bias, rslora) in enumerate(POINTS):
        name = f"secant/{kind.replace(', ', '-').replace(' ', '-')}/{i}"
        how: Any = {"bias": bias, "lora_bias": lora_bias, "rslora": rslora}
        how |= {"alpha": ALPHAS[i % len(ALPHAS)], "p": DROPS[i % len(DROPS)]}
        wide = draw(name, kind, shape, "float64", (seed, i, 5), **how)
        cases.append(cast(under(wide, spec), PRECISIONS[profile].dtype))
    return cases


def battery_secant(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Every gradient along random directions, against the subject's own forward at both ends of a long step."""
    norms = spec_of(subject).norm_gradient
    for i, case in enumerate(points(profile, seed, spec_of(subject))):
        if case.m is not None and case.norm_gradient not in norms:
            continue
        if not chosen(case.id, only) or (level == "quick" and i % 2):
            continue
        count = DIRECTIONS if level == "full" else DIRECTIONS // 2
        yield judge_secants(subject, case, PRECISIONS[profile], (seed, i, 6), count)


def judge_secants(
    subject: Any, case: Case, precision: Precision, seed: tuple[int, ...], count: int = DIRECTIONS
) -> list[Check]:
    """One check a gradient, by the worst of its directions."""
    try:
        got = answer(subject, case)
    except (Absent, Crash) as error:
        return [_check(case, "y")(refusal(error), note=str(error))]
    checks = []
    for name in (*case.wanted, "W"):
        if name not in got:
            if name != "W":
                given = offers(subject, name)
                note = "asked for, and not given" if given else NOT_OFFERED
                checks.append(_check(case, name)("fail" if given else "not run", note=note))
            continue
        wanted = getattr(case, name)
        if got[name].shape != wanted.shape or got[name].dtype != wanted.dtype:
            note = f"expected {wanted.dtype} {wanted.shape}, got {got[name].dtype} {got[name].shape}"
            checks.append(_check(case, name)("fail", note=note))
            continue
        try:
            found = list(secants(subject, case, got, name, precision, seed, count))
        except (Absent, Crash) as error:
            checks.append(_check(case, name)(refusal(error), note=str(error)))
            continue
        checks.append(_judge(case, name, got[name], found))
    return checks


def _check(case: Case, tensor: str) -> Callable[..., Check]:
    return partial(Check, f"{case.id}/{tensor}", "secant", case.kind, tensor)


def _judge(case: Case, name: str, gradient: HostArray, found: list[Secant]) -> Check:
    if not np.isfinite(gradient.astype(np.float64)).all():
        return _check(case, name)("fail", note="not finite")
    full = float(case.norm_gradient)
    ratios = [abs(s.slope + full * s.through - s.rise) / (s.limit + full * s.through_limit) for s in found]
    worst = int(np.argmax(np.nan_to_num(ratios, nan=np.inf)))
    one, ratio = found[worst], float(ratios[worst])
    if not any(abs(s.rise) > s.limit for s in found):
        return _check(case, name)("vacuous", note="y does not change beyond its roundings")
    verdict = "pass" if ratio <= 1 else "fail"
    note = (
        ""
        if verdict == "pass"
        else f"along direction {worst}: got is the gradient's, want is the difference of y"
    )
    return _check(case, name)(
        verdict, ratio=ratio, got=one.slope + full * one.through, want=one.rise, note=note
    )


def total(values: HostArray) -> float:
    """The sum of some numbers, rounded once; NaN where they are beyond all bounds."""
    try:
        return fsum(values.ravel())
    except (OverflowError, ValueError):  # finite ones too large together, or infinities of both signs
        return float("nan")


# ---- one direction -------------------------------------------------------------------------------------------


def secants(
    subject: Any,
    case: Case,
    got: dict[str, HostArray],
    name: str,
    precision: Precision,
    seed: tuple[int, ...],
    count: int = DIRECTIONS,
) -> Iterator[Secant]:
    """Compare a gradient with differences of y along `count` gaussian directions in one argument."""
    rng = np.random.default_rng((*seed, GRADIENTS.index(name)))
    u, G = width(precision), case.gy.astype(np.float64)
    at = _explained(case, u)
    theta = getattr(case, name)
    size = float(np.sqrt(np.mean(np.square(theta.astype(np.float64))))) or 1.0
    for _ in range(count):
        v = LENGTH * size * rng.standard_normal(theta.shape)
        ends = [_moved(case, name, (theta + sign * v).astype(theta.dtype)) for sign in (1, -1)]
        ys = [_forward(subject, end).astype(np.float64) for end in ends]
        delta = getattr(ends[0], name).astype(np.float64) - getattr(ends[1], name).astype(np.float64)
        g = got[name].astype(np.float64)
        rise = total(G * ys[0]) - total(G * ys[1])  # (lattice.6)
        slope = total(g * delta)
        error = total(np.abs(delta) * at[name]) + 4 * UNIT["float64"] * total(np.abs(g * delta))
        for end, y in zip(ends, ys, strict=True):  # (lattice.7)
            error += total(np.abs(G) * (bounds(end, u, y_alone=True)["y"] + 4 * UNIT["float64"] * np.abs(y)))
            error += _still(case, end, u) if case.m is not None and name in THROUGH_NORM else 0.0
        beyond = (0.0, 0.0)
        if case.m is not None and name in THROUGH_NORM:
            beyond = _through_norm(subject, case, _rate(case, name, delta), u)
        yield Secant(rise, slope, beyond[0], error, beyond[1])


@lru_cache(maxsize=4)  # one case after the other, each with all its gradients
def _explained(case: Case, u: Width) -> dict[str, HostArray]:
    """The bounds on every gradient; the wider, where the norm is in question."""
    return bounds(replace(case, norm_gradient=case.m is not None), u)


def _is_like(value: HostArray | None, other: HostArray | None) -> bool:
    return value is not None and other is not None and value.shape == other.shape and value.dtype == other.dtype


def _forward(subject: Any, case: Case) -> HostArray:
    """The subject's y, from its forward alone where it has one."""
    if not hasattr(subject, "forward"):
        y = answer(subject, case)["y"]
    else:
        y = by_name("forward", {"y": ask(subject, "forward", case.copy())}, ("y",))["y"]
    if not _is_like(y, case.gy):
        raise Unlike(f"forward: expected {case.gy.dtype} {case.gy.shape} as y, got {y.dtype} {y.shape}")
    return y


def _moved(case: Case, name: str, value: HostArray) -> Case:
    """The case with one array put in place of another, and m moved so that k stays where it was."""
    if case.m is None or name not in THROUGH_NORM:
        return replace(case, **{name: value})  # type: ignore[arg-type]
    there = replace(case, **{name: value})  # type: ignore[arg-type]
    m = case.m.astype(np.float64) * norms(there)[1] / norms(case)[1]  # (lattice.8)
    return replace(there, m=m.astype(case.m.dtype))


def norms(case: Case) -> tuple[HostArray, HostArray]:
    """V and its row norms, in float64."""
    W, A, B = (value.astype(np.float64) for value in (case.W, case.A, case.B))
    V = W + case.scaling * B @ A
    return V, np.sqrt((V * V).sum(axis=1))


def _still(case: Case, end: Case, u: Width) -> float:
    """How far the rounding of the moved m takes ⟨gy, y⟩: k is still only to within one roundoff."""
    k = np.asarray(case.m, dtype=np.float64) / norms(case)[1]
    off = np.abs(np.asarray(end.m, dtype=np.float64) / norms(end)[1] - k) + 64 * UNIT["float64"] * np.abs(k)
    return float(off @ _reach(end))


def _reach(case: Case) -> HostArray:
    """How far ⟨gy, y⟩ goes with each row's k, at most."""
    wide = cast(case, "float64")
    return np.asarray(np.abs(wide.gy.reshape(-1, len(wide.W)) * whole(wide)).sum(axis=0))


def _through_norm(subject: Any, case: Case, rate: HostArray, u: Width) -> tuple[float, float]:
    """⟨gm, rate⟩ as the subject's own forward has it, and the error of that: y is affine in m."""
    m = np.asarray(case.m, dtype=np.float64)
    ends = [replace(case, m=(m + sign * rate / 2).astype(case.x.dtype)) for sign in (1, -1)]
    G, ys = case.gy.astype(np.float64), [_forward(subject, end).astype(np.float64) for end in ends]
    n = norms(case)[1]
    step = np.asarray(ends[0].m, dtype=np.float64) - np.asarray(ends[1].m, dtype=np.float64)
    off = np.abs(step - rate) + 64 * UNIT["float64"] * np.abs(rate)  # both ends are stored numbers
    error = float(off / n @ _reach(case))
    for end, y in zip(ends, ys, strict=True):
        error += total(np.abs(G) * (bounds(end, u, y_alone=True)["y"] + 4 * UNIT["float64"] * np.abs(y)))
    return total(G * ys[0]) - total(G * ys[1]), error  # (lattice.16)


def _rate(case: Case, name: str, delta: HostArray) -> HostArray:
    """m·dn/n along a direction: what the norm's change costs, in units of m."""
    V, n = norms(case)
    A, B = case.A.astype(np.float64), case.B.astype(np.float64)
    moved = B @ delta if name == "A" else delta @ A if name == "B" else delta
    dV = (1.0 if name == "W" else case.scaling) * moved
    return np.asarray(np.asarray(case.m, dtype=np.float64) * (V * dV).sum(axis=1) / n**2)  # (lattice.9)


def norm_of(subject: Any, profile: str = "fp32", seed: int = 0, asked: bool = False) -> Norm:
    """Tell from outside whether a subject's DoRA gradient holds the norm constant, or runs through it.

    asked : the norm_gradient that its cases carry; a subject may heed it or not
    Raises Crash where the subject breaks, Absent where it does no DoRA.
    """
    held, through, told = True, True, False
    for case in points(profile, seed, spec_of(subject)):
        if case.m is None or "full" in case.kind:
            continue
        case = replace(case, norm_gradient=asked, kind="dora full norm" if asked else "dora")
        got = answer(subject, case)
        for name in ("A", "B"):
            if not _is_like(got.get(name), getattr(case, name)):
                return "neither"
            for s in secants(subject, case, got, name, PRECISIONS[profile], (seed, 7)):
                held &= abs(s.slope - s.rise) <= s.limit
                through &= abs(s.slope + s.through - s.rise) <= s.limit + s.through_limit
                told |= abs(s.through) > 2 * (s.limit + s.through_limit)
    return "neither" if held == through or not told else "detached" if held else "full"
