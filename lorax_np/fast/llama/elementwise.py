"""Norms and the gated activation, a few rows at a time, so that blocks stay in the core's own cache."""

from math import log2
from math import e as EULER

import numpy as np

from ...backend import HostArray
from .room import Room, even_blocks

NORM_HEIGHT, GATE_HEIGHT = 128, 32


def rms(h: HostArray, eps: float, out: HostArray, rho: HostArray) -> None:
    """ρ = (⟨h²⟩/d + ε)^−½, out = ρ∘h: the norm without its weight.  (training_speed.19)

    h, out : (N, d);  rho : (N, 1), written
    """
    for part in even_blocks(len(h), NORM_HEIGHT):
        squares = np.einsum("ij,ij->i", h[part], h[part])
        squares /= h.shape[1]
        squares += eps
        np.sqrt(squares, out=squares)
        np.divide(1, squares, out=rho[part, 0])
        np.multiply(h[part], rho[part], out=out[part])


def rms_rows(h: HostArray, rho: HostArray, out: HostArray) -> None:
    """The same again, for rows whose ρ is known."""
    np.multiply(h, rho, out=out)


def rms_back(gx: HostArray, x: HostArray, rho: HostArray, g: HostArray) -> None:
    """g ← g + ρ(gx − x⟨gx∘x⟩/d), for x = ρ∘h.  gx, x are overwritten.  (training_speed.20)"""
    mean = np.einsum("ij,ij->i", gx, x)[:, None]
    mean /= x.shape[1]
    x *= mean
    gx -= x
    gx *= rho
    g += gx


def swiglu(gu: HostArray, out: HostArray, room: Room) -> None:
    """out ← u∘σ(u)∘w for gu = [u w].  gu : (N, 2 ff), out : (N, ff).  (training_speed.21)"""
    ff = out.shape[1]
    scratch = room.take("swiglu", 1, GATE_HEIGHT, ff)[0]
    for part in even_blocks(len(gu), GATE_HEIGHT):
        u, w = gu[part, :ff], gu[part, ff:]
        t = scratch[: len(u)]
        _one_plus_exp(u, t)
        np.divide(u, t, out=t)
        np.multiply(t, w, out=out[part])


def _one_plus_exp(u: HostArray, t: HostArray) -> None:
    """t ← 1 + e^−u."""
    np.multiply(u, -log2(EULER), out=t)
    np.exp2(t, out=t)
    t += 1


def swiglu_rows(gu: HostArray, y: HostArray, room: Room) -> tuple[HostArray, HostArray]:
    """σ(u) and u∘σ(u) of a block of rows, in the room's arrays; y is written: the activation."""
    ff = gu.shape[1] // 2
    sigma, a = room.take("swiglu", 2, GATE_HEIGHT, ff)[:, : len(gu)]
    _one_plus_exp(gu[:, :ff], sigma)
    np.reciprocal(sigma, out=sigma)
    np.multiply(gu[:, :ff], sigma, out=a)
    np.multiply(a, gu[:, ff:], out=y)
    return sigma, a


def swiglu_back(gy: HostArray, gu: HostArray, sigma: HostArray, a: HostArray, out: HostArray) -> None:
    """out ← [gy∘w∘(σ + a(1 − σ)), gy∘a].  All of one block; a is overwritten.  (training_speed.22)"""
    ff = gy.shape[1]
    t = out[:, :ff]
    np.multiply(gy, a, out=out[:, ff:])
    np.subtract(1, sigma, out=t)
    a *= t
    a += sigma
    a *= gu[:, ff:]
    np.multiply(a, gy, out=t)
