"""Laws between the tensors of one layer, which hold for every right implementation and need no truth.

Each is None where it holds, or says in a line what is wrong. Its tolerance is the bound of specs/verify.md on
each tensor, carried through the law.  Derivation: specs/lattice.md.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from ..bounds.widths import Width, bounds, merged_bounds, roundoff
from ..cases import UNIT, Case, HostArray
from .laws import differs
from .secant import norms
from .tensors import Absent, answer, ask, by_name

EPS = UNIT["float64"]


def _wide(subject: Any, case: Case, *names: str) -> list[HostArray]:
    got = answer(subject, case)
    for name in names:
        shape = case.gy.shape if name == "y" else getattr(case, name).shape
        if name not in got:
            raise Absent(f"the subject gives no gradient by {name}")
        if got[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {got[name].shape}")
        if got[name].dtype != case.x.dtype:
            raise ValueError(f"{name}: expected dtype {case.x.dtype}, got {got[name].dtype}")
    return [got[name].astype(np.float64) for name in names]


def _off(left: HostArray, right: HostArray, bound: HostArray) -> str | None:
    off = np.abs(left - right)
    if (off <= bound).all():
        return None
    if not np.isfinite(off).all():
        return "not finite"
    return f"off by {off.max():.3g}, {(off / np.maximum(bound, 1e-300)).max():.2g} × the bound"


def gauge(subject: Any, case: Case, u: Width) -> str | None:
    """Both factors see the same gradient by z-space: BᵀgB = gA Aᵀ, with any mask, under DoRA too."""
    gA, gB = _wide(subject, case, "A", "B")  # (lattice.12)
    A, B, bound = case.A.astype(np.float64), case.B.astype(np.float64), bounds(case, u)
    error = np.abs(B.T) @ bound["B"] + bound["A"] @ np.abs(A.T)
    error += 64 * EPS * (np.abs(B.T) @ np.abs(gB) + np.abs(gA) @ np.abs(A.T))
    return _off(B.T @ gB, gA @ A.T, error)


def turned(subject: Any, case: Case, u: Width) -> str | None:
    """T permutes ranks and scales by powers of two, so that TA and BT⁻¹ have no error."""
    r = case.A.shape[0]
    order, scale = np.random.default_rng(3).permutation(r), 2.0 ** (np.arange(r) % 5 - 2)
    A, B = case.A[order] * scale[:, None], case.B[:, order] / scale
    turned = replace(case, A=A.astype(case.A.dtype), B=B.astype(case.B.dtype))
    want, got = answer(subject, case), answer(subject, turned)
    if "A" in want and want["A"].shape == A.shape and want["A"].dtype == case.A.dtype:
        want["A"] = (want["A"][order] / scale[:, None]).astype(A.dtype)
    if "B" in want and want["B"].shape == B.shape and want["B"].dtype == case.B.dtype:
        want["B"] = (want["B"][:, order] * scale).astype(B.dtype)
    return differs(got, want, bounds(turned, u))


def scaled(subject: Any, case: Case, u: Width) -> str | None:
    """y is affine in s: two values of it give the derivative, without bB, which s multiplies too."""
    plain_case = replace(case, bB=None, config=replace(case.config, lora_bias=False))
    c = plain_case.config
    more = replace(plain_case, config=replace(c, lora_alpha=3 * c.lora_alpha))
    (y, gB), (y3,) = _wide(subject, plain_case, "y", "B"), _wide(subject, more, "y")
    G, bound, B = case.gy.astype(np.float64), bounds(plain_case, u), case.B.astype(np.float64)
    error = float((np.abs(G) * (bound["y"] + bounds(more, u)["y"])).sum() / 2 + (np.abs(B) * bound["B"]).sum())
    error += 64 * EPS * float((np.abs(G) * (np.abs(y) + np.abs(y3))).sum() + np.abs(B * gB).sum())
    left = (G * (y3 - y)).sum() / 2  # s(L(3s) − L(s))/(3s − s)                                     (lattice.13)
    return _off(np.array([left]), np.array([(B * gB).sum()]), np.array([error]))


def magnitude(subject: Any, case: Case, u: Width) -> str | None:
    """Without a mask y less what stands outside k is linear in m, row by row."""
    y, gm = _wide(subject, case, "y", "m")  # (lattice.14)
    G, bound, m = case.gy.astype(np.float64), bounds(case, u), np.asarray(case.m, dtype=np.float64)
    b = np.zeros(len(m)) if case.b is None or case.scales_bias else case.b.astype(np.float64)
    axes = tuple(range(G.ndim - 1))
    error = np.abs(m) * bound["m"] + (np.abs(G) * (bound["y"] + 64 * EPS * (np.abs(y) + np.abs(b)))).sum(
        axis=axes
    )
    return _off(m * gm, (G * (y - b)).sum(axis=axes), error)


def tangent(subject: Any, case: Case, u: Width) -> str | None:
    """Where W = 0, V = s·BA is linear in B's rows: a gradient through the norm is at a right angle to them."""
    bare = replace(case, W=np.zeros_like(case.W))
    if case.scales_bias:  # which B does not reach
        bare = replace(bare, b=None, train_b=False)
    gB, gm = _wide(subject, bare, "B", "m")  # (lattice.15)
    B, m, bound = case.B.astype(np.float64), np.asarray(case.m, dtype=np.float64), bounds(bare, u)
    error = (np.abs(B) * (bound["B"] + 64 * EPS * np.abs(gB))).sum(axis=1)
    if case.norm_gradient:
        return _off((B * gB).sum(axis=1), np.zeros(len(m)), error)
    return _off((B * gB).sum(axis=1), m * gm, error + np.abs(m) * bound["m"])


# ---- merging -------------------------------------------------------------------------------------------------


def _merge(subject: Any, case: Case) -> dict[str, HostArray]:
    return by_name("merge", ask(subject, "merge", case.copy()), ("W", "b"))


def merged(subject: Any, case: Case, u: Width) -> str | None:
    """x W'ᵀ + b', in float64, is the forward without dropout."""
    got, y = _merge(subject, case), answer(subject, case)["y"].astype(np.float64)
    error, x = merged_bounds(case, u), case.x.astype(np.float64)
    if "W" not in got or got["W"].shape != case.W.shape:
        return f"W: expected shape {case.W.shape}, got {got['W'].shape if 'W' in got else 'none'}"
    W, b = got["W"].astype(np.float64), got.get("b", np.zeros(len(case.W))).astype(np.float64)
    bound = bounds(case, u)["y"] + np.abs(x) @ (error["W"] + 64 * EPS * np.abs(W)).T + error["b"]
    off = np.abs(x @ W.T + b - y)
    return None if (off <= bound).all() else f"y differs by {off.max():.3g}"


def unmerged(subject: Any, case: Case, u: Width) -> str | None:
    """W and b come back within three times the roundings of merging: once in, and no more than twice out."""
    whole = _merge(subject, case)
    given = {name: value.copy() for name, value in whole.items()}
    got = by_name("unmerge", ask(subject, "unmerge", case.copy(), given), ("W", "b"))
    k = 1.0 if case.m is None else (np.abs(case.m.astype(np.float64)) / norms(case)[1])[:, None]
    update = abs(case.scaling) * np.abs(case.B.astype(np.float64)) @ np.abs(case.A.astype(np.float64))
    size = np.abs(case.W.astype(np.float64)) + update
    count = case.A.shape[0] + 16
    bound = {"W": 3 * (merged_bounds(case, u)["W"] / k + count * roundoff(u) * size)}
    if case.b is not None:
        bound["b"] = 3 * (
            merged_bounds(case, u)["b"] + 16 * roundoff(u) * np.abs(whole["b"].astype(np.float64))
        )
    return differs(got, {name: getattr(case, name) for name in bound}, {k: v / 2 for k, v in bound.items()})
