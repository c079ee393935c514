"""Embeddings: the layer on one-hot rows, computed by looking rows up and by adding gradients to them.

y = e·(W[i] + s·A[:, i]ᵀBᵀ), under DoRA e·k∘(...). Ids repeat, some are never used; a padding id trains B, and
neither W nor A. Derivation: specs/subjects.md.
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

    def arrays(self) -> dict[str, HostArray]:
        """Every array, by name."""
        names = ("W", "A", "B", "m", "ids", "gy")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def copy(self) -> "EmbeddingCase":
        """The same case in arrays of its own."""
        return replace(self, **{name: value.copy() for name, value in self.arrays().items()})  # type: ignore[arg-type]


class EmbeddingReference:
    """The embedding and its adjoint, by rows."""

    def embedding_forward(self, case: EmbeddingCase) -> HostArray:
        """y : (*lead, dim).  (subjects.9), (subjects.10)"""
        z = case.A.T[case.ids]
        y = case.embed_scale * (case.W[case.ids] + case.scaling * (z @ case.B.T)) * ratio(case)
        return np.asarray(y, dtype=case.W.dtype)

    def embedding_backward(self, case: EmbeddingCase, gy: HostArray) -> dict[str, HostArray]:
        """The gradients by A, B, W and m.  (subjects.11) to (subjects.14), (subjects.20) to (subjects.22)"""
        ids, G = case.ids.reshape(-1), case.embed_scale * gy.reshape(-1, case.W.shape[1])
        z, k = case.A.T[ids], ratio(case)
        gu, gW_rows = case.scaling * (G * k), G * k
        by_row = {"A": np.zeros(case.A.shape[::-1], gu.dtype), "W": np.zeros(case.W.shape, gu.dtype)}
        np.add.at(by_row["A"], ids, gu @ case.B)
        np.add.at(by_row["W"], ids, gW_rows)
        gB = gu.T @ z
        for g in by_row.values():
            if case.by_frequency:
                g /= np.maximum(case.counts, 1)[:, None]
        found = {"B": gB}
        if case.m is not None:
            V = case.W.T + case.scaling * case.B @ case.A
            n = np.sqrt(np.sum(V * V, axis=1))
            found["m"] = np.sum(G * (case.W[ids] + case.scaling * (z @ case.B.T)), axis=0) / n
            if case.norm_gradient:
                gV = (-found["m"] * case.m / n**2)[:, None] * V
                by_row["A"] += (case.scaling * case.B.T @ gV).T
                by_row["W"] += gV.T
                found["B"] = gB + case.scaling * gV @ case.A.T
        if case.padding is not None:
            for g in by_row.values():
                g[case.padding] = 0.0
        found |= {"A": by_row["A"].T, "W": by_row["W"]}
        return {name: np.asarray(value, dtype=case.W.dtype) for name, value in found.items()}

    def embedding_merge(self, case: EmbeddingCase) -> dict[str, HostArray]:
        """The merged table."""
        return {"W": merged(case).astype(case.W.dtype)}

    def embedding_init(self, W: HostArray, config: LoraConfig, seed: int) -> dict[str, HostArray]:
        """A = 0, and B of normal numbers."""
        B = np.random.default_rng(seed).standard_normal((W.shape[1], config.r))
        return {"A": np.zeros((config.r, len(W)), W.dtype), "B": B.astype(W.dtype)}


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


# ---- the battery -------------------------------------------------------------------------------------------

VOCAB, DIM = 11, 7
#        what            leading axes  r  ids drawn from           padding, by frequency, e
LAYOUTS: tuple[tuple[str, tuple[int, ...], int, tuple[int, ...], int | None, bool, float], ...] = (
    # and under DoRA where it is called so
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
    ("dora", (3, 4), 3, (0, 2, 5, 7), None, False, 1.0),
    ("dora, scaled, padding", (11,), 2, (4, 1, 9), 4, False, 2.6457513110645907),
    ("dora, frequency", (2, 5), 4, (1, 6, 8), None, True, 1.0),
    ("dora full norm", (9,), 3, (2, 3, 10), None, False, 1.0),
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
    config = LoraConfig(r=r, lora_alpha=5.3, use_rslora=layout % 2 == 1, use_dora="dora" in kind)
    options: Any = {"padding": padding, "by_frequency": by_frequency, "embed_scale": e}
    if config.use_dora:
        options["m"] = (rng.uniform(0.3, 3, DIM) * rng.choice([-1, 1], DIM) * sqrt(VOCAB)).astype(dtype)
        options["norm_gradient"] = "full" in kind
    return EmbeddingCase(id, f"embedding, {kind}", config, W, A, B, ids, gy, **options)


def cases(subject: Any, profile: str, seed: int, level: str, only: str, stem: str) -> Iterator[EmbeddingCase]:
    """The cases whose norm is differentiated as the subject's is, by the segments of their ids."""
    norms = spec_of(subject).norm_gradient
    for i, layout in enumerate(LAYOUTS):
        for j in range(1 if level == "quick" else 3):
            id = f"{stem}/{layout[0].replace(', ', '-').replace(' ', '-')}/{j}"
            if chosen(id, only) and ("dora" not in layout[0] or ("full" in layout[0]) in norms):
                yield draw(id, i, PROFILES[profile], (seed, 61, i, j))


def battery_embedding(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Embeddings, for subjects with embedding_forward and embedding_backward; then how they start."""
    if not hasattr(subject, "embedding_forward"):
        return
    for case in cases(subject, profile, seed, level, only, "embedding"):
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
            got |= by_name("embedding_backward", found, ("A", "B", "W", "m"))
        mergeable = hasattr(subject, "embedding_merge")
        folded = (
            by_name("embedding_merge", ask(subject, "embedding_merge", case.copy()), ("W",))
            if mergeable
            else {}
        )
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
    if folded:
        every = replace(case, ids=np.arange(len(case.W)), gy=np.zeros_like(case.W), embed_scale=1.0)
        limit = 2 * embedding_bounds(every, precision)["y"] + embedding_bounds(every, PRECISIONS["fp64"])["y"]
        checks.append(
            judge(f"{case.id}/merged", "embedding", case.kind, "W", folded.get("W"), merged(case), limit, dtype)
        )
    law = "gradients by ids without a token, and by padding, are 0"
    wrong = _not_zero(case, got)
    checks.append(
        Check(f"{case.id}/zero", "embedding", case.kind, law, "fail" if wrong else "pass", note=wrong)
    )
    return checks


def _not_zero(case: EmbeddingCase, got: dict[str, HostArray]) -> str:
    """What has a gradient without cause, bit by bit; or nothing."""
    shapes = {name: value.shape for name, value in case.arrays().items()} | {"y": case.gy.shape}
    for name, value in got.items():
        if value.shape != shapes[name]:
            return f"{name}: expected shape {shapes[name]}, got {value.shape}"
    unused = (case.counts == 0) & (not case.norm_gradient)  # a norm is of every id
    idle = unused | (np.arange(len(case.W)) == case.padding)
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
