"""What known faults make of a few tests, so that others can see whether their own comparison finds them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..bounds.sigma import THRESHOLD
from ..cases import Case, HostArray
from ..layers import plain
from ..mutants import CATALOGUE
from ..mutants.fault import Fault
from .case import TENSOR_OF, Group, Vector, single, to_case, widened


@dataclass(frozen=True, eq=False)
class Bug:
    """One fault, and its outputs on the tests that show it."""

    fault: Fault
    outputs: dict[int, dict[str, HostArray]]  # by tcId


class Probe(NamedTuple):
    """A test, how it is compared, and its case in float64."""

    vector: Vector
    compare: str
    case: Case


def differs(got: dict[str, HostArray], vector: Vector, compare: str, profile: str = "fp32") -> list[str]:
    """The names of the outputs that are not within what is allowed, of those that the test has.

    compare : bitwise, where zeros of either sign are equal, or sigma
    """
    found = []
    for name, want in vector.outputs.items():
        value = got.get(name)
        if value is None or value.shape != want.shape:
            found.append(name)
            continue
        error = np.abs(value.astype(np.float64) - want)
        most = THRESHOLD * vector.sigma[profile][name].astype(np.float64) if compare == "sigma" else 0.0
        if not (error <= most).all():
            found.append(name)
    return found


def bugs(groups: Iterable[Group]) -> Iterator[Bug]:
    """Each fault of the catalogue that is a replaced step of the layer, where something shows it."""
    probes = list(_probes(groups))
    for fault in CATALOGUE.values():
        if fault.steps is not None:
            shown = _shown(fault, probes)
            if shown:
                yield Bug(fault, shown)


def _probes(groups: Iterable[Group]) -> Iterator[Probe]:
    """Normal data first, as exact data cannot show a lost bit, then exact, then corners; small ones first."""
    order = {"generic": 0, "lattice-lora": 1, "lattice-dora": 2, "lattice-dora-full": 3, "corners": 4}
    for group in sorted((g for g in groups if g.name in order), key=lambda g: order[g.name]):
        for vector in sorted(group.vectors, key=lambda v: sum(a.size for a in v.outputs.values())):
            yield Probe(vector, group.compare, widened(to_case(vector)))


def _shown(fault: Fault, probes: list[Probe]) -> dict[int, dict[str, HostArray]]:
    """The fault's outputs on the first test of each way of comparing and each kind of DoRA that shows it."""
    shown: dict[int, dict[str, HostArray]] = {}
    have: set[tuple[str, object]] = set()
    for probe in probes:
        key = (probe.compare, probe.vector.settings["dora"])
        if key in have or len(shown) == 4:
            continue
        got = _faulty(fault, probe)
        if got is not None and differs(got, probe.vector, probe.compare):
            shown[probe.vector.tcId] = got
            have.add(key)
    return shown


def _faulty(fault: Fault, probe: Probe) -> dict[str, HostArray] | None:
    """A fault's outputs on a test, or None where it makes no such arrays."""
    vector, case = probe.vector, probe.case
    try:
        with np.errstate(all="ignore"):
            y, gradients = plain.run(case, case.gy, fault.steps)
    except (ValueError, IndexError, ZeroDivisionError):  # shapes that do not fit: anyone sees that
        return None
    found = {"y": y, **gradients}
    got = {
        name: single(_settled(found[TENSOR_OF[name]])) for name in vector.outputs if TENSOR_OF[name] in found
    }
    if any(got[name].shape != vector.outputs[name].shape for name in got):
        return None
    return got


def _settled(value: HostArray) -> HostArray:
    """Round float64 to 24 bits of the largest entry, so that no order of summation shows in a file."""
    largest = np.abs(value[np.isfinite(value)]).max(initial=0.0)
    bits = 24 - int(np.frexp(largest)[1])
    rounded: HostArray = np.ldexp(np.rint(np.ldexp(value, bits)), -bits)
    return rounded
