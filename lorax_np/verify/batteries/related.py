"""Related forms of the update: VeRA's shared factors, AdaLoRA's three, and trained rows of an embedding.

The first two are LoRA of factors that are products: λ_d∘A and λ_b∘B, E∘A and B. So their truth is the engine's
linear layer in float64 and the chain rule through these products. Each is held to laws besides, which ask the
subject about itself. Equations: specs/vera.md, specs/adalora.md, specs/tokens.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ... import Adapter, Linear, lora_linear_backward, lora_linear_forward
from ..bounds.worst import FEW
from ..cases import PROFILES, UNIT, HostArray
from ..report import Check
from .edges import law, off
from .tensors import Absent, Crash, ask, by_name, chosen, judge, refusal

Named = dict[str, HostArray]
WIDE = np.float64
SMALL = 1e-5  # (adalora.4)
COLUMNS = "y", "x", "A", "B"  # of a report's table
GRADIENTS = {
    "vera": ("x", "lambda_d", "lambda_b"),
    "adalora": ("x", "A", "B", "E"),
    "tokens": ("T",),
}


@dataclass(frozen=True, eq=False)
class RelatedCase:
    """One layer of a related form at one point. NumPy arrays in the profile's dtype; ids and index are int64.

    form : vera, of x (*lead, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), lambda_d (r,),
           lambda_b (d_out,), and mask (*lead, d_in) or none; adalora, of E (r,) in place of the two vectors, 0
           where pruned; tokens, of ids (*lead), W (vocab, dim), T (n, dim) and index (n,)
    gy : (*lead, d_out) or (*lead, dim);  alpha, rank : of AdaLoRA's factor;  padding : an id, or None
    """

    id: str
    kind: str
    form: str
    at: Named
    gy: HostArray
    alpha: float = 1.0
    rank: int = 1
    padding: int | None = None

    def copy(self) -> "RelatedCase":
        """The same case in arrays of its own."""
        return replace(self, at={name: value.copy() for name, value in self.at.items()}, gy=self.gy.copy())

    def moved(self, **arrays: HostArray) -> "RelatedCase":
        """The case with other arrays, in the dtype of those that they stand in for."""
        new = {name: np.asarray(value, self.at[name].dtype) for name, value in arrays.items()}
        return replace(self, at=self.at | new)


class RelatedReference:
    """The three forms and their adjoints, by the equations."""

    def vera_forward(self, case: RelatedCase) -> HostArray:
        """y : (*lead, d_out).  (vera.1) to (vera.4)"""
        v, _, _, u = _vera(case)
        return np.asarray(v["x"] @ v["W"].T + v["lambda_b"] * u)

    def vera_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """The gradients by x, lambda_d and lambda_b.  (vera.5) to (vera.10)"""
        v, _, h, u = _vera(case)
        gz = (v["lambda_b"] * gy) @ v["B"]
        gx = gy @ v["W"] + ((v["lambda_d"] * gz) @ v["A"]) * v.get("mask", np.ones((), gy.dtype))
        return {"x": gx, "lambda_d": _summed(gz * h), "lambda_b": _summed(gy * u)}

    def adalora_forward(self, case: RelatedCase) -> HostArray:
        """y : (*lead, d_out).  (adalora.1) to (adalora.5)"""
        v, _, h = _adalora(case)
        return v["x"] @ v["W"].T + _factor(case) * ((v["E"] * h) @ v["B"].T)

    def adalora_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """The gradients by x, A, B and E.  (adalora.6) to (adalora.12)"""
        v, xd, h = _adalora(case)
        gu = _factor(case) * gy
        gz = gu @ v["B"]
        gh = v["E"] * gz
        gx = gy @ v["W"] + (gh @ v["A"]) * v.get("mask", np.ones((), gy.dtype))
        gA, gB = _rows(gh).T @ _rows(xd), _rows(gu).T @ _rows(v["E"] * h)
        return {"x": gx, "A": gA, "B": gB, "E": _summed(gz * h)}

    def tokens_forward(self, case: RelatedCase) -> HostArray:
        """y : (*lead, dim).  (tokens.1) to (tokens.3)"""
        table = case.at["W"].astype(case.at["T"].dtype)
        table[case.at["index"]] = case.at["T"]
        return np.asarray(table[case.at["ids"]])

    def tokens_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """The gradient by T.  (tokens.4), (tokens.7)"""
        g = np.zeros_like(case.at["W"])
        np.add.at(g, case.at["ids"], gy)
        if case.padding is not None:
            g[case.padding] = 0.0
        return {"T": g[case.at["index"]]}


def _factor(case: RelatedCase) -> float:
    return case.alpha / (case.rank + SMALL)


def _vera(case: RelatedCase) -> tuple[Named, HostArray, HostArray, HostArray]:
    v = case.at
    xd = v["x"] * v.get("mask", np.ones((), v["x"].dtype))
    h = xd @ v["A"].T
    return v, xd, h, (v["lambda_d"] * h) @ v["B"].T


def _adalora(case: RelatedCase) -> tuple[Named, HostArray, HostArray]:
    v = case.at
    xd = v["x"] * v.get("mask", np.ones((), v["x"].dtype))
    return v, xd, xd @ v["A"].T


def _rows(x: HostArray) -> HostArray:
    return x.reshape(-1, x.shape[-1])


def _summed(x: HostArray) -> HostArray:
    return np.asarray(_rows(x).sum(axis=0))


# ---- truth and bounds --------------------------------------------------------------------------------------


def truth(case: RelatedCase) -> Named:
    """In float64: LoRA of the products with its gradients taken through them, or the table written out."""
    v = {name: value.astype(WIDE) if value.dtype.kind == "f" else value for name, value in case.at.items()}
    gy = case.gy.astype(WIDE)
    if case.form == "tokens":
        right = RelatedReference()
        wide = replace(case, at=v)
        return {"y": right.tokens_forward(wide), **right.tokens_backward(wide, gy)}
    vera = case.form == "vera"
    A = (v["lambda_d"] if vera else v["E"])[:, None] * v["A"]
    B, s = (v["lambda_b"][:, None] * v["B"], 1.0) if vera else (v["B"], _factor(case))
    base, adapter, mask = Linear(v["W"]), Adapter(A, B), v.get("mask")
    y, saved = lora_linear_forward(v["x"], base, adapter, scaling=s, mask=mask)
    gx, g = lora_linear_backward(gy, saved, base, adapter, scaling=s)
    gA, gB = np.asarray(g.A), np.asarray(g.B)
    found: dict[str, Any] = {"y": y, "x": gx}
    if vera:
        found |= {"lambda_d": (gA * v["A"]).sum(axis=1), "lambda_b": (gB * v["B"]).sum(axis=1)}
    else:
        found |= {"A": v["E"][:, None] * gA, "B": gB, "E": (gA * v["A"]).sum(axis=1)}
    return {name: np.asarray(value) for name, value in found.items()}


def related_bounds(case: RelatedCase, u: float) -> Named:
    """The most that roundings of size u explain: γ of the terms.  (vera.16), (adalora.22), (tokens.10)"""
    absolute = replace(case, at={k: np.abs(v) if v.dtype.kind == "f" else v for k, v in case.at.items()})
    absolute = replace(
        absolute, at={k: v.astype(WIDE) if v.dtype.kind == "f" else v for k, v in absolute.at.items()}
    )
    size = truth(replace(absolute, gy=np.abs(case.gy), alpha=abs(case.alpha)))
    N = case.gy.size // case.gy.shape[-1]
    if case.form == "tokens":
        count = {"y": 0, "T": N}
    else:
        (d_out, d_in), r = case.at["W"].shape, len(case.at["A"])
        count = {"y": d_in + r, "x": d_out + r, "A": d_out + N, "B": d_in + N, "E": d_out + d_in + N}
        count |= {"lambda_d": d_out + d_in + N, "lambda_b": d_in + r + N}
    return {name: _gamma(count[name] + FEW, u) * value for name, value in size.items()}


def _gamma(count: int, u: float) -> float:
    return count * u / (1 - count * u)


# ---- the cases ---------------------------------------------------------------------------------------------

SHAPES = ((5, 7, 3, (2, 4)), (6, 4, 5, (3,)), (3, 3, 3, (5,)), (1, 8, 2, (2, 2, 2)), (7, 5, 1, ()))


def draw(id: str, form: str, layout: int, dtype: str, seed: tuple[int, ...]) -> RelatedCase:
    """One case: nothing is 0 or 1 that need not be, ids repeat, and trained rows are listed in no order."""
    rng = np.random.default_rng(seed)
    d_out, d_in, r, lead = SHAPES[layout]

    def normal(*size: int) -> HostArray:
        return np.asarray(rng.standard_normal(size), dtype)

    if form == "tokens":
        vocab, n = d_in + 6, r + 1
        index = np.roll(np.sort(rng.permutation(vocab)[:n]), 1)  # ascending but for one: neither order is right
        ids = np.where(rng.random(lead) < 0.6, rng.choice(index, lead), rng.integers(0, vocab, lead))
        ids = np.asarray(ids, np.int64)
        ids.reshape(-1)[:1] = index[-1]  # some row is trained, and is not padding's
        at = {"ids": ids, "W": normal(vocab, d_out), "T": normal(n, d_out)}
        padding = int(index[0]) if layout % 2 else None
        at["index"] = np.asarray(index, np.int64)
        return RelatedCase(
            id, "tokens, padding" if layout % 2 else "tokens", form, at, normal(*lead, d_out), padding=padding
        )
    at = {"x": normal(*lead, d_in), "W": normal(d_out, d_in), "A": normal(r, d_in), "B": normal(d_out, r)}
    if form == "vera":
        at |= {"lambda_d": normal(r), "lambda_b": normal(d_out)}
    else:
        at["E"] = normal(r) * (np.arange(r) != 1)  # one rank is pruned, where there are two
    if layout in (0, 2):  # of more tokens than one, so that not all of it is dropped
        at["mask"] = np.asarray((rng.random(at["x"].shape) < 0.55) / 0.55, dtype)
    kind = f"{form}, dropout" if "mask" in at else form
    return RelatedCase(id, kind, form, at, normal(*lead, d_out), alpha=5.3, rank=r)


def _cases(subject: Any, battery: str, profile: str, seed: int, level: str, only: str) -> Iterator[RelatedCase]:
    for i, form in enumerate(GRADIENTS):
        if hasattr(subject, f"{form}_forward"):
            for j in range(len(SHAPES)):
                for k in range(1 if level == "quick" else 3):
                    id = f"{battery.replace(' ', '-')}/{form}/{j}" + (f"-{k}" if k else "")
                    if chosen(id, only):
                        yield draw(id, form, j, PROFILES[profile], (seed, 71, i, j, k))


# ---- the batteries -----------------------------------------------------------------------------------------


def battery_related(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """y and every gradient of each form that a subject offers, against the truth."""
    dtype = PROFILES[profile]
    for case in _cases(subject, "related", profile, seed, level, only):
        try:
            got = _answer(subject, case)
        except (Absent, Crash) as error:
            yield [Check(f"{case.id}/y", "related", case.kind, "y", refusal(error), note=str(error))]
            continue
        want, bound = truth(case), related_bounds(case, UNIT[dtype])
        for name, more in related_bounds(case, UNIT["float64"]).items():
            bound[name] = bound[name] + more
        yield [
            _shown(judge(case.id, "related", case.kind, name, got.get(name), want[name], bound[name], dtype))
            for name in want
        ]


def _shown(check: Check) -> Check:
    """A gradient that has no column of its own in a report stands among the laws."""
    if check.tensor in COLUMNS:
        return check
    return replace(check, tensor=f"the gradient by {check.tensor}", ratio=None)


def battery_related_laws(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Laws of each form, of which none needs a truth."""
    u = UNIT[PROFILES[profile]]
    for case in _cases(subject, "related laws", profile, seed, "quick", only):
        for name, run in LAWS[case.form].items():
            id = f"{case.id}/{name.split(',')[0].replace(' ', '-')}"
            yield law(id, "related laws", case.kind, name, partial(run, subject, case, u))


def _answer(subject: Any, case: RelatedCase) -> Named:
    y = by_name(f"{case.form}_forward", {"y": ask(subject, f"{case.form}_forward", case.copy())}, ("y",))
    again = case.copy()
    found = ask(subject, f"{case.form}_backward", again, again.gy)
    return y | by_name(f"{case.form}_backward", found, GRADIENTS[case.form])


def _y(subject: Any, case: RelatedCase) -> HostArray:
    return _answer(subject, case)["y"].astype(WIDE)


# ---- the laws ----------------------------------------------------------------------------------------------


def _pairing(a: HostArray, b: HostArray) -> float:
    return float(np.sum(a.astype(WIDE) * b.astype(WIDE)))


def _limit(case: RelatedCase, u: float) -> float:
    """A pairing's roundings: those of y or a gradient, summed over its entries, both sides of the law."""
    bound = related_bounds(case, u)
    return 4 * float(sum(np.sum(b * _partner(case, name)) for name, b in bound.items()))


def _partner(case: RelatedCase, name: str) -> HostArray:
    """What a tensor is paired with, at absolute values; twice, since a law moves an argument by itself."""
    return 2 * np.abs(case.gy if name == "y" else case.at[name]).astype(WIDE) + 1


def _gauge(one: str, other: str, axis: int, subject: Any, case: RelatedCase, u: float) -> str | None:
    """y is unchanged where a factor is multiplied and its vector divided, by powers of two, exactly."""
    d = 2.0 ** (np.arange(len(case.at[other])) % 3 - 1)
    other_way = case.moved(
        **{one: case.at[one] * (d[:, None] if axis == 0 else d[None, :]), other: case.at[other] / d}
    )
    return off("y", _y(subject, other_way), _y(subject, case), 2 * related_bounds(case, u)["y"])


def _euler(names: tuple[str, ...], base: str, subject: Any, case: RelatedCase, u: float) -> str | None:
    """y less the base's is linear in each of these alone: ⟨g, value⟩ = ⟨gy, update⟩ for each."""
    got = _answer(subject, case)
    update = got["y"] - _y(subject, case.moved(**{base: 0 * case.at[base]}))
    want = _pairing(case.gy, update)
    for name in names:
        wrong = off(f"⟨g{name}, {name}⟩", WIDE(_pairing(got[name], case.at[name])), want, _limit(case, u))
        if wrong:
            return wrong
    return None


def _secant(name: str, subject: Any, case: RelatedCase, u: float) -> str | None:
    """y is affine in one argument: a step of its own size gives the gradient."""
    v = np.roll(case.at[name], 1, axis=-1)
    ends = [case.moved(**{name: case.at[name] + sign * v}) for sign in (1, -1)]
    moved = ends[0].at[name].astype(WIDE) - ends[1].at[name]
    if name == "T" and case.padding is not None:
        moved[case.at["index"] == case.padding] = 0  # not trained, and moves y
        ends = [
            end.moved(T=np.where((end.at["index"] == case.padding)[:, None], case.at["T"], end.at["T"]))
            for end in ends
        ]
    rise = _pairing(case.gy, _y(subject, ends[0]) - _y(subject, ends[1]))
    slope = _pairing(_answer(subject, case)[name], moved)
    limit = sum(_limit(one, u) for one in (case, *ends))
    return off(f"⟨g{name}, v⟩", WIDE(slope), rise, limit)


def _rank(subject: Any, case: RelatedCase, u: float) -> str | None:
    """The update is divided by the rank that was given: (adalora.4)."""
    none = _y(subject, case.moved(E=0 * case.at["E"]))
    more = replace(case, rank=3 * case.rank)
    want = (_y(subject, case) - none) * _factor(more) / _factor(case)
    limit = sum(related_bounds(one, u)["y"] for one in (case, more)) * 2
    return off("the update at thrice the rank", _y(subject, more) - none, want, limit)


def _row_by_row(subject: Any, case: RelatedCase, u: float) -> str | None:
    """(adalora.20), (adalora.21)"""
    got, v = _answer(subject, case), case.at
    want = got["E"].astype(WIDE) * v["E"]
    bound, E = related_bounds(case, u), np.abs(v["E"]).astype(WIDE)
    rest = 2 * E * bound["E"]
    for name, axis in (("A", 1), ("B", 0)):
        pairs = (got[name].astype(WIDE) * v[name]).sum(axis=axis)
        limit = 2 * (bound[name] * np.abs(v[name])).sum(axis=axis) + rest
        if wrong := off(f"⟨g{name}, {name}⟩ rank by rank", pairs, want, limit):
            return wrong
    return None


def _as_it_was(subject: Any, case: RelatedCase, u: float) -> str | None:
    """Rows that are the table's own change nothing."""
    W, ids = case.at["W"], case.at["ids"]
    return off("y", _y(subject, case.moved(T=W[case.at["index"]])), W[ids].astype(WIDE), 0 * W[ids])


def _all_there(subject: Any, case: RelatedCase, u: float) -> str | None:
    """What the rows get and what other positions have is all of gy, but for padding's."""
    g, v = _answer(subject, case)["T"].astype(WIDE), case.at
    listed = np.isin(v["ids"], v["index"])
    padded = v["ids"] == (-1 if case.padding is None else case.padding)
    want = case.gy[listed & ~padded].astype(WIDE).sum(axis=0)
    if case.padding is not None and g[v["index"] == case.padding].any():
        return "the row of padding has a gradient"
    limit = _gamma(v["ids"].size + FEW, u) * (
        np.abs(case.gy).astype(WIDE).reshape(-1, g.shape[1]).sum(axis=0) + 1e-30
    )
    return off("the sum of the rows' gradients", g.sum(axis=0), want, 2 * limit)


Run = Callable[[Any, RelatedCase, float], str | None]
LAWS: dict[str, dict[str, Run]] = {
    "vera": {
        "rows of A, against λ_d": partial(_gauge, "A", "lambda_d", 0),
        "rows of B, against λ_b": partial(_gauge, "B", "lambda_b", 0),
        "linear in each vector": partial(_euler, ("lambda_d", "lambda_b"), "lambda_b"),
        "affine in x": partial(_secant, "x"),
    },
    "adalora": {
        "rows of A, against E": partial(_gauge, "A", "E", 0),
        "columns of B, against E": partial(_gauge, "B", "E", 1),
        "linear in each factor": partial(_euler, ("A", "B", "E"), "E"),
        "rank by rank": _row_by_row,
        "divided by the rank": _rank,
        "affine in x": partial(_secant, "x"),
    },
    "tokens": {
        "the table's own rows": _as_it_was,
        "nothing lost": _all_there,
        "affine in T": partial(_secant, "T"),
    },
}
