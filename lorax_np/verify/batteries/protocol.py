"""How a layer must behave over several calls, layouts and updates, and what merging must keep.

Each law says in a line what is wrong, or nothing. What must be equal for any order of evaluation is compared
within twice the bounds of specs/verify.md; what must be the same bits, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ..bounds.widths import Width, bounds, width
from ..cases import UNIT, Case, HostArray, draw, under
from ..conventions import spec_of
from ..layers import plain
from ..precision import PRECISIONS
from ..report import Check
from . import invariants
from .lattice import cast
from .laws import OF_TOKENS, AsGiven, Law, differs, hashes, lawful, resized
from .probes import draws
from .tensors import Absent, Crash, answer, ask, by_name, chosen, in_one_line

EPS = UNIT["float64"]
ALL = ("x", "W", "A", "B", "m", "b", "bB")


def battery_conduct(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Conduct over calls, layouts and updates, then merging, then the laws between a layer's tensors."""
    spec, u, dtype = spec_of(subject), width(PRECISIONS[profile]), PRECISIONS[profile].dtype
    kinds = ["lora, dropout"] + [kind for full, kind in _DORA.items() if full in spec.norm_gradient]
    for kind in kinds[: 2 if level == "quick" else 3]:
        drawn = draw("", kind, (5, 7, 3, (2, 2)), "float64", (seed, 9), bias="trained", lora_bias=True)
        case = cast(under(drawn, spec), dtype)
        if draws(subject):
            case = case.undropped()
        name = kind.partition(",")[0].replace(" ", "-")
        for i, (law, run) in enumerate(laws_of(subject, case, u).items()):
            id = f"conduct/{name}/{i}"
            if run is not None and chosen(id, only):
                yield [lawful(id, "conduct", kind, law, run)]


_DORA = {False: "dora, dropout", True: "dora full norm, dropout"}


def laws_of(subject: Any, case: Case, u: Width) -> dict[str, Law | None]:
    """The laws by name, in the order of their numbers; None where one says nothing of this layer."""
    dry = case.undropped()
    biased, case = dry, without_bB(case)
    dry = without_bB(dry)
    two = hasattr(subject, "forward") and hasattr(subject, "backward")
    several = two and spec_of(subject).interleaves
    merges, unmerges = hasattr(subject, "merge"), hasattr(subject, "merge") and hasattr(subject, "unmerge")
    dora, strided, given = case.m is not None, spec_of(subject).strided, not draws(subject)
    laws: dict[str, tuple[bool, Law]] = {
        "two forwards before a backward": (several, partial(_forward_twice, subject, case, u)),
        "a second backward gives the same": (two, partial(_backward_twice, subject, case)),
        "two cases interleaved": (several, partial(_interleaved, subject, case, u)),
        "three runs give the same bits": (True, partial(_bits, subject, case)),
        "what was returned stays as it was": (True, partial(_kept, subject, case)),
        "backward writes to nothing, gy included": (True, partial(_gy_untouched, subject, case)),
        "without a mask nothing is dropped, whatever p is": (given, partial(_eval, subject, case, u)),
        "zero tokens in any shape": (True, partial(_empty, subject, case)),
        "one token, as a row and without axis": (True, partial(_one_token, subject, case, u)),
        "tokens in another order": (True, partial(_permuted, subject, case, u)),
        "rank past both sides": (True, partial(_padded, subject, case, u)),
        "transposed, offset and repeated arrays": (strided, partial(_layouts, subject, case, u)),
        "updates of the parameters are seen": (True, partial(_updated, subject, case, u)),
        "merged weights compute the same": (merges, partial(invariants.merged, subject, biased, u)),
        "unmerging gives W and b back": (unmerges, partial(invariants.unmerged, subject, biased, u)),
        "BᵀgB = gA Aᵀ": (True, partial(invariants.gauge, subject, case, u)),
        "A → TA, B → BT⁻¹ moves nothing else": (True, partial(invariants.turned, subject, case, u)),
        "s·dL/ds = ⟨B, gB⟩": (not dora, partial(invariants.scaled, subject, case, u)),
        "m∘gm = Σ gy∘(y − b)": (dora, partial(invariants.magnitude, subject, dry, u)),
        "⟨B, gB⟩ by rows where W = 0: 0, or m∘gm": (dora, partial(invariants.tangent, subject, dry, u)),
    }
    return {name: partial(_fitting, law) if applies else None for name, (applies, law) in laws.items()}


def without_bB(case: Case) -> Case:
    """The layer without a bias of B, which many implementations do not have."""
    return replace(case, bB=None, config=replace(case.config, lora_bias=False))


def _fitting(law: Law) -> str | None:
    """A law over tensors that may not fit together, which breaks it."""
    try:
        return law()
    except (ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        return f"tensors do not fit together: {in_one_line(error)}"


# ---- conduct -------------------------------------------------------------------------------------------------


def _same(case: Case, got: dict[str, HostArray], want: dict[str, HostArray], u: Width) -> str | None:
    return differs(got, want, bounds(case, u))


def _gradients(subject: Any, case: Case, gy: HostArray) -> dict[str, HostArray]:
    return by_name("backward", ask(subject, "backward", case, gy), ALL)


def _forward_twice(subject: Any, case: Case, u: Width) -> str | None:
    want, mine = answer(subject, case), case.copy()
    ask(subject, "forward", mine)
    y = by_name("forward", {"y": ask(subject, "forward", mine)}, ("y",))
    return _same(case, y | _gradients(subject, mine, mine.gy), want, u)


def _backward_twice(subject: Any, case: Case) -> str | None:
    """A gradient is returned, not summed into the last one: twice the value is the common fault."""
    mine = case.copy()
    ask(subject, "forward", mine)
    first, second = (_gradients(subject, mine, mine.gy) for _ in range(2))
    return _bitwise(first, second)


def _bitwise(first: dict[str, HostArray], second: dict[str, HostArray]) -> str | None:
    for name, value in first.items():
        if name not in second or not np.array_equal(value, second[name], equal_nan=True):
            return f"{name} differs"
    return None


def _other(case: Case, seed: int = 1) -> Case:
    """Another point of the same shape."""
    rng = np.random.default_rng(seed)

    def moved(value: HostArray) -> HostArray:
        return (value * rng.uniform(0.5, 2.0, value.shape)).astype(value.dtype)

    return replace(case, **{k: moved(v) for k, v in case.arrays().items() if k != "mask"})  # type: ignore[arg-type]


def _interleaved(subject: Any, case: Case, u: Width) -> str | None:
    cases = case, _other(case)
    want, mine = [answer(subject, one) for one in cases], [one.copy() for one in cases]
    ys = [by_name("forward", {"y": ask(subject, "forward", one)}, ("y",)) for one in mine]
    for one, y, wanted in zip(mine, ys, want, strict=True):
        wrong = _same(one, y | _gradients(subject, one, one.gy), wanted, u)
        if wrong:
            return f"{wrong}: backward has taken the activations of another forward"
    return None


def _bits(subject: Any, case: Case) -> str | None:
    first = answer(subject, case)
    return _bitwise(first, answer(subject, case)) or _bitwise(first, answer(subject, case))


def _raw(subject: Any, case: Case) -> dict[str, Any]:
    """What a subject returns, in its own arrays."""
    if hasattr(subject, "run"):
        y, gradients = ask(subject, "run", case, case.gy)
    else:
        y, gradients = ask(subject, "forward", case), ask(subject, "backward", case, case.gy)
    if not isinstance(gradients, dict):
        raise Crash(f"backward: expected a dict of arrays by name, got {type(gradients).__name__}")
    return {"y": y, **gradients}


def _kept(subject: Any, case: Case) -> str | None:
    held = _raw(subject, case.copy())
    names = ("y", *ALL)
    before = by_name("backward", held, names)
    other = _other(case)
    _raw(subject, other.copy())
    return _bitwise(before, by_name("backward", held, names))


def _gy_untouched(subject: Any, case: Case) -> str | None:
    mine, gy = case.copy(), case.gy.copy()
    if hasattr(subject, "run"):
        ask(subject, "run", mine, gy)
    else:
        ask(subject, "forward", mine)
        ask(subject, "backward", mine, gy)
        ask(subject, "backward", mine, gy)
    before, after = hashes(case), hashes(replace(mine, gy=gy))
    changed = [name for name in before if before[name] != after[name]]
    return f"written to: {', '.join(changed)}" if changed else None


def _eval(subject: Any, case: Case, u: Width) -> str | None:
    wet, dry = case.undropped(0.45), case.undropped()
    return _same(dry, answer(subject, wet), answer(subject, dry), u)


def _empty(subject: Any, case: Case) -> str | None:
    for lead in ((0,), (0, 3)):
        none = resized(case, lead)
        got = answer(subject, none)
        for name in ("y", *case.wanted):
            shape = none.gy.shape if name == "y" else getattr(none, name).shape
            if name in got and got[name].shape != shape:
                return f"{name}: expected shape {shape}, got {got[name].shape}"
            if name in got and not (got[name] == 0).all():
                return f"{name}: expected 0 for x of shape {none.x.shape}, got {got[name].flat[0]}"
    return None


def _one_token(subject: Any, case: Case, u: Width) -> str | None:
    """The first of several tokens gives the y and gx that it gives alone; in one shape as in another."""
    full = answer(subject, case)
    alone = resized(case, (1,))
    both = [name for name in ("y", "x") if name in full]
    want: dict[str, HostArray] = {name: full[name].reshape(-1, full[name].shape[-1])[:1] for name in both}
    got = answer(subject, alone)
    wrong = _same(alone, got, want, u)
    if wrong:
        return f"{wrong} for x of shape {alone.x.shape}"
    flat = resized(case, ())
    try:
        without = answer(subject, flat)
    except Absent:
        return None
    limit = bounds(flat, u)
    wanted = {name: value.reshape(limit[name].shape) for name, value in got.items() if name in limit}
    wrong = _same(flat, without, wanted, u)
    return f"{wrong} for x of shape {flat.x.shape}" if wrong else None


def _permuted(subject: Any, case: Case, u: Width) -> str | None:
    """Permuting tokens permutes y and gx, and leaves the other gradients."""
    N = prod(case.x.shape[:-1])
    order = np.random.default_rng(2).permutation(N)

    def turn(value: HostArray) -> HostArray:
        return value.reshape(N, -1)[order].reshape(value.shape)

    tokens: Any = {name: turn(value) for name, value in case.arrays().items() if name in OF_TOKENS}
    turned = replace(case, **tokens)
    want = answer(subject, case)
    return _same(turned, answer(subject, turned), want | {k: turn(want[k]) for k in ("y", "x") if k in want}, u)


def _padded(subject: Any, case: Case, u: Width) -> str | None:
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


def _layouts(subject: Any, case: Case, u: Width) -> str | None:
    def offset(value: HostArray) -> HostArray:
        room = np.full(value.size + 3, np.nan, value.dtype)
        room[3:] = value.reshape(-1)
        return room[3:].reshape(value.shape)

    def transposed(value: HostArray) -> HostArray:
        return np.asfortranarray(value)

    def repeated(value: HostArray) -> HostArray:
        return np.broadcast_to(value[:1], value.shape) if value.ndim > 1 else value

    flat = resized(case, (prod(case.x.shape[:-1]),))
    for words, layout, names in (
        ("offset", offset, set(case.arrays())),
        ("transposed", transposed, set(case.arrays())),
        ("one row repeated by a stride of 0", repeated, {"gy", "x"}),
    ):
        viewed = {name: layout(value) if name in names else value for name, value in flat.arrays().items()}
        plainly = replace(flat, **{name: np.array(value) for name, value in viewed.items()})  # type: ignore[arg-type]
        fields = {name: getattr(flat, name) for name in flat.__dataclass_fields__}
        wrong = _same(plainly, answer(subject, AsGiven(**(fields | viewed))), answer(subject, plainly), u)
        if wrong:
            return f"{wrong} where arrays are {words}"
    return None


def _updated(subject: Any, case: Case, u: Width) -> str | None:
    """A step in new arrays, then one in place: a norm, a product or a transpose kept from before would show."""
    want = {name: value.copy() for name, value in case.arrays().items()}
    mine = case.copy()
    _raw(subject, mine)
    for step, where in ((2, "new arrays"), (3, "the same arrays")):
        after = _other(replace(case, **want), step)  # type: ignore[arg-type]
        if where == "new arrays":
            mine = after.copy()
        else:
            for name, value in after.arrays().items():
                getattr(mine, name)[...] = value
        wide = cast(after, "float64")
        y, truth = plain.run(wide, wide.gy)
        got = by_name("backward", _raw(subject, mine), ("y", *ALL))
        bound = {name: value + bounds(after, EPS)[name] for name, value in bounds(after, u).items()}
        wrong = differs(got, {k: v for k, v in {"y": y, **truth}.items() if k in got}, bound)
        if wrong:
            return f"{wrong} after parameters were updated in {where}"
    return None
