"""More faults of several adapters: ends of segments, slices of unequal width, samples of a mixed batch."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from ..batteries.packed import NONE, PackedCase, PackedReference
from ..cases import Case, HostArray
from ..layers.plain import rows
from .fault import Fault
from .packed import Answer, Grads, Packed, Serving, Together, together


def mixed(cases: list[Case], ids: list[int]) -> HostArray:
    """y of a batch whose samples each have one of these adapters, or none where the id is −1.  (faults.7)"""
    x, b = cases[0].x, cases[0].b
    y = x @ cases[0].W.T + (0 if b is None else b)
    for i, a in enumerate(ids):
        if a != NONE:
            y[i] += cases[a].scaling * (x[i] @ cases[a].A.T) @ cases[a].B.T
    return np.asarray(y, x.dtype)


class Mixing(Serving):
    """Serves packed tokens right, sums two adapters right, and runs mixed batches in a way of its own."""

    def __init__(self, ids: Callable[[list[int]], list[int]] | None = None) -> None:
        """ids : changes which adapter a sample has."""
        super().__init__()
        self.ids = ids

    def mixed(self, cases: list[Case], ids: list[int]) -> HostArray:
        """y of each sample with its adapter, or with another."""
        return mixed(cases, ids if self.ids is None else self.ids(ids))


# ---- the faults ------------------------------------------------------------------------------------------


def _without_ends(case: PackedCase) -> PackedCase:
    """The last token of every segment is left out."""
    ids = case.ids.copy()
    ids[[end - 1 for _, end, _ in case.segments()]] = NONE
    return replace(case, ids=ids)


def _equal_slices(case: PackedCase) -> PackedCase:
    """The rows of B as if all slices were equally wide."""
    B, share = case.B.copy(), case.B.shape[1] // len(case.d_outs)
    for i, begin in enumerate(accumulate((0, *case.d_outs[:-1]))):
        wrong = min(i * share, case.B.shape[1] - case.d_outs[i])
        B[:, begin : begin + case.d_outs[i]] = case.B[:, wrong : wrong + case.d_outs[i]]
    return replace(case, B=B)


def _none_cleared(case: PackedCase, y: HostArray) -> HostArray:
    return np.where((case.ids == NONE)[:, None], 0, y).astype(y.dtype)


def _idle_left_over(case: PackedCase, gy: HostArray, g: Grads) -> Grads:
    """An adapter without tokens keeps the gradients of the one before it, the first those of the last."""
    g = {name: value.copy() for name, value in g.items()}
    for a in range(len(case.ranks)):
        if not (case.ids == a).any():
            g["A"][a], g["B"][a] = g["A"][a - 1], g["B"][a - 1]
    return g


def _first_slice_of_gy(case: PackedCase, gy: HostArray, g: Grads) -> Grads:
    """gA of every slice by the first slice's share of gy."""
    first = gy.copy()
    for i, begin in enumerate(accumulate((0, *case.d_outs[:-1]))):
        first[:, begin : begin + case.d_outs[i]] = np.resize(
            gy[:, : case.d_outs[0]].T, (case.d_outs[i], len(gy))
        ).T
    return g | {"A": PackedReference().packed_backward(case, first)["A"]}


def _masks_swapped(cases: list[Case], gy: HostArray) -> Answer:
    masks = [case.mask for case in cases]
    return together([replace(case, mask=mask) for case, mask in zip(cases, masks[::-1], strict=True)], gy)


def _last_term(cases: list[Case], gy: HostArray) -> Answer:
    """gx: the base's term and the last adapter's, which the others' was overwritten by."""
    y, g = together(cases, gy)
    zero = [replace(case, B=0 * case.B) for case in cases[:-1]]
    return y, g | {"x": together([*zero, cases[-1]], gy)[1]["x"]}


def _of_sum(cases: list[Case], gy: HostArray) -> Answer:
    """Factors added before they are multiplied: (A₀ + A₁)ᵀ(B₀ + B₁)ᵀ on the ranks that both have."""
    r = min(len(case.A) for case in cases)
    y, g = together(cases, gy)
    x = rows(cases[0].x)
    one, two = cases
    for a, b in ((one, two), (two, one)):
        y = y + (a.scaling * (x @ a.A[:r].T) @ b.B[:, :r].T).reshape(y.shape).astype(y.dtype)
    return y, g


def _pack(id: str, title: str, given: Any, forward: Any = None, backward: Any = None) -> Fault:
    return Fault(id, title, "packed", (), "faults.2", make=lambda: Packed(given, forward, backward))


def _together(id: str, title: str, how: Any) -> Fault:
    return Fault(id, title, "packed", (), "faults.3", make=lambda: Together(how))


def _mixing(id: str, title: str, ids: Callable[[list[int]], list[int]]) -> Fault:
    return Fault(id, title, "packed", (), "faults.7", make=lambda: Mixing(ids))


FAULTS = (
    _pack("K15", "the last token of each segment dropped", _without_ends),
    _pack("K16", "rows of B found as if all slices were equally wide", _equal_slices),
    _pack("K17", "y of tokens of none set to 0", None, _none_cleared),
    _pack("K18", "an adapter without tokens keeps another's gradients", None, None, _idle_left_over),
    _pack("K19", "gA of q, k and v all by q's share of gy", None, None, _first_slice_of_gy),
    _together("U6", "the masks of two adapters swapped", _masks_swapped),
    _together("U7", "gx of the last of two active adapters alone, beside the base's term", _last_term),
    _together("U8", "factors of two adapters added, and the sums multiplied", _of_sum),
    _mixing(
        "U9", "a mixed batch: each sample with the adapter of the one before", lambda ids: [ids[0], *ids[:-1]]
    ),
    _mixing(
        "U10",
        "a mixed batch: none taken for the last adapter",
        lambda ids: [max(ids) if a < 0 else a for a in ids],
    ),
    _mixing("U11", "a mixed batch: the first sample's adapter for all", lambda ids: [ids[0]] * len(ids)),
)
