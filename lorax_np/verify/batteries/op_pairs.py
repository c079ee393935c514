"""What laws of ops are made of: pairings of gradients with their arguments, and numbers on a grid."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cases import HostArray
from .edges import off
from .op_case import OpCase
from .ops import both_bounds, fitting

Law = Callable[[Any, OpCase], str | None]
Laws = tuple[tuple[str, str, Law], ...]  # at which layout, what it says, what finds it broken


def grid(x: HostArray) -> HostArray:
    """Rounded to multiples of 1/256, so that small whole numbers are added to them exactly."""
    return np.asarray(np.round(x.astype(np.float64) * 256) / 256, x.dtype)


def nothing(name: str, got: HostArray, bound: HostArray) -> str | None:
    """What is wrong with numbers that are 0 but for roundings."""
    return off(name, got, np.zeros(got.shape), bound)


def pairing(a: HostArray, b: HostArray) -> Any:
    """Σ a∘b, in float64."""
    return np.sum(a.astype(np.float64) * b.astype(np.float64))


def paired(names: tuple[str, ...], subject: Any, case: OpCase) -> str | None:
    """y is linear in these together: ⟨gw, w⟩ + ... = ⟨gy, y⟩, and y of w times −2 is −2y.  (modelops.11)"""
    got, bound = fitting(subject, case), both_bounds(case)
    other = case.moved(**{name: -2 * case.at[name] for name in names})
    wrong = off("y", fitting(subject, other)["y"], -2 * got["y"], 4 * bound["y"])
    if wrong or any(name not in got for name in names):
        return wrong
    limit = pairing(np.abs(case.gy), bound["y"])
    limit += sum(pairing(np.abs(case.at[name]), bound[name]) for name in names)
    found = sum(pairing(got[name], case.at[name]) for name in names)
    return off(f"⟨g{names[0]}, {names[0]}⟩", np.float64(found), pairing(case.gy, got["y"]), limit)
