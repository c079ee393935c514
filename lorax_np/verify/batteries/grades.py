"""How well a merge into a weight of 16 bits is rounded: a grade, and a failure only past all of them.

An entry has the first grade that it fits: it is the number nearest to the exact one; or what float32 can give,
rounded once; or what comes of an update that was rounded before it was added; or what arithmetic in 16 bits
throughout can give. Derivation: specs/merge.md.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from textwrap import wrap
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..bounds.ceiling import merged_ceiling
from ..cases import PROFILES, UNIT, Case, HostArray, draw
from ..conventions import spec_of
from ..lines import WIDTH
from ..precision import Precision
from ..report import Check
from ..truths import exact
from ..truths.nearest import nearest, places
from .lattice import cast
from .tensors import Absent, Crash, ask, by_name, chosen, refusal

Merge = Callable[[Case], dict[str, Any]]
GRADES = ("correctly rounded", "rounded once", "doubly rounded", "low precision")
WORDS = {
    "rounded once": "in float32",
    "doubly rounded": "delta rounded first",
    "low precision": "summed in 16 bits, or rounded oftener",
}
SHAPE = (48, 40, 8, (1,))
ALPHA = 3.0**1.5  # α/r of few digits, as 53/80, makes ties that the last bit of s decides
HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


class Exact(NamedTuple):
    """A merged tensor in fixed point, its parts, and how far float32 and 16-bit arithmetic may be from it."""

    value: Any  # t = k∘(W + delta)
    base: Any  # W
    delta: Any
    m: Any  # as a column; None without DoRA
    single: HostArray  # bound on the error of t in float32
    single_delta: HostArray  # of delta in float32
    half: HostArray  # of t in 16 bits


def battery_grades(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Merges into a weight of 16 bits, of adapters in float32 and in 16 bits, in each way the subject has."""
    dtype = PROFILES[profile]
    if dtype not in HALF or not hasattr(subject, "merge"):
        return
    for words, merge in _ways(subject).items():
        for i, kind in enumerate(("lora", "dora")):
            for adapters in ("float32", dtype):
                label = ", ".join(filter(None, (kind, f"{adapters} adapters", words)))
                id = f"grades/{kind}-{adapters}{words and '-'}{words.replace(', ', '-')}/{i}"
                if chosen(id, only):
                    case = merge_case(id, kind, dtype, adapters, (seed, i, 51))
                    yield judge_merge(merge, case, label, dtype)


def _ways(subject: Any) -> Mapping[str, Merge]:
    """The subject's merges by the settings that tell them apart; most subjects have one."""
    found: Mapping[str, Merge] | None = getattr(subject, "merges", None)
    return {"": subject.merge} if found is None or spec_of(subject).transposed else found


def merge_case(id: str, kind: str, dtype: str, adapters: str, seed: tuple[int, ...]) -> Case:
    """A layer of 16 bits whose adapter is in float32, or in 16 bits too."""
    wide = draw(id, kind, SHAPE, "float64", seed, alpha=ALPHA, bias="frozen", lora_bias=True)
    own: Any = {name: v.astype(adapters) for name, v in wide.arrays().items() if name in ("A", "B", "m", "bB")}
    return replace(cast(wide, dtype), **own)


def judge_merge(merge: Merge, case: Case, kind: str, dtype: str) -> list[Check]:
    """One check a tensor, with the grade that all its entries reach."""
    try:
        got = by_name("merge", ask(SimpleNamespace(merge=merge), "merge", case.copy()), ("W", "b"))
    except (Absent, Crash) as error:
        return [Check(f"{case.id}/W", "grades", kind, "W", refusal(error), note=str(error))]
    return [grade(case, kind, name, got.get(name), want, dtype) for name, want in exactly(case, dtype).items()]


def exactly(case: Case, dtype: str) -> dict[str, Exact]:
    """W' and b' of a case, with all that their grades need."""
    u, plain = UNIT["float32"], replace(case, m=None)
    single, half = (Precision("", dtype, 0.0, each, each) for each in (u, HALF[dtype]))
    near, far = merged_ceiling(case, single), merged_ceiling(case, half)
    alone = replace(plain, W=0 * case.W, b=None if case.b is None else 0 * case.b)
    update = merged_ceiling(alone, single)  # (merge.11) of delta alone
    V, t = exact.merged(plain), exact.merged(case)
    found = {}
    for name in t:
        base, m = exact.fixed(getattr(case, name)), None
        if name == "W" and case.m is not None:
            m = np.asarray(exact.fixed(case.m), dtype=object)[:, None]
        found[name] = Exact(t[name], base, V[name] - base, m, near[name], update[name], far[name])
    return found


def grade(case: Case, kind: str, name: str, got: HostArray | None, want: Exact, dtype: str) -> Check:
    """The verdict on one merged tensor: the grade of its worst entry, and how many are off."""
    check = partial(Check, f"{case.id}/{name}", "grades", kind, name)
    if got is None:
        return check("not run", note="the subject gives no such tensor")
    for what, came, wanted in (("shape", got.shape, want.value.shape), ("dtype", got.dtype.name, dtype)):
        if came != wanted:
            return check("fail", note=f"expected {what} {wanted}, got {came}")
    value = got.astype(np.float64)
    if not np.isfinite(value).all():
        return check("fail", note="not finite")
    error = exact.to_float(exact.fixed(value) - want.value)
    share = np.abs(error) / want.half
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(share)), share.shape))
    values: Any = {"ratio": float(share[at]), "at": at, "got": float(value[at])}
    values["want"] = float(exact.to_float(want.value[at]))
    if share[at] > 1:
        return check("fail", **values, note="further off than 16-bit arithmetic explains")
    wrong = _scale(error, want, dtype)
    if wrong:
        return check("fail", **values, note=wrong)
    off = value != nearest(want.value, dtype)
    left, found = off, GRADES[0]
    for name, fits in zip(GRADES[1:], (_once, _twice, None), strict=True):
        if left.any():
            found, left = name, left & (False if fits is None else ~fits(value, want, dtype))
    note = f"all of {off.size:,} entries"
    if off.any():
        worst = float((np.abs(error) / places(want.value, dtype)).max())
        note = f"{WORDS[found]}: {100 * off.mean():.3g} % of entries differ from the correctly rounded sum, "
        note += f"worst {worst:.3g} ulp"
    return check("pass", **values, grade=found, note=note)


def _once(value: HostArray, want: Exact, dtype: str) -> Any:
    """Whether an entry is what some number within float32's reach rounds to.  (merge.10)"""
    reach = exact.fixed(want.single)
    low, high = (nearest(want.value + sign * reach, dtype) for sign in (-1, 1))
    return (low <= value) & (value <= high)


def _twice(value: HostArray, want: Exact, dtype: str) -> Any:
    """Whether an entry is what comes of a delta that was rounded first.  (merge.11)"""
    reach = exact.fixed(want.single_delta)
    low, high, middle = (exact.fixed(nearest(want.delta + sign * reach, dtype)) for sign in (-1, 1, 0))
    if want.m is None:
        return (nearest(want.base + low, dtype) <= value) & (value <= nearest(want.base + high, dtype))
    fits = np.zeros(value.shape, bool)
    for V in (want.base + want.delta, want.base + middle):  # of which the norm may be taken
        n = exact.norms(V)[:, None]
        unsure = (np.abs(V) * (high - low)).sum(axis=1)[:, None] // n  # of n
        ends = []
        for delta in (low, high):
            t = (want.m << exact.BITS) // n * (want.base + delta) >> exact.BITS
            slack = exact.fixed(want.single) + (np.abs(t) * unsure) // n
            ends += [nearest(t - slack, dtype), nearest(t + slack, dtype)]
        fits |= (np.min(ends, axis=0) <= value) & (value <= np.max(ends, axis=0))
    return fits


def _scale(error: HostArray, want: Exact, dtype: str) -> str:
    """What is wrong with the size of the whole update, below the noise of its entries.  (merge.13)"""
    update = exact.to_float(want.delta)
    if want.m is not None:
        update = update * exact.to_float(want.m) / exact.to_float(exact.norms(want.base + want.delta))[:, None]
    weight = 1 / np.square(want.half)  # by which an honest error grows and falls
    size = float((weight * update * update).sum())
    if size == 0.0:
        return ""
    slope = float((weight * error * update).sum()) / size
    left = float((weight * np.square(error - slope * update)).mean())
    limit = (2 if want.m is None else 6) * HALF[dtype] + 8 * np.sqrt(left / size)
    return f"the update is off by {100 * slope:.2g} % as a whole" if abs(slope) > limit else ""


def graded(checks: Iterable[Check], profile: str) -> list[str]:
    """A line for each layer's W'; one for each way of merging whose grades are all the best."""
    mine, lines = [check for check in checks if check.grade and check.tensor == "W"], []
    ways = [check.kind.split(", ", 2)[2:] for check in mine]
    for way in [way for i, way in enumerate(ways) if way not in ways[:i]]:
        of_it = [check for check, its in zip(mine, ways, strict=True) if its == way]
        if {check.grade for check in of_it} == {GRADES[0]}:
            title = ", ".join([f"merge in {profile}", *way])
            lines.append(f"{title}: {GRADES[0]} (every entry of {len(of_it)} layers)")
        else:
            lines += [f"merge in {profile}, {check.kind}: {check.grade} ({check.note})" for check in of_it]
    return [part for line in lines for part in wrap(line, WIDTH, subsequent_indent="  ")]
