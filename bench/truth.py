"""Whether an engine computes the layer at all: its results beside the formula in float64.

A sum of K rounded terms moves by about u·√K of its own size (random signs, the worst order of evaluation); the
sums of one result follow each other, so these add. Every stored intermediate adds its own unit roundoff. An
engine whose root-mean-square error is above that is wrong, and its time would mean nothing.
"""

from math import sqrt
from typing import NamedTuple

import numpy as np

from .cases import SCALING, Arrays, Case

UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "split3": 3 * 2.0**-16}  # the last is (speed.21)'s
STORED = 8  # intermediates that an engine may store between the input and a result
DEVIATIONS = 6.0  # of a binomial share


class Truth(NamedTuple):
    """What no mask changes of a case, in float64; DoRA's matrices are None where there is no DoRA."""

    v: Arrays
    y0: np.ndarray  # x Wᵀ
    gx0: np.ndarray  # gy W
    gbranch: np.ndarray  # the branch's gradient by xd
    M: np.ndarray | None = None  # (d_out, d_in)  what DoRA makes of the branch, y = y0 + xd Mᵀ
    V: np.ndarray | None = None
    n: np.ndarray | None = None


def prepare(case: Case, arrays: Arrays) -> Truth:
    """The parts of the truth that no mask changes."""
    v = {name: value.astype(np.float64) for name, value in arrays.items()}
    y0, gx0 = v["x"] @ v["W"].T, v["gy"] @ v["W"]
    if not case.dora:
        return Truth(v, y0, gx0, SCALING * (v["gy"] @ v["B"]) @ v["A"])
    V = v["W"] + SCALING * v["B"] @ v["A"]
    n = np.sqrt((V * V).sum(axis=1))
    M = (v["m"] / n)[:, None] * V - v["W"]
    return Truth(v, y0, gx0, v["gy"] @ M, M, V, n)


def results(case: Case, t: Truth, mask: np.ndarray | None) -> Arrays:
    """y, gx, gA, gB and gm by the formula, in float64."""
    v, xd = t.v, t.v["x"] if mask is None else t.v["x"] * mask
    z = xd @ v["A"].T
    found = {"y": t.y0 + (SCALING * z @ v["B"].T if t.M is None else xd @ t.M.T)}
    found["gx"] = t.gx0 + (t.gbranch if mask is None else t.gbranch * mask)
    k = 1.0 if t.n is None else (v["m"] / t.n)[None, :]
    gu = SCALING * k * v["gy"]
    found |= {"gA": (gu @ v["B"]).T @ xd, "gB": gu.T @ z}
    if t.V is not None:
        gk = (v["gy"] * (xd @ t.V.T)).sum(axis=0)
        found["gm"] = gk / t.n
        if case.norm_gradient:
            gV = -(gk * v["m"] / t.n**3)[:, None] * t.V
            found["gA"] += SCALING * v["B"].T @ gV
            found["gB"] += SCALING * gV @ v["A"].T
    return found


def own_mask(case: Case, got: Arrays) -> tuple[np.ndarray, str]:
    """The mask that an engine drew for itself, of which it tells the entries kept; what is wrong, or "".

    An engine that kept others than it says, or scaled them otherwise than by 1/(1 − p), has wrong results.
    """
    kept = got["kept"]
    share, wanted = float(np.mean(kept)), 1 - case.p
    off = abs(share - wanted) > DEVIATIONS * sqrt(case.p * wanted / kept.size) + 2.0**-17
    wrong = f"mask: {share:.4f} of the entries kept, expected {wanted:.4f}" if off else ""
    return kept / (1 - case.p), wrong


def allowed(case: Case, unit: float) -> dict[str, float]:
    """How large a root-mean-square error of each result may be, relative to the result."""
    tokens, d_in, d_out, r = case[:4]
    sums, stored = UNIT["float32"], STORED * unit
    norm = sqrt(d_in) if case.dora else 0.0
    lengths = {
        "y": sqrt(d_in) + sqrt(r) + norm,
        "gx": sqrt(d_out) + sqrt(r) + norm,
        "gA": sqrt(d_out) + sqrt(tokens) + norm,
        "gB": sqrt(d_in) + sqrt(tokens) + norm,
        "gm": sqrt(d_in) + sqrt(tokens) + norm,
    }
    if case.norm_gradient:
        for name in ("gA", "gB"):
            lengths[name] += sqrt(d_in) + sqrt(tokens) + sqrt(max(d_in, d_out))
    return {name: 2 * (sums * length + stored) for name, length in lengths.items()}


def faults(case: Case, want: Arrays, got: Arrays, unit: float) -> list[str]:
    """What is wrong with an engine's results, in words; nothing where it computes the layer."""
    wanted = [name for name in want if name != "gx" or case.need_gx]
    bounds = allowed(case, unit)
    found = []
    for name in wanted:
        if name not in got:
            found.append(f"{name}: expected an array, got none")
        elif got[name].shape != want[name].shape:
            found.append(f"{name}: expected {want[name].shape}, got {got[name].shape}")
        else:
            size = float(np.linalg.norm(want[name]))
            error = float(np.linalg.norm(got[name] - want[name])) / size
            if not error <= bounds[name]:
                found.append(
                    f"{name}: expected an error of at most {bounds[name]:.1e} of its size, got {error:.1e}"
                )
    return found


def judge(case: Case, t: Truth, got: Arrays, mask: np.ndarray | None, *, draws: bool, unit: float) -> list[str]:
    """Faults of an engine that was given `mask`, or drew its own, and stores with the given unit roundoff."""
    if draws and case.p:
        if "kept" not in got:
            return ["kept: expected the entries that dropout kept, got none"]
        mask, wrong = own_mask(case, got)
        if wrong:
            return [wrong]
    return faults(case, results(case, t, mask), got, unit)
