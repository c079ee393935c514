"""Faults of fused experts: the two orders of the stored factors, the layout of weights, rows and experts.

A right evaluation takes the rows of each expert in turn (faults.6); each fault replaces a piece of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..batteries.experts import ExpertsCase
from ..cases import HostArray
from .fault import Fault, Faulty

Grads = dict[str, HostArray]
Place = Callable[[ExpertsCase, int], Any]  # the rows of A, or the columns of B, of an expert


def slowest(case: ExpertsCase, e: int) -> Any:
    """The places of an expert whose entries follow one another."""
    return slice(e * case.config.r, (e + 1) * case.config.r)


def fastest(case: ExpertsCase, e: int) -> Any:
    """The places of an expert of which every E-th is its own."""
    return slice(e, None, case.experts)


@dataclass(frozen=True)
class Pieces:
    """What a right evaluation is made of; each fault has another piece.

    A, B : where an expert's factors are read;  gA, gB : where their gradients are written, as read unless given
    given : changes the case first;  delta : changes a written-out update;  scaling : of all of them
    """

    A: Place = slowest
    B: Place = fastest
    gA: Place | None = None
    gB: Place | None = None
    given: Callable[[ExpertsCase], ExpertsCase] = lambda case: case
    delta: Callable[[HostArray], HostArray] = lambda delta: delta
    scaling: Callable[[ExpertsCase], float] = lambda case: case.scaling
    skipped: Callable[[ExpertsCase], tuple[int, ...]] = lambda case: ()
    spoil: Callable[[ExpertsCase, Grads], Grads] = lambda case, g: g
    merged: Callable[[ExpertsCase, int], int] = lambda case, e: e
    merges_scaled: bool = True


class Routed(Faulty):
    """Runs, differentiates and merges experts by the written-out update of each, one piece of it replaced."""

    def __init__(self, pieces: Pieces | None = None) -> None:
        """pieces : those of a right evaluation unless given."""
        super().__init__()
        self.pieces = Pieces() if pieces is None else pieces

    def _update(self, case: ExpertsCase, e: int) -> tuple[HostArray, HostArray, HostArray, HostArray]:
        """W_e as (d_out, d_in), A_e, B_e, and the written-out update."""
        A, B = case.A[self.pieces.A(case, e)], case.B[:, self.pieces.B(case, e)]
        delta = self.pieces.delta(self.pieces.scaling(case) * (B @ A))
        skipped = e in self.pieces.skipped(case)
        return case.W[e].T if case.transposed else case.W[e], A, B, 0 * delta if skipped else delta

    def experts_forward(self, case: ExpertsCase) -> HostArray:
        """y of each row, by its expert."""
        case = self.pieces.given(case)
        y = np.zeros(case.gy.shape, case.x.dtype)
        for e in range(case.experts):
            rows, (W, _, _, delta) = np.flatnonzero(case.ids == e), self._update(case, e)
            y[rows] = case.x[rows] @ (W + delta).T
        return y

    def experts_backward(self, case: ExpertsCase, gy: HostArray) -> Grads:
        """The gradients by x, A, B and W."""
        case, pieces = self.pieces.given(case), self.pieces
        g = {name: np.zeros_like(getattr(case, name)) for name in ("x", "A", "B", "W")}
        s = pieces.scaling(case)
        for e in range(case.experts):
            rows, (W, A, B, delta) = np.flatnonzero(case.ids == e), self._update(case, e)
            gW = gy[rows].T @ case.x[rows]
            g["x"][rows] = gy[rows] @ (W + delta)
            g["W"][e] = gW.T if case.transposed else gW
            if e not in pieces.skipped(case):
                g["A"][(pieces.gA or pieces.A)(case, e)] = s * (B.T @ gW)
                g["B"][:, (pieces.gB or pieces.B)(case, e)] = s * (gW @ A.T)
        return pieces.spoil(case, g)

    def experts_merge(self, case: ExpertsCase) -> Grads:
        """W_e + delta_e, stored as W is."""
        case = replace(self.pieces.given(case), ids=case.ids)
        weights = []
        for e in range(case.experts):
            W, _, _, _ = self._update(case, e)
            delta = self._update(case, self.pieces.merged(case, e))[3]
            weights.append(W + (delta if self.pieces.merges_scaled else delta / self.pieces.scaling(case)))
        return {"W": case.stored(weights).astype(case.W.dtype)}


# ---- the faults ------------------------------------------------------------------------------------------


def _reshaped(delta: HostArray) -> HostArray:
    return delta.T.reshape(delta.shape)


def _one_row_late(case: ExpertsCase) -> ExpertsCase:
    return replace(case, ids=np.concatenate([case.ids[:1], case.ids[:-1]]))


def _as_sorted(case: ExpertsCase) -> ExpertsCase:
    return replace(case, ids=np.sort(case.ids))


def _layout_ignored(case: ExpertsCase) -> ExpertsCase:
    """A transposed parameter taken for one that is not."""
    return replace(case, transposed=False, W=case.W.reshape(case.W.shape[0], case.B.shape[0], -1))


def _stored_rank(case: ExpertsCase) -> float:
    return replace(case.config, r=case.config.r * case.experts).scaling


def _left_over(case: ExpertsCase, g: Grads) -> Grads:
    """An expert without rows keeps what the buffer held: the gradients of the one before."""
    g = {name: value.copy() for name, value in g.items()}
    for e in range(1, case.experts):
        if not (case.ids == e).any():
            g["A"][slowest(case, e)] = g["A"][slowest(case, e - 1)]
            g["B"][:, fastest(case, e)] = g["B"][:, fastest(case, e - 1)]
    return g


def _base_alone(case: ExpertsCase, g: Grads) -> Grads:
    """gx without the adapter's term."""
    W = case.W.transpose(0, 2, 1) if case.transposed else case.W
    gx = [gy @ W[e] for gy, e in zip(case.gy, case.ids, strict=True)]
    return g | {"x": np.array(gx, case.x.dtype).reshape(case.x.shape)}


def _unscaled(name: str) -> Callable[[ExpertsCase, Grads], Grads]:
    return lambda case, g: g | {name: (g[name] / case.scaling).astype(g[name].dtype)}


def _fault(id: str, title: str, pieces: Pieces, *sources: str, line: str = "faults.6") -> Fault:
    return Fault(id, title, "experts", sources, line, make=lambda: Routed(pieces))


FAULTS = (
    _fault("Y1", "A read expert-fastest, as B is", Pieces(A=fastest), line="experts.1"),
    _fault(
        "Y2",
        "B read expert-slowest, as A is: every norm stays",
        Pieces(B=slowest),
        "unsloth-zoo#1269",
        "unsloth#6930",
        line="experts.2",
    ),
    _fault(
        "Y3",
        "each expert's update transposed, then shaped back",
        Pieces(delta=_reshaped),
        "vLLM#52194",
        "vLLM#52198",
        "vLLM#41384",
        line="experts.3",
    ),
    _fault("Y4", "the last expert's update never run", Pieces(skipped=lambda case: (case.experts - 1,))),
    _fault("Y5", "experts' rows off by one", Pieces(given=_one_row_late)),
    _fault("Y6", "rows taken to be sorted by expert", Pieces(given=_as_sorted)),
    _fault("Y7", "s of the stored rank r·E, not of one expert's", Pieces(scaling=_stored_rank)),
    _fault("Y8", "a transposed parameter shaped, not transposed", Pieces(given=_layout_ignored)),
    _fault("Y9", "gA stored expert-fastest", Pieces(gA=fastest), line="experts.8"),
    _fault("Y10", "gB stored expert-slowest", Pieces(gB=slowest), line="experts.8"),
    _fault("Y11", "an expert without rows keeps the gradients of the one before", Pieces(spoil=_left_over)),
    _fault("Y12", "gx of experts without the adapter's term", Pieces(spoil=_base_alone)),
    _fault("Y13", "gA of experts without s", Pieces(spoil=_unscaled("A")), line="experts.4"),
    _fault("Y14", "gB of experts without s", Pieces(spoil=_unscaled("B")), line="experts.5"),
    _fault("Y15", "experts merged without s", Pieces(merges_scaled=False), line="experts.10"),
    _fault(
        "Y16",
        "the first expert's update merged into every expert",
        Pieces(merged=lambda case, e: 0),
        line="experts.10",
    ),
)
