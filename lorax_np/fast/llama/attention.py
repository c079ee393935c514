"""Causal attention of whole sequences, by blocks of queries, with the keys as rows.

A block's queries of all heads that share a key head are one matrix, so that a product has g·128 columns:
S = K Qᵀ : (keys, g·height). Maxima and sums then run down columns.  Equations: specs/training_speed.md.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from ...backend import HostArray
from ..gemm import gemm
from .room import Room, Run
from .shape import LlamaShape

HEIGHT = 128  # queries of a block


class Kept(NamedTuple):
    """What the backward reads."""

    q: HostArray  # (N·d_q,)  rotated and scaled, (H, height, D) of each block one after another
    k: HostArray  # (K, N, D) rotated
    v: HostArray  # (K, N, D)
    L: HostArray  # (N·H,)    logsumexp, (H, height) of each block one after another


class Angles(NamedTuple):
    """e^{jtθ} of each row, complex, with and without the scale of the scores.  (training_speed.8)"""

    q: HostArray  # (N, D/2)
    k: HostArray  # (N, D/2)


def angles(positions: HostArray, shape: LlamaShape, dtype: str) -> Angles:
    """The rotation of each row, computed in float64."""
    kind = "complex64" if dtype == "float32" else "complex128"
    e = shape.factor * np.exp(1j * positions[:, None] * np.array(shape.turns))
    return Angles((e * shape.D**-0.5).astype(kind), e.astype(kind))


@cache
def mask(height: int, g: int, dtype: str) -> HostArray:
    """−∞ where a key of the block comes after the query: (keys, g·queries)."""
    later = np.tri(height, k=-1, dtype=bool)
    return np.tile(np.where(later, np.array(-np.inf, dtype), np.array(0, dtype)), g)


def pairs(x: HostArray, heads: int) -> HostArray:
    """(N, heads·D) as complex numbers (N, heads, D/2): a view."""
    kind = "complex64" if x.dtype == np.float32 else "complex128"
    return x.view(kind).reshape(len(x), heads, -1)


def rotate(y: HostArray, shape: LlamaShape, turn: Angles, kept: Kept, run: Run) -> None:
    """Queries, keys and values as the scores read them, from y : (N, d_q + 2 d_kv).  (training_speed.8)"""
    d_q, d_kv = shape.d_q, shape.d_kv
    for part in run.blocks(HEIGHT):
        block = of_block(kept.q, part, shape.H, shape.D)
        out = pairs(block.reshape(-1, shape.D), 1).reshape(*block.shape[:2], -1).swapaxes(0, 1)
        np.multiply(pairs(y[part, :d_q], shape.H), turn.q[part, None], out=out)
    out = pairs(kept.k.reshape(-1, shape.D), 1).reshape(*kept.k.shape[:2], -1).swapaxes(0, 1)
    np.multiply(pairs(y[:, d_q : d_q + d_kv], shape.K), turn.k[:, None], out=out)
    kept.v[...] = y[:, d_q + d_kv :].reshape(len(y), shape.K, shape.D).swapaxes(0, 1)


def of_block(flat: HostArray, part: slice, H: int, D: int) -> HostArray:
    """(H, height, D) of one block of rows."""
    return flat[part.start * H * D : part.stop * H * D].reshape(H, part.stop - part.start, D)


def keys_of(a: int, part: slice, window: int | None) -> slice:
    """The rows of keys that some query of a block may see."""
    return slice(a if window is None else max(a, part.start - window + 1), part.stop)


def hide(S: HostArray, part: slice, keys: slice, window: int | None) -> None:
    """Scores of keys that come after their query, or too long before it, to −∞.  S : (keys, g·height)"""
    height = part.stop - part.start
    g = S.shape[1] // height
    S[part.start - keys.start :] += mask(height, g, S.dtype.name)
    if window is not None and keys.start + window < part.stop:
        old = np.arange(part.start, part.stop) - np.arange(keys.start, keys.stop)[:, None] >= window
        S[np.tile(old, g)] = -np.inf


def forward(kept: Kept, o: HostArray, shape: LlamaShape, window: int | None, run: Run, room: Room) -> None:
    """o ← softmax(S)v, and L.  o : (N, d_q).  (training_speed.13), (training_speed.14)"""
    g = shape.H // shape.K
    for a, end, _ in run.sequences():
        for start in range(a, end, HEIGHT):
            part = slice(start, min(start + HEIGHT, end))
            keys, height = keys_of(a, part, window), part.stop - start
            q = of_block(kept.q, part, shape.K, g * shape.D).reshape(shape.K, g * height, shape.D)
            Ls = of_block(kept.L, part, shape.H, 1).reshape(shape.K, g * height)
            out = o[part].reshape(height, shape.K, g, shape.D)
            for j in range(shape.K):
                S = room.take("S", keys.stop - keys.start, g * height)
                O = room.take("O", g * height, shape.D)
                gemm(kept.k[j, keys], q[j].T, S)
                hide(S, part, keys, window)
                largest = np.maximum.reduce(S, axis=0)
                S -= largest
                np.exp(S, out=S)
                total = np.add.reduce(S, axis=0)
                gemm(S.T, kept.v[j, keys], O)
                np.add(largest, np.log(total), out=Ls[j])
                np.divide(O.reshape(g, height, -1), total.reshape(g, height, 1), out=out[:, j].swapaxes(0, 1))


def backward(
    go: HostArray,
    o: HostArray,
    kept: Kept,
    gy: HostArray,
    shape: LlamaShape,
    window: int | None,
    turn: Angles,
    run: Run,
    room: Room,
) -> None:
    """gy : (N, d_q + 2 d_kv) by what rotate was given.  (training_speed.15) to (training_speed.18)"""
    K, D, g, d_q, d_kv = shape.K, shape.D, shape.H // shape.K, shape.d_q, shape.d_kv
    back = Angles(np.conj(turn.q), np.conj(turn.k))
    gk, gv = gy[:, d_q : d_q + d_kv], gy[:, d_q + d_kv :]
    gy[:, d_q:] = 0
    for a, end, _ in run.sequences():
        for start in range(a, end, HEIGHT):
            part = slice(start, min(start + HEIGHT, end))
            keys, height = keys_of(a, part, window), part.stop - start
            q = of_block(kept.q, part, K, g * D).reshape(K, g * height, D)
            Ls = of_block(kept.L, part, shape.H, 1).reshape(K, g * height)
            gO, gQ = room.take("gO", K, g * height, D), room.take("gQ", K, g * height, D)
            there = go[part].reshape(height, shape.H, D)
            gO.reshape(shape.H, height, D)[...] = there.swapaxes(0, 1)
            delta = np.einsum("thd,thd->ht", there, o[part].reshape(there.shape)).reshape(K, g * height)
            for j in range(K):
                P, gP = (room.take(name, keys.stop - keys.start, g * height) for name in ("S", "gP"))
                columns = slice(j * D, (j + 1) * D)
                gemm(kept.k[j, keys], q[j].T, P)
                hide(P, part, keys, window)
                P -= Ls[j]
                np.exp(P, out=P)
                gemm(P, gO[j], gv[keys, columns], 1.0, 1.0)
                gemm(kept.v[j, keys], gO[j].T, gP)
                gP -= delta[j]
                gP *= P
                gemm(gP.T, kept.k[j, keys], gQ[j])
                gemm(gP, q[j], gk[keys, columns], 1.0, 1.0)
            turned = pairs(gQ.reshape(-1, D), 1).reshape(shape.H, height, -1).swapaxes(0, 1)
            np.multiply(turned, back.q[part, None], out=pairs(gy[part, :d_q], shape.H))
    straight = pairs(gk, K)
    np.multiply(straight, back.k[:, None], out=straight)
