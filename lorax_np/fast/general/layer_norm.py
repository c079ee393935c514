"""Layer norm, a few rows at a time, so that blocks stay in the core's own cache.  Equations: specs/norm.md."""

import numpy as np

from ...backend import HostArray, to_host
from ...ops.norm import NormSaved
from ...shapes import bind
from ..buffers import empty

HEIGHT = 128  # rows of a block


def layer_norm_forward(x: HostArray, w: HostArray, b: HostArray, *, eps: float) -> tuple[HostArray, NormSaved]:
    """y and what is saved, as ops.layer_norm_forward, to rounding.  (norm.7) to (norm.10)

    >>> layer_norm_forward(np.array([[1.0, 3.0]]), np.array([2.0, 2.0]), np.ones(2), eps=0.0)[0].tolist()
    [[-1.0, 3.0]]
    """
    d = bind(x=(x, "... d"), w=(w, "d"), b=(b, "d"))["d"]
    name = x.dtype.name
    y, h, rho = empty(x.shape, name), empty(x.shape, name), np.empty((len(x), 1), name)
    for start in range(0, len(x), HEIGHT):
        part = slice(start, start + HEIGHT)
        c, r = h[part], rho[part]
        np.subtract(x[part], np.add.reduce(x[part], axis=1, keepdims=True) / d, out=c)
        np.divide(np.einsum("ij,ij->i", c, c)[:, None], d, out=r)
        r += eps
        np.sqrt(r, out=r)
        np.divide(1, r, out=r)
        c *= r
        np.multiply(c, w, out=y[part])
        y[part] += b
    return y, NormSaved(h, rho)


def layer_norm_backward(gy: HostArray, saved: NormSaved, w: HostArray) -> HostArray:
    """gx as ops.layer_norm_backward, to rounding.  (norm.11), (norm.12)"""
    h, rho = to_host(saved.h), to_host(saved.rho)
    d = bind(gy=(gy, "... d"), w=(w, "d"), h=(h, "... d"))["d"]
    gx = empty(gy.shape, gy.dtype.name)
    room = empty((min(HEIGHT, len(gy)), d), gy.dtype.name)
    for start in range(0, len(gy), HEIGHT):
        part = slice(start, min(start + HEIGHT, len(gy)))
        g, t = gx[part], room[: part.stop - start]
        np.multiply(gy[part], w, out=g)
        along = np.einsum("ij,ij->i", g, h[part])[:, None] / d
        g -= np.add.reduce(g, axis=1, keepdims=True) / d
        np.multiply(h[part], along, out=t)
        g -= t
        g *= rho[part]
    return gx
