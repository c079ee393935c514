"""The ops of a model besides linear maps, against their definitions; and against differences of their own y.

A subject has a method for each op it offers, and is judged on those; the rest is not run.  Protocol, truths and
bounds: specs/modelops.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..cases import PROFILES, UNIT, HostArray
from ..layers.op_steps import op_bounds
from ..report import Check
from ..truths import ops as definitions
from .edges import law
from .op_case import FROZEN, LAYOUTS, OPS, Named, OpCase, draw, offered
from .tensors import Absent, Crash, ask, by_name, chosen, judge, refusal

Checks = Iterator[list[Check]]
COLUMNS = "y", "x", "W"  # of a report's table
WIDTHS = ("fp64", "fp32")
NARROW = "ops are judged in fp64 and fp32: their bounds know one unit roundoff throughout"
ALONE = "the subject gives y and no gradients"
STEPS = {"float64": 2.0**-17, "float32": 2.0**-6}  # of differences: their cube and a rounding weigh alike
DIFFERENCED = {  # at which layouts the own differences are taken
    op: tuple(
        name for name in ("odd", "grouped", "cross", "bias", "repeated", "smooth", "of all") if name in some
    )
    for op, some in LAYOUTS.items()
}


def battery_ops(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """y and every gradient of each op that a subject offers, against the truth."""
    found = tuple(offered(subject))
    others = [op for op in OPS if op not in found]
    for id, name, reason in (
        ("ops/all", "the ops of a model", "" if profile in WIDTHS else NARROW),
        (
            "ops/others",
            "other ops of a model",
            f"the subject has no method {', '.join(others)}" if others else "",
        ),
    ):
        if found and reason and chosen(id, only):
            yield [Check(id, "ops", "ops", name, "not run", note=reason)]
    for op in found if profile in WIDTHS else ():
        for layout in LAYOUTS[op]:
            for j in range(1 if level == "quick" else 2):
                case = draw(op, layout, PROFILES[profile], (seed, 91, j))
                case = replace(case, id=f"{case.id}/{j}")
                if chosen(case.id, only):
                    yield judge_op(subject, case)


def judge_op(subject: Any, case: OpCase) -> list[Check]:
    """Every tensor of one case."""
    try:
        got = op_answer(subject, case)
    except (Absent, Crash) as error:
        return [Check(f"{case.id}/y", "ops", case.kind, "y", refusal(error), note=str(error))]
    want, bound = definitions.truth(case), both_bounds(case)
    checks = []
    for name, value in want.items():
        if name in got or needed(case, got, name):
            checks.append(_judged(case, name, got.get(name), value, bound[name]))
        else:
            note = ALONE if set(got) == {"y"} else f"the subject gives no gradient by {name}"
            checks.append(Check(f"{case.id}/{name}", "ops", case.kind, _shown(name), "not run", note=note))
    return checks


def needed(case: OpCase, got: Named, name: str) -> bool:
    """Whether a gradient has to be there: where any is, and it is not one of what may be frozen."""
    return len(got) > 1 and (case.op, name) not in FROZEN


def _judged(case: OpCase, name: str, got: HostArray | None, want: HostArray, bound: HostArray) -> Check:
    if want.any() or got is None:
        if got is not None and got.shape == want.shape == ():
            got, want, bound = got.reshape(1), want.reshape(1), bound.reshape(1)
        check = judge(case.id, "ops", case.kind, name, got, want, bound, case.dtype)
        return check if name in COLUMNS else replace(check, tensor=_shown(name), ratio=None)
    wrong = ""
    if got.shape != want.shape or got.dtype != case.dtype:
        wrong = f"expected {case.dtype} of shape {want.shape}, got {got.dtype} of {got.shape}"
    elif got.any():
        wrong = f"expected 0 in every entry, got {got[got != 0].flat[0]}"
    what = "what is 0 is 0 exactly"
    return Check(f"{case.id}/{name}", "ops", case.kind, what, "fail" if wrong else "pass", note=wrong)


def _shown(name: str) -> str:
    """A gradient that has no column of its own in a report stands among the laws."""
    return name if name in COLUMNS else f"the gradient by {name}"


def op_answer(subject: Any, case: OpCase) -> Named:
    """y and the gradients that a subject gives, as NumPy arrays; its gradients may be None."""
    mine = case.copy()
    found = ask(subject, case.op, mine, mine.gy)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Crash(f"{case.op}: expected y and a dict of gradients, got {type(found).__name__}")
    y, gradients = found
    g = {} if gradients is None else by_name(case.op, gradients, OPS[case.op])
    return by_name(case.op, {"y": y}, ("y",)) | {name: v for name, v in g.items() if name in case.at}


def both_bounds(case: OpCase) -> Named:
    """What roundings of the subject explain, and those of a float64 truth.  (modelops.3)"""
    u = UNIT[case.dtype]
    more = 1 + UNIT["float64"] / u  # to first order they are as u is, and never less
    return {name: more * value for name, value in op_bounds(case, u).items()}


def fitting(subject: Any, case: OpCase) -> Named:
    """As op_answer, in float64 and of the right shapes; ValueError says which is not."""
    found = op_answer(subject, case)
    for name, value in found.items():
        shape = case.gy.shape if name == "y" else case.at[name].shape
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
    return {name: value.astype(np.float64) for name, value in found.items()}


# ---- differences -------------------------------------------------------------------------------------------


def battery_op_differences(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Gradients against differences of the subject's own y: nothing else is asked."""
    for op in offered(subject) if profile in WIDTHS else ():
        for layout in DIFFERENCED[op]:
            case = draw(op, layout, PROFILES[profile], (seed, 92), "op-differences")
            for name in case.names:
                id = f"{case.id}/{name}"
                if chosen(id, only):
                    run = partial(_differences, subject, case, name)
                    yield law(id, "op differences", case.kind, "gradients are slopes of y", run)


def _differences(subject: Any, case: OpCase, name: str) -> str | None:
    """⟨gy, y(θ + hv) − y(θ − hv)⟩/2h = ⟨gθ, v⟩ + ch², whose c two steps tell.  (modelops.9)"""
    got, at, bound = fitting(subject, case), case.at[name].astype(np.float64), op_bounds(case, UNIT[case.dtype])
    if name not in got:
        absent = f"the subject gives no gradient by {name}"
        if needed(case, got, name):
            return absent
        raise Absent(absent)
    v = np.random.default_rng(7).choice((-1.0, -0.5, 0.5, 1.0), at.shape)
    if case.op == "lookup" and case.padding is not None:
        v[case.padding] = 0
    rests, h = [], STEPS[case.dtype] * _room(case)
    gy = case.gy.astype(np.float64)
    for step in (h, 2 * h):
        up, down = (case.moved(**{name: at + sign * step * v}) for sign in (1, -1))
        moved = up.at[name].astype(np.float64) - down.at[name]
        rise = np.sum(gy * (fitting(subject, up)["y"] - fitting(subject, down)["y"]))
        rests.append(float(rise - np.sum(got[name] * moved)) / (2 * step))
    noise = 2 * float(np.sum(np.abs(gy) * bound["y"])) / h + float(np.sum(np.abs(v) * bound[name]))
    if abs(rests[0]) <= abs(rests[1] - rests[0]) + noise:
        return None
    return f"⟨g{name}, v⟩ = {np.sum(got[name] * v):.6g}, and y rises by {rests[0] + np.sum(got[name] * v):.6g}"


def _room(case: OpCase) -> float:
    """A share of the step that lets every token keep its experts."""
    if case.op != "router" or case.k == case.z.shape[1]:
        return 1.0
    z = -np.sort(-case.z.astype(np.float64), axis=1)
    return min(1.0, float(np.min(z[:, case.k - 1] - z[:, case.k])) / (8 * STEPS[case.dtype]))
