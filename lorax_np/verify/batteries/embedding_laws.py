"""Laws of an embedding that need no other one: parts alone, secants, padding and frequency, magnitudes, merges.

Each asks the subject twice, with something changed whose effect is plain. Derivation: specs/subjects.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ... import LoraConfig
from ..cases import PROFILES, HostArray
from ..precision import PRECISIONS, Precision
from ..report import Check
from .edges import law, off
from .embedding import cases
from .embedding_case import EmbeddingCase, embedding_bounds
from .tensors import Absent, ask, by_name, chosen

Run = Callable[[], str | None]
NAMES = "A", "B", "W", "m"


def battery_embedding_laws(
    subject: Any, profile: str, seed: int, level: str, only: str
) -> Iterator[list[Check]]:
    """Laws of embeddings, for subjects with embedding_forward; of gradients and merges, if they have those."""
    if not hasattr(subject, "embedding_forward"):
        return
    p = PRECISIONS[profile]
    for case in cases(subject, profile, seed, "quick", only, "embeddinglaws"):
        for name, run in laws(subject, case, p).items():
            yield law(
                f"{case.id}/{name.split(',')[0].replace(' ', '-')}", "embedding laws", case.kind, name, run
            )
    if hasattr(subject, "embedding_init") and chosen("embeddinglaws/start/0", only):
        name, run = "the first y is the base's", partial(_first, subject, PROFILES[profile], seed, p)
        yield law("embeddinglaws/start/0", "embedding laws", "embedding", name, run)


def laws(subject: Any, case: EmbeddingCase, p: Precision) -> dict[str, Run]:
    """The laws that a case can show, by what they say."""
    found: dict[str, Run] = {}
    if not case.ids.size:
        return found
    if case.m is None:
        found["base and update, each alone"] = partial(_apart, subject, case, p)
    else:
        found["a magnitude of n changes nothing"] = partial(_neutral, subject, case, p)
    if hasattr(subject, "embedding_merge"):
        found["merged, it gives what both gave"] = partial(_served, subject, case, p)
    if hasattr(subject, "embedding_backward"):
        plain = case.padding is None and not case.by_frequency
        what = "gradients are secants" if plain else "padding and frequency change rows alone"
        found[what] = partial(_secants if plain else _options, subject, case, p)
    return found


def forward(subject: Any, case: EmbeddingCase) -> HostArray:
    """y, of the right shape, in float64."""
    y = by_name("embedding_forward", {"y": ask(subject, "embedding_forward", case.copy())}, ("y",))["y"]
    if y.shape != case.gy.shape:
        raise ValueError(f"y: expected shape {case.gy.shape}, got {y.shape}")
    return y.astype(np.float64)


def backward(subject: Any, case: EmbeddingCase) -> dict[str, HostArray]:
    """The gradients, of the right shapes, in float64."""
    mine = case.copy()
    found = by_name("embedding_backward", ask(subject, "embedding_backward", mine, mine.gy), NAMES)
    for name in ("A", "B", *(("m",) if case.m is not None else ())):
        if name not in found:
            raise Absent(f"the subject gives no gradient by {name}")
    for name, value in found.items():
        if value.shape != getattr(case, name).shape:
            raise ValueError(f"{name}: expected shape {getattr(case, name).shape}, got {value.shape}")
    return {name: value.astype(np.float64) for name, value in found.items()}


def _limit(case: EmbeddingCase, p: Precision) -> dict[str, HostArray]:
    """What roundings of the profile explain, and the float64 of these laws."""
    found, more = embedding_bounds(case, p), embedding_bounds(case, PRECISIONS["fp64"])
    return {name: value + more[name] for name, value in found.items()}


def _apart(subject: Any, case: EmbeddingCase, p: Precision) -> str | None:
    """With B = 0, y = e·W[ids]; with W = 0, y = s·e·(BA)ᵀ[ids]."""
    for name, zero in (("the base", {"B": 0 * case.B}), ("the update", {"W": 0 * case.W})):
        one = replace(case, **zero)  # type: ignore[arg-type]
        W, A, B = (value.astype(np.float64) for value in (one.W, one.A, one.B))
        want = case.embed_scale * (W + case.scaling * (B @ A).T)[case.ids]
        wrong = off("y", forward(subject, one), want, _limit(one, p)["y"])
        if wrong:
            return f"{name} alone: {wrong}"
    return None


def _secants(subject: Any, case: EmbeddingCase, p: Precision) -> str | None:
    """⟨gy, y(θ + v) − y(θ − v)⟩ = ⟨gθ, 2v⟩ for each θ in which y is affine: A, B, W, m.

    Under DoRA y is affine in A and B where m moves along, so that m/n stays what it is: the gradient is that of
    a norm held constant.
    """
    got, bound = backward(subject, case), _limit(case, p)
    G, rng = case.gy.astype(np.float64), np.random.default_rng(5)
    for name in ("A", "B", "W") if case.m is None else ("m",) if case.norm_gradient else ("m", "A", "B"):
        if name not in got:
            continue
        value = getattr(case, name)
        v = (rng.standard_normal(value.shape) * np.abs(value).mean()).astype(value.dtype)
        up, down = (_moved(case, name, end) for end in (value + v, value - v))
        step = getattr(up, name).astype(np.float64) - getattr(down, name)
        found = float(np.sum(G * (forward(subject, up) - forward(subject, down))))
        want = float(np.sum(got[name] * step))
        slack = sum(float(np.sum(np.abs(G) * _limit(end, p)["y"])) for end in (up, down))
        if not abs(found - want) <= slack + float(np.sum(bound[name] * np.abs(step))):
            return f"⟨g{name}, v⟩ = {want:.6g}, and y changes by {found:.6g}"
    return None if case.m is None else _gauge(case, got, bound)


def _moved(case: EmbeddingCase, name: str, value: HostArray) -> EmbeddingCase:
    """The case with another θ; of A and B, with the m that keeps m/n."""
    end = replace(case, **{name: value})  # type: ignore[arg-type]
    if case.m is None or name not in ("A", "B"):
        return end
    before, after = (np.linalg.norm(one.W.T + one.scaling * one.B @ one.A, axis=1) for one in (case, end))
    return replace(end, m=(case.m * (after / before)).astype(case.m.dtype))


def _gauge(case: EmbeddingCase, got: dict[str, HostArray], bound: dict[str, HostArray]) -> str | None:
    """Both factors see the same gradient by z-space: BᵀgB = gA Aᵀ.  (lattice.12)"""
    A, B = case.A.astype(np.float64), case.B.astype(np.float64)
    limit = np.abs(B.T) @ bound["B"] + bound["A"] @ np.abs(A.T)
    return off("gA Aᵀ", got["A"] @ A.T, B.T @ got["B"], limit)


def _options(subject: Any, case: EmbeddingCase, p: Precision) -> str | None:
    """Without padding and frequency: the same gB and gm, and gA and gW but for what the options say."""
    bare = replace(case, padding=None, by_frequency=False)
    got, want, first, second = (
        backward(subject, case),
        backward(subject, bare),
        _limit(case, p),
        _limit(bare, p),
    )
    share = 1 / np.maximum(case.counts, 1) if case.by_frequency else np.ones(len(case.W))
    factor = {"A": share * (np.arange(len(case.W)) != case.padding)}
    factor["W"] = factor["A"][:, None]
    for name in got.keys() & want.keys():
        scale = factor.get(name, np.ones(1))
        wrong = off(f"g{name}", got[name], scale * want[name], first[name] + scale * second[name])
        if wrong:
            return wrong
    return None


def _neutral(subject: Any, case: EmbeddingCase, p: Precision) -> str | None:
    """m = ‖Wᵀ + s·BA‖ by rows: y is the layer's without a magnitude. And m∘gm = Σ gy∘y: y is linear in m."""
    W, A, B = (value.astype(np.float64) for value in (case.W, case.A, case.B))
    n = np.linalg.norm(W.T + case.scaling * B @ A, axis=1).astype(case.W.dtype)
    same, plain = replace(case, m=n), case.plain()
    limit = _limit(same, p)["y"] + _limit(plain, p)["y"]
    wrong = off("y", forward(subject, same), forward(subject, plain), limit)
    if wrong or case.m is None or not hasattr(subject, "embedding_backward"):
        return wrong
    dim, bound, m = W.shape[1], _limit(case, p), case.m.astype(np.float64)
    G, y = case.gy.astype(np.float64).reshape(-1, dim), forward(subject, case).reshape(-1, dim)
    rest = np.sum(np.abs(G) * bound["y"].reshape(-1, dim), axis=0)
    return off("m∘gm", m * backward(subject, case)["m"], np.sum(G * y, axis=0), np.abs(m) * bound["m"] + rest)


def _served(subject: Any, case: EmbeddingCase, p: Precision) -> str | None:
    """Every row of the merged table, looked up with B = 0."""
    found = by_name("embedding_merge", ask(subject, "embedding_merge", case.copy()), ("W",))
    if "W" not in found or found["W"].shape != case.W.shape:
        return f"W: expected shape {case.W.shape}, got {found['W'].shape if 'W' in found else 'none'}"
    every = replace(case, ids=np.arange(len(case.W)), gy=np.zeros_like(case.W))
    after = replace(every.plain(), W=found["W"], B=0 * case.B)
    limit = 2 * (_limit(every, p)["y"] + _limit(after, p)["y"])
    return off("y", forward(subject, after), forward(subject, every), limit)


def _first(subject: Any, dtype: str, seed: int, p: Precision) -> str | None:
    """y of a fresh adapter is y without one."""
    W = np.random.default_rng((seed, 63)).standard_normal((20, 9)).astype(dtype)
    config = LoraConfig(r=4, lora_alpha=11)
    got = by_name("embedding_init", ask(subject, "embedding_init", W.copy(), config, seed), ("A", "B"))
    case = EmbeddingCase("", "embedding", config, W, got["A"], got["B"], np.arange(20), np.zeros_like(W))
    plain = replace(case, A=0 * got["A"], B=0 * got["B"])
    return off("y", forward(subject, case), W.astype(np.float64), _limit(plain, p)["y"])
