"""What sums that are always truncated lose together.  Derivation: specs/bounds.md."""

from typing import Any

import numpy as np

from ..cases import HostArray


def leanings(t: Any, half: float) -> dict[str, HostArray]:
    """What sums that are always truncated lose together; half of their unit roundoff for each term of each."""
    size = {
        "y": half * (t.d_in + t.r + 1) * np.abs(t.y0),
        "x": half * (t.d_out + t.r + 1) * np.abs(t.gx_terms[0]),
    }
    kappa = np.zeros(t.d_out)
    if t.dora:
        kappa = half * (t.d_in / 2 + 1 + t.r * np.abs(t.turn))  # (bounds.35)
    whole = (t.P if t.dora else 0.0) + t.L
    size["y"] = size["y"] + half * (t.d_in + t.r + 2) * np.abs(t.k * t.L) + kappa * np.abs(t.k * whole)
    adapter = sum(np.abs(term) for term in t.gx_terms[1:])
    size["x"] = size["x"] + half * (t.d_out + t.r + 2) * adapter
    if t.dora:
        size["y"] = size["y"] + half * (t.d_in + 1) * np.abs((t.k - 1) * t.P)
        mask, other = (1.0 if m is None else m for m in (t.mask, t.other))
        if t.alike:
            size["x"] = size["x"] + (np.abs(t.Gk) * kappa) @ np.abs(t.V) * mask
        else:
            size["x"] = size["x"] + (np.abs(t.Gk) * kappa) @ np.abs(t.W) * other
            size["x"] = size["x"] + (np.abs(t.Go) * kappa) @ np.abs(t.V - t.W) * mask
    shared = kappa[:, None] * np.abs(t.Mk + 3 * t.gV)
    longest = t.N + t.d_out + 2 * (t.d_in + t.r)
    size["A"] = half * (t.N + t.d_out + 2) * np.abs(t.gA_terms[0]) + abs(t.s) * np.abs(t.B.T) @ shared
    size["B"] = half * (t.N + t.d_in + 2) * np.abs(t.gB_terms[0])
    size["B"] = size["B"] + kappa[:, None] * np.abs(sum(t.gB_terms) + 2 * sum(t.gB_terms[1:]))
    size["W"] = half * (t.N + 1) * (np.abs(t.G.T @ t.x) + np.abs((t.k - 1)[:, None] * t.M))
    size["W"] = size["W"] + kappa[:, None] * np.abs((t.Mp if t.dora else t.M) + 3 * t.gV)
    if t.full:
        for name, term in (("A", t.gA_terms[1]), ("B", t.gB_terms[1]), ("W", t.gV)):
            size[name] = size[name] + half * longest * np.abs(term)
    size["b"] = half * (t.N + 1) * np.abs(t.G.sum(axis=0))
    size["bB"] = abs(t.s) * half * (t.N + 1) * np.abs(t.Go.sum(axis=0))
    if t.scaled:
        size["b"] = (half * (t.N + 1) + kappa) * np.abs(t.Gk.sum(axis=0))
    if t.reused:
        both = np.abs(t.Gk.sum(axis=0)) + np.abs((t.G * (t.k - 1)).sum(axis=0))
        size["b"] = np.maximum(size["b"], half * (t.N + 1) * both)
    if t.dora:
        size["m"] = (half * (t.N + t.d_in + t.r + 2) + kappa) * np.abs(t.gm)
    return size
