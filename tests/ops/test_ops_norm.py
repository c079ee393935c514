"""RMS norm and layer norm: the definition, every gradient by a complex step, their laws, and precision."""

import ml_dtypes
import numpy as np
import pytest
from checkers import assert_adjoint, assert_close, total
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, normals, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops.norm import (
    layer_norm_backward,
    layer_norm_backward_w,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_backward_w,
    rms_norm_forward,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
kinds = pytest.mark.parametrize("kind", ["rms", "layer"])
EPS = 2.0**-52
TINY = 1e-30


def forward(kind, x, w, b, eps):
    return rms_norm_forward(x, w, eps=eps) if kind == "rms" else layer_norm_forward(x, w, b, eps=eps)


def backward(kind, gy, saved, w):
    if kind == "rms":
        return rms_norm_backward(gy, saved, w), rms_norm_backward_w(gy, saved)
    return layer_norm_backward(gy, saved, w), layer_norm_backward_w(gy, saved)


def statistics(kind, x, eps):
    """rho, the centred row, and how much larger the row's terms are than what is left of them."""
    c = x if kind == "rms" else x - x.mean(axis=-1, keepdims=True)
    rho = 1 / np.sqrt(np.mean(c * c, axis=-1, keepdims=True) + eps)
    return rho, c, 1 + rho * np.abs(x).max(axis=-1, keepdims=True, initial=0)


@libraries
@kinds
@settings(max_examples=15)
@given(seed=seeds, lead=leads, d=sizes, eps=st.sampled_from([1e-12, 1e-3, 4.0]))
def test_values_and_every_gradient(library, kind, seed, lead, d, eps):
    """(norm.1) to (norm.12): the definition, and complex steps; a row's condition multiplies the roundings."""
    draw, host = normals(seed, library), library.host
    x, w, b, gy = draw(*lead, d), draw(d), draw(d), draw(*lead, d)
    y, saved = forward(kind, x, w, b, eps)
    gx, gw = backward(kind, gy, saved, w)
    X, W, G = host(x), host(w), host(gy)
    rho, c, worse = statistics(kind, X, eps)
    shift = host(b) if kind == "layer" else 0 * W
    assert_close(
        "y", host(y), rho * c * W + shift, 16 * EPS * (worse * (1 + np.sqrt(d)) * np.abs(W) + np.abs(shift))
    )
    want = np.empty(X.shape)
    for i in range(d):  # each row has its own statistics
        stepped = X.astype("complex128")
        stepped[..., i] += TINY * 1j
        ends = host(forward(kind, library.place(stepped), w, b, eps)[0])
        want[..., i] = np.sum(G * np.imag(ends) / TINY, axis=-1)
    size = rho * np.sqrt(d * np.sum((G * W) ** 2, axis=-1, keepdims=True))
    assert_close("gx", host(gx), want, np.broadcast_to(32 * EPS * worse**2 * size, X.shape))
    v = draw(d)  # y is affine in w
    jv, _ = forward(kind, x, v, 0.0 * b, eps)
    bound = total(G, worse * (1 + np.sqrt(d)) * np.abs(host(v)))
    assert_adjoint(host(gw), host(v), G, host(jv), bound, "gw")
    assert (y.shape, gx.shape, gw.shape) == (X.shape, X.shape, W.shape)


@kinds
@given(seed=seeds, d=st.integers(2, 9), eps=st.sampled_from([0.0, 1e-3, 4.0]))
def test_what_a_norm_does_not_see_has_no_gradient(kind, seed, d, eps):
    """(norm.13): a constant; (norm.14): the size, as far as ε goes."""
    draw = normals(seed)
    x, w, b, gy = 3 + draw(5, d), draw(d), draw(d), draw(5, d)
    _, saved = forward(kind, x, w, b, eps)
    gx, _ = backward(kind, gy, saved, w)
    rho, c, worse = statistics(kind, x, eps)
    size = 64 * EPS * (worse**2 * rho * np.sqrt(d * np.sum((gy * w) ** 2, axis=-1, keepdims=True)))[:, 0]
    if kind == "layer":
        assert_close("⟨gx⟩", gx.sum(axis=-1), np.zeros(5), d * size)
    along = rho[:, 0] ** 2 * eps * np.sum(gy * w * rho * c, axis=-1)
    assert_close("⟨gx∘c⟩", np.sum(gx * c, axis=-1), along, d * size * np.abs(x).max(axis=-1))


@kinds
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_stay_and_statistics_are_float32_at_least(kind, dtype):
    """16-bit rows are read exactly, computed in float32 and rounded once; 576·20² is past float16."""
    like = np.dtype(getattr(ml_dtypes, dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    draw = normals(0)
    x, gy, w, b = ((5 * k * draw(3, 576)).astype(like) for k in (4, 1, 1, 1))
    w, b = w[0], b[0]
    y, saved = forward(kind, x, w, b, 1e-6)
    grads = backward(kind, gy, saved, w)
    assert {v.dtype for v in (y, *grads)} == {like}
    assert {str(v.dtype) for v in saved} == {"float64" if dtype == "float64" else "float32"}
    wide = [v.astype("float64") for v in (x, w, b, gy)]
    Y, exact = forward(kind, *wide[:3], 1e-6)
    unit = 2.0 ** -{"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}[dtype]
    for got, want in zip((y, *grads), (Y, *backward(kind, wide[3], exact, wide[1])), strict=True):
        bound = unit * np.abs(want) + 64 * min(unit, 2.0**-24) * np.abs(want).max()
        assert_close("rounded once", got.astype("float64"), want, bound)


def test_a_mean_that_dwarfs_the_deviation_costs_its_own_digits_alone():
    """(norm.8) of the centred row: the difference of two sums of squares would keep none at 10⁴ in float32."""
    x = (1e4 + normals(1)(4, 64)).astype("float32")
    one = np.ones(64, "float32")
    y, _ = layer_norm_forward(x, one, 0 * one, eps=0.0)
    c = x.astype("float64") - x.astype("float64").mean(axis=-1, keepdims=True)
    want = c / np.sqrt(np.mean(c * c, axis=-1, keepdims=True))
    assert_close("y", y, want, 16 * 2.0**-24 * 1e4)


@libraries
@kinds
def test_no_rows_and_strided_rows(library, kind):
    draw, host = normals(2, library), library.host
    w, b = draw(5), draw(5)
    _, saved = forward(kind, draw(0, 5), w, b, 1e-6)
    gx, gw = backward(kind, draw(0, 5), saved, w)
    assert gx.shape == (0, 5)
    assert not host(gw).any()
    values = host(draw(5, 6))
    straight, turned = library.place(np.ascontiguousarray(values.T)), library.place(values).T
    y, _ = forward(kind, straight, w, b, 1e-6)
    again, _ = forward(kind, turned, w, b, 1e-6)
    assert_close("y", host(again), host(y), 16 * EPS * np.abs(host(y)).max())


def test_what_does_not_fit_is_refused():
    draw = normals(3)
    with pytest.raises(ShapeError, match=r"^w: expected \(d,\) with d=5 set by x, got \(4,\)$"):
        rms_norm_forward(draw(2, 5), draw(4), eps=1e-6)
    with pytest.raises(ShapeError, match=r"^b: expected \(d,\) with d=5 set by x, got \(1,\)$"):
        layer_norm_forward(draw(2, 5), draw(5), draw(1), eps=1e-6)
    with pytest.raises(DtypeError, match=r"^w: expected float64, set by x, got float32$"):
        rms_norm_forward(draw(2, 5), draw(5).astype("float32"), eps=1e-6)
    _, saved = rms_norm_forward(draw(2, 5), draw(5), eps=1e-6)
    for call in (
        lambda gy: rms_norm_backward(gy, saved, draw(5)),
        lambda gy: layer_norm_backward(gy, saved, draw(5)),
        lambda gy: rms_norm_backward_w(gy, saved),
        lambda gy: layer_norm_backward_w(gy, saved),
    ):
        with pytest.raises(ShapeError, match=r"^gy: expected \(\.\.\., d\) with \.\.\.=\(2,\) set by h"):
            call(draw(3, 5))
