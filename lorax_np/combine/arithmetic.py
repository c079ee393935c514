"""Arithmetic of updates: what is dropped of each, which signs win, and the sum.  Equations: specs/combine.md.

On the host and in float64. A task is one array of an adapter: A, B, or its update.
"""

from collections.abc import Sequence

import numpy as np

from ..backend import HostArray


def largest_kept(task: HostArray, density: float) -> HostArray:
    """Return the task with all but its int(density·size) largest entries, by magnitude, set to 0.

    Of equal magnitudes the first in memory is kept.

    >>> largest_kept(np.array([1.0, -3.0, 2.0]), 0.67).tolist()
    [0.0, -3.0, 2.0]
    """
    order = np.argsort(-np.abs(task), axis=None, kind="stable")[: int(density * task.size)]
    kept = np.zeros(task.size, bool)
    kept[order] = True  # (combine.5)
    return np.where(kept.reshape(task.shape), task, 0.0)


def some_kept(task: HostArray, density: float, rng: np.random.Generator) -> HostArray:
    """Return the task with each entry kept with probability `density`, and what is kept divided by it."""
    kept = rng.random(task.shape) < density
    return np.where(kept, task / density, 0.0)  # (combine.6)


def weighted_sum(tasks: Sequence[HostArray], weights: Sequence[float]) -> HostArray:
    """Return Σ wᵢtᵢ."""
    total = np.zeros_like(tasks[0])
    for task, weight in zip(tasks, weights, strict=True):
        total += weight * task  # (combine.7)
    return total


def elected_mean(tasks: Sequence[HostArray], weights: Sequence[float], how: str) -> HostArray:
    """Return Σ wᵢtᵢ over the tasks whose sign was elected, divided by how many they are.

    how : "total", the sign of Σ tᵢ, or "frequency", of Σ sign(tᵢ), neither weighted; 0 elects +

    >>> tasks = [np.array([1.0, 0.0]), np.array([-3.0, 0.0]), np.array([-1.0, 2.0])]
    >>> elected_mean(tasks, [1.0, 1.0, 3.0], "total").tolist()
    [-3.0, 6.0]
    """
    voices = np.zeros_like(tasks[0])
    for task in tasks:
        voices += task if how == "total" else np.sign(task)
    elected = np.where(voices >= 0, 1.0, -1.0)  # (combine.8)
    total, count = np.zeros_like(tasks[0]), np.zeros_like(tasks[0])
    for task, weight in zip(tasks, weights, strict=True):
        agrees = np.sign(task) == elected
        total += np.where(agrees, weight * task, 0.0)
        count += agrees
    found: HostArray = total / np.maximum(count, 1.0)  # (combine.9)
    return found


def factored(A: HostArray, B: HostArray, rank: int) -> tuple[HostArray, HostArray]:
    """Return A' : (rank, K), B' : (d_out, rank), the best of that rank for the product BA of stacked factors.

    A : (R, K), B : (d_out, R). By QR of both and the SVD of what is between, so that BA is never formed. Each
    row of A' has norm 1, B' the singular values; the entry of B' largest in a column is positive.
    """
    QB, RB = np.linalg.qr(B)
    QA, RA = np.linalg.qr(A.T)
    U, S, Vh = np.linalg.svd(RB @ RA.T, full_matrices=False)  # (combine.11)
    return signed(Vh[:rank] @ QA.T, QB @ (U[:, :rank] * S[:rank]))  # (combine.12)


def signed(A: HostArray, B: HostArray) -> tuple[HostArray, HostArray]:
    """Turn each pair of a row of A and a column of B so that the column's largest entry is positive."""
    top = np.argmax(np.abs(B), axis=0)
    sign = np.where(B[top, np.arange(B.shape[1])] < 0, -1.0, 1.0)
    return sign[:, None] * A, B * sign


def clamped(A: HostArray, B: HostArray, quantile: float) -> tuple[HostArray, HostArray]:
    """Cut the entries of both to ± the quantile of all of them together."""
    most = np.quantile(np.concatenate([B.ravel(), A.ravel()]), quantile)  # (combine.13)
    return np.clip(A, -most, most), np.clip(B, -most, most)
