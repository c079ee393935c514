"""Weighted combination of adapters by every method, entry by entry, exactly, and by laws.

A subject is told which entries a random method keeps, so that nothing is left to chance. Where entries are
compared with one another, by magnitude or by sign, roundings cannot turn the comparison: so cases are drawn.
Equations: specs/combine.md.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..bounds.worst import FEW
from ..cases import PROFILES, UNIT, HostArray
from .blended_case import D_IN, D_OUT, METHODS, RIGHT, WIDE, BlendCase, draw, exact_case
from .edges import Checks, law, off
from .tensors import ask, by_name, chosen

# ---- the batteries -----------------------------------------------------------------------------------------


def battery_blended(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """A' and B' where factors are added, and the update where one is formed, against the definition."""
    if not hasattr(subject, "blend"):
        return
    dtype = PROFILES[profile]
    for i, method in enumerate(METHODS):
        for j in range(2 if level == "quick" else 4):
            id = f"blended/{method}/{j}"
            if chosen(id, only):
                case = draw(id, method, dtype, (seed, 91, i, j))
                run = partial(_defined, subject, case, UNIT[dtype])
                yield law(id, "blended", method, "by its definition", run)


def battery_blended_exact(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Whole numbers, bit by bit: the methods that end in no SVD."""
    if not hasattr(subject, "blend"):
        return
    for i, method in enumerate(METHODS):
        id = f"blended-exact/{method}/0"
        if METHODS[method][0] != "update" and chosen(id, only):
            case = exact_case(id, method, PROFILES[profile], (seed, 92, i))
            yield law(id, "blended exact", method, "bit by bit", partial(_exact, subject, case))


def battery_blended_laws(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """What a combination is without a definition at hand: of its own results."""
    if not hasattr(subject, "blend"):
        return
    dtype = PROFILES[profile]
    for i, method in enumerate(METHODS):
        case = draw(f"blended-laws/{method}", method, dtype, (seed, 93, i, 0))
        for name, (applies, run) in LAWS.items():
            id = f"{case.id}/{name.replace(' ', '-')}"
            if applies(case) and chosen(id, only):
                yield law(id, "blended laws", method, name, partial(run, subject, case, UNIT[dtype]))


def _blend(subject: Any, case: BlendCase) -> dict[str, HostArray]:
    found = by_name("blend", ask(subject, "blend", case.copy()), ("A", "B"))
    return {name: found[name] for name in ("A", "B")}


def _update(subject: Any, case: BlendCase) -> HostArray:
    found = _blend(subject, case)
    update: HostArray = found["B"].astype(WIDE) @ found["A"].astype(WIDE)
    return update


def _sizes(case: BlendCase) -> dict[str, Any]:
    """The terms of A', B' and B'A' at absolute values, whatever is dropped of them."""
    d = case.density if METHODS[case.method][1] == "some" else 1.0
    c = [abs(w * s) for w, s in zip(case.weights, case.scalings, strict=True)]
    wide = [(np.abs(A).astype(WIDE), np.abs(B).astype(WIDE)) for A, B in case.pairs]
    if case.of == "factors":
        A = sum(np.sqrt(v) * A for v, (A, _) in zip(c, wide, strict=True)) / (d or 1.0)
        B = sum(np.sqrt(v) * B for v, (_, B) in zip(c, wide, strict=True)) / (d or 1.0)
        return {"A": A, "B": B, "update": B @ A}
    whole = sum(v * B @ A for v, (A, B) in zip(c, wide, strict=True)) / (d or 1.0)
    return {"update": whole}


def _limit(case: BlendCase, u: float) -> float:
    """Of B'A': the roundings of every sum, and of an SVD, whose residual is a few times its sides in u·‖D‖."""
    count = sum(A.shape[0] for A, _ in case.pairs) + D_OUT + D_IN + 2 * FEW
    return float(2 * count * u * np.linalg.norm(_sizes(case)["update"]))


def _defined(subject: Any, case: BlendCase, u: float) -> str | None:
    got, want = _blend(subject, case), RIGHT.blend(_wide(case))
    if case.of == "factors":
        for name in ("A", "B"):
            if wrong := off(name, got[name], want[name], 2 * FEW * u * _sizes(case)[name]):
                return wrong
        return None
    if case.of == "stacks" and got["A"].shape != want["A"].shape:
        return f"A: expected shape {want['A'].shape}, got {got['A'].shape}"
    update = got["B"].astype(WIDE) @ got["A"].astype(WIDE)
    return off("the update", update, want["B"] @ want["A"], _limit(case, u))


def _wide(case: BlendCase) -> BlendCase:
    return replace(case, pairs=tuple((A.astype(WIDE), B.astype(WIDE)) for A, B in case.pairs))


def _exact(subject: Any, case: BlendCase) -> str | None:
    got, want = _blend(subject, case), RIGHT.blend(_wide(case))
    return next((w for n in ("A", "B") if (w := off(n, got[n], want[n], np.zeros(want[n].shape)))), None)


# ---- the laws ----------------------------------------------------------------------------------------------


def _homogeneous(subject: Any, case: BlendCase, u: float) -> str | None:
    """Four times the weights is four times the update."""
    more = replace(case, weights=tuple(4 * w for w in case.weights))
    return off("the update", _update(subject, more), 4 * _update(subject, case), 8 * _limit(case, u))


def _odd(subject: Any, case: BlendCase, u: float) -> str | None:
    """One adapter with the negative weight is the negative update."""
    w = case.weights[0]
    one, other = (_update(subject, _first(case, weights=(v,))) for v in (w, -w))
    return off("the update", other, -one, 2 * _limit(case, u))


def _first(case: BlendCase, **changed: Any) -> BlendCase:
    """The first adapter alone, all of it kept."""
    masks = None if case.masks is None else (tuple(np.ones(m.shape, bool) for m in case.masks[0]),)
    density = None if case.density is None else 1.0
    one: Any = {"pairs": case.pairs[:1], "weights": (1.0,), "scalings": case.scalings[:1]}
    return replace(case, **one | {"masks": masks, "density": density} | changed)


def _itself(subject: Any, case: BlendCase, u: float) -> str | None:
    """One adapter of weight 1, nothing dropped, is itself: its s is in its factors."""
    A, B = (v.astype(WIDE) for v in case.pairs[0])
    alone = _first(case)
    return off("the update", _update(subject, alone), case.scalings[0] * B @ A, _limit(alone, u))


def _order(subject: Any, case: BlendCase, u: float) -> str | None:
    """The order of the adapters does not matter."""
    back: Any = {name: getattr(case, name)[::-1] for name in ("pairs", "weights", "scalings")}
    turned = replace(case, **back, masks=None if case.masks is None else case.masks[::-1])
    return off("the update", _update(subject, turned), _update(subject, case), 2 * _limit(case, u))


def _expected(subject: Any, case: BlendCase, u: float) -> str | None:
    """What a random method keeps is divided by the density, so that the mean stays."""
    alone = _first(case, density=0.5)
    times = 4.0 if case.of == "factors" else 2.0  # of A and of B, or of the update
    whole = _update(subject, _first(case))
    return off("the update", _update(subject, alone), times * whole, 2 * _limit(alone, u))


def _loudest(subject: Any, case: BlendCase, u: float) -> str | None:
    """Of two opposite adapters the larger elects, whatever the weights, and is divided by 1."""
    (A, B), s, alone = case.pairs[0], case.scalings[0], _first(case)
    small = (-A / 4, B) if case.of == "update" else (-A / 4, -B / 4)
    masks = None if alone.masks is None else 2 * alone.masks
    two = _first(case, pairs=((A, B), small), weights=(1.0, 64.0), scalings=(s, s), masks=masks)
    return off("the update", _update(subject, two), _update(subject, alone), 2 * _limit(two, u))


def _best(subject: Any, case: BlendCase, u: float) -> str | None:
    """Cut to a rank, the update is as near as that rank allows."""
    whole, cut = _update(subject, case), _update(subject, replace(case, rank=2))
    least = np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[2:])
    far = float(np.linalg.norm(whole - cut))
    if far <= least + 4 * _limit(case, u):
        return None
    return f"cut to rank 2 the update is {far:.3g} away, and could be {least:.3g}"


def _always(case: BlendCase) -> bool:
    return True


def _drawn(case: BlendCase) -> bool:
    return case.masks is not None


def _voted(case: BlendCase) -> bool:
    return METHODS[case.method][2] and case.majority == "total"


def _formed(case: BlendCase) -> bool:
    return case.of == "update"


LAWS: dict[
    str, tuple[Callable[[BlendCase], bool], Callable[[Any, BlendCase, float], str | None]]
] = {  # whether a case is one of it, and the law
    "weights multiply": (_always, _homogeneous),
    "weights have a sign": (_always, _odd),
    "one alone is itself": (_always, _itself),
    "in any order": (_always, _order),
    "the mean stays": (_drawn, _expected),
    "the larger elects": (_voted, _loudest),
    "the best of its rank": (_formed, _best),
}
