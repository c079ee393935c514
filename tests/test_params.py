"""The records: immutable, and refused when made of parts that do not fit."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from strategies import LIBRARIES, normals

from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.params import (
    Adapter,
    Linear,
    check_direction,
    check_pair,
    linear_from_stored,
    linear_to_stored,
    param_count,
)

STRICT = next(x for x in LIBRARIES if x.name == "array_api_strict")
libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
d = normals(0)


def test_the_fields_are_those_of_the_public_face():
    assert [f.name for f in fields(Linear)] == ["W", "b"]
    assert [f.name for f in fields(Adapter)] == ["A", "B", "m", "b", "bB"]
    assert Linear(d(4, 5)).b is None
    adapter = Adapter(d(3, 5), d(4, 3))
    assert (adapter.m, adapter.b, adapter.bB) == (None, None, None)


@libraries
def test_records_hold_the_very_arrays(library):
    draw = normals(0, library)
    W, b, A, B, m = draw(4, 5), draw(4), draw(3, 5), draw(4, 3), draw(4)
    base, adapter = Linear(W, b), Adapter(A, B, m=m, b=b)
    assert base.W is W
    assert base.b is b
    assert (adapter.A is A, adapter.B is B, adapter.m is m, adapter.b is b) == (True,) * 4


def test_records_cannot_be_changed():
    base, adapter = Linear(d(4, 5)), Adapter(d(3, 5), d(4, 3))
    for record, name in ((base, "W"), (base, "b"), (adapter, "A"), (adapter, "m")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, d(4, 5))
        with pytest.raises(FrozenInstanceError):
            delattr(record, name)
    for record in (base, adapter):
        with pytest.raises((AttributeError, TypeError)):
            record.training = True
        assert not hasattr(record, "__dict__")


def test_records_compare_by_identity_and_can_be_keys():
    W = d(4, 5)
    assert Linear(W) != Linear(W)
    assert len({Linear(W), Linear(W)}) == 2


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"W": d(5)}, ShapeError, "W: expected (d_out, d_in), got (5,)"),
        ({"W": d(4, 5, 1)}, ShapeError, "W: expected (d_out, d_in), got (4, 5, 1)"),
        ({"W": d(4, 0)}, ShapeError, "W: expected (d_out, d_in) with axes of at least 1, got (4, 0)"),
        ({"W": d(4, 5), "b": d(5)}, ShapeError, "b: expected (d_out,) with d_out=4 set by W, got (5,)"),
        ({"W": d(4, 5), "b": d(4).astype("float32")}, DtypeError, "b: expected float64, set by W, got float32"),
        (
            {"W": np.ones((4, 5), int)},
            DtypeError,
            "W: expected one of float16, bfloat16, float32, float64, complex128, got int64",
        ),
        (
            {"W": [[1.0]]},
            TypeError,
            "W: expected an array of numpy, cupy or an array-standard library, got builtins.list",
        ),
        ({"W": None}, TypeError, "W: expected an array"),
        ({"W": None, "b": d(4)}, TypeError, "W: expected an array"),
        (
            {"W": d(4, 5), "b": STRICT.place(d(4))},
            TypeError,
            "arrays must share one library, got W in numpy, b in array_api_strict",
        ),
    ],
)
def test_a_linear_of_parts_that_do_not_fit(parts, error, message):
    with pytest.raises(error) as caught:
        Linear(**parts)
    assert type(caught.value) is error
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"A": None}, ConfigError, "A: expected an array beside the other factor, got None"),
        ({"B": None}, ConfigError, "B: expected an array beside the other factor, got None"),
        (
            {"A": None, "B": None, "m": d(4)},
            ConfigError,
            "m: expected None where A and B are None, got an array",
        ),
        (
            {"A": None, "B": None, "bB": d(4)},
            ConfigError,
            "bB: expected None where A and B are None, got an array",
        ),
        ({"A": None, "B": None}, ConfigError, "Adapter: expected A and B, or b, got nothing"),
        (
            {"m": d(4), "bB": d(4)},
            ConfigError,
            "bB: expected None beside m, since DoRA has no bias of B, got an array",
        ),
        ({"A": d(5)}, ShapeError, "A: expected (r, d_in), got (5,)"),
        ({"A": d(2, 5)}, ShapeError, "B: expected (d_out, r) with r=2 set by A, got (4, 3)"),
        ({"m": d(3)}, ShapeError, "m: expected (d_out,) with d_out=4 set by B, got (3,)"),
        ({"m": d(1, 4)}, ShapeError, "m: expected (d_out,) with d_out=4 set by B, got (1, 4)"),
        ({"b": d(3)}, ShapeError, "b: expected (d_out,) with d_out=4 set by B, got (3,)"),
        ({"bB": d(3)}, ShapeError, "bB: expected (d_out,) with d_out=4 set by B, got (3,)"),
        ({"B": d(4, 3).astype("float32")}, DtypeError, "B: expected float64, set by A, got float32"),
        ({"m": d(4).astype("float32")}, DtypeError, "m: expected float64, set by A, got float32"),
        ({"bB": d(4).astype("float32")}, DtypeError, "bB: expected float64, set by A, got float32"),
        ({"b": np.ones(4, int)}, DtypeError, "b: expected one of "),
        (
            {"A": [[1.0] * 5] * 3},
            TypeError,
            "A: expected an array of numpy, cupy or an array-standard library, got builtins.list",
        ),
        (
            {"b": STRICT.place(d(4))},
            TypeError,
            "arrays must share one library, got A in numpy, b in array_api_strict",
        ),
    ],
)
def test_an_adapter_of_parts_that_do_not_fit(parts, error, message):
    with pytest.raises(error) as caught:
        Adapter(**{"A": d(3, 5), "B": d(4, 3), **parts})
    assert type(caught.value) is error
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_bias_may_have_the_dtype_of_the_base():
    adapter = Adapter(d(3, 5).astype("float32"), d(4, 3).astype("float32"), b=d(4).astype("float16"))
    assert (adapter.A.dtype, adapter.b.dtype) == ("float32", "float16")


def test_parameters_are_counted():
    assert param_count(Adapter(d(3, 5), d(4, 3))) == 27
    assert param_count(Adapter(d(3, 5), d(4, 3), m=d(4), b=d(4))) == 35
    assert param_count(Adapter(d(3, 5), d(4, 3), bB=d(4))) == 31
    assert param_count(Adapter(None, None, b=d(4))) == 4
    assert type(param_count(Adapter(None, None, b=d(4)))) is int


def test_a_stored_weight_is_a_view():
    """fan_in_fan_out is a layout: nothing is copied, and what was read is written back."""
    stored, b = d(5, 4), d(4)
    linear = linear_from_stored(stored, b, fan_in_fan_out=True)
    assert linear.W.shape == (4, 5)
    assert np.shares_memory(linear.W, stored)
    back, bias = linear_to_stored(linear, fan_in_fan_out=True)
    assert np.array_equal(back, stored)
    assert np.shares_memory(back, stored)
    assert bias is b
    plain = linear_from_stored(stored, fan_in_fan_out=False)
    assert plain.W is stored
    assert linear_to_stored(plain, fan_in_fan_out=False)[0] is stored
    with pytest.raises(ShapeError, match=r"^W: expected \(d_in, d_out\), got \(4,\)$"):
        linear_from_stored(d(4), fan_in_fan_out=True)
    with pytest.raises(ShapeError, match=r"^W: expected \(d_out, d_in\), got \(4,\)$"):
        linear_from_stored(d(4), fan_in_fan_out=False)


def test_a_scaling_comes_back_as_a_python_float():
    """A NumPy float64 would widen float32 arrays."""
    base, adapter = Linear(d(4, 5)), Adapter(d(3, 5), d(4, 3))
    for s in (0.5, 2, np.float64(0.5), np.float32(0.5), np.int64(2), -1.5, 0.0):
        got = check_pair(base, adapter, s)
        assert type(got) is float
        assert got == s


@libraries
def test_rows_of_zeros_are_counted(library):
    V = np.ones((8, 3))
    check_direction(library.place(V))
    V[[0, 2, 5]] = 0.0
    V[5, 1] = -0.0
    if library.name == "guarded":
        return  # the count is read on the host
    with pytest.raises(ConfigError, match=r"got 3 rows of zeros \(first: 0, 2, 5\); leave this layer out"):
        check_direction(library.place(V))
