"""The low-rank update, its written-out form, and their adjoints."""

import numpy as np
import pytest
from checkers import Refused, assert_adjoint, assert_close, total
from hypothesis import given
from strategies import LIBRARIES, leads, normals, ranks, scalings, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops.lora import delta_backward, delta_forward, lora_backward, lora_backward_bB, lora_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)


@libraries
@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks, s=scalings)
def test_lora_backward_is_the_adjoint(library, seed, lead, d_in, d_out, r, s):
    """(lora.1) to (lora.10): y is linear in x, in A, in B and in bB."""
    draw, host = normals(seed, library), library.host
    at = {"x": draw(*lead, d_in), "A": draw(r, d_in), "B": draw(d_out, r)}
    y, saved = lora_forward(**at, scaling=s)
    gy = draw(*lead, d_out)
    assert y.shape == gy.shape
    assert y.dtype == gy.dtype
    for (name, value), g in zip(at.items(), lora_backward(gy, saved, at["A"], at["B"], scaling=s), strict=True):
        assert g.shape == value.shape
        assert g.dtype == value.dtype
        v = draw(*value.shape)
        moved = {**at, name: v}
        jv, _ = lora_forward(**moved, scaling=s)
        terms, _ = lora_forward(**{k: np.abs(host(a)) for k, a in moved.items()}, scaling=s)
        assert_adjoint(host(g), host(v), host(gy), host(jv), total(host(gy), terms), f"g{name}")
    v = draw(d_out)
    gbB = lora_backward_bB(gy, scaling=s)
    assert gbB.shape == (d_out,)
    jv, _ = lora_forward(at["x"] * 0.0, at["A"], at["B"], v, scaling=s)
    assert_adjoint(host(gbB), host(v), host(gy), host(jv), total(host(gy), host(jv)), "gbB")


@libraries
@given(seed=seeds, d_in=sizes, d_out=sizes, r=ranks, s=scalings)
def test_delta_backward_is_the_adjoint(library, seed, d_in, d_out, r, s):
    """(lora.11) to (lora.14): delta is linear in A and in B."""
    draw, host = normals(seed, library), library.host
    at, gdelta = {"A": draw(r, d_in), "B": draw(d_out, r)}, draw(d_out, d_in)
    grads = delta_backward(gdelta, at["A"], at["B"], scaling=s)
    for (name, value), g in zip(at.items(), grads, strict=True):
        assert g.shape == value.shape
        assert g.dtype == value.dtype
        v = draw(*value.shape)
        moved = {**at, name: v}
        jv = delta_forward(**moved, scaling=s)
        terms = delta_forward(**{k: np.abs(host(a)) for k, a in moved.items()}, scaling=s)
        assert_adjoint(host(g), host(v), host(gdelta), host(jv), total(host(gdelta), terms), f"g{name}")


@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks, s=scalings)
def test_the_forward_is_the_matrix_it_stands_for(seed, lead, d_in, d_out, r, s):
    """(lora.1) to (lora.4) against (lora.11): y = x·deltaᵀ + s·bB, and delta's sum written out."""
    draw = normals(seed)
    x, A, B, bB = draw(*lead, d_in), draw(r, d_in), draw(d_out, r), draw(d_out)
    delta = np.einsum("or,ri->oi", B, A) * s
    y, saved = lora_forward(x, A, B, bB, scaling=s)
    eps = 2.0**-52
    assert_close(
        "delta", delta_forward(A, B, scaling=s), delta, 32 * eps * delta_forward(abs(A), abs(B), scaling=s)
    )
    size, _ = lora_forward(abs(x), abs(A), abs(B), abs(bB), scaling=s)
    assert_close("y", y, np.einsum("...i,oi->...o", x, delta) + s * bB, 32 * eps * size)
    assert saved.x is x
    assert saved.z.shape == (*lead, r)


@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks, s=scalings)
def test_the_two_adjoints_agree(seed, lead, d_in, d_out, r, s):
    """(lora.6), (lora.8) against (lora.13), (lora.14) of gdelta = gyᵀx: the second order of evaluation."""
    draw = normals(seed)
    x, A, B, gy = draw(*lead, d_in), draw(r, d_in), draw(d_out, r), draw(*lead, d_out)

    def both(x, A, B, gy):
        _, saved = lora_forward(x, A, B, scaling=s)
        _, gA, gB = lora_backward(gy, saved, A, B, scaling=s)
        gdelta = np.einsum("no,ni->oi", gy.reshape(-1, d_out), x.reshape(-1, d_in))
        return gA, gB, *delta_backward(gdelta, A, B, scaling=s)

    gA, gB, gA2, gB2 = both(x, A, B, gy)
    size_A, size_B, *_ = both(abs(x), abs(A), abs(B), abs(gy))
    assert_close("gA", gA, gA2, 64 * 2.0**-52 * size_A)
    assert_close("gB", gB, gB2, 64 * 2.0**-52 * size_B)


@pytest.mark.parametrize("seed", range(4))
def test_strided_arrays_are_read_as_they_are(seed):
    """(lora.1) to (lora.9) over views: every other column, transposed, and backwards."""
    draw = normals(seed)
    views = draw(3, 2, 8)[:, ::-1, ::2], draw(4, 3).T, draw(5, 6)[::-1, ::-2], draw(2, 3, 5).transpose(1, 0, 2)
    assert not any(view.flags.c_contiguous for view in views)

    def everything(x, A, B, gy):
        y, saved = lora_forward(x, A, B, scaling=1.7)
        return y, *lora_backward(gy, saved, A, B, scaling=1.7)

    solid = [np.ascontiguousarray(v) for v in views]
    for got, want, size in zip(
        everything(*views), everything(*solid), everything(*map(np.abs, solid)), strict=True
    ):
        assert_close("view", got, want, 32 * 2.0**-52 * size)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", lambda g, s: 1.001 * g),
        ("A", lambda g, s: 1.001 * g),
        ("B", lambda g, s: 1.001 * g),
        ("x", lambda g, s: g / s),
        ("A", lambda g, s: g / s),
        ("B", lambda g, s: g / s),
        ("A", lambda g, s: -g),
        ("B", lambda g, s: g.T.reshape(g.shape)),
        ("A", lambda g, s: g * (np.arange(len(g)) < len(g) - 1)[:, None]),
        ("A", lambda g, s: g * np.nan),
    ],
)
@given(seed=seeds)
def test_a_wrong_adjoint_is_refused(name, wrong, seed):
    """The checker of this file, shown rules that are wrong by 0.1 % and by more."""
    draw, s = normals(seed), 0.7
    at = {"x": draw(4, 5), "A": draw(3, 5), "B": draw(2, 3)}
    _, saved = lora_forward(**at, scaling=s)
    gy, v = draw(4, 2), draw(*at[name].shape)
    g = dict(zip(at, lora_backward(gy, saved, at["A"], at["B"], scaling=s), strict=True))[name]
    moved = {**at, name: v}
    jv, _ = lora_forward(**moved, scaling=s)
    terms, _ = lora_forward(**{k: np.abs(a) for k, a in moved.items()}, scaling=s)
    assert_adjoint(g, v, gy, jv, total(gy, terms))
    with pytest.raises(Refused, match=r"^<gx, v>: expected "):
        assert_adjoint(wrong(g, s), v, gy, jv, total(gy, terms), "gx")


@libraries
def test_zero_tokens_give_zero_gradients(library):
    """(lora.6), (lora.8), (lora.10) of no rows are sums of nothing."""
    draw = normals(0, library)
    A, B, gy = draw(5, 3), draw(4, 5), draw(0, 4)
    y, saved = lora_forward(draw(0, 3), A, B, draw(4), scaling=0.7)
    gx, gA, gB = lora_backward(gy, saved, A, B, scaling=0.7)
    assert (y.shape, gx.shape) == ((0, 4), (0, 3))
    for g, like in ((gA, A), (gB, B), (lora_backward_bB(gy, scaling=0.7), draw(4))):
        assert g.shape == like.shape
        assert not library.host(g).any()


def test_float32_stays_float32():
    draw = normals(0, dtype="float32")
    A, B, gy = draw(2, 3), draw(4, 2), draw(5, 4)
    y, saved = lora_forward(draw(5, 3), A, B, draw(4), scaling=0.7)
    results = (
        y,
        *lora_backward(gy, saved, A, B, scaling=0.7),
        lora_backward_bB(gy, scaling=0.7),
        delta_forward(A, B, scaling=0.7),
        *delta_backward(draw(4, 3), A, B, scaling=0.7),
    )
    assert {str(v.dtype) for v in results} == {"float32"}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"A": (4, 10)}, "A: expected (r, d_in) with d_in=12 set by x, got (4, 10)"),
        ({"B": (5, 3)}, "B: expected (d_out, r) with r=4 set by A, got (5, 3)"),
        ({"B": (5,)}, "B: expected (d_out, r) with r=4 set by A, got (5,)"),
        ({"bB": (4,)}, "bB: expected (d_out,) with d_out=5 set by B, got (4,)"),
        ({"x": ()}, "x: expected (..., d_in), got ()"),
        ({"A": (0, 12)}, "A: expected (r, d_in) with d_in=12 set by x, got (0, 12)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    at = {"x": (2, 12), "A": (4, 12), "B": (5, 4), "bB": (5,), **shapes}
    draw = normals(0)
    with pytest.raises(ShapeError) as caught:
        lora_forward(**{k: draw(*shape) for k, shape in at.items()}, scaling=0.5)
    assert str(caught.value) == message


def test_dtypes_that_differ_are_named():
    draw = normals(0)
    with pytest.raises(DtypeError, match=r"^A: expected float64, set by x, got float32$"):
        lora_forward(draw(2, 3), draw(4, 3).astype("float32"), draw(5, 4), scaling=0.5)
    with pytest.raises(DtypeError, match=r"^x: expected one of .*, got int64$"):
        lora_forward(np.ones((2, 3), dtype="int64"), draw(4, 3), draw(5, 4), scaling=0.5)
