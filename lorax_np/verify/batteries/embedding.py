"""Embeddings: the layer on one-hot rows, computed by looking rows up and by adding gradients to them.

y = e·(W[i] + s·A[:, i]ᵀBᵀ). Ids repeat, and some are never used; a padding id trains B, and neither W nor A.
Derivation: specs/subjects.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import erf, log, sqrt
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
from ..cases import PROFILES, HostArray
from ..conventions import spec_of
from ..precision import PRECISIONS, Precision
from ..report import Check
from .laws import lawful
from .starts import CHANCE
from .tensors import Absent, Crash, ask, by_name, chosen, judge, refusal

LEAST = {"float16": 2.0**-14}  # the least normal number, where products come near it
OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True, eq=False)
class EmbeddingCase:
    """N ids at one point. All NumPy arrays; ids are int64, the rest of the profile's dtype.

    W : (vocab, dim), as embeddings are stored;  A : (r, vocab), B : (dim, r);  ids : (*lead), gy : (*lead, dim)
    padding : the id whose row of W and column of A have no gradient, or None
    by_frequency : whether the gradient by that row and column is divided by how often the id occurs
    embed_scale : e, by which the base multiplies what it looks up
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

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.config.scaling

    @property
    def counts(self) -> HostArray:
        """How often each id occurs, (vocab,)."""
        return np.bincount(self.ids.reshape(-1), minlength=len(self.W))

    def arrays(self) -> dict[str, HostArray]:
        """Every array, by name."""
        return {name: getattr(self, name) for name in ("W", "A", "B", "ids", "gy")}

    def copy(self) -> "EmbeddingCase":
        """The same case in arrays of its own."""
        return replace(self, **{name: value.copy() for name, value in self.arrays().items()})  # type: ignore[arg-type]


class EmbeddingReference:
    """The embedding and its adjoint, by rows."""

    def embedding_forward(self, case: EmbeddingCase) -> HostArray:
        """y : (*lead, dim).  (subjects.9), (subjects.10)"""
        z = case.A.T[case.ids]
        y = case.embed_scale * (case.W[case.ids] + case.scaling * (z @ case.B.T))
        return np.asarray(y, dtype=case.W.dtype)

    def embedding_backward(self, case: EmbeddingCase, gy: HostArray) -> dict[str, HostArray]:
        """The gradients by A, B and W.  (subjects.11) to (subjects.14)"""
        ids, G = case.ids.reshape(-1), case.embed_scale * gy.reshape(-1, case.W.shape[1])
        gu = case.scaling * G
        gA, gW = np.zeros(case.A.shape[::-1], gu.dtype), np.zeros(case.W.shape, gu.dtype)
        np.add.at(gA, ids, gu @ case.B)
        np.add.at(gW, ids, G)
        for g in (gA, gW):
            if case.by_frequency:
                g /= np.maximum(case.counts, 1)[:, None]
            if case.padding is not None:
                g[case.padding] = 0.0
        found = {"A": gA.T, "B": gu.T @ case.A.T[ids], "W": gW}
        return {name: np.asarray(value, dtype=case.W.dtype) for name, value in found.items()}

    def embedding_init(self, W: HostArray, config: LoraConfig, seed: int) -> dict[str, HostArray]:
        """A = 0, and B of normal numbers."""
        B = np.random.default_rng(seed).standard_normal((W.shape[1], config.r))
        return {"A": np.zeros((config.r, len(W)), W.dtype), "B": B.astype(W.dtype)}


# ---- truth and bounds --------------------------------------------------------------------------------------


def truth(case: EmbeddingCase) -> dict[str, HostArray]:
    """What the engine's linear layer gives in float64 on one-hot rows; then padding and frequency."""
    W, A, B, gy = (value.astype(np.float64) for value in (case.W, case.A, case.B, case.gy))
    x, gy = np.eye(len(W))[case.ids], case.embed_scale * gy
    base, adapter = Linear(np.ascontiguousarray(W.T)), Adapter(A, B)
    y, saved = lora_linear_forward(x, base, adapter, scaling=case.scaling)
    _, g = lora_linear_backward(gy, saved, base, adapter, scaling=case.scaling)
    gW = lora_linear_backward_base(gy, saved, base, adapter, scaling=case.scaling).W
    engine: Any = {"y": case.embed_scale * y, "A": g.A, "B": g.B, "W": gW.T}
    found = {name: np.array(value) for name, value in engine.items()}
    for by_id in (found["A"].T, found["W"]):
        by_id /= np.maximum(case.counts, 1)[:, None] if case.by_frequency else 1
        by_id[np.arange(len(W)) == case.padding] = 0.0
    return found


def embedding_bounds(case: EmbeddingCase, p: Precision) -> dict[str, HostArray]:
    """The most that a profile's roundings explain, by entry; 0 for ids that do not occur, and for padding."""
    s, e, (_, dim), r = abs(case.scaling), abs(case.embed_scale), case.W.shape, len(case.A)
    W, A, B, gy = (np.abs(value).astype(np.float64) for value in (case.W, case.A, case.B, case.gy))
    ids, G, count = case.ids.reshape(-1), e * gy.reshape(-1, dim), case.counts[:, None]
    z, least = A.T[ids], LEAST.get(p.dtype, 0.0)
    each = p.accumulate * (2 if p.rounding == "toward zero" else 1)

    def gamma(length: Any) -> Any:
        total = length * each + FEW * max(p.store, each) + 4 * p.operand
        return np.where(total < 1, total / np.maximum(1 - total, 1e-300), np.inf)

    gA, gW = np.zeros(A.shape[::-1]), np.zeros(W.shape)
    np.add.at(gA, ids, s * (G @ B + least))
    np.add.at(gW, ids, G)
    share = np.maximum(count, 1) if case.by_frequency else 1
    live = (count > 0) & (np.arange(len(W))[:, None] != case.padding)
    return {
        "y": (gamma(r) * e * (W[ids] + s * z @ B.T + least)).reshape(case.gy.shape),  # (subjects.15)
        "A": (live * (gamma(dim + count) * gA / share + least * p.store)).T,  # (subjects.16)
        "B": gamma(len(ids)) * s * (G.T @ z + least),  # (subjects.17)
        "W": live * (gamma(count) * gW / share + least * p.store),  # (subjects.18)
    }


# ---- the battery -------------------------------------------------------------------------------------------

VOCAB, DIM = 11, 7
#        what            leading axes  r  ids drawn from           padding, by frequency, e
LAYOUTS: tuple[tuple[str, tuple[int, ...], int, tuple[int, ...], int | None, bool, float], ...] = (
    ("plain", (5,), 3, (0, 2, 5, 7, 9, 10), None, False, 1.0),
    ("repeated", (13,), 3, (1, 4, 8), None, False, 1.0),
    ("axes", (2, 2, 3), 4, tuple(range(VOCAB)), None, False, 1.0),
    ("padding", (3, 5), 3, (3, 0, 6), 3, False, 1.0),
    ("first padding", (9,), 2, (0, 1, 10), 0, False, 1.0),
    ("frequency", (12,), 3, (2, 5, 9), None, True, 1.0),
    ("frequency, padding", (2, 7), 3, (6, 2, 7), 6, True, 1.0),
    ("scaled", (6,), 5, (0, 3, 4, 8), None, False, 2.6457513110645907),
    ("scaled, padding", (2, 6), 2, (5, 3, 4), 5, False, 2.6457513110645907),
    ("rank one", (8,), 1, (0, 5, 6, 7), None, False, 1.0),
    ("one id", (), 3, (4,), None, False, 1.0),
    ("no token", (0,), 3, (0,), None, False, 1.0),
)


def draw(id: str, layout: int, dtype: str, seed: tuple[int, ...]) -> EmbeddingCase:
    """Draw one case: A and B are not 0, and every id that may occur does."""
    kind, lead, r, some, padding, by_frequency, e = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    N = int(np.prod(lead))
    ids = np.concatenate([some[:N], rng.choice(some, max(N - len(some), 0))]).astype(np.int64)
    ids = rng.permutation(ids).reshape(lead)
    wide = [rng.standard_normal(size) for size in ((VOCAB, DIM), (r, VOCAB), (DIM, r), (*lead, DIM))]
    W, A, B, gy = (value.astype(dtype) for value in wide)
    config = LoraConfig(r=r, lora_alpha=5.3, use_rslora=layout % 2 == 1)
    options: Any = {"padding": padding, "by_frequency": by_frequency, "embed_scale": e}
    return EmbeddingCase(id, f"embedding, {kind}", config, W, A, B, ids, gy, **options)


def battery_embedding(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Embeddings, for subjects with embedding_forward and embedding_backward; then how they start."""
    if not hasattr(subject, "embedding_forward"):
        return
    for i, layout in enumerate(LAYOUTS):
        for j in range(1 if level == "quick" else 3):
            id = f"embedding/{layout[0].replace(', ', '-').replace(' ', '-')}/{j}"
            if chosen(id, only):
                case = draw(id, i, PROFILES[profile], (seed, 61, i, j))
                yield judge_embedding(subject, case, PRECISIONS[profile])
    if hasattr(subject, "embedding_init"):
        for j, r in enumerate((8, 64)):
            id = f"embedding/start/{j}"
            if chosen(id, only):
                run = partial(_start, subject, PROFILES[profile], r, seed + j)
                law = f"{spec_of(subject).embedding} = 0, and the other factor is drawn"
                yield [lawful(id, "embedding", "start", law, run)]


def judge_embedding(subject: Any, case: EmbeddingCase, precision: Precision) -> list[Check]:
    """y and the gradients of a case, and what has to be 0 exactly."""
    dtype = precision.dtype
    try:
        got = by_name("embedding_forward", {"y": ask(subject, "embedding_forward", case.copy())}, ("y",))
        if hasattr(subject, "embedding_backward"):
            again = case.copy()
            found = ask(subject, "embedding_backward", again, again.gy)
            got |= by_name("embedding_backward", found, ("A", "B", "W"))
    except (Absent, Crash) as error:
        return [Check(f"{case.id}/y", "embedding", case.kind, "y", refusal(error), note=str(error))]
    want, bound = truth(case), embedding_bounds(case, precision)
    for name, more in embedding_bounds(case, PRECISIONS["fp64"]).items():
        bound[name] = bound[name] + more
    checks = [
        judge(case.id, "embedding", case.kind, name, got.get(name), want[name], bound[name], dtype)
        for name in want
        if want[name].any() and (name in got or name != "W")
    ]
    law = "gradients by ids without a token, and by padding, are 0"
    wrong = _not_zero(case, got)
    checks.append(
        Check(f"{case.id}/zero", "embedding", case.kind, law, "fail" if wrong else "pass", note=wrong)
    )
    return checks


def _not_zero(case: EmbeddingCase, got: dict[str, HostArray]) -> str:
    """What has a gradient without cause, bit by bit; or nothing."""
    shapes = {"y": case.gy.shape, "A": case.A.shape, "B": case.B.shape, "W": case.W.shape}
    for name, value in got.items():
        if value.shape != shapes[name]:
            return f"{name}: expected shape {shapes[name]}, got {value.shape}"
    idle = (case.counts == 0) | (np.arange(len(case.W)) == case.padding)
    if "A" in got and got["A"][:, idle].any():  # NaN counts as something
        return "gA of an id without a token, or of padding, is not 0"
    if "W" in got and got["W"][idle].any():
        return "gW of an id without a token, or of padding, is not 0"
    if not case.ids.size and "B" in got and got["B"].any():
        return "gB without a token is not 0"
    return ""


def _start(subject: Any, dtype: str, r: int, seed: int) -> str | None:
    """The factor that the subject declares is 0, and the other is of standard normal numbers."""
    zero = spec_of(subject).embedding
    drawn = OTHER[zero]
    W = np.random.default_rng((seed, 62)).standard_normal((120, 96)).astype(dtype)
    config = LoraConfig(r=r, lora_alpha=11)
    got = by_name("embedding_init", ask(subject, "embedding_init", W.copy(), config, seed), ("A", "B"))
    for name, shape in (("A", (r, 120)), ("B", (96, r))):
        if name not in got or got[name].shape != shape:
            return f"{name}: expected shape {shape}, got {got[name].shape if name in got else 'none'}"
    if got[zero].any():
        swapped = "" if got[drawn].any() else f"; {drawn} is, the other role: declare Spec(embedding={drawn!r})"
        return f"{zero} is not 0{swapped}"
    values = np.sort(got[drawn].astype(np.float64).ravel())
    chance = np.array([0.5 * (1 + erf(value / sqrt(2))) for value in values.tolist()])
    away = float(np.abs(np.arange(1, values.size + 1) / values.size - chance).max())
    limit = sqrt(log(2 / CHANCE) / (2 * values.size)) + 1 / values.size  # Dvoretzky, Kiefer, Wolfowitz
    return None if away <= limit else f"{drawn} is {away:.2f} away from the normal distribution"
