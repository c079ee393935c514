"""How far roundings usually carry an implementation: one standard deviation of the error, entry by entry.

Every rounding counts as an independent draw, uniform within half a unit of the last place. Through the linear
steps after it each draw reaches an output with a known weight, so variances add. Where an implementer may
choose the order of evaluation, or where to apply s, each entry gets the largest variance of the choices. Errors
that many terms share (of k = m/n in a row, of A over all tokens) are weighted before they are squared.
Derivation: specs/bounds.md. The equations are in prepared.py, variances.py and truncated.py, and what single
roundings and products cost in units.py. The worst case is in ceiling.py, a test for an error that a whole
tensor shares in slope.py.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from ..precision import PRECISIONS, Precision
from . import variances
from .ceiling import ceiling
from .prepared import magnitude, norm_gradient, prepared
from .truncated import leanings

__all__ = ["THRESHOLD", "ceiling", "deviations", "replay", "tolerance"]

THRESHOLD = 8.0
"""An entry further than this many deviations from the truth is no rounding: the only tuned constant.

A normal variable is that far out with probability 1.2e-15, so that among 10⁹ entries one false alarm has the
chance 1e-6. Sums of few roundings have shorter tails still: one alone stays within √3 deviations.
"""


def deviations(case: Case, precision: Precision) -> dict[str, HostArray]:
    """Return one standard deviation of the error of y and of the gradients by x, W, A, B, m, b and bB.

    Shapes are those of y = gy and of the arrays; a tensor is there where the case has it. float64.
    """
    _, found = replay(case, precision)
    shapes = {name: value.shape for name, value in case.arrays().items()} | {"y": case.gy.shape}
    return {name: np.sqrt(value).reshape(shapes[name]) for name, value in found.items() if name in shapes}


def replay(case: Case, precision: Precision) -> tuple[Any, dict[str, HostArray]]:
    """Return the steps of the layer with their variances, and those of the results, leading axes folded."""
    t = prepared(case, precision)
    magnitude(t)
    found = {"y": variances.of_y(t), "x": variances.of_x(t)}
    norm_gradient(t)
    found |= {"W": variances.of_W(t), "A": variances.of_A(t), "B": variances.of_B(t), **variances.of_biases(t)}
    if t.dora:
        found["m"] = variances.of_m(t)
    if precision.rounding == "toward zero":
        for name, lean in leanings(t, precision.accumulate / 2).items():
            found[name] = found[name] + lean * lean  # (bounds.30)
    return t, found


def tolerance(case: Case, precision: Precision) -> dict[str, HostArray]:
    """How far from a float64 truth a right implementation may be: 8 deviations of its own and 8 of the truth's.

    The truth counts with the terms of the norm wherever there is one, since holding it still costs them.
    """
    widest = replace(case, norm_gradient=case.m is not None)
    truth = deviations(widest, PRECISIONS["fp64"])
    alike = precision == PRECISIONS["fp64"] and widest.norm_gradient == case.norm_gradient
    own = truth if alike else deviations(case, precision)
    return {name: THRESHOLD * (value + truth[name]) for name, value in own.items()}
