"""Layers whose every intermediate is exact, whatever the order of evaluation: right answers agree bit for bit.

The numbers are small multiples of powers of two, s is 1.5, a mask holds 0 and 2 or 4, and DoRA's V has 1, 4
or 16 entries ±2ʲ in a row, so that its norm is a power of two. Derivation: specs/lattice.md.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from ... import LoraConfig
from ..bounds.worst import bounds
from ..cases import Case, HostArray, under
from ..conventions import OURS, Spec, spec_of
from ..layers.dyadic import TooWide, solve
from ..precision import PRECISIONS, Precision
from ..report import Check
from .tensors import NOT_OFFERED, Absent, Crash, answer, chosen, offers, refusal

BITS = {"float64": 24, "float32": 24, "float16": 11, "bfloat16": 8}  # significand asked for; float64 has more
#         d_out d_in r  lead    rslora   p      r past both sides, r = 1, odd r, d_out = 1, one token, no token
SHAPES = (
    (12, 16, 6, (2, 5), False, 0.5),
    (5, 16, 9, (7,), False, 0.75),
    (3, 23, 7, (1,), False, 0.5),
    (1, 16, 1, (3,), False, 0.75),
    (9, 33, 4, (2, 3), True, 0.5),
    (17, 18, 16, (2, 2), True, 0.75),
    (6, 17, 5, (0,), False, 0.5),
)
#            bias, bias of B, dropout
VARIANTS = (
    ("frozen", False, True),
    ("trained", True, True),
    ("absent", True, False),
    ("trained", False, False),
)
# Tried in turn: largest |x|, |A| and |B|, |W| and |b|, |gy|; share of non-zeros; exponents of k, and of V
RANGES = (
    (3, 2, 4, 2, 1.0, (-4, -2, -1, 1), (0, 1)),
    (2, 1, 2, 1, 1.0, (-2, -1, 1), (0, 1)),
    (1, 1, 2, 1, 0.7, (-1, 1), (0, 1)),
    (1, 1, 1, 1, 0.5, (-1, 1), (0,)),
    (1, 1, 1, 1, 0.25, (-1,), (0,)),
    (1, 1, 1, 1, 0.12, (-1,), (0,)),
)
AXES = {
    "A": ("r", "d_in"),
    "B": ("d_out", "r"),
    "W": ("d_out", "d_in"),
    "x": ("N", "d_in"),
    "y": ("N", "d_out"),
}


class Lattice(NamedTuple):
    """A case in float32, its exact answer in float64, and the bits that any evaluation of it needs."""

    case: Case
    want: dict[str, HostArray]
    bits: int

    def fits(self, dtype: str) -> bool:
        """Whether every intermediate of every order of evaluation is a number of this dtype."""
        return self.bits <= BITS[dtype]


def lattice_cases(seed: int = 0) -> list[Case]:
    """Every case of the battery, in float32, with stable ids: what golden vectors are made of."""
    return [item.case for item in lattice(seed)]


@lru_cache(maxsize=32)  # every spec at every width: 2 MB each
def lattice(seed: int = 0, bits: int = 24, spec: Spec = OURS) -> tuple[Lattice, ...]:
    """The cases, their answers and their proofs. With fewer bits the numbers are smaller and sparser."""
    return tuple(filter(None, (_entry(mode, i, seed, bits, spec) for mode in MODES for i in range(N_CASES))))


MODES = ("lora", "dora", "dora full norm")
N_CASES = len(SHAPES) * len(VARIANTS)


def _entry(mode: str, i: int, seed: int, bits: int, spec: Spec) -> Lattice | None:
    d_out, d_in, r, lead, rslora, p = SHAPES[i % len(SHAPES)]
    bias, lora_bias, dropout = VARIANTS[(i // len(SHAPES) + i) % len(VARIANTS)]
    alpha = 1.5 * r**0.5 if rslora else 1.5 * r
    kind = mode + ", dropout" * dropout
    number = f"lattice/{kind.replace(', ', '-').replace(' ', '-')}/{i}"
    how: Any = {"alpha": alpha, "rslora": rslora, "bias": bias, "lora_bias": lora_bias and mode == "lora"}
    shape = (d_out, d_in, r, lead)
    return draw(number, mode, shape, seed=(seed, i), p=p if dropout else 0.0, bits=bits, spec=spec, **how)


# ---- one case ----------------------------------------------------------------------------------------------


def draw(
    name: str,
    mode: str,
    shape: tuple[int, int, int, tuple[int, ...]],
    *,
    alpha: float,
    rslora: bool = False,
    p: float = 0.0,
    bias: str = "absent",
    lora_bias: bool = False,
    seed: tuple[int, ...] = (0,),
    bits: int = 24,
    spec: Spec = OURS,
) -> Lattice | None:
    """Draw numbers from ever smaller ranges until all intermediates are proven to fit; None where none do."""
    r, mode = shape[2], mode.partition(",")[0]
    settings: Any = {"use_rslora": rslora, "use_dora": mode != "lora", "lora_bias": lora_bias}
    trained = "all" if bias == "trained" else "none"
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=p, bias=trained, **settings)
    for ranges in RANGES:
        found = _numbers(np.random.default_rng(seed), shape, config, bias, ranges)
        arrays: Any = {key: value.astype(np.float32) for key, value in found.items()}
        case = Case(
            id=name,
            kind=mode + (", dropout" if p else ""),
            config=config,
            train_b=bias == "trained",
            norm_gradient="full" in mode,
            **arrays,
        )
        case = under(case, spec)
        with suppress(TooWide):
            return Lattice(case, *solve(case, bits))
    return None


def _numbers(rng: Any, shape: Any, config: LoraConfig, bias: str, ranges: Any) -> dict[str, HostArray]:
    """The arrays of one case, by name, in float64."""
    (d_out, d_in, r, lead), s, p = shape, config.scaling, config.lora_dropout
    most_x, most_ab, most_w, most_g, share, k_exponents, v_exponents = ranges

    def whole(most: int, size: tuple[int, ...], part: float = 1.0) -> HostArray:
        """Integers in [−most, most], a part of them not 0."""
        values = rng.integers(1, most + 1, size) * rng.choice((-1, 1), size)
        kept = rng.random(size) < part
        if values.ndim == 2 and values.size:  # none of the rows and columns is empty
            kept[np.arange(max(size)) % size[0], np.arange(max(size)) % size[1]] = True
        return np.asarray(values * kept, dtype=np.float64)

    found = {"x": whole(most_x, (*lead, d_in), 0.85 * share), "gy": whole(most_g, (*lead, d_out), 0.8 * share)}
    found |= {"A": whole(most_ab, (r, d_in), share), "B": whole(most_ab, (d_out, r), share)}
    found["W"] = whole(most_w, (d_out, d_in), 0.9 * share)
    if config.use_dora:  # (lattice.3): V is drawn and W = V − s·BA
        count = 16 if d_in >= 16 else 4 if d_in >= 4 else 1
        j = rng.choice(v_exponents, d_out)
        V = np.zeros((d_out, d_in))
        for row in range(d_out):
            V[row, rng.choice(d_in, count, replace=False)] = rng.choice((-1, 1), count) * 2.0 ** j[row]
        found["W"] = V - s * found["B"] @ found["A"]
        found["m"] = count**0.5 * 2.0**j * 2.0 ** rng.choice(k_exponents, d_out)
    if p:
        kept = rng.random((*lead, d_in)) >= p
        kept.reshape(-1)[:2] = (False, True)[: kept.size] if kept.size else ()
        found["mask"] = np.where(kept, 1 / (1 - p), 0.0)
    if bias != "absent":
        found["b"] = whole(most_w, (d_out,))
    if config.lora_bias:
        found["bB"] = whole(most_ab, (d_out,))
    return found


# ---- the battery -------------------------------------------------------------------------------------------


def battery_lattice(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Layers of every kind, bit for bit; in a profile of 16 bits, layers that are exact in those too."""
    dtype, spec = PRECISIONS[profile].dtype, spec_of(subject)
    for i, item in enumerate(lattice(seed, BITS[dtype], Spec(dora=spec.dora, dropout=spec.dropout))):
        case = item.case
        if case.m is not None and case.norm_gradient not in spec.norm_gradient:
            continue
        asked = case.id in (only, only.rpartition("/")[0])  # by its own name: whatever the level
        if chosen(case.id, only) and (level == "full" or i % 3 == 0 or asked):
            checks = judge_lattice(subject, item, profile)
            yield checks if case.x.size else [check for check in checks if check.verdict != "vacuous"]


def judge_lattice(subject: Any, item: Lattice, profile: str) -> list[Check]:
    """Every tensor of one case, each of its entries equal to the truth."""
    case = cast(item.case, PRECISIONS[profile].dtype)
    try:
        got = answer(subject, case)
    except (Absent, Crash) as error:
        verdict = refusal(error)
        return [Check(f"{case.id}/y", "lattice", case.kind, "y", verdict, note=str(error))]
    names = [name for name in item.want if name in ("y", *case.wanted) or name in got]
    checks = [
        _compare(case, name, got.get(name), item.want[name].astype(case.x.dtype))
        if name in got or offers(subject, name)
        else Check(f"{case.id}/{name}", "lattice", case.kind, name, "not run", note=NOT_OFFERED)
        for name in names
    ]
    if case.m is None or all(check.at is None for check in checks):
        return checks
    return [_excused(check, item, got, spec_of(subject), PRECISIONS[profile]) for check in checks]


def _excused(check: Check, item: Lattice, got: dict[str, HostArray], spec: Any, precision: Precision) -> Check:
    """Say where roundings explain a difference under DoRA; pass it where the subject declares such a root.

    IEEE roots and quotients of powers of two are exact; approximate ones, as of fast-math, are off by ulps.
    """
    if check.at is None:
        return check
    name, u = check.tensor, max(precision.operand, precision.accumulate, precision.store)
    bound = bounds(item.case, u)[name]
    with np.errstate(invalid="ignore"):
        share = np.abs(got[name].astype(np.float64) - item.want[name]) / np.where(bound > 0, bound, 1e-300)
    if not (share <= 1).all():
        return check
    if getattr(spec, "approximate_root", False):
        return replace(check, verdict="pass", ratio=float(share.max()))
    note = f"{check.note}; by no more than roundings, as of an approximate root or quotient"
    return replace(check, ratio=float(share.max()), note=note)


def cast(case: Case, dtype: str) -> Case:
    """The case in another dtype."""
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  (NumPy knows the name after this)
    return replace(case, **{name: value.astype(dtype) for name, value in case.arrays().items()})  # type: ignore[arg-type]


def _compare(case: Case, tensor: str, got: HostArray | None, want: HostArray) -> Check:
    check = partial(Check, f"{case.id}/{tensor}", "lattice", case.kind, tensor)
    if got is None:
        return check("fail", note="asked for, and not given")
    for what, came, wanted in (("shape", got.shape, want.shape), ("dtype", got.dtype, want.dtype)):
        if came != wanted:
            return check("fail", note=f"expected {what} {wanted}, got {came}")
    bad = ~(got == want)  # a NaN differs from everything, −0 does not differ from 0
    if not bad.any():
        return check(
            "pass" if np.any(want) else "vacuous", note="" if np.any(want) else "the truth is zero everywhere"
        )
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return check("fail", at=at, got=float(got[at]), want=float(want[at]), note=places(bad, tensor))


def places(bad: HostArray, tensor: str) -> str:
    """How many entries differ, and in which rows and columns where not in all.

    >>> places(np.arange(18).reshape(9, 2) > 15, "A")
    '2 of 18 differ, r 8..8 of 9, the last r % 4'
    """
    folded = bad.reshape(-1, bad.shape[-1]) if bad.ndim > 1 else bad
    names = ("N", *AXES[tensor][1:])[-folded.ndim :] if tensor in ("x", "y") else AXES.get(tensor, ("d_out",))
    text = f"{int(bad.sum())} of {bad.size} differ"
    for axis, name in enumerate(names):
        hit = np.flatnonzero(folded.any(axis=tuple(i for i in range(folded.ndim) if i != axis)))
        size = folded.shape[axis]
        if len(hit) == size:
            continue
        first, last = int(hit[0]), int(hit[-1])
        run = last - first + 1 == len(hit)
        text += f", {name} {f'{first}..{last}' if run else ' '.join(map(str, hit[:6].tolist()))} of {size}"
        tile = next((t for t in (4, 8, 16, 32, 2) if size % t == len(hit)), 0)
        if run and last == size - 1 and tile:
            text += f", the last {name} % {tile}"
    return text
