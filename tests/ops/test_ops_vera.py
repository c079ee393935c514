"""VeRA's update and its adjoint."""

import numpy as np
import pytest
from checkers import Refused, assert_adjoint, assert_close, total
from hypothesis import given
from strategies import LIBRARIES, leads, normals, ranks, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops.vera import vera_backward, vera_delta, vera_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
TRAINED = "x", "lambda_d", "lambda_b"


def drawn(draw, lead, d_in, d_out, r):
    shapes = {"x": (*lead, d_in), "A": (r, d_in), "B": (d_out, r), "lambda_d": (r,), "lambda_b": (d_out,)}
    return {name: draw(*shape) for name, shape in shapes.items()}


def gradients(gy, saved, at):
    rest = {k: v for k, v in at.items() if k != "x"}
    return dict(zip(TRAINED, vera_backward(gy, saved, **rest), strict=True))


@libraries
@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks)
def test_vera_backward_is_the_adjoint(library, seed, lead, d_in, d_out, r):
    """(vera.1) to (vera.10): y is linear in each of x, λ_d and λ_b alone."""
    draw, host = normals(seed, library), library.host
    at = drawn(draw, lead, d_in, d_out, r)
    y, saved = vera_forward(**at)
    gy = draw(*lead, d_out)
    assert (y.shape, y.dtype) == (gy.shape, gy.dtype)
    for name, g in gradients(gy, saved, at).items():
        assert (g.shape, g.dtype) == (at[name].shape, at[name].dtype)
        v = draw(*g.shape)
        moved = {**at, name: v}
        jv, _ = vera_forward(**moved)
        terms, _ = vera_forward(**{k: np.abs(host(a)) for k, a in moved.items()})
        assert_adjoint(host(g), host(v), host(gy), host(jv), total(host(gy), terms), f"g{name}")


@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks)
def test_the_forward_is_the_matrix_it_stands_for(seed, lead, d_in, d_out, r):
    """(vera.1) to (vera.4) against (vera.11), and that against the sum written out."""
    at = drawn(normals(seed), lead, d_in, d_out, r)
    x = at.pop("x")
    want = np.einsum("o,or,r,ri->oi", at["lambda_b"], at["B"], at["lambda_d"], at["A"])
    size = vera_delta(**{k: np.abs(v) for k, v in at.items()})
    delta = vera_delta(**at)
    assert_close("delta", delta, want, 32 * 2.0**-52 * size)
    y, _ = vera_forward(x, **at)
    assert_close("y", y, x @ want.T, 64 * 2.0**-52 * (np.abs(x) @ size.T))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("factor", [1.001, -1.0, np.nan])
@given(seed=seeds)
def test_a_wrong_adjoint_is_refused(name, factor, seed):
    draw = normals(seed)
    at = drawn(draw, (4,), 5, 2, 3)
    _, saved = vera_forward(**at)
    gy, v = draw(4, 2), draw(*at[name].shape)
    g, moved = gradients(gy, saved, at)[name], {**at, name: v}
    jv, _ = vera_forward(**moved)
    size = total(gy, vera_forward(**{k: np.abs(a) for k, a in moved.items()})[0])
    assert_adjoint(g, v, gy, jv, size)
    with pytest.raises(Refused):
        assert_adjoint(factor * g, v, gy, jv, size)


@libraries
def test_zero_tokens_give_zero_gradients(library):
    draw = normals(0, library)
    at = drawn(draw, (0,), 3, 4, 2)
    y, saved = vera_forward(**at)
    found = gradients(draw(0, 4), saved, at)
    assert (y.shape, found["x"].shape) == ((0, 4), (0, 3))
    assert not library.host(found["lambda_d"]).any()
    assert not library.host(found["lambda_b"]).any()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lambda_d", (4,), "lambda_d: expected (r,) with r=2 set by A, got (4,)"),
        ("lambda_b", (2,), "lambda_b: expected (d_out,) with d_out=4 set by B, got (2,)"),
        ("A", (2, 5), "A: expected (r, d_in) with d_in=3 set by x, got (2, 5)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape, message):
    draw = normals(0)
    at = {**drawn(draw, (2,), 3, 4, 2), name: draw(*shape)}
    with pytest.raises(ShapeError) as caught:
        vera_forward(**at)
    assert str(caught.value) == message


def test_dtypes_that_differ_are_named():
    at = drawn(normals(0), (2,), 3, 4, 2)
    with pytest.raises(DtypeError, match=r"^lambda_b: expected float64, set by x, got float32$"):
        vera_forward(**{**at, "lambda_b": at["lambda_b"].astype("float32")})
