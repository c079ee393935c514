"""Faults of several adapters at once: stacked for serving, a token choosing one; or all active on every token.

A right evaluation takes the tokens of each adapter in turn (faults.2); each fault replaces a piece of it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..batteries.packed import NONE, PackedCase, PackedReference
from ..cases import Case, HostArray
from ..layers.plain import rows
from .fault import Fault, Faulty

Answer = tuple[HostArray, dict[str, HostArray]]
Grads = dict[str, HostArray]


def together(cases: list[Case], gy: HostArray, *, one_scale: bool = False, one_mask: bool = False) -> Answer:
    """y and gradients of two adapters active on one base: the sum of their updates.  (faults.3)

    The gradients by the i-th adapter's A and B are named A0, B0, A1, B1.
    """
    x, G, W = rows(cases[0].x), rows(gy), cases[0].W
    y, gx = x @ W.T + (0 if cases[0].b is None else cases[0].b), G @ W
    g: Grads = {}
    for i, case in enumerate(cases):
        s = cases[0].scaling if one_scale else case.scaling
        given = cases[0].mask if one_mask else case.mask
        mask = np.ones_like(x) if given is None else rows(given)
        z, gu = (x * mask) @ case.A.T, s * G
        y = y + s * (z @ case.B.T)
        gx = gx + ((gu @ case.B) @ case.A) * mask
        g |= {f"A{i}": (gu @ case.B).T @ (x * mask), f"B{i}": gu.T @ z}
    like = x.dtype
    found = {"x": gx.reshape(cases[0].x.shape), **g}
    return y.reshape(gy.shape).astype(like), {name: value.astype(like) for name, value in found.items()}


class Serving(Faulty):
    """Serves packed tokens right, and sums two adapters right."""

    def __init__(self) -> None:
        """Nothing is changed."""
        super().__init__()
        self.packs = PackedReference()

    def packed_forward(self, case: PackedCase) -> HostArray:
        """y with the update of each token's adapter."""
        return self.packs.packed_forward(case)

    def packed_backward(self, case: PackedCase, gy: HostArray) -> Grads:
        """The gradients by x, A and B."""
        return self.packs.packed_backward(case, gy)

    def together(self, cases: list[Case], gy: HostArray) -> Answer:
        """y, and the gradients by x, A0, B0, A1, B1."""
        return together(cases, gy)


class Packed(Serving):
    """Serves another pack than it is given, or spoils what comes of it."""

    def __init__(
        self,
        given: Callable[[PackedCase], PackedCase] | None = None,
        forward: Callable[[PackedCase, HostArray], HostArray] | None = None,
        backward: Callable[[PackedCase, HostArray, Grads], Grads] | None = None,
    ) -> None:
        """given : changes the pack;  forward : changes y;  backward : changes the gradients."""
        super().__init__()
        self.given, self.forwards, self.backwards = given, forward, backward

    def packed_forward(self, case: PackedCase) -> HostArray:
        """y with the update of each token's adapter, or of another."""
        y = super().packed_forward(case if self.given is None else self.given(case))
        return y if self.forwards is None else self.forwards(case, y)

    def packed_backward(self, case: PackedCase, gy: HostArray) -> Grads:
        """The gradients by x, A and B, as wrong as y."""
        g = super().packed_backward(case if self.given is None else self.given(case), gy)
        return g if self.backwards is None else self.backwards(case, gy, g)


class Together(Serving):
    """Sums two adapters in a way of its own."""

    def __init__(self, how: Callable[[list[Case], HostArray], Answer]) -> None:
        """how : cases and gy to y and gradients."""
        super().__init__()
        self.how = how

    def together(self, cases: list[Case], gy: HostArray) -> Answer:
        """y, and the gradients by x, A0, B0, A1, B1."""
        return self.how(cases, gy)


# ---- the faults ------------------------------------------------------------------------------------------


def _without_last(case: PackedCase) -> PackedCase:
    return replace(case, ids=np.where(case.ids == len(case.ranks) - 1, NONE, case.ids))


def _python_index(case: PackedCase) -> PackedCase:
    return replace(case, ids=case.ids % len(case.ranks))


def _full_rank(case: PackedCase) -> PackedCase:
    return replace(case, ranks=(case.r_max,) * len(case.ranks))


def _one_scale(case: PackedCase) -> PackedCase:
    return replace(case, scalings=case.scalings[:1] * len(case.scalings))


def _padded_scale(case: PackedCase) -> PackedCase:
    pairs = zip(case.scalings, case.ranks, strict=True)
    return replace(case, scalings=tuple(s * r / case.r_max for s, r in pairs))


def _one_late(case: PackedCase) -> PackedCase:
    return replace(case, ids=np.concatenate([case.ids[:1], case.ids[:-1]]))


def _of_first(case: PackedCase) -> PackedCase:
    return replace(case, ids=np.repeat(case.ids[:1], case.ids.size))


def _smallest_rank(case: PackedCase) -> PackedCase:
    return replace(case, ranks=(min(case.ranks),) * len(case.ranks))


def _present_only(case: PackedCase) -> PackedCase:
    """Adapters numbered among those that have tokens."""
    present = np.unique(case.ids[case.ids >= 0])
    place = {int(i): k for k, i in enumerate(present)}
    return replace(case, ids=np.array([place.get(int(i), NONE) for i in case.ids], dtype=case.ids.dtype))


def _first_slice(case: PackedCase) -> PackedCase:
    A, first = case.A.copy(), case.A[:, : case.r_max]
    for i in range(len(case.d_outs)):
        A[:, i * case.r_max : (i + 1) * case.r_max] = first
    return replace(case, A=A)


def _left_sorted(case: PackedCase, y: HostArray) -> HostArray:
    return y[np.argsort(case.ids, kind="stable")]


def _overwritten(case: PackedCase, y: HostArray) -> HostArray:
    return np.where((case.ids != NONE)[:, None], y - case.y, y)


def _last_segment(case: PackedCase, gy: HostArray, g: Grads) -> Grads:
    """gA of the last of an adapter's segments, what the others left overwritten."""
    last = {i: (begin, end) for begin, end, i in case.segments()}
    ids = np.full_like(case.ids, NONE)
    for i, (begin, end) in last.items():
        ids[begin:end] = i
    return g | {"A": PackedReference().packed_backward(replace(case, ids=ids), gy)["A"]}


def _last_slice(case: PackedCase, gy: HostArray, g: Grads) -> Grads:
    """gx of the last slice, what the others left overwritten."""
    begin = sum(case.d_outs[:-1])
    last = np.concatenate([0 * gy[:, :begin], gy[:, begin:]], axis=1)
    return g | {"x": PackedReference().packed_backward(case, last)["x"]}


def _base_twice(cases: list[Case], gy: HostArray) -> Answer:
    y, g = together(cases, gy)
    return y, g | {"x": g["x"] + (rows(gy) @ cases[0].W).reshape(g["x"].shape)}


def _last_only(cases: list[Case], gy: HostArray) -> Answer:
    zero = [replace(case, B=0 * case.B) for case in cases[:-1]]
    y, _ = together([*zero, cases[-1]], gy)
    return y, together(cases, gy)[1]


def _chained(cases: list[Case], gy: HostArray) -> Answer:
    """The second adapter sees the gradient that the first one scaled."""
    y, g = together(cases, gy)
    s = cases[0].scaling
    return y, g | {"A1": s * g["A1"], "B1": s * g["B1"]}


def _pack(id: str, title: str, given: Any, forward: Any = None, backward: Any = None) -> Fault:
    return Fault(id, title, "packed", (), "faults.2", make=lambda: Packed(given, forward, backward))


def _together(id: str, title: str, how: Any) -> Fault:
    return Fault(id, title, "packed", (), "faults.3", make=lambda: Together(how))


FAULTS = (
    _pack("K1", "the last adapter of a stack never run", _without_last),
    _pack("K2", "id −1 taken for the last adapter, not for none", _python_index),
    _pack("K3", "what lies past an adapter's rank used", _full_rank),
    _pack("K4", "the first adapter's s for all", _one_scale),
    _pack("K5", "segments that begin one token late", _one_late),
    _pack("K6", "the first token's adapter for all tokens", _of_first),
    _pack("K7", "s of the stack's rank, not of the adapter's own", _padded_scale),
    _pack("K8", "an adapter without tokens shifts the ones after it", _present_only),
    _pack("K9", "every adapter cut to the smallest rank", _smallest_rank),
    _pack("K10", "tokens sorted by adapter and left so", None, _left_sorted),
    _pack("K11", "y overwritten where it should be added to", None, _overwritten),
    _pack("K12", "gA of an adapter's last segment only", None, None, _last_segment),
    _pack("K13", "q, k and v all by the A of q", _first_slice),
    _pack("K14", "gx of the last of q, k and v only", None, None, _last_slice),
    _together("U1", "two adapters summed with one s", lambda cases, gy: together(cases, gy, one_scale=True)),
    _together("U2", "two adapters dropped by one mask", lambda cases, gy: together(cases, gy, one_mask=True)),
    _together("U3", "the base's term of gx once for each adapter", _base_twice),
    _together("U4", "of two active adapters, the last alone in y", _last_only),
    _together("U5", "the second adapter's gradients scaled by the first one's s as well", _chained),
)
