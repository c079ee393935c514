"""The layer's refusals: each argument that does not fit, by its error and the message that names it."""

import numpy as np
import pytest
from strategies import LIBRARIES, normals

from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.layer import lora_linear_backward, lora_linear_backward_base, lora_linear_forward
from lorax_np.params import Adapter, Linear


def good():
    """Arguments that fit, by name."""
    draw = normals(0)
    return {
        "x": draw(2, 5),
        "W": draw(4, 5),
        "b": draw(4),
        "A": draw(3, 5),
        "B": draw(4, 3),
        "m": None,
        "ab": None,
        "bB": None,
        "mask": None,
        "scaling": 0.7,
        "gy": draw(2, 4),
    }


def run(**changed):
    a = {**good(), **changed}
    base, adapter = Linear(a["W"], a["b"]), Adapter(a["A"], a["B"], a["m"], a["ab"], a["bB"])
    _, saved = lora_linear_forward(a["x"], base, adapter, scaling=a["scaling"], mask=a["mask"])
    lora_linear_backward(a["gy"], saved, base, adapter, scaling=a["scaling"])
    lora_linear_backward_base(a["gy"], saved, base, adapter, scaling=a["scaling"])


d = normals(7)
STRICT = next(x for x in LIBRARIES if x.name == "array_api_strict")
BAD = [
    ({"x": d(2, 6)}, ShapeError, "x: expected (..., d_in) with d_in=5 set by W, got (2, 6)"),
    ({"x": d()}, ShapeError, "x: expected (..., d_in) with d_in=5 set by W, got ()"),
    ({"W": d(5)}, ShapeError, "W: expected (d_out, d_in), got (5,)"),
    ({"W": d(4, 5, 1)}, ShapeError, "W: expected (d_out, d_in), got (4, 5, 1)"),
    ({"b": d(5)}, ShapeError, "b: expected (d_out,) with d_out=4 set by W, got (5,)"),
    ({"b": d(4, 1)}, ShapeError, "b: expected (d_out,) with d_out=4 set by W, got (4, 1)"),
    ({"A": d(3, 4)}, ShapeError, "A: expected (r, d_in) with d_in=5 set by W, got (3, 4)"),
    ({"A": d(2, 5)}, ShapeError, "B: expected (d_out, r) with r=2 set by A, got (4, 3)"),
    ({"A": d(0, 5), "B": d(4, 0)}, ShapeError, "A: expected (r, d_in) with axes of at least 1, got (0, 5)"),
    ({"B": d(5, 3)}, ShapeError, "B: expected (d_out, r) with d_out=4 set by W, r=3 set by A, got (5, 3)"),
    ({"B": d(3, 4)}, ShapeError, "B: expected (d_out, r) with r=3 set by A, got (3, 4)"),
    ({"m": d(5)}, ShapeError, "m: expected (d_out,) with d_out=4 set by B, got (5,)"),
    ({"m": d(1)}, ShapeError, "m: expected (d_out,) with d_out=4 set by B, got (1,)"),
    ({"ab": d(5)}, ShapeError, "b: expected (d_out,) with d_out=4 set by B, got (5,)"),
    ({"bB": d(3)}, ShapeError, "bB: expected (d_out,) with d_out=4 set by B, got (3,)"),
    (
        {"mask": d(5)},
        ShapeError,
        "mask: expected (..., d_in) with ...=(2,) set by x, d_in=5 set by W, got (5,)",
    ),
    (
        {"mask": d(2, 1)},
        ShapeError,
        "mask: expected (..., d_in) with ...=(2,) set by x, d_in=5 set by W, got (2, 1)",
    ),
    (
        {"gy": d(2, 5)},
        ShapeError,
        "gy: expected (..., d_out) with ...=(2,) set by x, d_out=4 set by W, got (2, 5)",
    ),
    ({"gy": d(4)}, ShapeError, "gy: expected (..., d_out) with ...=(2,) set by x, d_out=4 set by W, got (4,)"),
    ({"x": d(2, 5).astype("float32")}, DtypeError, "x: expected float64, set by W, got float32"),
    ({"b": d(4).astype("float32")}, DtypeError, "b: expected float64, set by W, got float32"),
    ({"B": d(4, 3).astype("float32")}, DtypeError, "B: expected float64, set by A, got float32"),
    ({"m": d(4).astype("float32")}, DtypeError, "m: expected float64, set by A, got float32"),
    ({"bB": d(4).astype("float32")}, DtypeError, "bB: expected float64, set by A, got float32"),
    ({"gy": d(2, 4).astype("float32")}, DtypeError, "gy: expected float64, set by x, got float32"),
    ({"x": np.ones((2, 5), int)}, DtypeError, "x: expected one of "),
    ({"W": np.ones((4, 5), int)}, DtypeError, "W: expected one of "),
    ({"A": np.ones((3, 5), int)}, DtypeError, "A: expected one of "),
    ({"ab": np.ones(4, int)}, DtypeError, "b: expected one of "),
    ({"mask": np.ones((2, 5), bool)}, DtypeError, "mask: expected one of "),
    ({"mask": np.ones((2, 5), int)}, DtypeError, "mask: expected one of "),
    ({"W": d(4, 5).astype("complex64")}, DtypeError, "W: expected one of "),
    ({"W": d(4, 5).astype("longdouble")}, DtypeError, "W: expected one of "),
    ({"x": np.array([["a"] * 5] * 2)}, DtypeError, "x: expected one of "),
    ({"x": np.array([[None] * 5] * 2)}, DtypeError, "x: expected one of "),
    ({"x": d(2, 5) + 0j}, DtypeError, "x: expected real arrays in a backward pass, got complex128"),
    ({"W": d(4, 5) + 0j}, DtypeError, "W: expected real arrays in a backward pass, got complex128"),
    ({"A": d(3, 5) + 0j}, DtypeError, "A: expected real arrays in a backward pass, got complex128"),
    ({"B": d(4, 3) + 0j}, DtypeError, "B: expected real arrays in a backward pass, got complex128"),
    ({"m": d(4) + 0j}, DtypeError, "m: expected real arrays in a backward pass, got complex128"),
    ({"b": d(4) + 0j}, DtypeError, "b: expected real arrays in a backward pass, got complex128"),
    ({"ab": d(4) + 0j}, DtypeError, "b: expected real arrays in a backward pass, got complex128"),
    ({"bB": d(4) + 0j}, DtypeError, "bB: expected real arrays in a backward pass, got complex128"),
    ({"mask": d(2, 5) + 0j}, DtypeError, "mask: expected real arrays in a backward pass, got complex128"),
    ({"gy": d(2, 4) + 0j}, DtypeError, "gy: expected real arrays in a backward pass, got complex128"),
    (
        {"x": [1.0] * 5},
        TypeError,
        "x: expected an array of numpy, cupy or an array-standard library, got builtins.list",
    ),
    (
        {"W": [[1.0] * 5]},
        TypeError,
        "W: expected an array of numpy, cupy or an array-standard library, got builtins.list",
    ),
    ({"x": None}, TypeError, "x: expected an array"),
    ({"W": None}, TypeError, "W: expected an array"),
    (
        {"x": 1.0},
        TypeError,
        "x: expected an array of numpy, cupy or an array-standard library, got builtins.float",
    ),
    (
        {"x": np.float64(1)},
        TypeError,
        "x: expected an array of numpy, cupy or an array-standard library, got numpy.float64",
    ),
    ({"x": np.ma.masked_array(d(2, 5))}, TypeError, "x: expected a plain array, got numpy.ma.MaskedArray"),
    ({"mask": [[1.0] * 5] * 2}, TypeError, "mask: expected an array"),
    ({"gy": [[1.0] * 4] * 2}, TypeError, "gy: expected an array"),
    ({"gy": None}, TypeError, "gy: expected an array"),
    (
        {"x": STRICT.place(d(2, 5))},
        TypeError,
        "arrays must share one library, got W in numpy, x in array_api_strict",
    ),
    (
        {"A": STRICT.place(d(3, 5))},
        TypeError,
        "arrays must share one library, got A in array_api_strict, B in numpy",
    ),
    (
        {"b": STRICT.place(d(4))},
        TypeError,
        "arrays must share one library, got W in numpy, b in array_api_strict",
    ),
    (
        {"gy": STRICT.place(d(2, 4))},
        TypeError,
        "arrays must share one library, got x in numpy, gy in array_api_strict",
    ),
    ({"mask": STRICT.place(d(2, 5))}, TypeError, "arrays must share one library, got W in numpy, mask in "),
    ({"scaling": float("nan")}, ConfigError, "scaling: expected a finite float, got nan"),
    ({"scaling": float("inf")}, ConfigError, "scaling: expected a finite float, got inf"),
    ({"scaling": "2"}, ConfigError, "scaling: expected a finite float, got '2'"),
    ({"scaling": None}, ConfigError, "scaling: expected a finite float, got None"),
    ({"scaling": True}, ConfigError, "scaling: expected a finite float, got True"),
    ({"scaling": 1j}, ConfigError, "scaling: expected a finite float, got 1j"),
    ({"scaling": 10**400}, ConfigError, "scaling: expected a finite float, got 1"),
    ({"scaling": np.ones(2)}, ConfigError, "scaling: expected a finite float, got "),
    ({"B": None}, ConfigError, "B: expected an array beside the other factor, got None"),
    ({"A": None}, ConfigError, "A: expected an array beside the other factor, got None"),
    (
        {"m": d(4), "bB": d(4)},
        ConfigError,
        "bB: expected None beside m, since DoRA has no bias of B, got an array",
    ),
    (
        {"A": None, "B": None, "ab": d(4), "mask": d(2, 5)},
        ConfigError,
        "mask: expected None beside an adapter without A, which drops nothing, got one",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[", ".join(changed) for changed, *_ in BAD])
def test_bad_input_is_refused_by_name(changed, error, message):
    run()
    with pytest.raises(error) as caught:
        run(**changed)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


def test_a_matrix_is_refused():
    with pytest.warns(PendingDeprecationWarning):
        x = np.matrix(np.ones((2, 5)))
    with pytest.raises(TypeError, match=r"^x: expected a plain array, got numpy.matrix$"):
        run(x=x)


def test_what_another_adapter_saved_is_refused():
    """saved must have the parts that this adapter has, in the shapes that it has."""
    draw = normals(0)
    a = good()
    base = Linear(a["W"], a["b"])
    lora, dora, bias = (
        Adapter(a["A"], a["B"]),
        Adapter(a["A"], a["B"], m=draw(4)),
        Adapter(None, None, b=draw(4)),
    )
    saved = {id(w): lora_linear_forward(a["x"], base, w, scaling=0.7)[1] for w in (lora, dora, bias)}
    for backward in (lora_linear_backward, lora_linear_backward_base):
        for one, other in ((lora, dora), (dora, lora), (lora, bias), (bias, lora), (dora, bias), (bias, dora)):
            with pytest.raises(ConfigError, match=r"^saved: expected this adapter's activations, got those of"):
                backward(a["gy"], saved[id(one)], base, other, scaling=0.7)
        for wrong in (None, {}, saved[id(lora)].lora, tuple(saved[id(lora)])):
            with pytest.raises(TypeError, match=r"^saved: expected what lora_linear_forward returned, got "):
                backward(a["gy"], wrong, base, lora, scaling=0.7)
    other = Adapter(draw(2, 5), draw(4, 2))
    with pytest.raises(ShapeError):
        lora_linear_backward(a["gy"], saved[id(lora)], base, other, scaling=0.7)
    other = Adapter(a["A"].astype("float32"), a["B"].astype("float32"))
    with pytest.raises(DtypeError):
        lora_linear_backward(a["gy"], saved[id(lora)], base, other, scaling=0.7)


@pytest.mark.parametrize("swap", ["base", "adapter"])
def test_records_of_another_kind_are_refused(swap):
    a = good()
    base, adapter = Linear(a["W"]), Adapter(a["A"], a["B"])
    for wrong in (None, (a["W"],), adapter if swap == "base" else base):
        pair = {"base": base, "adapter": adapter, swap: wrong}
        with pytest.raises(
            TypeError, match=f"^{swap}: expected {'Linear' if swap == 'base' else 'Adapter'}, got "
        ):
            lora_linear_forward(a["x"], pair["base"], pair["adapter"], scaling=0.7)
