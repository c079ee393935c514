"""Embeddings: the layer on one-hot rows, computed by looking rows up and by adding gradients to them.

y = e·(W[i] + s·A[:, i]ᵀBᵀ), under DoRA e·k∘(...). Ids repeat, some are never used; a padding id trains B, and
neither W nor A. Derivation: specs/subjects.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import erf, log, sqrt
from typing import Any

import numpy as np

from ... import LoraConfig
from ..cases import PROFILES, HostArray
from ..conventions import spec_of
from ..precision import PRECISIONS, Precision
from ..report import Check
from .embedding_case import EmbeddingCase, embedding_bounds, merged, ratio, truth
from .laws import lawful
from .starts import CHANCE
from .tensors import Absent, Crash, ask, by_name, chosen, judge, refusal

OTHER = {"A": "B", "B": "A"}


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
