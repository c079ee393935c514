"""What the ops of a model are: each by its definition, gradients by complex steps of it.

No derivative is written down but erf's, and nothing of the engine is used.  Definitions: specs/modelops.md.
"""

from collections.abc import Callable
from math import erf, pi, sqrt
from typing import Any

import numpy as np

from ..batteries.op_case import IGNORED, OpCase
from ..cases import HostArray

STEP = 1e-30
Arrays = dict[str, Any]  # each with a first axis of steps


def truth(case: OpCase) -> dict[str, HostArray]:
    """y and the gradient by each of case.names, in float64."""
    wide = {n: v.astype(np.float64) if v.dtype.kind == "f" else v for n, v in case.at.items()}
    steps = sum(wide[name].size for name in case.names)
    stepped: Arrays = {}
    first = 1  # where the steps of an array begin; at 0 there is none
    for name, value in wide.items():
        many = np.broadcast_to(value, (steps + 1, *value.shape))
        if name in case.names:
            many = many.astype(np.complex128).reshape(steps + 1, value.size)
            many[np.arange(first, first + value.size), np.arange(value.size)] += STEP * 1j
            many, first = many.reshape(steps + 1, *value.shape), first + value.size
        stepped[name] = many
    y = DEFINITIONS[case.op](stepped, case)
    gy = case.gy.astype(np.float64)
    slopes = np.sum((gy * y.imag[1:]).reshape(steps, gy.size), axis=1) / STEP
    found, first = {"y": np.array(y[0].real)}, 0
    for name in case.names:
        size = wide[name].size
        found[name] = slopes[first : first + size].reshape(wide[name].shape)
        first += size
    if case.op == "lookup" and case.padding is not None:
        found["W"][case.padding] = 0.0
    return found


def seen_by(case: OpCase) -> HostArray:
    """Which keys a query sees, by loops: of its sequence, not later, within the window: (N, M)."""
    seen = np.zeros((len(case.q), len(case.k)), bool)
    bounds = zip(case.starts[:-1], case.starts[1:], case.key_starts[:-1], case.key_starts[1:], strict=True)
    for a, b, c, d in bounds:
        ahead = (d - c) - (b - a) if case.causal else 0
        for t in range(b - a):
            for s in range(d - c):
                back = t + ahead - s
                seen[a + t, c + s] = not (case.causal and back < 0) and (
                    case.window is None or back < case.window
                )
    return seen


def distances(case: OpCase) -> HostArray:
    """s − t of every query and key, each counted within its sequence, 0 across sequences: (N, M)."""
    found = np.zeros((len(case.q), len(case.k)), np.int64)
    bounds = zip(case.starts[:-1], case.starts[1:], case.key_starts[:-1], case.key_starts[1:], strict=True)
    for a, b, c, d in bounds:
        ahead = (d - c) - (b - a) if case.causal else 0
        found[a:b, c:d] = np.arange(d - c) - ahead - np.arange(b - a)[:, None]
    return found


def bucket(r: int, buckets: int, bidirectional: bool, max_distance: int) -> int:
    """T5's bucket of the relative position r = s − t, its logarithms compared as whole numbers."""
    n = buckets // 2 if bidirectional else buckets
    side, d, half = (n if bidirectional and r > 0 else 0), abs(r) if bidirectional else max(-r, 0), n // 2
    if d < half:
        return side + d
    steps = n - half  # d ≥ half·(max/half)^(j/steps), both sides to the power of steps
    over = [j for j in range(steps) if d**steps * half**j >= half**steps * max_distance**j]
    return side + half + max(over)


def kept_by(z: HostArray, k: int) -> HostArray:
    """Which experts each token keeps: the k largest logits, of equal ones the first: (N, E)."""
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    kept = np.zeros(z.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept


# ---- the definitions, on a first axis of steps -------------------------------------------------------------


def _rms_norm(v: Arrays, case: OpCase) -> Any:
    x = v["x"]
    return x / np.sqrt(np.mean(x * x, axis=2, keepdims=True) + case.eps) * v["w"][:, None]


def _layer_norm(v: Arrays, case: OpCase) -> Any:
    c = v["x"] - np.mean(v["x"], axis=2, keepdims=True)
    return c / np.sqrt(np.mean(c * c, axis=2, keepdims=True) + case.eps) * v["w"][:, None] + v["b"][:, None]


def _rope(v: Arrays, case: OpCase) -> Any:
    """Pairs of channels as complex numbers, turned by an angle each."""
    x, half = v["x"], case.x.shape[2] // 2
    angle = case.positions[:, None, None] * case.theta ** (-np.arange(half) / half)
    turn, found = (np.cos(angle), np.sin(angle)), np.empty(x.shape, x.dtype)
    for i in range(half):
        found[..., i] = x[..., i] * turn[0][..., i] - x[..., i + half] * turn[1][..., i]
        found[..., i + half] = x[..., i] * turn[1][..., i] + x[..., i + half] * turn[0][..., i]
    return found


def _attention(v: Arrays, case: OpCase) -> Any:
    """Query by query of one table, as large as it is."""
    q, k, value = v["q"], v["k"], v["v"]
    group = q.shape[2] // k.shape[2]
    k, value = np.repeat(k, group, axis=2), np.repeat(value, group, axis=2)
    S = case.scale * np.einsum("pnhd,pmhd->phnm", q, k)
    if "R" in v:
        how = len(case.R), case.bidirectional, case.max_distance
        numbers = {r: bucket(int(r), *how) for r in np.unique(distances(case))}
        places = np.vectorize(numbers.get, otypes=[np.int64])(distances(case))
        S = S + np.moveaxis(v["R"][:, places], 3, 1)
    seen = seen_by(case)
    S = np.where(seen, S, 0)
    top = np.max(np.where(seen, S.real, -np.inf), axis=3, keepdims=True, initial=-1e300)
    P = np.exp(np.where(seen, S - top, 0)) * seen
    return np.einsum("phnm,pmhd->pnhd", P / P.sum(axis=3, keepdims=True), value)


def _silu(u: Any) -> Any:
    return u / (1 + np.exp(-u))


def _gelu(v: Arrays, case: OpCase) -> Any:
    u = v["u"]
    at = np.array([erf(value / sqrt(2)) for value in case.u.ravel().tolist()]).reshape(case.u.shape)
    slope = 2 / sqrt(pi) * np.exp(-(case.u.astype(np.float64) ** 2) / 2)
    return 0.5 * u * (1 + at + 1j * slope * u.imag / sqrt(2))


def _gelu_tanh(v: Arrays, case: OpCase) -> Any:
    u = v["u"]
    return u / (1 + np.exp(-2 * sqrt(2 / pi) * (u + 0.044715 * u**3)))


def _cross_entropy(v: Arrays, case: OpCase) -> Any:
    """Row by row, and the mean over n."""
    z, V = v["z"], case.z.shape[1]
    found = np.zeros(len(z), np.complex128)
    for row, label in enumerate(case.labels.tolist()):
        if label != IGNORED:
            top = z[:1, row].real.max()
            log_p = z[:, row] - top - np.log(np.sum(np.exp(z[:, row] - top), axis=1))[:, None]
            share = np.full(V, case.smoothing / V)
            share[label] += 1 - case.smoothing
            found -= np.sum(share * log_p, axis=1) / case.n
    return found


def _lookup(v: Arrays, case: OpCase) -> Any:
    return v["W"][:, case.ids]


def _router(v: Arrays, case: OpCase) -> Any:
    kept = kept_by(case.z, case.k)
    e = np.exp(v["z"] - v["z"].real.max(axis=2, keepdims=True, initial=-1e300))
    return e * kept / np.sum(e * kept if case.normalised else e, axis=2, keepdims=True)


DEFINITIONS: dict[str, Callable[[Arrays, OpCase], Any]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope": _rope,
    "attention": _attention,
    "swiglu": lambda v, case: _silu(v["u"]) * v["w"],
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "cross_entropy": _cross_entropy,
    "lookup": _lookup,
    "router": _router,
}
