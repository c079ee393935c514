"""Three ways to differentiate a function that somebody else wrote, each with what rounding may add to it.

f is seen along one argument at a time, as ⟨G, f(θ)⟩ with G fixed, and moved along one direction at a time: a
unit vector gives one entry of the gradient, a gaussian one its projection.  Derivation: specs/gradcheck.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import log2
from typing import Any

import numpy as np

from ..cases import HostArray

STEP = 1e-30  # of the complex method: its square is lost beside any number of use
EPS = 2.0**-52  # of float64, in which differences are taken
ROUNDINGS = 64  # in units of eps, how far one evaluation may be off its own terms


class Unfit(Exception):
    """f is not what the method rests on; the gradient is not to blame."""

    def __init__(self, verdict: str, note: str) -> None:
        """Verdict : one of gradcheck's words;  note : why."""
        super().__init__(note)
        self.verdict = verdict


@dataclass(frozen=True)
class View:
    """One argument of f, everything else held.

    f : argument -> y, all outputs in one flat array, float64 or complex128
    theta : the point, in its own dtype;  G : as y, float64;  eps : of the coarsest dtype in play
    """

    f: Callable[[HostArray], HostArray]
    theta: HostArray
    G: HostArray
    eps: float

    @property
    def scale(self) -> float:
        """The largest entry of the argument, 1 where it is zero."""
        return float(np.abs(self.theta).max(initial=0.0)) or 1.0

    def at(self, value: HostArray) -> HostArray:
        """Y at another value of the argument."""
        y = self.f(value)
        if y.shape != self.G.shape:
            raise Unfit("fail", f"f: expected {self.G.size} outputs as at the point itself, got {y.size}")
        if not np.isfinite(y).all():
            raise Unfit("not finite", "f is not finite at a step from here")
        return y


@dataclass(frozen=True)
class Quotient:
    """How far ⟨G, f⟩ rises where θ moves by delta, and by how much rounding can have falsified that.

    kink : the slopes before and behind θ, where they differ however small the step
    """

    rise: float
    delta: HostArray
    slack: float
    kink: tuple[float, float] | None = None


def _size(G: HostArray, *ys: HostArray) -> float:
    """Σ|G|∘|y| over the outputs that moved at all: the others subtract to 0 without an error."""
    moved = ys[0] != ys[1]
    return float(sum(np.abs(G[moved]) @ np.abs(y[moved]) for y in ys))


def secant(view: View, v: HostArray) -> Quotient:
    """One large step. Exact for what is affine in the argument, whatever the step's length."""
    h = 2.0 ** np.ceil(log2(max(1.0, view.scale)))
    wide = view.theta.astype(np.float64)
    plus, minus = ((wide + t * h * v).astype(view.theta.dtype) for t in (1, -1))  # stored, so rounded
    up, down = view.at(plus), view.at(minus)
    delta = plus.astype(np.float64) - minus.astype(np.float64)
    rise = float(view.G @ (up - down))  # (gradcheck.1)
    return Quotient(rise, delta, ROUNDINGS * view.eps * _size(view.G, up, down))  # (gradcheck.2)


def assert_affine(view: View, v: HostArray) -> None:
    """Raise Unfit where f bends along a direction: f at −1, ½ and 1 steps is not in one line with f at 0."""
    h = 2.0 ** np.ceil(log2(max(1.0, view.scale)))
    wide = view.theta.astype(np.float64)
    here = view.at(view.theta)
    ahead, back, half = (view.at((wide + t * h * v).astype(view.theta.dtype)) for t in (1.0, -1.0, 0.5))
    for bend, terms in (
        (ahead + back - 2 * here, np.abs(ahead) + np.abs(back) + 2 * np.abs(here)),  # (gradcheck.3)
        (ahead + here - 2 * half, np.abs(ahead) + np.abs(here) + 2 * np.abs(half)),
    ):
        if bend.size and np.abs(bend).max() > ROUNDINGS * view.eps * terms.max():
            part = np.abs(bend).max() / terms.max()
            raise Unfit(
                "not affine",
                f"f bends here (second difference {part:.1e} of its terms): take method='complex' or 'central'",
            )


def central(view: View, v: HostArray, eps: float) -> Quotient:
    """Small steps h and 2h to either side, extrapolated; their disagreement is the error's estimate."""
    h = 2.0 ** round(log2(eps))  # a power of two: θ ± h is stored as it is
    wide = view.theta.astype(np.float64)
    y = {t: view.at(wide + t * h * v) for t in (-2, -1, 0, 1, 2)}
    near, far = (float(view.G @ (y[t] - y[-t])) / (2 * t * h) for t in (1, 2))
    noise = ROUNDINGS * EPS * _size(view.G, y[2], y[-2]) / h + EPS * view.scale / h * abs(near)
    slopes = [tuple(float(view.G @ (y[t] - y[0])) / (t * h) for t in (-s, s)) for s in (1, 2)]
    gap, wider = (abs(after - before) for before, after in slopes)
    kinked = gap > 2 * noise and gap > 0.75 * wider  # (gradcheck.7): it halves with h where f is smooth
    rise = (4 * near - far) / 3  # (gradcheck.5)
    before, after = slopes[0]
    return Quotient(rise, v, abs(near - far) + noise, (before, after) if kinked else None)  # (gradcheck.6)


def complex_step(view: View, v: HostArray) -> Quotient:
    """An imaginary step, at which nothing is subtracted. Right for holomorphic f alone."""
    if not complex_products_hold():
        raise Unfit(
            "not holomorphic", "this BLAS forms complex products from three real ones: no complex step holds"
        )
    try:
        y = view.at(view.theta + 1j * STEP * v)
    except (TypeError, np.exceptions.ComplexWarning) as error:
        raise Unfit("not holomorphic", f"f takes no complex numbers ({_line(error)}); {ELSE}") from error
    if y.dtype.kind != "c":
        raise Unfit(
            "not holomorphic", f"f gave real numbers at a complex argument: abs, norm or a cast; {ELSE}"
        )
    dy = y.imag / STEP
    moved = dy != 0
    terms = np.abs(dy[moved]) + np.abs(y.real[moved]) * float(np.abs(v).max(initial=0.0)) / view.scale
    slack = ROUNDINGS * view.eps * float(np.abs(view.G[moved]) @ terms)
    return Quotient(float(view.G @ dy), v, slack)  # (gradcheck.4)


ELSE = "method='central' judges it, method='secant' where it is affine"


def assert_holomorphic(view: View, v: HostArray, eps: float) -> None:
    """Raise Unfit where the complex step contradicts a central difference of the same f."""
    step, difference = complex_step(view, v), central(view, v, eps)
    if difference.kink is not None:
        raise Unfit("kink", "f has a kink here: slopes {:.6g} before, {:.6g} after".format(*difference.kink))
    if abs(step.rise - difference.rise) > 2 * difference.slack + step.slack:
        raise Unfit(
            "not holomorphic",
            f"the complex step gives {step.rise:.6g}, a central difference {difference.rise:.6g}: "
            f"abs, conj, norm, maximum or a cast within f; {ELSE}",
        )


@cache
def complex_products_hold() -> bool:
    """Whether matmul keeps an imaginary part of 1e-30: a product from three real ones does not."""
    rng = np.random.default_rng(0)
    P, dP, Q = (rng.standard_normal((48, 48)) for _ in range(3))
    found = ((P + 1j * STEP * dP) @ Q).imag / STEP
    return bool(np.abs(found - dP @ Q).max() < 1e-12)


def _line(error: BaseException) -> str:
    text: Any = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return str(text)[:80]
