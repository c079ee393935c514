"""How good the diagnosis is: every known fault planted, one at a time and in pairs, and what it is called.

Words of an outcome: named, alone and by its own id; class, together with faults that give the same answers;
hidden, together with the right layer, roundings being larger than its effect; several, its name among others
that differ; masked, one of two named where the other changes nothing that is seen; unnamed; wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..batteries.lattice import cast
from ..batteries.tensors import answer
from ..cases import Case, HostArray
from ..conventions import Spec
from ..layers import plain
from ..layers.plain import Step
from ..layers.replaying import STEPS
from ..layers.rounding import to_bits
from ..precision import PRECISIONS
from .dictionary import RIGHT, Comparison, Match, faults, replay
from .pairs import pairs
from .probe_layers import KINDS, LAYERS, observe, probe

Outcome = Literal["named", "class", "hidden", "several", "masked", "unnamed", "wrong"]
BITS = {2.0**-8: 8, 2.0**-11: 11}


class Stored:
    """Plain steps, some changed, each stored in the profile's format: how a narrow implementation computes."""

    def __init__(self, changed: Mapping[str, Step], profile: str) -> None:
        """changed : step name to what stands in for it."""
        self.spec, self.bits = Spec(norm_gradient=(False, True)), BITS[PRECISIONS[profile].store]
        self.steps = {name: self._stored(step) for name, step in {**STEPS, **changed}.items()}

    def _stored(self, step: Step) -> Step:
        def rounded(t: Any) -> Any:
            value = step(t)
            return to_bits(value, self.bits) if isinstance(value, np.ndarray) else value

        return rounded

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients, in the case's dtype."""
        wide, dtype = cast(case, "float64"), case.x.dtype
        y, g = plain.run(wide, wide.gy, self.steps)
        return y.astype(dtype), {name: value.astype(dtype) for name, value in g.items()}


@dataclass(frozen=True)
class Trial:
    """One planting: what was planted, what came of it, the names that were given.

    invented : names given with the planted fault out of the catalogue, outside of the class printed with it in;
               two faults that together are the planted one, digit for digit, are none, nor is what hides with
               the right layer
    """

    planted: tuple[str, ...]
    outcome: Outcome
    names: tuple[str, ...]
    invented: tuple[str, ...] = ()


def subject_of(changed: Mapping[str, Step], profile: str) -> Any:
    """A subject with some steps changed, in the arithmetic of a profile."""
    return (
        plain.Plain(changed)
        if PRECISIONS[profile].dtype in ("float32", "float64")
        else Stored(changed, profile)
    )


def single(id: str, profile: str, leave_out: bool = True) -> Trial:
    """Plant one fault, ask what it is, and ask again without it in the catalogue."""
    fault = faults()[id]
    planted = fault.subject() if fault.steps is None else subject_of(fault.steps, profile)
    with np.errstate(all="ignore"):
        probes, answers = observe(planted, profile, KINDS, answer)
        found = _names(Comparison(probes, answers))
        invented: tuple[str, ...] = ()
        if leave_out:
            printed = {RIGHT} | {name for match in found if id in match.ids for name in match.ids}
            rest = _names(Comparison(probes, answers, frozenset({id})))
            given = [name for match in rest if RIGHT not in match.ids for name in match.ids]
            invented = tuple(name for name in given if name not in printed and not same(name, id))
    return Trial((id,), _outcome(found, {id}), _ids(found), invented)


def same(name: str, id: str) -> bool:
    """Whether two faults, named with a plus, are a third one by another name."""
    known = faults()
    both = [known[part].steps for part in name.split(" + ")]
    if len(both) != 2 or known[id].steps is None:
        return False
    joint = {**(both[0] or {}), **(both[1] or {})}
    for kind in KINDS:
        for number in range(len(LAYERS)):
            layer = probe("fp64", kind, number)
            one, other = replay(layer, joint), replay(layer, known[id].steps)
            if one.forms != other.forms or not np.allclose(one.values, other.values, rtol=1e-9, equal_nan=True):
                return False
    return True


def pair(one: str, other: str, profile: str) -> Trial | None:
    """Plant two faults at once; None where they change one step both."""
    first, second = (faults()[id].steps for id in (one, other))
    if first is None or second is None or first.keys() & second.keys():
        return None
    with np.errstate(all="ignore"):
        compared = Comparison(*observe(subject_of({**first, **second}, profile), profile, KINDS, answer))
        found = _names(compared)
    outcome = _outcome(found, {f"{one} + {other}", f"{other} + {one}"})
    if outcome in ("wrong", "several") and {one, other} & set(_ids(found)):
        outcome = "masked"
    if outcome == "wrong" and RIGHT in _ids(found):
        outcome = "hidden"
    if outcome == "wrong" and all(same(f"{one} + {other}", id) for id in _ids(found) if " + " not in id):
        outcome = "class"
    return Trial((one, other), outcome, _ids(found))


def _names(compared: Comparison) -> list[Match]:
    return compared.single() or compared.rounded() or pairs(compared)


def _ids(found: list[Match]) -> tuple[str, ...]:
    return tuple(id for match in found for id in match.ids)


def _outcome(found: list[Match], wanted: set[str]) -> Outcome:
    if not found:
        return "unnamed"
    hit = [match for match in found if wanted & set(match.ids)]
    if not hit:
        return "wrong"
    if len(found) > 1:
        return "several"
    if RIGHT in hit[0].ids:
        return "hidden"
    return "named" if len(hit[0].ids) == 1 else "class"
