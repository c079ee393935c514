"""What a fault is: one line of the layer replaced, by an error that somebody published or could have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ..cases import Case, HostArray
from ..layers.plain import Plain, Step
from ..subjects.engine import Reference

Kind = Literal[
    "forward",
    "gradient",
    "dora",
    "dropout",
    "precision",
    "shape",
    "conduct",
    "start",
    "pissa",
    "family",
    "merge",
    "file",
    "packed",
    "experts",
    "embedding",
    "conv",
    "related",
    "blended",
    "op",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Faulty(Plain):
    """A right subject of plain steps, its start and its merge the engine's, from which each fault departs."""

    def __init__(self, changed: Mapping[str, Step] | None = None) -> None:
        """changed : step name to what stands in for it."""
        super().__init__(changed)
        self.right = Reference()

    def init(self, W: Any, config: Any, seed: int) -> dict[str, Any]:
        """The engine's start of an adapter at W."""
        return self.right.init(W, config, seed)

    def init_from(self, W: Any, config: Any, seed: int, given: dict[str, Any]) -> dict[str, Any]:
        """The engine's start of an adapter at W, of more than a draw."""
        return self.right.init_from(W, config, seed, given)

    def merge(self, case: Case) -> dict[str, Any]:
        """The engine's merged weight and bias."""
        return self.right.merge(case)

    def unmerge(self, case: Case, merged: dict[str, HostArray]) -> dict[str, Any]:
        """W and b again, of the merged ones; the row norms are those of before, under DoRA."""
        return self.right.unmerge(case, merged)

    def accumulate(self, case: Case, gy: Any, into: dict[str, HostArray]) -> dict[str, HostArray]:
        """The gradients of this call added to those of earlier ones."""
        _, g = self.run(case, gy)
        return {name: into[name] + value if name in into else value for name, value in g.items()}


@dataclass(frozen=True, eq=False)
class Fault:
    """One known error.

    id : never given to another fault;  kind : what it is wrong in
    sources : where it was published, as project#number;  empty where it is only plausible
    line : the equation it breaks, as in specs/
    steps : the replaced steps of plain.run, or None where the fault is no step of it
    make : what builds the subject where steps do not suffice
    """

    id: str
    title: str
    kind: Kind
    sources: tuple[str, ...]
    line: str
    steps: Mapping[str, Step] | None = None
    make: Callable[[], Any] | None = None

    def subject(self) -> Any:
        """A fresh subject that has this fault and no other."""
        return Faulty(self.steps) if self.make is None else self.make()


def to_bits(value: Any, bits: int) -> Any:
    """Numbers rounded to that many significant bits, ties to even: bfloat16 has 8, TF32 and float16 11."""
    mantissa, exponent = np.frexp(value)
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return float(rounded) if isinstance(value, float) else rounded.astype(value.dtype)


def row_norms(V: HostArray) -> HostArray:
    """The norm of each row of a matrix."""
    return np.asarray(np.sqrt(np.sum(V * V, axis=1)))


def moved(mask: HostArray) -> HostArray:
    """Another mask with as many kept entries: what a second draw is to the first."""
    return np.roll(mask.reshape(-1), 1).reshape(mask.shape)
