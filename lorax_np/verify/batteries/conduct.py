"""How a layer must behave over several calls and updates, in other forms, and what its tensors must keep.

Each law says in a line what is wrong, or nothing. What must be equal for any order of evaluation is compared
within twice the bounds of specs/verify.md; what must be the same bits, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..bounds.widths import Width, bounds, width
from ..cases import UNIT, Case, HostArray, draw, under
from ..conventions import spec_of
from ..layers import plain
from ..precision import PRECISIONS
from ..report import Check
from . import forms, invariants
from .forms import same
from .lattice import cast
from .laws import Law, differs, hashes, lawful
from .probes import draws
from .tensors import Crash, answer, ask, by_name, chosen, in_one_line

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
        "three runs give the same bits": (True, partial(_bits, subject, case, u)),
        "what was returned stays as it was": (True, partial(_kept, subject, case)),
        "nothing that is given is written to": (True, partial(_untouched, subject, case)),
        "without a mask nothing is dropped, whatever p is": (given, partial(_eval, subject, case, u)),
        "zero tokens in any shape": (True, partial(forms.empty, subject, case)),
        "one token, as a row and without axis": (True, partial(forms.one_token, subject, case, u)),
        "leading axes only stack tokens": (True, partial(forms.stacked, subject, case, u)),
        "tokens in another order": (True, partial(forms.permuted, subject, case, u)),
        "rank past both sides": (True, partial(forms.padded, subject, case, u)),
        "strided, transposed, offset and repeated arrays": (strided, partial(forms.layouts, subject, case, u)),
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


def _gradients(subject: Any, case: Case, gy: HostArray) -> dict[str, HostArray]:
    return by_name("backward", ask(subject, "backward", case, gy), ALL)


def _forward_twice(subject: Any, case: Case, u: Width) -> str | None:
    want, mine = answer(subject, case), case.copy()
    ask(subject, "forward", mine)
    y = by_name("forward", {"y": ask(subject, "forward", mine)}, ("y",))
    return same(case, y | _gradients(subject, mine, mine.gy), want, u)


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
        wrong = same(one, y | _gradients(subject, one, one.gy), wanted, u)
        if wrong:
            return f"{wrong}: backward has taken the activations of another forward"
    return None


def _bits(subject: Any, case: Case, u: Width) -> str | None:
    first = answer(subject, case)
    for _ in range(2):
        again = answer(subject, case)
        wrong = _bitwise(first, again)
        if wrong:
            return wrong if same(case, again, first, u) else f"{wrong}, by no more than roundings"
    return None


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


def _untouched(subject: Any, case: Case) -> str | None:
    """Neither the case nor gy, after each call: what a second one undoes was written all the same."""
    mine, gy = case.copy(), case.gy.copy()
    twice: tuple[tuple[Any, ...], ...] = (("forward", mine), ("backward", mine, gy), ("backward", mine, gy))
    for method, *given in (("run", mine, gy),) if hasattr(subject, "run") else twice:
        ask(subject, method, *given)
        before = hashes(case)
        after, beside = hashes(mine), hashes(replace(mine, gy=gy))
        changed = [name for name in before if not before[name] == after[name] == beside[name]]
        if changed:
            return f"written to: {', '.join(changed)}"
    return None


def _eval(subject: Any, case: Case, u: Width) -> str | None:
    wet, dry = case.undropped(0.45), case.undropped()
    return same(dry, answer(subject, wet), answer(subject, dry), u)


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
