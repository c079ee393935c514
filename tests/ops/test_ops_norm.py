"""RMS norm and layer norm: the definition, and every gradient by a complex step."""

import numpy as np
import pytest
from checkers import assert_close
from hypothesis import given
from strategies import LIBRARIES, leads, normals, seeds, sizes

from lorax_np.ops.linear import linear_backward_b
from lorax_np.ops.norm import (
    layer_norm_backward,
    layer_norm_backward_w,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_backward_w,
    rms_norm_forward,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
TINY = 1e-30


def forward(kind, x, w, b, eps):
    return rms_norm_forward(x, w, eps=eps) if kind == "rms" else layer_norm_forward(x, w, b, eps=eps)


def backward(kind, gy, saved, w):
    if kind == "rms":
        return rms_norm_backward(gy, saved, w), rms_norm_backward_w(gy, saved)
    return layer_norm_backward(gy, saved, w), layer_norm_backward_w(gy, saved)


@libraries
@pytest.mark.parametrize("kind", ["rms", "layer"])
@given(seed=seeds, lead=leads, d=sizes)
def test_every_gradient_is_a_complex_step(library, kind, seed, lead, d):
    """(norm.1) to (norm.12), within the condition of the row: with d = 1 the layer norm has no slope."""
    draw, host, eps = normals(seed, library), library.host, 0.03
    x, w, b, gy = draw(*lead, d), draw(d), draw(d), draw(*lead, d)
    y, saved = forward(kind, x, w, b, eps)
    gx, gw = backward(kind, gy, saved, w)
    assert (y.shape, gx.shape, gw.shape) == (x.shape, x.shape, w.shape)
    X, W, G = (host(v).astype("float64") for v in (x, w, gy))
    c = X if kind == "rms" else X - X.mean(-1, keepdims=True)
    rho = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + eps)
    scale = (
        32
        * EPS
        * np.sqrt(d)
        * rho
        * np.sqrt(np.sum((G * W) ** 2, -1, keepdims=True))
        * (1 + np.abs(X).max(initial=0))
    )
    want = np.empty(X.shape)
    for i in range(d):
        stepped = X.astype("complex128")
        stepped[..., i] += TINY * 1j
        stepped_y = host(forward(kind, library.place(stepped), w, b, eps)[0])
        want[..., i] = np.sum(G * np.imag(stepped_y) / TINY, axis=-1)
    assert_close("gx", host(gx), want, np.broadcast_to(scale, X.shape))
    flat = (G * rho * c).reshape(-1, d)
    assert_close(
        "gw",
        host(gw),
        flat.sum(0),
        64 * EPS * (np.abs(flat).sum(0) + np.abs(G * rho * np.abs(X).max(initial=0)).reshape(-1, d).sum(0)),
    )
    if kind == "layer":
        assert_close(
            "gb",
            host(linear_backward_b(gy)),
            G.reshape(-1, d).sum(0),
            64 * EPS * np.abs(G).reshape(-1, d).sum(0),
        )


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes_stay_and_statistics_are_float32_at_least(kind, dtype):
    draw = normals(0, dtype=dtype)
    x, w, gy = draw(3, 5), draw(5), draw(3, 5)
    y, saved = forward(kind, x, w, w, 1e-6)
    gx, gw = backward(kind, gy, saved, w)
    assert {str(v.dtype) for v in (y, gx, gw)} == {dtype}
    assert str(saved.h.dtype) == ("float32" if dtype == "float16" else dtype)
