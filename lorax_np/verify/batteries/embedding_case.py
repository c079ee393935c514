"""An embedding as a case of the harness: its arrays and options, its truth, and what roundings explain of it.

Derivation: specs/subjects.md.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import (
    Adapter,
    Linear,
    LoraConfig,
    lora_linear_backward,
    lora_linear_backward_base,
    lora_linear_forward,
)
from ..bounds.worst import FEW
from ..cases import HostArray
from ..precision import Precision

LEAST = {"float16": 2.0**-14}  # the least normal number, where products come near it


@dataclass(frozen=True, eq=False)
class EmbeddingCase:
    """N ids at one point. All NumPy arrays; ids are int64, the rest of the profile's dtype.

    W : (vocab, dim), as embeddings are stored;  A : (r, vocab), B : (dim, r);  ids : (*lead), gy : (*lead, dim)
    padding : the id whose row of W and column of A have no gradient, or None
    by_frequency : whether the gradient by that row and column is divided by how often the id occurs
    embed_scale : e, by which the base multiplies what it looks up
    m : (dim,) under DoRA;  norm_gradient : whether the gradient then runs through the norm
    """

    id: str
    kind: str
    config: LoraConfig
    W: HostArray
    A: HostArray
    B: HostArray
    ids: HostArray
    gy: HostArray
    padding: int | None = None
    by_frequency: bool = False
    embed_scale: float = 1.0
    m: HostArray | None = None
    norm_gradient: bool = False

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.config.scaling

    @property
    def counts(self) -> HostArray:
        """How often each id occurs, (vocab,)."""
        return np.bincount(self.ids.reshape(-1), minlength=len(self.W))

    def plain(self) -> "EmbeddingCase":
        """The same layer without a magnitude, by its config too, from which some subjects are made."""
        return replace(self, config=replace(self.config, use_dora=False), m=None, norm_gradient=False)

    def arrays(self) -> dict[str, HostArray]:
        """Every array, by name."""
        names = ("W", "A", "B", "m", "ids", "gy")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def copy(self) -> "EmbeddingCase":
        """The same case in arrays of its own."""
        return replace(self, **{name: value.copy() for name, value in self.arrays().items()})  # type: ignore[arg-type]


# ---- truth and bounds --------------------------------------------------------------------------------------


def ratio(case: EmbeddingCase) -> Any:
    """k = m/n of each column of W, or 1 without a magnitude.  (subjects.20)"""
    if case.m is None:
        return 1.0
    V = case.W.T + case.scaling * case.B @ case.A
    return case.m / np.sqrt(np.sum(V * V, axis=1))


def merged(case: EmbeddingCase) -> HostArray:
    """W' in float64."""
    one = _wide(case)
    return np.asarray(ratio(one) * (one.W + one.scaling * (one.B @ one.A).T))


def _wide(case: EmbeddingCase) -> EmbeddingCase:
    floats = {name: value.astype(np.float64) for name, value in case.arrays().items() if name != "ids"}
    return replace(case, **floats)  # type: ignore[arg-type]


def truth(case: EmbeddingCase) -> dict[str, HostArray]:
    """What the engine's linear layer gives in float64 on one-hot rows; then padding and frequency."""
    v = _wide(case)
    x, gy = np.eye(len(v.W))[case.ids], case.embed_scale * v.gy
    base, adapter = Linear(np.ascontiguousarray(v.W.T)), Adapter(v.A, v.B, v.m)
    y, saved = lora_linear_forward(x, base, adapter, scaling=case.scaling)
    how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
    _, g = lora_linear_backward(gy, saved, base, adapter, **how)
    gW = lora_linear_backward_base(gy, saved, base, adapter, **how).W
    engine: Any = {"y": case.embed_scale * y, "A": g.A, "B": g.B, "W": gW.T, "m": g.m}
    found = {name: np.array(value) for name, value in engine.items() if value is not None}
    for by_id in (found["A"].T, found["W"]):
        by_id /= np.maximum(case.counts, 1)[:, None] if case.by_frequency else 1
        by_id[np.arange(len(v.W)) == case.padding] = 0.0
    return found


def embedding_bounds(case: EmbeddingCase, p: Precision) -> dict[str, HostArray]:
    """The most that a profile's roundings explain, by entry; 0 for ids that do not occur, and for padding."""
    s, e, (vocab, dim), r = abs(case.scaling), abs(case.embed_scale), case.W.shape, len(case.A)
    W, A, B, gy = (np.abs(value).astype(np.float64) for value in (case.W, case.A, case.B, case.gy))
    ids, G, count = case.ids.reshape(-1), e * gy.reshape(-1, dim), case.counts[:, None]
    z, least = A.T[ids], LEAST.get(p.dtype, 0.0)
    each = p.accumulate * (2 if p.rounding == "toward zero" else 1)

    def gamma(length: Any) -> Any:
        total = length * each + FEW * max(p.store, each) + 4 * p.operand
        return np.where(total < 1, total / np.maximum(1 - total, 1e-300), np.inf)

    k, k1, rho = 1.0, 0.0, 0.0  # |k|, the size of (k − 1)∘P's factor, and how far k may be off, relatively
    if case.m is not None:
        one, slack = _wide(case), gamma(r)
        V, size = one.W.T + case.scaling * one.B @ one.A, W.T + s * B @ A
        n = np.linalg.norm(V, axis=1)
        k = np.abs(one.m) / n  # type: ignore[arg-type]
        rho = np.sum(np.abs(V) * size, axis=1) * slack / n**2 + gamma(vocab)  # (subjects.23)
        k1 = k + 1
    live = (count > 0) & (np.arange(vocab)[:, None] != case.padding)
    P, Q = W[ids], s * z @ B.T + least
    share = np.maximum(count, 1) if case.by_frequency else 1
    gA, gW = np.zeros(A.shape[::-1]), np.zeros(W.shape)
    gA_rho, gW_rho = np.zeros_like(gA), np.zeros_like(gW)
    np.add.at(gA, ids, s * ((G * k) @ B + least))
    np.add.at(gA_rho, ids, s * ((G * k * rho) @ B))
    np.add.at(gW, ids, G * (1 + k1))
    np.add.at(gW_rho, ids, G * k * rho)
    found = {
        "y": gamma(r) * e * ((1 + k1) * P + k * Q) + e * rho * k * (P + Q),  # (subjects.15), (subjects.24)
        "A": (gamma(dim + count) * gA + gA_rho) / share + least * p.store,  # (subjects.16)
        "B": (gamma(len(ids)) + np.reshape(rho, (-1, 1))) * s * ((G * k).T @ z + least),  # (subjects.17)
        "W": (gamma(count) * gW + gW_rho) / share + least * p.store,  # (subjects.18)
    }
    if case.m is not None:
        gk = np.sum(G * (P + Q), axis=0)
        found["m"] = (gamma(len(ids) + r) + rho) * gk / n
        if case.norm_gradient:  # (subjects.25)
            turn = (gamma(len(ids) + vocab + dim + 2 * r) + 4 * rho) * gk * k / n**2
            gV = turn[:, None] * size
            found["A"], found["W"] = found["A"] + s * (B.T @ gV).T, found["W"] + gV.T
            found["B"] = found["B"] + s * gV @ A.T
            live = np.arange(vocab)[:, None] != case.padding
    found["A"], found["W"] = (live * found["A"]).T, live * found["W"]
    return {**found, "y": found["y"].reshape(case.gy.shape)}
