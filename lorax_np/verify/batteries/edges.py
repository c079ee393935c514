"""Checks of what a layer does besides y and gradients, for any subject that offers the methods they call.

Each thing is held in two ways that share nothing: against the written-out definition in float64, and by what a
subject does with it afterwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..bounds.worst import bounds, merged_bounds
from ..cases import PROFILES, UNIT, Case, HostArray, draw, under
from ..conventions import Spec, spec_of
from ..report import Check
from ..truths import exact, truth
from .tensors import Absent, Crash, answer, ask, by_name, chosen, in_one_line, judge_case, with_truth

Checks = Iterator[list[Check]]
#        d_out d_in r  lead: square where a transpose hides, in one, two or three of the sides
EDGES = ((6, 6, 3, (3,)), (5, 7, 7, (2,)), (7, 5, 7, (3,)), (6, 6, 6, (4,)), (9, 6, 5, (2, 2, 2)))


def law(id: str, battery: str, kind: str, name: str, run: Callable[[], str | None]) -> list[Check]:
    """One check of a law: None from run is a pass, a line is what is wrong."""
    try:
        wrong = run()
    except Absent as error:
        return [Check(id, battery, kind, name, "not run", note=str(error))]
    except Crash as error:
        return [Check(id, battery, kind, name, "crash", note=str(error))]
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError) as error:
        note = f"tensors do not fit together: {in_one_line(error)}"
        return [Check(id, battery, kind, name, "fail", note=note)]
    return [Check(id, battery, kind, name, "fail" if wrong else "pass", note=wrong or "")]


def off(name: str, got: Any, want: Any, bound: Any) -> str | None:
    """What is wrong with one array, in a line: its shape, or an entry further off than the bound."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return f"{name}: expected shape {want.shape}, got {got.shape}"
    if got.dtype.kind != "f" and str(got.dtype) != "bfloat16":
        return f"{name}: expected floating numbers, got {got.dtype}"
    error = np.abs(got.astype(np.float64) - want)
    return None if (error <= bound).all() else f"{name} is off by {np.max(error):.2g}"


def battery_edges(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Square layers, ranks equal to a side, three leading axes, and a magnitude of which one entry is 0."""
    dtype, norms = PROFILES[profile], spec_of(subject).norm_gradient
    kinds = ["lora", "lora, dropout", *(["dora"] * (False in norms)), *(["dora full norm"] * (True in norms))]
    for i, shape in enumerate(EDGES):
        for j, kind in enumerate(kinds):
            id = f"edges/{kind.replace(', ', '-').replace(' ', '-')}/{i}"
            if not chosen(id, only) or (level == "quick" and (i + j) % 2 and i):
                continue
            case = draw(id, kind, shape, dtype, (seed, i, j, 31), alpha=5.3, p=0.45, bias="trained")
            case = under(case, spec_of(subject))
            if case.m is not None and i == 0:
                case = replace(case, m=case.m * (np.arange(case.m.size) != 1).astype(dtype))
            want = truth.of(case)
            if case.m is not None:
                want["B"] = np.where(case.m[:, None] == 0, 0.0, want["B"])  # exactly, where the bound is 0 too
            yield judge_case(subject, "edges", case, want, with_truth(case, UNIT[dtype]))


def battery_widened(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """An input feature of zeros, with weights of zero, changes nothing: square layers against others.

    Nothing but the subject is asked, so that this sees what battery_edges does by a law of its own.
    """
    dtype, norms = PROFILES[profile], spec_of(subject).norm_gradient
    kinds = ["lora, dropout", *(["dora"] * (False in norms)), *(["dora full norm"] * (True in norms))]
    for i, shape in enumerate(EDGES[: 4 if level == "full" else 3]):
        for kind in kinds:
            id = f"widened/{kind.replace(', ', '-').replace(' ', '-')}/{i}"
            if chosen(id, only):
                case = draw(id, kind, shape, dtype, (seed, i, 35), alpha=5.3, p=0.45, bias="trained")
                case = under(case, spec_of(subject))
                if case.m is not None and i == 0:
                    case = replace(case, m=case.m * (np.arange(case.m.size) != 1).astype(dtype))
                yield law(
                    id, "widened", kind, "a feature of zeros changes nothing", partial(_widened, subject, case)
                )


def _widened(subject: Any, case: Case) -> str | None:
    def wide(value: HostArray | None) -> HostArray | None:
        return None if value is None else np.concatenate([value, 0 * value[..., :1]], axis=-1)

    names = ("x", "W", "A", "base_mask", *(["mask"] if case.output_mask is None else []))
    wider: Any = {name: wide(getattr(case, name)) for name in names}
    got, want = answer(subject, replace(case, **wider)), answer(subject, case)
    limit = bounds(replace(case, **wider), UNIT[case.x.dtype.name])
    for name in ("y", *case.wanted):
        if name in got and name in want:
            last = want[name].shape[-1] if want[name].ndim else None
            wrong = off(name, got[name][..., :last], want[name], 2 * limit[name][..., :last])
            if wrong:
                return wrong
    return None


# ---- merging ---------------------------------------------------------------------------------------------


def _merge_cases(battery: str, profile: str, seed: int, only: str, spec: Spec) -> Iterator[Case]:
    shapes = ((5, 7, 3, (2, 2)), (4, 3, 6, (3,)), (7, 9, 2, (4,)))
    for i, (shape, kind) in enumerate((shape, kind) for shape in shapes for kind in ("lora", "dora")):
        id = f"{battery}/{kind}/{i}"
        if chosen(id, only):
            bias = ("absent", "frozen")[i // 2 % 2]
            how: Any = {"bias": bias, "lora_bias": True, "rslora": i > 3}
            yield under(draw(id, kind, shape, PROFILES[profile], (seed, i, 32), **how), spec)


def battery_served(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """What a merged layer computes is what the layer computes: y of x by W' and b'."""
    if not hasattr(subject, "merge"):
        return
    for case in _merge_cases("served", profile, seed, only, spec_of(subject)):

        def run(case: Case = case) -> str | None:
            got = by_name("merge", ask(subject, "merge", case.copy()), ("W", "b"))
            if got.get("W", case.W[:0]).shape != case.W.shape:
                return "W': expected the shape of W"
            limit, u = merged_bounds(case, UNIT[case.x.dtype.name]), UNIT["float64"]
            y = case.x.astype(np.float64) @ got["W"].T.astype(np.float64) + got.get("b", 0.0)
            slack = np.abs(case.x.astype(np.float64)) @ limit["W"].T + limit["b"]
            return off("y", y, truth.dense(case), slack + 100 * bounds(case, u)["y"])

        yield law(case.id, "served", case.kind, "the merged layer gives the layer's y", run)


def battery_unmerge(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Of an exactly merged weight, the base comes back within the roundings of both."""
    if not hasattr(subject, "unmerge"):
        return
    for case in _merge_cases("unmerge", profile, seed, only, spec_of(subject)):

        def run(case: Case = case) -> str | None:
            merged = {
                name: exact.to_float(value).astype(case.W.dtype) for name, value in exact.merged(case).items()
            }
            return _returns(subject, case, merged)

        yield law(case.id, "unmerge", case.kind, "unmerging gives the base back", run)


def battery_round_trip(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """A layer merged, then unmerged by the subject itself, computes what its base did."""
    if not (hasattr(subject, "unmerge") and hasattr(subject, "merge")):
        return
    for case in _merge_cases("round-trip", profile, seed, only, spec_of(subject)):

        def run(case: Case = case) -> str | None:
            return _returns(subject, case, by_name("merge", ask(subject, "merge", case.copy()), ("W", "b")))

        yield law(case.id, "round trip", case.kind, "merging and unmerging changes nothing", run)


def _returns(subject: Any, case: Case, merged: dict[str, HostArray]) -> str | None:
    v = {name: value.astype(np.float64) for name, value in case.arrays().items()}
    n = None
    if case.m is not None:
        n = np.sqrt(np.sum((v["W"] + case.scaling * v["B"] @ v["A"]) ** 2, axis=1))
    given = {name: value.copy() for name, value in merged.items()}
    got = by_name("unmerge", ask(subject, "unmerge", case.copy(), given), ("W", "b"))
    limit, u = merged_bounds(case, UNIT[case.W.dtype.name]), UNIT[case.W.dtype.name]
    ratio = 1.0 if n is None else np.abs(n / v["m"])[:, None]
    slack = ratio * limit["W"] + (case.A.shape[0] + 12) * u * (
        ratio * np.abs(merged["W"]) + np.abs(v["W"]) + abs(case.scaling) * np.abs(v["B"]) @ np.abs(v["A"])
    )
    wrong = off("W", got.get("W", v["W"][:0]), v["W"], slack)
    if wrong is None and "b" in got:
        wrong = off("b", got["b"], v.get("b", 0.0 * v["W"][:, 0]), 2 * limit["b"])
    return wrong
