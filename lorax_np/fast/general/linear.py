"""A linear layer that nothing trains at: one product, and the bias in it.  Equations: specs/linear.md."""

from ...backend import HostArray
from ...shapes import bind
from ..buffers import empty
from ..gemm import gemm


def linear_forward(x: HostArray, W: HostArray, b: HostArray | None = None) -> HostArray:
    """y as ops.linear_forward, to rounding.  (linear.1), (linear.2)

    >>> import numpy as np
    >>> linear_forward(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), np.array([5.0])).tolist()
    [[16.0]]
    """
    bind(x=(x, "... d_in"), W=(W, "d_out d_in"), b=(b, "? d_out"))
    y = empty((len(x), len(W)), x.dtype.name)
    if b is not None:
        y[...] = b
    gemm(x, W.T, y, 1.0, 0.0 if b is None else 1.0)
    return y


def linear_backward_x(gy: HostArray, W: HostArray) -> HostArray:
    """gx as ops.linear_backward_x, to rounding.  (linear.3)"""
    bind(gy=(gy, "... d_out"), W=(W, "d_out d_in"))
    gx = empty((len(gy), W.shape[1]), gy.dtype.name)
    gemm(gy, W, gx)
    return gx
