"""What a law is: a function that says in a line what is wrong, or nothing; and what laws are made of."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from ..report import Check
from .tensors import Absent, Crash

Law = Callable[[], str | None]
OF_TOKENS = ("x", "gy", "mask", "base_mask")  # arrays with a row for each token


def lawful(id: str, battery: str, kind: str, law: str, run: Law) -> Check:
    """The check that a law is kept."""
    try:
        wrong = run()
    except Absent as error:
        return Check(id, battery, kind, law, "not run", note=str(error))
    except Crash as error:
        return Check(id, battery, kind, law, "crash", note=str(error))
    return Check(id, battery, kind, law, "fail" if wrong else "pass", note=wrong or "")


def floating(value: HostArray) -> bool:
    """Whether these are floating numbers; bfloat16 are, which NumPy does not know for such."""
    return value.dtype.kind == "f" or value.dtype.name == "bfloat16"


def differs(got: dict[str, HostArray], want: dict[str, HostArray], bound: dict[str, HostArray]) -> str | None:
    """Where two answers to one question differ by more than both their roundings."""
    for name, value in want.items():
        if name not in bound:
            continue  # nobody asked for it
        if name not in got or got[name].shape != value.shape:
            return f"{name}: expected shape {value.shape}, got {got[name].shape if name in got else 'none'}"
        if not (floating(got[name]) and floating(value)):
            return f"{name}: expected floating numbers, got {got[name].dtype}"
        if value.shape != bound[name].shape:
            return f"{name}: expected shape {bound[name].shape}, got {value.shape}"
        if not (np.abs(got[name].astype(np.float64) - value) <= 2 * bound[name]).all():
            return f"{name} differs"
    return None


def resized(case: Case, lead: tuple[int, ...]) -> Case:
    """The case with its tokens repeated, or cut, to other leading axes."""

    def to(value: HostArray) -> HostArray:
        return np.resize(value, (*lead, value.shape[-1])).astype(value.dtype)

    tokens: Any = {name: to(value) for name, value in case.arrays().items() if name in OF_TOKENS}
    return replace(case, **tokens)


def hashes(case: Case) -> dict[str, str]:
    """A digest of every array of a case."""
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in case.arrays().items()}


class AsGiven(Case):
    """A case that hands out its own arrays, whatever their layout."""

    def copy(self) -> Case:
        """Return the case itself."""
        return self
