"""Faults that one call does not show: state between calls, writes into what was given, races."""

from dataclasses import replace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from .fault import Fault, Faulty

Answer = tuple[HostArray, dict[str, HostArray]]


class Overwrites(Faulty):
    """Accumulates by assignment: what was in a gradient's buffer is lost."""

    def accumulate(self, case: Case, gy: Any, into: dict[str, HostArray]) -> dict[str, HostArray]:
        """The gradients of this call alone, where the sum with `into` is wanted."""
        return self.run(case, gy)[1]


class WritesGxIntoX(Faulty):
    """Uses the memory of x for gx."""

    def run(self, case: Case, gy: Any) -> Answer:
        """y and all gradients; x is gone afterwards."""
        y, g = super().run(case, gy)
        if case.x.flags.writeable:
            case.x[...] = g["x"]
        return y, g


class DropsInPlace(Faulty):
    """Writes x∘mask over x."""

    def run(self, case: Case, gy: Any) -> Answer:
        """y and all gradients; x holds what was kept of it afterwards."""
        answer = super().run(case, gy)
        if case.mask is not None and case.x.flags.writeable:
            case.x[...] = case.x * case.mask
        return answer


class ScalesGyInPlace(Faulty):
    """Writes s·gy over gy."""

    def run(self, case: Case, gy: Any) -> Answer:
        """y and all gradients; gy is scaled afterwards."""
        answer = super().run(case, gy)
        if gy.flags.writeable:
            gy *= case.scaling
        return answer


class CapturesWeights(Faulty):
    """Keeps the A and B of its first call at a base weight, as a compiled graph does with constants."""

    def __init__(self) -> None:
        """Nothing is captured at first."""
        super().__init__()
        self.first: dict[tuple[bytes, tuple[int, ...]], tuple[HostArray, HostArray]] = {}

    def run(self, case: Case, gy: Any) -> Answer:
        """y and all gradients, of the factors captured."""
        A, B = self.first.setdefault((case.W.tobytes(), case.A.shape), (case.A.copy(), case.B.copy()))
        return super().run(replace(case, A=A, B=B), gy)


class CapturesScale(Faulty):
    """Keeps the s of its first call at a base weight."""

    def __init__(self) -> None:
        """Nothing is captured at first."""
        super().__init__()
        self.first: dict[bytes, float] = {}
        self.changed = {"s": lambda t: self.first.setdefault(t.W.tobytes(), t.c.scaling)}


class KeepsInput(Faulty):
    """Every second call in the same shapes takes z and xd of the call before: a buffer shared by two layers."""

    def __init__(self) -> None:
        """Nothing is kept at first."""
        super().__init__()
        self.kept: dict[tuple[int, ...], HostArray] = {}

    def run(self, case: Case, gy: Any) -> Answer:
        """y and all gradients; gA of the x of the last call in these shapes."""
        y, g = super().run(case, gy)
        key = (*case.x.shape, *case.A.shape, case.W.shape[0])
        last = self.kept.get(key, case.x)
        self.kept[key] = case.x.copy()
        return y, g | {"A": super().run(replace(case, x=last), gy)[1]["A"]}


class Races(Faulty):
    """Loses the first token's share of gA in every second call, as two unordered additions may."""

    def __init__(self) -> None:
        """The first call is right."""
        super().__init__()
        self.calls = 0

    def run(self, case: Case, gy: Any) -> Answer:
        """y and all gradients."""
        y, g = super().run(case, gy)
        self.calls += 1
        if self.calls % 2 == 0 and case.x.size:
            x = case.x.copy()
            x.reshape(-1, x.shape[-1])[0] = 0
            g |= {"A": super().run(replace(case, x=x), gy)[1]["A"]}
        return y, g


class OrderOfSums(Faulty):
    """Sums tokens in another order at each call: right every time, and never the same bits twice."""

    def __init__(self) -> None:
        """The first call sums in order."""
        super().__init__()
        self.calls = 0

    def run(self, case: Case, gy: Any) -> Answer:
        """y and all gradients."""
        self.calls += 1
        first = self.calls % 7 + 1

        def gA(t: Any) -> Any:
            order = np.roll(np.arange(t.G.shape[0]), first)
            total = np.zeros_like(t.A)
            for i in order:
                total += np.outer(t.gz[i], t.xd[i])
            return total

        self.changed = {"gA": gA}
        return super().run(case, gy)


class RemembersMask(Faulty):
    """Goes on dropping with the last mask where none is given."""

    def __init__(self) -> None:
        """No mask at first."""
        super().__init__()
        self.last: dict[tuple[int, ...], HostArray] = {}

    def run(self, case: Case, gy: Any) -> Answer:
        """y and all gradients."""
        if case.mask is not None:
            self.last[case.mask.shape] = case.mask.copy()
        return super().run(replace(case, mask=self.last.get(case.x.shape)), gy)


FAULTS = (
    Fault(
        "G6", "a second backward overwrites what the first one left", "conduct", (), "lora.8", make=Overwrites
    ),
    Fault("G7", "gx written into the saved x", "conduct", (), "lora.8", make=WritesGxIntoX),
    Fault("C1", "x∘mask written over x", "conduct", (), "dropout.1", make=DropsInPlace),
    Fault("C2", "s·gy written over gy", "conduct", (), "lora.5", make=ScalesGyInPlace),
    Fault(
        "C3",
        "A and B of the first call captured",
        "conduct",
        ("mlx-lm-lora#50",),
        "lora.1",
        make=CapturesWeights,
    ),
    Fault("C4", "s of the first call captured", "conduct", (), "lora.4", make=CapturesScale),
    Fault("C5", "gA of the x of the call before: a buffer shared", "conduct", (), "lora.8", make=KeepsInput),
    Fault("C6", "unordered additions lose one token's share of gA", "conduct", (), "lora.8", make=Races),
    Fault(
        "C7",
        "the mask of the last call used where none is given",
        "conduct",
        (),
        "dropout.1",
        make=RemembersMask,
    ),
    Fault("C8", "tokens summed in another order at every call", "conduct", (), "lora.8", make=OrderOfSums),
)
