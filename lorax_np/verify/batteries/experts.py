"""Fused experts: one parameter with a weight for each, two stored factors of opposite orders, routed tokens.

y = x W_eᵀ + s·(x A_eᵀ)B_eᵀ, e the expert of each row. Derivation: specs/experts.md; what is judged:
specs/subjects.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ... import (
    Adapter,
    Experts,
    Linear,
    LoraConfig,
    lora_experts_backward,
    lora_experts_backward_base,
    lora_experts_forward,
    lora_linear_backward,
    lora_linear_backward_base,
    lora_linear_forward,
    merge,
    merge_experts,
)
from ..bounds.worst import bounds, merged_bounds
from ..cases import PROFILES, UNIT, Case, HostArray
from ..report import Check
from .edges import Checks, law, off
from .tensors import Absent, Crash, answer, ask, by_name, chosen, judge, refusal


@dataclass(frozen=True, eq=False)
class ExpertsCase:
    """N rows and E experts at one point. All NumPy arrays; ids are int64, the rest of the profile's dtype.

    x : (N, d_in), gy : (N, d_out), ids : (N,), the expert of each row
    W : (E, d_out, d_in), or (E, d_in, d_out) where transposed
    A : (r·E, d_in), expert-slowest;  B : (d_out, r·E), expert-fastest
    """

    id: str
    kind: str
    config: LoraConfig
    x: HostArray
    W: HostArray
    A: HostArray
    B: HostArray
    ids: HostArray
    gy: HostArray
    transposed: bool = False

    @property
    def scaling(self) -> float:
        """The factor s of the update, of the rank of one expert."""
        return self.config.scaling

    @property
    def experts(self) -> int:
        """How many experts there are, E."""
        return len(self.W)

    def arrays(self) -> dict[str, HostArray]:
        """Every array, by name."""
        return {name: getattr(self, name) for name in ("x", "W", "A", "B", "ids", "gy")}

    def copy(self) -> "ExpertsCase":
        """The same case in arrays of its own."""
        return replace(self, **{name: value.copy() for name, value in self.arrays().items()})  # type: ignore[arg-type]

    def places(self, e: int) -> tuple[slice, slice]:
        """Where the factors of an expert stand: the rows of A, the columns of B."""
        r = self.config.r
        return slice(e * r, (e + 1) * r), slice(e, None, self.experts)

    def layer(self, e: int) -> tuple[HostArray, Case]:
        """The rows of an expert, and the linear layer that they meet, as a case."""
        tokens, (rows, columns) = np.flatnonzero(self.ids == e), self.places(e)
        W = self.W[e].T if self.transposed else self.W[e]
        factors = self.A[rows], np.ascontiguousarray(self.B[:, columns])
        return tokens, Case("", "lora", self.config, self.x[tokens], W, *factors, self.gy[tokens])

    def stored(self, weights: list[HostArray]) -> HostArray:
        """Matrices (d_out, d_in), one an expert, as W is stored."""
        return np.stack([W.T if self.transposed else W for W in weights])


class ExpertsReference:
    """The engine's experts and their adjoints, judged like a stranger's."""

    def experts_forward(self, case: ExpertsCase) -> HostArray:
        """y : (N, d_out).  (experts.6)"""
        found: Any = experts_by_engine(case)[0]
        return np.asarray(found)

    def experts_backward(self, case: ExpertsCase, gy: HostArray) -> dict[str, HostArray]:
        """The gradients by x, A, B and W, as they are stored.  (experts.7) to (experts.9)"""
        base, adapter = _records(case)
        saved = experts_by_engine(case)[1]
        gx, g = lora_experts_backward(gy, saved, base, adapter, scaling=case.scaling)
        gbase = lora_experts_backward_base(gy, saved, base, adapter, scaling=case.scaling)
        found: Any = {"x": gx, "A": g.A, "B": g.B, "W": gbase.W}
        return {name: np.asarray(value) for name, value in found.items()}

    def experts_merge(self, case: ExpertsCase) -> dict[str, HostArray]:
        """The merged parameter.  (experts.10)"""
        return {"W": np.asarray(merge_experts(*_records(case), scaling=case.scaling).W)}


def experts_by_engine(case: ExpertsCase) -> Any:
    """y, and what the backward reads."""
    return lora_experts_forward(case.x, *_records(case), scaling=case.scaling, ids=case.ids)


def _records(case: ExpertsCase) -> tuple[Experts, Adapter]:
    return Experts(case.W, case.transposed), Adapter(case.A, case.B)


# ---- truth and bounds --------------------------------------------------------------------------------------


def truth(case: ExpertsCase) -> dict[str, HostArray]:
    """What a loop over the experts gives, one float64 linear layer of the engine each; "merged" is W'."""
    exact = replace(case, **{n: v.astype(np.float64) for n, v in case.arrays().items() if n != "ids"})  # type: ignore[arg-type]
    found = _zeros(exact)
    weights, merged = [], []
    for e in range(case.experts):
        tokens, layer = exact.layer(e)
        base, adapter, s = Linear(layer.W), Adapter(layer.A, layer.B), case.scaling
        y, saved = lora_linear_forward(layer.x, base, adapter, scaling=s)
        gx, g = lora_linear_backward(layer.gy, saved, base, adapter, scaling=s)
        rows, columns = case.places(e)
        found["y"][tokens], found["x"][tokens] = y, gx
        found["A"][rows], found["B"][:, columns] = g.A, g.B
        whole: Any = lora_linear_backward_base(layer.gy, saved, base, adapter, scaling=s).W
        weights.append(whole)
        merged.append(merge(base, adapter, scaling=s).W)
    return found | {"W": case.stored(weights), "merged": case.stored(merged)}  # type: ignore[arg-type]


def experts_bounds(case: ExpertsCase, u: float) -> dict[str, HostArray]:
    """The most that roundings of size u explain: those of each expert's layer. 0 for experts without rows."""
    found = _zeros(case)
    weights, merged = [], []
    for e in range(case.experts):
        tokens, layer = case.layer(e)
        bound, (rows, columns) = bounds(layer, u), case.places(e)
        found["y"][tokens], found["x"][tokens] = bound["y"], bound["x"]
        if tokens.size:
            found["A"][rows], found["B"][:, columns] = bound["A"], bound["B"]
        weights.append(bound["W"] if tokens.size else 0 * bound["W"])
        merged.append(merged_bounds(layer, u)["W"])
    return found | {"W": case.stored(weights), "merged": case.stored(merged)}


def _zeros(case: ExpertsCase) -> dict[str, HostArray]:
    shapes = {"y": case.gy.shape, "x": case.x.shape, "A": case.A.shape, "B": case.B.shape}
    return {name: np.zeros(shape) for name, shape in shapes.items()}


# ---- the batteries -----------------------------------------------------------------------------------------

#        what         ids drawn from, rows  E  r  d_out, d_in  transposed
LAYOUTS: tuple[tuple[str, tuple[int, ...], int, int, int, tuple[int, int], bool], ...] = (
    ("ragged", (0, 1, 2, 2, 3), 9, 4, 3, (5, 7), False),
    ("square", (0, 1, 2), 7, 3, 3, (6, 6), False),  # E = r, and no shape tells one axis from another
    ("idle", (1, 3), 6, 4, 2, (5, 7), False),
    ("last", (2,), 4, 3, 2, (7, 5), False),
    ("transposed", (0, 1, 2), 8, 3, 2, (5, 8), True),
    ("transposed square", (0, 1), 5, 2, 3, (6, 6), True),
    ("one expert", (0,), 5, 1, 3, (5, 7), False),
    ("no row", (), 0, 3, 2, (5, 7), False),
)
QUICK = ("ragged", "square", "idle", "last", "transposed", "no row")


def draw(id: str, layout: int, dtype: str, seed: tuple[int, ...]) -> ExpertsCase:
    """Draw one case: rows in any order, every expert that may have rows has some."""
    kind, some, N, E, r, (d_out, d_in), transposed = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    ids = np.concatenate([some[:N], rng.choice(some, N - len(some))]) if N else np.zeros(0)
    shapes = (N, d_in), (E, *((d_in, d_out) if transposed else (d_out, d_in))), (r * E, d_in), (d_out, r * E)
    x, W, A, B, gy = (rng.standard_normal(shape).astype(dtype) for shape in (*shapes, (N, d_out)))
    config = LoraConfig(r=r, lora_alpha=5.3, use_rslora=layout % 2 == 1)
    ids = rng.permutation(ids).astype(np.int64)
    return ExpertsCase(id, f"experts, {kind}", config, x, W, A, B, ids, gy, transposed)


def _cases(name: str, profile: str, seed: int, level: str, only: str, salt: int) -> Iterator[ExpertsCase]:
    for i, layout in enumerate(LAYOUTS):
        id = f"{name}/{layout[0].replace(' ', '-')}/0"
        if chosen(id, only) and (level == "full" or layout[0] in QUICK):
            yield draw(id, i, PROFILES[profile], (seed, salt, i))


def battery_experts(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Routed rows against a loop over the experts, for subjects with experts_forward."""
    if hasattr(subject, "experts_forward"):
        for case in _cases("experts", profile, seed, level, only, 71):
            yield judge_experts(subject, case)


def judge_experts(subject: Any, case: ExpertsCase) -> list[Check]:
    """y, the gradients and the merged parameter of a case, and what has to be 0 exactly."""
    dtype, u = case.x.dtype.name, UNIT[case.x.dtype.name]
    check = partial(Check, battery="experts", kind=case.kind)
    try:
        got = by_name("experts_forward", {"y": ask(subject, "experts_forward", case.copy())}, ("y",))
        if hasattr(subject, "experts_backward"):
            again = case.copy()
            found = ask(subject, "experts_backward", again, again.gy)
            got |= by_name("experts_backward", found, ("x", "A", "B", "W"))
        if hasattr(subject, "experts_merge"):
            merged = by_name("experts_merge", ask(subject, "experts_merge", case.copy()), ("W",))
            got |= {"merged": merged["W"]} if "W" in merged else {}
    except (Absent, Crash) as error:
        return [check(f"{case.id}/y", tensor="y", verdict=refusal(error), note=str(error))]
    want, bound = truth(case), experts_bounds(case, u)
    for name, more in experts_bounds(case, UNIT["float64"]).items():
        bound[name] = bound[name] + more
    expected = [name for name in want if name in got or (name in ("x", "A", "B") and len(got) > 1)]
    checks = []
    for name in expected:
        if want[name].any():
            id, tensor = (f"{case.id}/merged", "W") if name == "merged" else (case.id, name)
            compared = (got.get(name), want[name], bound[name])
            checks.append(judge(id, "experts", case.kind, tensor, *compared, dtype))
    rule = "gradients of experts without rows are 0"
    wrong = _not_zero(case, got)
    return [*checks, check(f"{case.id}/zero", tensor=rule, verdict="fail" if wrong else "pass", note=wrong)]


def _not_zero(case: ExpertsCase, got: dict[str, HostArray]) -> str:
    """What has a gradient without cause, bit by bit; or nothing."""
    shapes = {name: value.shape for name, value in case.arrays().items()} | {"y": case.gy.shape}
    for name, value in got.items():
        wanted = case.W.shape if name == "merged" else shapes[name]
        if value.shape != wanted:
            return f"{name}: expected shape {wanted}, got {value.shape}"
    for e in set(range(case.experts)) - set(case.ids.tolist()):
        rows, columns = case.places(e)
        for name, at in (("A", rows), ("B", (slice(None), columns)), ("W", e)):
            if name in got and got[name][at].any():  # NaN counts as something
                return f"g{name} of an expert without rows is not 0"
    return ""


def battery_routed(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Fused experts against the subject itself: its own linear layer, expert by expert, and the merged one."""
    if not hasattr(subject, "experts_forward"):
        return
    for case in _cases("routed", profile, seed, level, only, 72):
        if case.ids.size:
            run = partial(_by_layer, subject, case)
            yield law(case.id, "routed", case.kind, "the layer, expert by expert", run)


def _by_layer(subject: Any, case: ExpertsCase) -> str | None:
    y = ask(subject, "experts_forward", case.copy())
    g = ask(subject, "experts_backward", case.copy(), case.gy.copy())
    merged = ask(subject, "experts_merge", case.copy())["W"] if hasattr(subject, "experts_merge") else None
    u = 60 * UNIT[case.x.dtype.name] * len(case.ids)
    want = _zeros(case)
    for e in range(case.experts):
        tokens, layer = case.layer(e)
        rows, columns = case.places(e)
        if tokens.size:
            alone = answer(subject, layer)
            want["y"][tokens], want["x"][tokens] = alone["y"], alone["x"]
            want["A"][rows], want["B"][:, columns] = alone["A"], alone["B"]
        if merged is not None and tokens.size:
            W = merged[e].T if case.transposed else merged[e]
            whole = answer(subject, replace(layer, W=W, B=0 * layer.B))["y"]
            if wrong := off("y, merged", whole, want["y"][tokens], u * (1 + np.abs(whole).max())):
                return wrong
    for name, got in {"y": y, **g}.items():
        if name in want and (wrong := off(name, got, want[name], u * (1 + np.abs(want[name]).max()))):
            return wrong
    return None
