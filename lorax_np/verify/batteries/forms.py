"""One layer in other forms: no token, one, other axes, another order, a wider rank, arrays of another layout.

Each law says in a line what is wrong, or nothing. What must be equal for any order of evaluation is compared
within twice the bounds of specs/verify.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ..bounds.widths import Width, bounds
from ..cases import PROFILES, UNIT, Case, HostArray, draw, under
from ..conventions import spec_of
from ..report import Check
from ..truths import truth
from .laws import OF_TOKENS, AsGiven, differs, lawful, resized
from .tensors import Absent, answer, chosen, offers, with_truth


def battery_views(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Each array in turn in memory of another layout, all others plain, against the truth."""
    spec, dtype = spec_of(subject), PROFILES[profile]
    if not spec.strided:
        return
    dora = ["dora"] if False in spec.norm_gradient else ["dora full norm"] if True in spec.norm_gradient else []
    for kind in ("lora", *dora):
        case = under(draw("", kind, (6, 8, 3, (2, 3)), dtype, (seed, 43), bias="trained"), spec)
        for name in case.arrays():
            id, law = f"views/{kind.replace(' ', '-')}/{name}", f"{name} strided, transposed or offset"
            if chosen(id, only):
                yield [lawful(id, "views", kind, law, partial(_viewed, subject, case, name, UNIT[dtype]))]


def _viewed(subject: Any, case: Case, name: str, u: float) -> str | None:
    want, limit = truth.of(case), with_truth(case, u)
    want = {n: value for n, value in want.items() if n in ("y", *case.wanted) and offers(subject, n)}
    for words, view in VIEWS.items():
        wrong = differs(answer(subject, as_given(case, {name: view(getattr(case, name))})), want, limit)
        if wrong:
            return f"{wrong} where {name} is {words}"
    return None


def same(case: Case, got: dict[str, HostArray], want: dict[str, HostArray], u: Width) -> str | None:
    """Where two answers to a case differ by more than both their roundings."""
    return differs(got, want, bounds(case, u))


def empty(subject: Any, case: Case) -> str | None:
    """No token gives an empty y and gx, and gradients of 0."""
    for lead in ((0,), (0, 3), (2, 0)):
        none = resized(case, lead)
        got = answer(subject, none)
        for name in ("y", *case.wanted):
            shape = none.gy.shape if name == "y" else getattr(none, name).shape
            if name in got and got[name].shape != shape:
                return f"{name}: expected shape {shape}, got {got[name].shape}"
            if name in got and not (got[name] == 0).all():
                return f"{name}: expected 0 for x of shape {none.x.shape}, got {got[name].flat[0]}"
    return None


def one_token(subject: Any, case: Case, u: Width) -> str | None:
    """The first of several tokens gives the y and gx that it gives alone; in one shape as in another."""
    full = answer(subject, case)
    alone = resized(case, (1,))
    both = [name for name in ("y", "x") if name in full]
    want: dict[str, HostArray] = {name: full[name].reshape(-1, full[name].shape[-1])[:1] for name in both}
    got = answer(subject, alone)
    wrong = same(alone, got, want, u)
    if wrong:
        return f"{wrong} for x of shape {alone.x.shape}"
    flat = resized(case, ())
    try:
        without = answer(subject, flat)
    except Absent:
        return None
    limit = bounds(flat, u)
    wanted = {name: value.reshape(limit[name].shape) for name, value in got.items() if name in limit}
    wrong = same(flat, without, wanted, u)
    return f"{wrong} for x of shape {flat.x.shape}" if wrong else None


def stacked(subject: Any, case: Case, u: Width) -> str | None:
    """Leading axes only stack tokens: in one axis they give the same."""
    flat = resized(case, (prod(case.x.shape[:-1]),))
    limit, want = bounds(flat, u), answer(subject, case)
    for name, given in (("y", case.gy), ("x", case.x)):
        if name in want and want[name].shape == given.shape:
            want[name] = want[name].reshape(limit[name].shape)
    return differs(answer(subject, flat), want, limit)


def permuted(subject: Any, case: Case, u: Width) -> str | None:
    """Permuting tokens permutes y and gx, and leaves the other gradients."""
    N = prod(case.x.shape[:-1])
    order = np.random.default_rng(2).permutation(N)

    def turn(value: HostArray) -> HostArray:
        return value.reshape(N, -1)[order].reshape(value.shape)

    tokens: Any = {name: turn(value) for name, value in case.arrays().items() if name in OF_TOKENS}
    turned = replace(case, **tokens)
    want = answer(subject, case)
    return same(turned, answer(subject, turned), want | {k: turn(want[k]) for k in ("y", "x") if k in want}, u)


def padded(subject: Any, case: Case, u: Width) -> str | None:
    """Rows of zeros in A, columns of zeros in B, past both sides, with the same s: nothing else moves."""
    r, more = case.config.r, 1 + max(case.W.shape)
    alpha = case.config.lora_alpha * (more / r) ** (0.5 if case.config.use_rslora else 1.0)
    A, B = np.zeros((more, case.A.shape[1]), case.A.dtype), np.zeros((case.B.shape[0], more), case.B.dtype)
    A[-r:], B[:, -r:] = case.A, case.B  # at the end, where a rank that was cut off would be missed
    wide = replace(case, A=A, B=B, config=replace(case.config, r=more, lora_alpha=alpha))
    want, got = answer(subject, case), answer(subject, wide)
    bound = bounds(replace(wide, A=A, B=B), u)
    for name, part in (("A", np.s_[-r:]), ("B", np.s_[:, -r:])):
        for one in (got, bound):
            if name in one and one[name].ndim == 2 and one[name].shape == getattr(wide, name).shape:
                one[name] = one[name][part]
    return differs(got, want, bound)


def layouts(subject: Any, case: Case, u: Width) -> str | None:
    """The same numbers in memory of another layout give the same."""

    def repeated(value: HostArray) -> HostArray:
        return np.broadcast_to(value[:1], value.shape) if value.ndim > 1 else value

    flat, every = resized(case, (prod(case.x.shape[:-1]),)), set(case.arrays())
    for words, layout, at, names in (
        ("every second of another, and read-only", _strided, case, every),
        ("offset", _offset, flat, every),
        ("transposed", np.asfortranarray, flat, every),
        ("one row repeated by a stride of 0", repeated, flat, {"gy", "x"}),
    ):
        viewed = {name: layout(value) if name in names else value for name, value in at.arrays().items()}
        plainly = replace(at, **{name: np.array(value) for name, value in viewed.items()})  # type: ignore[arg-type]
        wrong = same(plainly, answer(subject, as_given(at, viewed)), answer(subject, plainly), u)
        if wrong:
            return f"{wrong} where arrays are {words}"
    return None


def as_given(case: Case, views: dict[str, HostArray]) -> AsGiven:
    """The case with some arrays in place of others, their layout left as it is."""
    return AsGiven(**({name: getattr(case, name) for name in case.__dataclass_fields__} | views))


def _strided(value: HostArray) -> HostArray:
    view = np.repeat(value, 2, axis=-1)[..., ::-1][..., ::-2]
    view.flags.writeable = False
    return view


def _offset(value: HostArray) -> HostArray:
    room = np.full(value.size + 3, np.nan, value.dtype)
    room[3:] = value.reshape(-1)
    return room[3:].reshape(value.shape)


VIEWS: dict[str, Callable[[HostArray], HostArray]] = {
    "every second of another, and read-only": _strided,
    "transposed": np.asfortranarray,
    "offset": _offset,
}
