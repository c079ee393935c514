"""Dropout by a given mask, and its adjoint."""

import numpy as np
import pytest
from checkers import assert_adjoint, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, mask_of, normals, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops.dropout import dropout_backward, dropout_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)


@libraries
@given(seed=seeds, lead=leads, d_in=sizes, p=st.floats(0.01, 0.99))
def test_the_backward_is_the_adjoint(library, seed, lead, d_in, p):
    """(dropout.1), (dropout.2): the product with one mask both ways."""
    draw, host = normals(seed, library), library.host
    v, gy, mask = draw(*lead, d_in), draw(*lead, d_in), mask_of((*lead, d_in), p, seed, library)
    gx, jv = dropout_backward(gy, mask), dropout_forward(v, mask)
    assert gx.shape == jv.shape == v.shape
    assert gx.dtype == jv.dtype == v.dtype
    assert_adjoint(host(gx), host(v), host(gy), host(jv), total(host(gy), host(jv)))
    assert np.array_equal(host(jv), host(v) * host(mask))
    assert np.array_equal(host(jv) == 0, host(mask) == 0)


@libraries
def test_without_a_mask_nothing_happens(library):
    """(dropout.1), (dropout.2) of no mask are the identity, the same array."""
    x = normals(0, library)(2, 3)
    assert dropout_forward(x, None) is x
    assert dropout_backward(x, None) is x


def test_a_dropped_infinity_is_not_hidden():
    """A product, as the definition says: 0·∞ is NaN, not 0."""
    with np.errstate(invalid="ignore"):
        y = dropout_forward(np.array([np.inf, 1.0]), np.array([0.0, 2.0]))
    assert np.isnan(y[0])
    assert y[1] == 2.0


def test_strided_masks_and_inputs():
    draw = normals(0)
    x, mask = draw(4, 10)[::-1, ::2], draw(5, 4).T
    assert np.array_equal(dropout_forward(x, mask), np.array(x) * np.array(mask))


@pytest.mark.parametrize(("f", "name"), [(dropout_forward, "x"), (dropout_backward, "gy")])
def test_masks_of_other_shapes_and_dtypes_are_refused(f, name):
    draw = normals(0)
    for shape in [(3,), (1, 3), (2, 1), (2, 4), (1, 2, 3)]:
        with pytest.raises(ShapeError, match=r"^mask: expected \(\.\.\., d_in\) with .* set by " + name):
            f(draw(2, 3), draw(*shape))
    with pytest.raises(DtypeError, match=f"^mask: expected float64, set by {name}, got float32$"):
        f(draw(2, 3), draw(2, 3).astype("float32"))
    with pytest.raises(DtypeError, match=r"^mask: expected one of .*, got bool$"):
        f(draw(2, 3), draw(2, 3) > 0)
