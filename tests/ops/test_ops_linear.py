"""The linear map and its adjoints."""

import numpy as np
import pytest
from checkers import assert_adjoint, assert_close, total
from hypothesis import given
from strategies import LIBRARIES, leads, normals, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops.linear import linear_backward_b, linear_backward_W, linear_backward_x, linear_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)


@libraries
@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes)
def test_the_backwards_are_the_adjoints(library, seed, lead, d_in, d_out):
    """(linear.1) to (linear.5): y is linear in x, in W and in b, so no step size is needed."""
    draw, host = normals(seed, library), library.host
    x, W, b, gy = draw(*lead, d_in), draw(d_out, d_in), draw(d_out), draw(*lead, d_out)
    zero = library.place(np.zeros(d_out))
    found = {
        "x": (x, linear_backward_x(gy, W), lambda v: linear_forward(v, W)),
        "W": (W, linear_backward_W(gy, x), lambda v: linear_forward(x, v)),
        "b": (b, linear_backward_b(gy), lambda v: linear_forward(x * 0.0, W, v)),
    }
    assert np.all(host(linear_forward(x, W, zero)) == host(linear_forward(x, W)))
    for name, (value, g, f) in found.items():
        assert g.shape == value.shape
        assert g.dtype == value.dtype
        v = draw(*value.shape)
        at = {"x": x, "W": W, **{name: v}}
        terms = np.abs(host(at["x"])) @ np.abs(host(at["W"])).T if name != "b" else np.abs(host(v))
        assert_adjoint(host(g), host(v), host(gy), host(f(v)), total(host(gy), terms), f"g{name}")


@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes)
def test_the_forward_is_its_sum(seed, lead, d_in, d_out):
    """(linear.1), (linear.2), with the sum written out."""
    draw = normals(seed)
    x, W, b = draw(*lead, d_in), draw(d_out, d_in), draw(d_out)
    want, size = np.einsum("...i,oi->...o", x, W) + b, np.einsum("...i,oi->...o", abs(x), abs(W)) + abs(b)
    assert_close("y", linear_forward(x, W, b), want, 16 * 2.0**-52 * size)


@pytest.mark.parametrize("seed", range(4))
def test_strided_arrays_are_read_as_they_are(seed):
    """(linear.1) to (linear.5) over views: every other column, transposed, and backwards."""
    draw = normals(seed)
    wide, tall, gy = draw(3, 4, 10), draw(5, 7), draw(4, 3, 7)
    x, W, gyt = wide[::-1, :, ::2], tall.T[:, ::-1], gy.transpose(1, 0, 2)[..., ::-1]
    for view in (x, W, gyt):
        assert not view.flags.c_contiguous
    solid = [np.ascontiguousarray(v) for v in (x, W, gyt)]
    for f in (
        lambda x, W, gy: linear_forward(x, W),
        lambda x, W, gy: linear_backward_x(gy, W),
        lambda x, W, gy: linear_backward_W(gy, x),
        lambda x, W, gy: linear_backward_b(gy),
    ):
        size = f(*map(np.abs, solid))
        assert_close("view", f(x, W, gyt), f(*solid), 32 * 2.0**-52 * size)


@libraries
def test_zero_tokens_give_zero_gradients(library):
    """(linear.4), (linear.5) of no rows are sums of nothing."""
    draw = normals(0, library)
    x, W, b, gy = draw(2, 0, 3), draw(4, 3), draw(4), draw(2, 0, 4)
    assert linear_forward(x, W, b).shape == (2, 0, 4)
    assert linear_backward_x(gy, W).shape == (2, 0, 3)
    assert not library.host(linear_backward_W(gy, x)).any()
    assert not library.host(linear_backward_b(gy)).any()


def test_float32_stays_float32():
    draw = normals(0, dtype="float32")
    x, W, b, gy = draw(2, 3), draw(4, 3), draw(4), draw(2, 4)
    results = linear_forward(x, W, b), linear_backward_x(gy, W), linear_backward_W(gy, x), linear_backward_b(gy)
    assert {str(v.dtype) for v in results} == {"float32"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda d: linear_forward(d(2, 3), d(4, 5)),
            ShapeError,
            "W: expected (d_out, d_in) with d_in=3 set by x, got (4, 5)",
        ),
        (
            lambda d: linear_forward(d(2, 3), d(4, 3), d(3)),
            ShapeError,
            "b: expected (d_out,) with d_out=4 set by W, got (3,)",
        ),
        (
            lambda d: linear_backward_x(d(2, 3), d(4, 3)),
            ShapeError,
            "W: expected (d_out, d_in) with d_out=3 set by gy, got (4, 3)",
        ),
        (
            lambda d: linear_backward_W(d(2, 3), d(3, 3)),
            ShapeError,
            "x: expected (..., d_in) with ...=(2,) set by gy, got (3, 3)",
        ),
        (lambda d: linear_backward_b(d()), ShapeError, "gy: expected (..., d_out), got ()"),
        (
            lambda d: linear_forward(d(2, 3), d(4, 3).astype("float32")),
            DtypeError,
            "W: expected float64, set by x, got float32",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, error, message):
    with pytest.raises(error) as caught:
        call(normals(0))
    assert str(caught.value) == message
