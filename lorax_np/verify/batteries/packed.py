"""Packed adapters, as servers run them: tokens of many requests in one matrix, each with an adapter of its own.

y += s_a·(x A_aᵀ)B_aᵀ for the tokens of adapter a, and nothing for tokens of none. The adapters are stacked and
padded to one rank; what stands in the padding means nothing, and may be NaN.
Derivation: specs/packed.md; what is judged: specs/subjects.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ... import (
    Adapter,
    Linear,
    LoraConfig,
    lora_linear_backward,
    lora_linear_forward,
    lora_packed_backward,
    lora_packed_forward,
)
from ..bounds.worst import FEW, bounds
from ..cases import PROFILES, UNIT, Case, HostArray
from ..report import Check
from .tensors import NOT_OFFERED, Absent, Crash, ask, by_name, chosen, judge

NONE = -1  # the id of a token without adapter


@dataclass(frozen=True, eq=False)
class PackedCase:
    """T tokens and L adapters at one point. All NumPy arrays; ids are int64, the rest of the profile's dtype.

    x : (T, d_in), y : (T, Σ d_out), what the update is added to, gy : as y
    A : (L, slices·r_max, d_in), slice by slice;  B : (L, Σ d_out, r_max), of rows slice by slice
    ids : (T,), the adapter of each token, or −1 for none
    ranks, scalings : of each adapter;  d_outs : of each slice, as of q, k and v in one matrix
    """

    id: str
    kind: str
    x: HostArray
    y: HostArray
    A: HostArray
    B: HostArray
    ids: HostArray
    gy: HostArray
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    d_outs: tuple[int, ...]

    @property
    def r_max(self) -> int:
        """The rank that the adapters are padded to."""
        return int(self.B.shape[2])

    def arrays(self) -> dict[str, HostArray]:
        """Every array, by name."""
        return {name: getattr(self, name) for name in ("x", "y", "A", "B", "ids", "gy")}

    def copy(self) -> "PackedCase":
        """The same case in arrays of its own."""
        return replace(self, **{name: value.copy() for name, value in self.arrays().items()})  # type: ignore[arg-type]

    def segments(self) -> list[tuple[int, int, int]]:
        """Runs of tokens of one adapter: (begin, end, id) in the order of the tokens, −1 included."""
        if not self.ids.size:
            return []
        cuts = [0, *(np.flatnonzero(np.diff(self.ids)) + 1).tolist(), self.ids.size]
        return [(begin, end, int(self.ids[begin])) for begin, end in pairwise(cuts)]

    def parts(self) -> Iterator[tuple[int, HostArray, tuple[slice, slice, slice]]]:
        """For each slice of each adapter: (adapter, its tokens, (rows of A, rows of B, columns of B))."""
        for a, r in enumerate(self.ranks):
            tokens, begin = np.flatnonzero(self.ids == a), 0
            for i, d_out in enumerate(self.d_outs):
                rows = slice(i * self.r_max, i * self.r_max + r)
                yield a, tokens, (rows, slice(begin, begin + d_out), slice(0, r))
                begin += d_out


class PackedReference:
    """The engine's packed layer and its adjoint, judged like a stranger's."""

    def packed_forward(self, case: PackedCase) -> HostArray:
        """y with the update added: (packed.1), (packed.2)."""
        return np.asarray(packed_by_engine(case)[0])

    def packed_backward(self, case: PackedCase, gy: HostArray) -> dict[str, HostArray]:
        """The gradients by x, A, B: (packed.3) to (packed.5). Zero in the padding, and for −1."""
        found: Any = lora_packed_backward(gy, packed_by_engine(case)[1], case.A, case.B, case.scalings)
        return dict(zip(("x", "A", "B"), found, strict=True))


def packed_by_engine(case: PackedCase) -> Any:
    """y, and what the backward reads."""
    how: Any = {"d_outs": case.d_outs, "y": case.y}
    return lora_packed_forward(case.x, case.A, case.B, case.ids, case.ranks, case.scalings, **how)


# ---- truth and bounds --------------------------------------------------------------------------------------


def truth(case: PackedCase) -> dict[str, HostArray]:
    """What a loop over the adapters gives, one float64 layer of the engine without base for each slice."""
    exact = replace(case, **{name: value.astype(np.float64) for name, value in case.arrays().items()})  # type: ignore[arg-type]
    found = {"y": exact.y.copy()} | {name: np.zeros_like(getattr(exact, name)) for name in ("x", "A", "B")}
    for a, tokens, (rows, outs, cols) in case.parts():
        adapter = Adapter(exact.A[a, rows], exact.B[a, outs, cols])
        base = Linear(np.zeros((outs.stop - outs.start, exact.x.shape[1])))
        update, saved = lora_linear_forward(exact.x[tokens], base, adapter, scaling=case.scalings[a])
        gx, g = lora_linear_backward(exact.gy[tokens, outs], saved, base, adapter, scaling=case.scalings[a])
        found["y"][tokens, outs] += update
        found["x"][tokens] += gx
        found["A"][a, rows], found["B"][a, outs, cols] = g.A, g.B
    return found


def packed_bounds(case: PackedCase, u: float) -> dict[str, HostArray]:
    """The most that roundings of size u explain: those of each slice as a layer, and of the sums over slices.

    Padding and tokens without adapter have the bound 0: nothing may be done to them.
    """
    found = {name: np.zeros(getattr(case, name).shape) for name in ("y", "x", "A", "B")}
    for a, tokens, (rows, outs, cols) in case.parts():
        A, B = case.A[a, rows], case.B[a, outs, cols]
        config = LoraConfig(r=A.shape[0], lora_alpha=case.scalings[a] * A.shape[0])
        zero = np.zeros((B.shape[0], A.shape[1]))
        layer = Case("", "lora", config, x=case.x[tokens], W=zero, A=A, B=B, gy=case.gy[tokens, outs])
        bound, size = bounds(layer, u), np.abs(case.y[tokens, outs]).astype(np.float64)
        count = (A.shape[1] + A.shape[0] + FEW) * u  # y may be added to at any point of the sums
        found["y"][tokens, outs] += bound["y"] + count / (1 - count) * size  # (subjects.8)
        others = sum(case.d_outs) + len(case.d_outs) - B.shape[0]  # gx may be one sum over all slices
        found["x"][tokens] += bound["x"] * (1 + others / (B.shape[0] + A.shape[0] + FEW))  # (subjects.7)
        found["A"][a, rows], found["B"][a, outs, cols] = bound["A"], bound["B"]
    return found


# ---- the battery -------------------------------------------------------------------------------------------

#        what              lengths of segments, their ids                 L  slices   shuffled
LAYOUTS: tuple[tuple[str, tuple[int, ...], tuple[int, ...], int, tuple[int, ...], bool], ...] = (
    ("ragged", (3, 1, 5, 2, 7), (1, NONE, 0, 3, 2), 4, (11,), False),
    ("permuted", (4, 3, 2, 6), (2, 0, NONE, 1), 3, (9,), True),
    ("last", (5,), (2,), 3, (7,), False),
    ("slices", (2, 4, 1, 3), (1, 0, NONE, 1), 2, (8, 5, 3), False),
    ("idle", (3, 2), (1, NONE), 3, (6,), False),  # adapters 0 and 2 have no token
    ("long", (33, 1, 17), (0, 1, 2), 3, (5, 4), True),
    ("none", (4,), (NONE,), 2, (6,), False),
    ("empty", (), (), 2, (6,), False),
)
RANKS, ALPHAS, D_IN = (3, 5, 1, 2), (3.7, 11.9, 0.83, 5.3), 13


def draw(id: str, layout: int, dtype: str, seed: tuple[int, ...]) -> PackedCase:
    """Draw one case. Ranks differ between adapters, and NaN fills what lies past each."""
    kind, lengths, of, L, d_outs, shuffled = LAYOUTS[layout]
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> HostArray:
        return rng.standard_normal(shape).astype(dtype)

    ids = np.repeat(np.array(of, np.int64), lengths)
    if shuffled:
        ids = rng.permutation(ids)
    ranks, r_max = RANKS[:L], 6
    configs = [LoraConfig(r=r, lora_alpha=alpha) for r, alpha in zip(ranks, ALPHAS, strict=False)]
    A, B = normal(L, len(d_outs) * r_max, D_IN), normal(L, sum(d_outs), r_max)
    T, wide = ids.size, sum(d_outs)
    case = PackedCase(
        id=id,
        kind=kind,
        x=normal(T, D_IN),
        y=normal(T, wide),
        A=np.full_like(A, np.nan),
        B=np.full_like(B, np.nan),
        ids=ids,
        gy=normal(T, wide),
        ranks=ranks,
        scalings=tuple(config.scaling for config in configs),
        d_outs=d_outs,
    )
    for a, _, (rows, outs, cols) in case.parts():
        case.A[a, rows], case.B[a, outs, cols] = A[a, rows], B[a, outs, cols]
    return case


def battery_packed(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Packed tokens against a loop over the adapters, for subjects with packed_forward and packed_backward."""
    if not hasattr(subject, "packed_forward"):
        return
    for i, layout in enumerate(LAYOUTS):
        for j in range(1 if level == "quick" else 2):
            id = f"packed/{layout[0]}/{j}"
            if chosen(id, only):
                yield judge_packed(subject, draw(id, i, PROFILES[profile], (seed, 6, i, j)))


def judge_packed(subject: Any, case: PackedCase) -> list[Check]:
    """y and the gradients of a case, and what has to be exactly so."""
    dtype = case.x.dtype.name
    check = partial(Check, battery="packed", kind=case.kind)
    try:
        got = by_name("packed_forward", {"y": ask(subject, "packed_forward", case.copy())}, ("y",))
        if hasattr(subject, "packed_backward"):
            again = case.copy()
            got |= by_name("packed_backward", ask(subject, "packed_backward", again, again.gy), ("x", "A", "B"))
    except (Absent, Crash) as error:
        crashed = isinstance(error, Crash)
        return [check(f"{case.id}/y", tensor="y", verdict="crash" if crashed else "not run", note=str(error))]
    want, bound = truth(case), packed_bounds(case, UNIT[dtype])
    for name, more in packed_bounds(case, UNIT["float64"]).items():
        bound[name] = bound[name] + more
    found = []
    for name in ("y", "x", "A", "B"):
        if name != "y" and want[name].any() and not hasattr(subject, "packed_backward"):
            found.append(check(f"{case.id}/{name}", tensor=name, verdict="not run", note=NOT_OFFERED))
        elif want[name].any():
            compared = (got.get(name), want[name], bound[name])
            found.append(judge(case.id, "packed", case.kind, name, *compared, dtype))
    law = "tokens of no adapter are left alone; unused and padded stay 0"
    wrong = _untouched(case, got)
    found.append(check(f"{case.id}/alone", tensor=law, verdict="fail" if wrong else "pass", note=wrong))
    return found


def _untouched(case: PackedCase, got: dict[str, HostArray]) -> str:
    """What was changed that no adapter reaches, bit by bit; or nothing."""
    shapes = {"y": case.y.shape, "x": case.x.shape, "A": case.A.shape, "B": case.B.shape}
    for name, value in got.items():
        if value.shape != shapes[name]:
            return f"{name}: expected shape {shapes[name]}, got {value.shape}"
    alone = case.ids == NONE
    if not np.array_equal(got["y"][alone], case.y[alone]):
        return "y of a token without adapter changed"
    if "x" in got and got["x"][alone].any():
        return "gx of a token without adapter is not 0"
    reached = {"A": np.zeros(case.A.shape, bool), "B": np.zeros(case.B.shape, bool)}
    for a, tokens, (rows, outs, cols) in case.parts():
        if tokens.size:
            reached["A"][a, rows] = reached["B"][a, outs, cols] = True
    for name, live in reached.items():
        if name in got and got[name][~live].any():  # NaN counts as something
            return f"g{name} of an unused adapter, or past a rank, is not 0"
    return ""
