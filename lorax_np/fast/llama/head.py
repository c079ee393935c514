"""The head and its cross entropy, over rows that carry a label, some at a time.

Logits and their gradient are one array in turn, and never there for more rows than a chunk has.
"""

from typing import NamedTuple

import numpy as np

from ...backend import HostArray
from ..gemm import gemm
from .elementwise import rms, rms_back
from .room import Room, Run

CHUNK, FEW = 256, 4  # rows whose logits are there at a time, and of them those that are in the cache
IGNORED = -100


class Head(NamedTuple):
    """What stands between the last layer and the loss."""

    norm: HostArray  # (d,)
    E: HostArray  # (V, d)
    eps: float


def loss_rows(h: HostArray, labels: HostArray, head: Head, n: int, room: Room, g: HostArray | None) -> float:
    """Σ (logsumexp(z) − z_label)/n over rows with a label, the sum in float64.  (training_speed.19)

    h : (N, d) after the last layer;  labels : (N,)
    g : (N, d), written: the gradient by h, zero in rows without a label; None where nobody asks for it
    """
    if g is not None:
        g[...] = 0
    chosen, total = np.flatnonzero(labels != IGNORED), 0.0
    for part in Run.cut(0, len(chosen), CHUNK):
        rows = chosen[part]
        total += _chunk(h[rows], labels[rows], rows, head, n, room, g)
    return total / n


def _chunk(
    h: HostArray, labels: HostArray, rows: HostArray, head: Head, n: int, room: Room, g: HostArray | None
) -> float:
    x, rho = np.empty_like(h), np.empty((len(h), 1), h.dtype)
    rms(h, head.eps, x, rho)
    x *= head.norm
    z, at = room.take("logits", len(h), len(head.E)), np.arange(len(h))
    gemm(x, head.E.T, z)
    nll = -z[at, labels].astype("float64")
    for part in Run.cut(0, len(h), FEW):
        nll[part] += _softmax(z[part], n)
    if g is not None:
        z[at, labels] -= z.dtype.type(1 / n)  # (training_speed.20)
        gemm(z, head.E, x)
        x *= head.norm
        there = np.zeros_like(x)
        rms_back(x, h, rho, there, room)
        g[rows] = there
    return float(np.sum(nll))


def _softmax(z: HostArray, n: int) -> HostArray:
    """z ← softmax(z)/n by rows, in place; returns logsumexp(z) in float64."""
    largest = np.max(z, axis=1, keepdims=True)
    z -= largest
    np.exp(z, out=z)
    total = np.sum(z, axis=1, keepdims=True)
    z *= 1 / (n * total)
    found: HostArray = np.log(total[:, 0].astype("float64")) + largest[:, 0]
    return found
