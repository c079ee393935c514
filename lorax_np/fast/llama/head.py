"""The head and its cross entropy: rows that carry a label, some at a time, logits and their gradient in one array."""

import numpy as np

from ...backend import HostArray
from ..gemm import gemm
from .elementwise import rms_back
from .room import Room, even_blocks

CHUNK, FEW = 256, 4  # rows whose logits are there at a time, and of them those that are in the cache
IGNORED = -100


def loss_rows(
    h: HostArray,
    labels: HostArray,
    norm: HostArray,
    E: HostArray,
    eps: float,
    n: int,
    room: Room,
    g: HostArray | None,
) -> float:
    """Σ (logsumexp(z) − z_label)/n over rows with a label, in float64.  (training_speed.23), (training_speed.24)

    h : (N, d) after the last layer;  norm : (d,);  E : (V, d)
    g : (N, d), written: the gradient by h, zero in rows without a label; None where nobody asks for it
    """
    if g is not None:
        g[...] = 0
    chosen, found = np.flatnonzero(labels != IGNORED), 0.0
    for part in even_blocks(len(chosen), CHUNK):
        found += _chunk(h, chosen[part], labels, norm, E, eps, n, room, g)
    return found


def _chunk(h, rows, labels, norm, E, eps, n, room, g) -> float:
    x, wanted = h[rows], labels[rows]
    rho = 1 / np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1] + eps)[:, None]
    x *= rho
    z = room.take("logits", len(rows), len(E))
    gemm(x * norm, E.T, z)
    nll = -z[np.arange(len(rows)), wanted].astype("float64")
    for part in even_blocks(len(rows), FEW):
        few = z[part]
        largest = np.max(few, axis=1, keepdims=True)
        few -= largest
        np.exp(few, out=few)
        total = np.sum(few, axis=1, keepdims=True)
        nll[part] += np.log(total[:, 0].astype("float64")) + largest[:, 0]
        if g is not None:
            few *= 1 / (n * total)
    if g is not None:
        z[np.arange(len(rows)), wanted] -= z.dtype.type(1 / n)
        gx = np.empty_like(x)
        gemm(z, E, gx)
        gx *= norm
        there = np.zeros_like(gx)
        rms_back(gx, x, rho, there)
        g[rows] = there
    return float(np.sum(nll)) / n
