"""The ops of a model as tables of steps, any of which can be replaced: what faults are planted in.

A step is a function of the steps before it, as in plain.py. On NumPy arrays these are one more right
implementation; on numbers that carry their roundings they are the bounds.  Equations: specs/modelops.md.
"""

from collections.abc import Mapping
from math import log, pi, sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..batteries.op_case import IGNORED, OpCase
from ..bounds.running import Rounded, erf, joined, largest, mean
from ..cases import HostArray
from .plain import Step

Table = Mapping[str, Step]


# ---- norms -------------------------------------------------------------------------------------------------

RMS_NORM: Table = {
    "c": lambda t: t.x,
    "rho": lambda t: 1 / np.sqrt(mean(t.c * t.c) + t.eps),
    "h": lambda t: t.rho * t.c,
    "y": lambda t: t.h * t.w,
    "g": lambda t: t.gy * t.w,
    "along": lambda t: mean(t.g * t.h),
    "gx": lambda t: t.rho * (t.g - t.h * t.along),
    "gw": lambda t: (t.gy * t.h).sum(axis=0),
}
LAYER_NORM: Table = {
    "c": lambda t: t.x - mean(t.x),
    "rho": lambda t: 1 / np.sqrt(mean(t.c * t.c) + t.eps),
    "h": lambda t: t.rho * t.c,
    "y": lambda t: t.h * t.w + t.b,
    "g": lambda t: t.gy * t.w,
    "along": lambda t: mean(t.g * t.h),
    "level": lambda t: mean(t.g),
    "gx": lambda t: t.rho * (t.g - t.level - t.h * t.along),
    "gw": lambda t: (t.gy * t.h).sum(axis=0),
    "gb": lambda t: t.gy.sum(axis=0),
}

# ---- rope --------------------------------------------------------------------------------------------------


def frequencies(theta: float, half: int) -> list[float]:
    """Of each pair of channels."""
    return [theta ** (-i / half) for i in range(half)]


def turned(x: Any, t: Any, sign: float) -> Any:
    """x : (N, H, D) turned by the angles, or back."""
    half = t.half
    s = sign * t.sines
    ahead, behind = x[..., :half], x[..., half:]
    return ahead * t.cosines - behind * s, behind * t.cosines + ahead * s


def _table(function: Any, t: Any) -> Any:
    """Cosines or sines, (N, 1, D/2); angles may be off by what the profile's numbers make of them."""
    angle = t.at[:, None, None] * np.asarray(t.rates)
    if isinstance(t.x, Rounded):
        return Rounded(function(angle), t.x.u * (8 * np.abs(angle) + 4), t.x.u)
    return function(angle).astype(t.x.dtype)


ROPE: Table = {
    "half": lambda t: t.case.x.shape[2] // 2,
    "rates": lambda t: frequencies(t.theta, t.half),
    "at": lambda t: t.positions,
    "cosines": lambda t: _table(np.cos, t),
    "sines": lambda t: _table(np.sin, t),
    "y": lambda t: joined(turned(t.x, t, 1.0)),
    "gx": lambda t: joined(turned(t.gy, t, -1.0)),
}

# ---- attention ---------------------------------------------------------------------------------------------


def _within(starts: tuple[int, ...]) -> tuple[HostArray, HostArray, HostArray]:
    """The sequence of each row, its position there, and the lengths."""
    lengths = np.diff(np.asarray(starts))
    which = np.repeat(np.arange(len(lengths)), lengths)
    return which, np.arange(len(which)) - np.asarray(starts)[which] if len(which) else which, lengths


def _apart(t: Any) -> HostArray:
    """s − t, the last query beside the last key where that is causal: (N, M)."""
    (mine, at, n), (_, place, m) = t.queries, t.keys
    ahead = (m - n)[mine] if t.causal else 0
    return np.asarray(place[None, :] - (at + ahead)[:, None])


def buckets(r: HostArray, n: int, bidirectional: bool, max_distance: int) -> HostArray:
    """T5's buckets of r = s − t."""
    n = n // 2 if bidirectional else n
    side, d = (n * (r > 0), np.abs(r)) if bidirectional else (0 * r, np.maximum(-r, 0))
    half = n // 2
    far = half + (np.log(np.maximum(d, 1) / half) / log(max_distance / half) * (n - half)).astype(np.int64)
    return np.asarray(side + np.where(d < half, d, np.minimum(far, n - 1)))


def _scores(t: Any) -> Any:
    S = t.scale * (t.Q @ t.Kt)
    if t.R is None:
        return S
    return S + t.R[t.places].transpose(2, 0, 1)


def _gR(t: Any) -> Any:
    if t.R is None:
        return None
    H, N, M = t.gS.value.shape if isinstance(t.gS, Rounded) else t.gS.shape
    hot = np.eye(len(t.case.R), dtype=t.case.dtype)[t.places.reshape(-1)].T  # (buckets, N·M)
    return hot @ t.gS.transpose(1, 2, 0).reshape(N * M, H)


def grouped(x: Any, t: Any) -> Any:
    """Summed over the query heads of each key head: (H, M, D) -> (M, K, D)."""
    _, M, D = x.value.shape if isinstance(x, Rounded) else x.shape
    belongs = (t.head == np.arange(t.K)[:, None]).astype(t.case.dtype)  # (K, H)
    return (belongs @ x.reshape(t.H, M * D)).reshape(t.K, M, D).transpose(1, 0, 2)


ATTENTION: Table = {
    "H": lambda t: t.case.q.shape[1],
    "K": lambda t: t.case.k.shape[1],
    "head": lambda t: np.arange(t.H) // (t.H // t.K),  # the key head of each query head
    "queries": lambda t: _within(t.starts),
    "keys": lambda t: _within(t.key_starts),
    "same": lambda t: t.queries[0][:, None] == t.keys[0][None, :],
    "r": _apart,
    "near": lambda t: np.full(t.r.shape, True) if t.window is None else -t.r < t.window,
    "past": lambda t: t.r <= 0 if t.causal else np.full(t.r.shape, True),
    "seen": lambda t: t.same & t.near & t.past,
    "places": lambda t: None if t.R is None else buckets(t.r, len(t.case.R), t.bidirectional, t.max_distance),
    "Q": lambda t: t.q.transpose(1, 0, 2),  # (H, N, D)
    "Kt": lambda t: t.k[:, t.head].transpose(1, 2, 0),  # (H, D, M)
    "V": lambda t: t.v[:, t.head].transpose(1, 0, 2),  # (H, M, D)
    "S": _scores,  # (H, N, M)
    "top": lambda t: largest(t.S, t.seen),
    "E": lambda t: np.exp((t.S - t.top) * t.seen) * t.seen,
    "P": lambda t: t.E / t.E.sum(axis=-1, keepdims=True),
    "O": lambda t: t.P @ t.V,
    "y": lambda t: t.O.transpose(1, 0, 2),
    "G": lambda t: t.gy.transpose(1, 0, 2),
    "gP": lambda t: t.G @ t.V.transpose(0, 2, 1),
    "row": lambda t: (t.G * t.O).sum(axis=-1, keepdims=True),
    "gS": lambda t: t.P * (t.gP - t.row),
    "gq": lambda t: (t.scale * (t.gS @ t.Kt.transpose(0, 2, 1))).transpose(1, 0, 2),
    "gk": lambda t: grouped(t.scale * (t.gS.transpose(0, 2, 1) @ t.Q), t),
    "gv": lambda t: grouped(t.P.transpose(0, 2, 1) @ t.G, t),
    "gR": _gR,
}

# ---- activations -------------------------------------------------------------------------------------------

SWIGLU: Table = {
    "s": lambda t: 0.5 * (1 + np.tanh(0.5 * t.u)),  # off by u of 1, not of itself, as kernels' may be
    "silu": lambda t: t.u * t.s,
    "y": lambda t: t.silu * t.w,
    "slope": lambda t: t.s + t.u * t.s * (1 - t.s),
    "gu": lambda t: t.gy * t.w * t.slope,
    "gw": lambda t: t.gy * t.silu,
}
GELU: Table = {
    "normal": lambda t: 0.5 * (1 + erf(sqrt(0.5) * t.u)),
    "y": lambda t: t.u * t.normal,
    "density": lambda t: (1 / sqrt(2 * pi)) * np.exp(-0.5 * (t.u * t.u)),
    "gu": lambda t: t.gy * (t.normal + t.u * t.density),
}
GELU_TANH: Table = {
    "cube": lambda t: 0.044715,
    "inner": lambda t: sqrt(2 / pi) * (t.u + t.cube * (t.u * t.u * t.u)),
    "tanh": lambda t: np.tanh(t.inner),
    "y": lambda t: 0.5 * t.u * (1 + t.tanh),
    "steep": lambda t: sqrt(2 / pi) * (1 + 3 * t.cube * (t.u * t.u)),
    "gu": lambda t: t.gy * (0.5 * (1 + t.tanh + t.u * (1 - t.tanh * t.tanh) * t.steep)),
}

# ---- loss, lookup, router ----------------------------------------------------------------------------------


def _hot(t: Any) -> HostArray:
    """1 at the label of each row that has one: (N, V)."""
    return np.asarray((t.target[:, None] == np.arange(t.V)) & t.counted[:, None])


CROSS_ENTROPY: Table = {
    "V": lambda t: t.case.z.shape[1],
    "target": lambda t: t.labels,
    "counted": lambda t: t.target != IGNORED,
    "divisor": lambda t: t.n,
    "hot": _hot,
    "off": lambda t: t.smoothing / t.V,
    "on": lambda t: 1 - t.smoothing,
    "top": lambda t: largest(t.z),
    "e": lambda t: np.exp(t.z - t.top),
    "Z": lambda t: t.e.sum(axis=-1, keepdims=True),
    "L": lambda t: t.top + np.log(t.Z),
    "share": lambda t: (t.on * t.hot + t.off) * t.counted[:, None],
    "y": lambda t: ((t.L - t.z) * t.share.astype(t.case.dtype)).sum() / t.divisor,
    "P": lambda t: np.exp(t.z - t.L),
    "gz": lambda t: t.gy * (t.P - t.on * t.hot - t.off) * t.counted[:, None] / t.divisor,
}
LOOKUP: Table = {
    "y": lambda t: t.W[t.ids],
    "hot": lambda t: (t.ids[:, None] == np.arange(len(t.case.W))).astype(t.case.dtype),  # (N, vocab)
    "live": lambda t: np.arange(len(t.case.W)) != (-1 if t.padding is None else t.padding),
    "gW": lambda t: (t.hot.T @ t.gy) * t.live[:, None],
}


def _kept(z: HostArray, k: int) -> HostArray:
    """The k largest of each row, of equal ones the first, one after the other: (N, E)."""
    left, kept = np.array(z, np.float64), np.zeros(z.shape, bool)
    for _ in range(k if len(z) else 0):
        best = np.argmax(left, axis=1)[:, None]
        np.put_along_axis(kept, best, True, axis=1)
        np.put_along_axis(left, best, -np.inf, axis=1)
    return kept


ROUTER: Table = {
    "kept": lambda t: _kept(t.case.z, t.k),
    "e": lambda t: np.exp(t.z - largest(t.z)),
    "P": lambda t: t.e / t.e.sum(axis=-1, keepdims=True),  # of all, also where shares of the kept are wanted
    "whole": lambda t: (
        (t.P * t.kept).sum(axis=-1, keepdims=True) if t.normalised else np.ones((), t.case.dtype)
    ),
    "y": lambda t: t.P * t.kept / t.whole,
    "along": lambda t: (t.gy * t.y).sum(axis=-1, keepdims=True) if t.normalised else np.zeros((), t.case.dtype),
    "gP": lambda t: t.kept * (t.gy - t.along) / t.whole,
    "gz": lambda t: t.P * (t.gP - (t.gP * t.P).sum(axis=-1, keepdims=True)),
}
STEPS: dict[str, Table] = {
    "rms_norm": RMS_NORM,
    "layer_norm": LAYER_NORM,
    "rope": ROPE,
    "attention": ATTENTION,
    "swiglu": SWIGLU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "cross_entropy": CROSS_ENTROPY,
    "lookup": LOOKUP,
    "router": ROUTER,
}


def run_op(case: OpCase, gy: Any, changed: Table | None = None, u: float | None = None) -> dict[str, Any]:
    """y and the gradients of a case by name, with some steps changed.

    u : None to compute in the case's own arrays; else a unit roundoff, and what comes are Rounded numbers
    """
    floats = {name: _lifted(v, u) if v.dtype.kind == "f" else v for name, v in case.at.items()}
    t = SimpleNamespace(case=case, gy=_lifted(gy, u), **({"R": None} | floats | case.options))
    for name, step in {**STEPS[case.op], **(changed or {})}.items():
        setattr(t, name, step(t))
    found = {"y": t.y} | {name: getattr(t, f"g{name}") for name in case.names}
    return found if u is not None else {name: np.asarray(v, case.dtype) for name, v in found.items()}


def _lifted(value: HostArray, u: float | None) -> Any:
    if u is None:
        return value
    wide = value.astype(np.float64)
    return Rounded(wide, np.zeros(wide.shape), u)


def op_bounds(case: OpCase, u: float) -> dict[str, HostArray]:
    """How far roundings of size u may move y and each gradient: twice what the steps above carry.

    Twice, since an implementation may take the same equations in another order.
    """
    carried = run_op(case, case.gy, None, u)
    return {name: 2 * np.asarray(value.slack) for name, value in carried.items()}
