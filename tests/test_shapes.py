"""Sizes of named axes: the messages of a misfit, word for word, and leading axes folded."""

import numpy as np
import pytest
from hypothesis import given
from strategies import LIBRARIES, leads, normals, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.shapes import axes, bind, rows

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)


def one(*shape):
    return np.ones(shape)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": (one(2, 12), "... d_in"), "A": (one(4, 10), "r d_in")},
            "A: expected (r, d_in) with d_in=12 set by x, got (4, 10)",
        ),
        (
            {"A": (one(4, 12), "r d_in"), "B": (one(5, 3), "d_out r"), "bB": (one(5), "d_out")},
            "B: expected (d_out, r) with r=4 set by A, got (5, 3)",
        ),
        (
            {"W": (one(4, 5), "d_out d_in"), "A": (one(2, 5), "r d_in"), "B": (one(2, 4), "d_out r")},
            "B: expected (d_out, r) with d_out=4 set by W, r=2 set by A, got (2, 4)",
        ),
        ({"W": (one(4), "d_out d_in")}, "W: expected (d_out, d_in), got (4,)"),
        ({"b": (one(4, 1), "d_out")}, "b: expected (d_out,), got (4, 1)"),
        ({"b": (one(), "d_out")}, "b: expected (d_out,), got ()"),
        ({"x": (one(), "... d_in")}, "x: expected (..., d_in), got ()"),
        ({"x": (one(2, 0), "... d_in")}, "x: expected (..., d_in) with axes of at least 1, got (2, 0)"),
        ({"A": (one(0, 3), "r d_in")}, "A: expected (r, d_in) with axes of at least 1, got (0, 3)"),
        (
            {"x": (one(2, 3, 5), "... d_in"), "mask": (one(3, 2, 5), "... d_in")},
            "mask: expected (..., d_in) with ...=(2, 3) set by x, d_in=5 set by x, got (3, 2, 5)",
        ),
        (
            {"x": (one(5), "... d_in"), "gy": (one(1, 4), "... d_out")},
            "gy: expected (..., d_out) with ...=() set by x, got (1, 4)",
        ),
    ],
)
def test_a_misfit_names_the_array_the_axes_and_who_set_them(arrays, message):
    for check in (axes, bind):
        with pytest.raises(ShapeError) as caught:
            check(**arrays)
        assert str(caught.value) == message
        assert isinstance(caught.value, ValueError)


@libraries
@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes)
def test_sizes_are_returned(library, seed, lead, d_in, d_out):
    draw = normals(seed, library)
    found = bind(
        x=(draw(*lead, d_in), "... d_in"),
        W=(draw(d_out, d_in), "d_out d_in"),
        b=(None, "? d_out"),
        gy=(draw(*lead, d_out), "... d_out"),
    )
    assert found == {"...": lead, "d_in": d_in, "d_out": d_out}


def test_an_absent_array_sets_and_wants_nothing():
    assert axes(W=(one(2, 3), "d_out d_in"), A=(None, "? r d_in"), B=(one(2, 7), "d_out r")) == {
        "d_out": 2,
        "d_in": 3,
        "r": 7,
    }


def test_axes_looks_at_no_dtype_and_bind_does():
    arrays = {"x": (one(3), "d"), "y": (np.ones(3, "float32"), "d")}
    assert axes(**arrays) == {"d": 3}
    with pytest.raises(DtypeError) as caught:
        bind(**arrays)
    assert str(caught.value) == "y: expected float64, set by x, got float32"
    assert isinstance(caught.value, TypeError)


def test_both_refuse_what_is_no_array_and_two_libraries():
    strict = next(x for x in LIBRARIES if x.name == "array_api_strict")
    for check in (axes, bind):
        with pytest.raises(
            TypeError, match=r"^x: expected an array of numpy, cupy or an array-standard library, got"
        ):
            check(x=([1.0], "d"))
        with pytest.raises(TypeError) as caught:
            check(x=(one(3), "d"), A=(strict.place(one(3)), "d"))
        assert str(caught.value) == "arrays must share one library, got x in numpy, A in array_api_strict"


@libraries
@given(seed=seeds, lead=leads, d=sizes)
def test_rows_folds_the_leading_axes(library, seed, lead, d):
    """No leading axis is one row; one of no tokens is no row."""
    x = normals(seed, library)(*lead, d)
    folded = rows(x)
    count = int(np.prod(lead, dtype=int))
    assert folded.shape == (count, d)
    assert np.array_equal(library.host(folded), library.host(x).reshape(count, d))


def test_rows_reads_views_as_they_are():
    x = np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2)[::-1, :, ::2]
    assert rows(x).tolist() == [row.tolist() for block in x for row in block]


def test_none_where_an_array_is_needed_is_named():
    with pytest.raises(TypeError, match=r"^A: expected an array, got None$"):
        axes(x=(np.ones(3), "... d_in"), A=(None, "r d_in"))
