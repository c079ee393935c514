"""What each start of more than a draw has to be: by its definition, and by what it leaves and does."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ... import LoraConfig
from ..cases import HostArray

R = 4  # the rank of all of these
# The levels of NF4 as published, in 8 digits: enough to tell which of them a number is near
NF4 = np.array(
    [
        *(-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1),
    ]
)


class Seen(NamedTuple):
    """What a start was made from and what it made, in float64."""

    way: str
    config: LoraConfig
    W: HostArray
    inputs: HostArray
    gradient: HostArray
    A: HostArray
    B: HostArray
    base: HostArray
    u: float  # of the profile

    @property
    def update(self) -> HostArray:
        """s·BA."""
        return self.config.scaling * self.B @ self.A


Look = Callable[[Seen], str | None]


def _near(name: str, got: HostArray, want: HostArray, limit: float) -> str | None:
    away = np.abs(got - want).max()
    return None if away <= limit else f"{name} is off by {away:.2g}, expected {limit:.2g} at most"


def _first(*found: str | None) -> str | None:
    """The first thing that is wrong."""
    return next((line for line in found if line), None)


def _svd(M: HostArray, part: slice = np.s_[:R]) -> HostArray:
    """Of a matrix, what some of its singular triples make."""
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    return np.asarray((U[:, part] * S[part]) @ Vh[part])


def _same_lines(name: str, got: HostArray, want: HostArray, limit: float) -> str | None:
    """Rows that are those wanted, or their opposites."""
    sign = np.where(np.sum(got * want, axis=1) < 0, -1, 1)
    return _near(name, got * sign[:, None], want, limit)


# ---- by definition -----------------------------------------------------------------------------------------


def _orthogonal(t: Seen) -> str | None:
    limit = 64 * R * t.u
    ranks = [int(np.linalg.matrix_rank(M, tol=1e-4)) for M in (t.A, t.B)]
    if ranks != [R // 2, R // 2]:
        return f"the ranks of A and B are {ranks[0]} and {ranks[1]}, expected r/2 = {R // 2}"
    squares = 100 * np.array([np.mean(t.A**2), np.mean(t.B**2)])
    if not ((squares > 0.2) & (squares < 1)).all():
        return (
            f"the mean squares of 10·A and 10·B are {squares[0]:.2g} and {squares[1]:.2g}, expected about 1/2"
        )
    return _first(_near("BA", t.B @ t.A, 0 * t.W, limit), _near("the base", t.base, t.W, 0))


def _olora(t: Seen) -> str | None:
    Q, upper = np.linalg.qr(t.W)
    limit = 1e3 * t.u * float(np.linalg.norm(t.W, 2))
    return _first(
        _same_lines("B", t.B.T, Q[:, :R].T, limit),
        _near("BA", t.B @ t.A, Q[:, :R] @ upper[:R], limit),
        _near("the base", t.base, t.W - t.update, limit),
    )


def _loftq(t: Seen) -> str | None:
    fit = _near("s·BA", t.update, _svd(t.W - t.base), 2e3 * t.u * float(np.abs(t.W).max()))
    if fit or t.way != "loftq/1":
        return fit
    blocks = t.W.reshape(-1, 64)
    top = np.abs(blocks).max(axis=1, keepdims=True)
    levels = NF4[np.abs(blocks[:, :, None] / top[:, :, None] - NF4).argmin(axis=2)] * top
    wrong = np.abs(levels.reshape(t.W.shape) - t.base) > 1e-5 * np.abs(t.W).max()
    return (
        f"{wrong.sum()} entries of the base are not the nearest of their block's levels"
        if wrong.any()
        else None
    )


def _eva(t: Seen) -> str | None:
    X = t.inputs - t.inputs.mean(axis=0)
    V = np.linalg.svd(X, full_matrices=False)[2][:R]
    return _first(
        _same_lines("A", t.A, V, 2e4 * t.u), _near("B", t.B, 0 * t.B, 0), _near("the base", t.base, t.W, 0)
    )


def _covariance(t: Seen) -> HostArray:
    C = t.inputs.T @ t.inputs
    C /= np.mean(np.diagonal(C))
    return np.asarray(C + 0.01 * np.eye(len(C)))


def _corda(t: Seen) -> str | None:
    C = _covariance(t)
    n = min(t.W.shape)
    want = _svd(t.W @ C, np.s_[:R] if t.way == "corda/ipm" else np.s_[n - R : n])
    limit = 1e3 * t.u * float(np.linalg.norm(t.W @ C, 2))
    return _near("s·BAC", t.update @ C, want, limit) or _near("the base", t.base, t.W - t.update, limit)


def _lora_ga(t: Seen) -> str | None:
    U, S, Vh = np.linalg.svd(t.gradient, full_matrices=False)
    i, s = np.arange(2 * R), t.config.scaling
    to_A, to_B, on_A, on_B = {
        "lora_ga/ArB2r": (i[:R], i[R:], 1.0, t.W.shape[0] ** 0.25 / 4),
        "lora_ga/A2rBr": (i[R:], i[:R], 1 / s, 1 / s),
        "lora_ga/ArBr": (i[1::2], i[::2], 1.0, 1.0),
    }[t.way]
    limit = 2e3 * t.u * S[0]
    return _first(
        _same_lines("A", t.A, on_A * Vh[to_A], limit),
        _same_lines("B", t.B.T, on_B * (U[:, to_B] * S[to_B]).T, limit),
        _near("the base", t.base, t.W - t.update, limit),
    )


DEFINITIONS: Mapping[str, Look] = {
    "orthogonal": _orthogonal,
    "olora": _olora,
    "loftq": _loftq,
    "eva": _eva,
    "corda": _corda,
    "lora_ga": _lora_ga,
}

# ---- by what it does ---------------------------------------------------------------------------------------


def _halves(t: Seen) -> str | None:
    """What A reaches of the rank and what B does are at right angles, and together all of it."""
    together = int(np.linalg.matrix_rank(np.concatenate([t.A.T, t.B]), tol=1e-4))
    sine = (
        np.linalg.norm(t.A @ t.A.T @ (t.B.T @ t.B)) / np.linalg.norm(t.A @ t.A.T) / np.linalg.norm(t.B.T @ t.B)
    )
    if together != R or sine > 64 * R * t.u:
        return f"A and B share directions: they reach {together} of {R}, and overlap by {sine:.2g}"
    return None


def _columns(t: Seen) -> str | None:
    """BA has W's first columns, and what it leaves of W is at right angles to B."""
    limit = 1e3 * t.u * float(np.linalg.norm(t.W, 2))
    BA = t.B @ t.A
    return _first(
        _near("BA's first columns", BA[:, :R], t.W[:, :R], limit),
        _near("Bᵀ(W − BA)", t.B.T @ (t.W - BA), 0 * t.A, 10 * limit),
    )


def _compensates(t: Seen) -> str | None:
    """W − base − s·BA is at right angles to A and B, and smaller than W − base; each block has few values."""
    rest = t.W - t.base - t.update
    limit = 2e3 * t.u * float(np.abs(t.W).max())
    found = _first(
        _near("rest·Aᵀ", rest @ t.A.T, 0 * t.B, limit), _near("Bᵀ·rest", t.B.T @ rest, 0 * t.A, limit)
    )
    if found or t.way == "loftq/8":
        return found
    blocks = t.base.reshape(-1, 64)
    top = np.abs(blocks).max(axis=1, keepdims=True)
    away = np.abs(blocks[:, :, None] / top[:, :, None] - NF4).min(axis=2).max()
    lost, alone = float(np.linalg.norm(rest)), float(np.linalg.norm(t.W - t.base))
    size = float(np.linalg.norm(t.W))
    if away > 1e-5:
        return f"the base is {away:.2g} of a block's largest entry away from NF4"
    if not lost < alone or not alone < 0.12 * size:
        return f"base and update lose {lost / size:.2g} of W, the base alone {alone / size:.2g}, expected 0.1"
    return None


def _varies_most(t: Seen) -> str | None:
    """The inputs' variance along A is the sum of the largest eigenvalues of their covariance."""
    values = np.linalg.eigvalsh(np.cov(t.inputs.T))[::-1]
    along = np.var(t.inputs @ t.A.T, axis=0, ddof=1)
    return _first(
        _near("the variance along A", along, values[:R], 1e4 * t.u * values[0]),
        _near("AAᵀ", t.A @ t.A.T, np.eye(R), 200 * t.u),
    )


def _weighs(t: Seen) -> str | None:
    """By the inputs' weight: what is left is the least, or what is adapted is."""
    C = _covariance(t)
    S = np.linalg.svd(t.W @ C, compute_uv=False)
    kept, want = (t.base, S[R:]) if t.way == "corda/ipm" else (t.update, S[-R:])
    got = np.linalg.svd(kept @ C, compute_uv=False)[: len(want)]
    words = "of what is left" if t.way == "corda/ipm" else "of what is adapted"
    return _near(f"singular values {words}, times C,", got, want, 1e3 * t.u * S[0])


def _steps(t: Seen) -> str | None:
    """A step of −gA and −gB, with rows and columns of one length, moves s·BA by the best rank 2r of −gW."""
    A = t.A / np.linalg.norm(t.A, axis=1, keepdims=True)
    B = t.B / np.linalg.norm(t.B, axis=0)
    G = t.gradient
    step = G @ A.T @ A + B @ B.T @ G
    return _near("the first step", step, _svd(G, np.s_[: 2 * R]), 5e3 * t.u * float(np.linalg.norm(G, 2)))


LAWS: Mapping[str, Look] = {
    "orthogonal": _halves,
    "olora": _columns,
    "loftq": _compensates,
    "eva": _varies_most,
    "corda": _weighs,
    "lora_ga": _steps,
}
