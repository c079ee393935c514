"""Faults of embeddings: in what is looked up, what is added to which row, the merged table, the start."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..batteries.embedding import EmbeddingReference
from ..batteries.embedding_case import EmbeddingCase, merged, ratio
from ..cases import HostArray
from .departing import Departing, Grads, departure


class Looking(Departing):
    """Looks rows up right, but for what is replaced."""

    kind, reference = "embedding", EmbeddingReference()
    embedding_forward, embedding_backward = Departing.layer_forward, Departing.layer_backward
    embedding_merge, embedding_init = Departing.layer_merge, Departing.layer_init


def _again(case: EmbeddingCase) -> Grads:
    return EmbeddingReference().embedding_backward(case, case.gy)


def _rows(case: EmbeddingCase) -> tuple[HostArray, HostArray]:
    """Ids in one row, and the gradient by z of each token."""
    gu = case.scaling * case.embed_scale * case.gy.reshape(-1, case.W.shape[1]) * ratio(case)
    return case.ids.reshape(-1), gu @ case.B


def _last_write(case: EmbeddingCase, g: Grads) -> Grads:
    ids, gz = _rows(case)
    gA = np.zeros_like(case.A.T)
    gA[ids] = gz
    return g | {"A": np.where(g["A"] != 0, gA.T, 0)}


def _once(case: EmbeddingCase, g: Grads) -> Grads:
    """Of the tokens of an id the first alone, its gradient times their number."""
    ids, gz = _rows(case)
    first = np.zeros_like(case.A.T)
    found, where = np.unique(ids, return_index=True)
    first[found] = gz[where] * case.counts[found][:, None]
    return g | {"A": np.where(g["A"] != 0, first.T, 0)}


def _without_padding(case: EmbeddingCase, g: Grads) -> Grads:
    kept = (case.ids != (-1 if case.padding is None else case.padding))[..., None]
    return g | {"B": _again(replace(case, gy=(case.gy * kept).astype(case.gy.dtype)))["B"]}


def _unscaled_base(case: EmbeddingCase, y: HostArray) -> HostArray:
    plain = EmbeddingReference().embedding_forward(replace(case, embed_scale=1.0))
    return np.asarray(plain + (case.embed_scale - 1) * case.W[case.ids] * ratio(case))


def _unscaled_gA(case: EmbeddingCase, g: Grads) -> Grads:
    return g | {"A": _again(replace(case, embed_scale=1.0))["A"]}


def _undivided_gA(case: EmbeddingCase, g: Grads) -> Grads:
    return g | {"A": _again(replace(case, by_frequency=False))["A"]}


def _shared_B(case: EmbeddingCase, g: Grads) -> Grads:
    if not case.by_frequency:
        return g
    share = (1 / np.maximum(case.counts, 1))[case.ids][..., None]
    return g | {"B": _again(replace(case, gy=(case.gy * share).astype(case.gy.dtype)))["B"]}


def _shared_by_all(case: EmbeddingCase, g: Grads) -> Grads:
    """Divided by the number of tokens, not by how often an id comes."""
    if not case.by_frequency:
        return g
    plain = _again(replace(case, by_frequency=False))
    return g | {name: plain[name] / max(case.ids.size, 1) for name in ("A", "W")}


def _by_token(case: EmbeddingCase, y: HostArray) -> HostArray:
    """Each token's vector divided by its own length, where a column of the table is meant."""
    if case.m is None:
        return y
    Z = case.W[case.ids] + case.scaling * (case.A.T[case.ids] @ case.B.T)
    return np.asarray(case.embed_scale * case.m * Z / np.linalg.norm(Z, axis=-1, keepdims=True))


def _of_base(case: EmbeddingCase, g: Grads) -> Grads:
    """gm of what the base gives alone."""
    return g if case.m is None else g | {"m": _again(replace(case, A=0 * case.A, m=case.m))["m"]}


def _plain_backward(case: EmbeddingCase, g: Grads) -> Grads:
    plain = _again(replace(case, m=None, norm_gradient=False))
    return g | {name: plain[name] for name in ("A", "B")}


def _untransposed(case: EmbeddingCase) -> HostArray:
    """BA as it lies in memory, in the shape of the table."""
    return np.asarray(ratio(case) * (case.W + case.scaling * (case.B @ case.A).reshape(case.W.shape)))


def _without_s(case: EmbeddingCase) -> EmbeddingCase:
    return replace(case, B=case.B / case.scaling)


def _drawn(found: Grads, seed: int) -> Grads:
    A: Any = np.random.default_rng(seed + 1).standard_normal(found["A"].shape)
    return found | {"A": A.astype(found["A"].dtype)}


_fault = partial(departure, Looking)
FAULTS = (
    _fault("Q1", "gA of an id's last token only: written, not added", "embedding.3", backward=_last_write),
    _fault("Q2", "gA of an id's first token, times their number", "embedding.3", backward=_once),
    _fault(
        "Q3",
        "padding's column of A and row of W trained",
        "embedding.4",
        given=lambda c: replace(c, padding=None),
    ),
    _fault("Q4", "padding's tokens left out of gB", "lora.6", backward=_without_padding),
    _fault("Q5", "the embedding's scale left out of gA", "embedding.10", backward=_unscaled_gA),
    _fault("Q6", "the embedding's scale left out of the update", "embedding.9", forward=_unscaled_base),
    _fault("Q7", "gA not divided by frequency", "embedding.5", backward=_undivided_gA),
    _fault("Q8", "gB divided by frequency as well", "lora.6", backward=_shared_B),
    _fault("Q9", "divided by the number of tokens, not by an id's", "embedding.5", backward=_shared_by_all),
    _fault("Q10", "ids counted from 1", "embedding.1", given=lambda c: replace(c, ids=(c.ids + 1) % len(c.W))),
    _fault("Q11", "each token's vector normalised, not the table's columns", "embedding.8", forward=_by_token),
    _fault("Q12", "gm of an embedding from the base's rows alone", "dora.10", backward=_of_base),
    _fault("Q13", "an embedding's DoRA with the backward of LoRA", "dora.9", backward=_plain_backward),
    _fault(
        "Q14", "the update merged into a table as it lies, not transposed", "embedding.13", merge=_untransposed
    ),
    _fault(
        "Q15",
        "the scale folded into the merged table",
        "embedding.13",
        merge=lambda c: c.embed_scale * merged(c),
    ),
    _fault(
        "Q16", "the update merged into a table without s", "embedding.13", merge=lambda c: merged(_without_s(c))
    ),
    _fault("Q17", "both factors of an embedding drawn", "embedding.15", start=_drawn),
)
