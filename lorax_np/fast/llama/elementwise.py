"""Norms and the gated activation, a few rows at a time, so that blocks stay in the core's own cache."""

from math import e, log2

import numpy as np

from ...backend import HostArray
from .room import Room, Run

NORM_HEIGHT, GATE_HEIGHT = 128, 64
LOG2E = log2(e)


def rms(h: HostArray, eps: float, out: HostArray, rho: HostArray) -> None:
    """ρ = (⟨h²⟩/d + ε)^−½, out = ρ∘h: the norm without its weight.  (training_speed.9)

    h, out : (N, d);  rho : (N, 1), written
    """
    for part in Run.cut(0, len(h), NORM_HEIGHT):
        squares = np.einsum("ij,ij->i", h[part], h[part])
        squares /= h.shape[1]
        squares += eps
        np.sqrt(squares, out=squares)
        np.divide(1, squares, out=rho[part, 0])
        np.multiply(h[part], rho[part], out=out[part])


def rms_back(gx: HostArray, h: HostArray, rho: HostArray, g: HostArray, room: Room) -> None:
    """g ← g + ρ·gx − ρ³⟨gx∘h⟩/d·h, for the x = ρ∘h of rms.  (training_speed.10)"""
    scratch = room.take("norm", NORM_HEIGHT, h.shape[1])
    for part in Run.cut(0, len(h), NORM_HEIGHT):
        t, along = scratch[: part.stop - part.start], rho[part]
        c = np.einsum("ij,ij->i", gx[part], h[part])[:, None]
        c *= along
        c *= along
        c *= along
        c /= -h.shape[1]
        np.multiply(h[part], c, out=t)
        g[part] += t
        np.multiply(gx[part], along, out=t)
        g[part] += t


def swiglu(gu: HostArray, out: HostArray, room: Room) -> None:
    """out ← u∘σ(u)∘w for gu = [u w].  gu : (N, 2 ff), out : (N, ff).  (training_speed.11)"""
    ff = out.shape[1]
    scratch = room.take("swiglu", 2, GATE_HEIGHT, ff)[0]
    for part in Run.cut(0, len(gu), GATE_HEIGHT):
        u, w = gu[part, :ff], gu[part, ff:]
        t = scratch[: len(u)]
        _one_plus_exp(u, t)
        np.divide(u, t, out=t)
        np.multiply(t, w, out=out[part])


def _one_plus_exp(u: HostArray, t: HostArray) -> None:
    """t ← 1 + e^−u."""
    np.multiply(u, -LOG2E, out=t)
    np.exp2(t, out=t)
    t += 1


def swiglu_again(gu: HostArray, y: HostArray, room: Room) -> tuple[HostArray, HostArray]:
    """σ(u) and a = u∘σ(u) of a block of rows, in the room's arrays; y ← a∘w is written.  (training_speed.11)"""
    ff = gu.shape[1] // 2
    sigma, a = room.take("swiglu", 2, GATE_HEIGHT, ff)[:, : len(gu)]
    _one_plus_exp(gu[:, :ff], sigma)
    np.reciprocal(sigma, out=sigma)
    np.multiply(gu[:, :ff], sigma, out=a)
    np.multiply(a, gu[:, ff:], out=y)
    return sigma, a


def swiglu_back(gy: HostArray, gu: HostArray, sigma: HostArray, a: HostArray, out: HostArray) -> None:
    """out ← [gy∘w∘(σ + a(1 − σ)), gy∘a].  All of one block; a is overwritten.  (training_speed.12)"""
    ff = gy.shape[1]
    t = out[:, :ff]
    np.multiply(gy, a, out=out[:, ff:])
    np.subtract(1, sigma, out=t)
    a *= t
    a += sigma
    a *= gu[:, ff:]
    np.multiply(a, gy, out=t)
