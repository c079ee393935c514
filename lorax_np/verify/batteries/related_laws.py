"""Laws of related forms, of which none needs a truth: gauges, Euler's rule, secants, ranks, rows of a table.

Each asks the subject twice, with something changed whose effect is plain. Equations: specs/vera.md,
specs/adalora.md, specs/tokens.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..bounds.worst import FEW
from ..cases import PROFILES, UNIT, HostArray
from ..report import Check
from .edges import law, off
from .related import WIDE, answer, cases, gamma, related_bounds
from .related_case import RelatedCase, factor


def battery_related_laws(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Laws of each form, of which none needs a truth."""
    u = UNIT[PROFILES[profile]]
    for case in cases(subject, "related laws", profile, seed, "quick", only):
        for name, run in LAWS[case.form].items():
            id = f"{case.id}/{name.split(',')[0].replace(' ', '-')}"
            yield law(id, "related laws", case.kind, name, partial(run, subject, case, u))


def _y(subject: Any, case: RelatedCase) -> HostArray:
    return answer(subject, case)["y"].astype(WIDE)


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
    got = answer(subject, case)
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
    slope = _pairing(answer(subject, case)[name], moved)
    limit = sum(_limit(one, u) for one in (case, *ends))
    return off(f"⟨g{name}, v⟩", WIDE(slope), rise, limit)


def _rank(subject: Any, case: RelatedCase, u: float) -> str | None:
    """The update is divided by the rank that was given: (adalora.4)."""
    none = _y(subject, case.moved(E=0 * case.at["E"]))
    more = replace(case, rank=3 * case.rank)
    want = (_y(subject, case) - none) * factor(more) / factor(case)
    limit = sum(related_bounds(one, u)["y"] for one in (case, more)) * 2
    return off("the update at thrice the rank", _y(subject, more) - none, want, limit)


def _row_by_row(subject: Any, case: RelatedCase, u: float) -> str | None:
    """(adalora.20), (adalora.21)"""
    got, v = answer(subject, case), case.at
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
    g, v = answer(subject, case)["T"].astype(WIDE), case.at
    listed = np.isin(v["ids"], v["index"])
    padded = v["ids"] == (-1 if case.padding is None else case.padding)
    want = case.gy[listed & ~padded].astype(WIDE).sum(axis=0)
    if case.padding is not None and g[v["index"] == case.padding].any():
        return "the row of padding has a gradient"
    limit = gamma(v["ids"].size + FEW, u) * (
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
