"""Row norms, magnitude times direction, and their adjoints."""

import numpy as np
import pytest
from checkers import assert_adjoint, assert_close, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, normals, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops.dora import magnitude_backward, magnitude_forward, row_norm_backward, row_norm_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52


@libraries
@given(seed=seeds, lead=leads, d_out=sizes)
def test_magnitude_backward_is_the_adjoint(library, seed, lead, d_out):
    """(dora.5) to (dora.11): t is linear in P and in Q, and affine in m with the step (P + Q)/n."""
    draw, host = normals(seed, library), library.host
    P, Q, gt, m = draw(*lead, d_out), draw(*lead, d_out), draw(*lead, d_out), draw(d_out)
    n = library.place(np.abs(host(draw(d_out))) + 0.1)
    zero = P * 0.0
    t, saved = magnitude_forward(P, Q, m=m, n=n)
    gP, gQ, gm, gn = magnitude_backward(gt, saved, m=m, n=n)
    for g, like in ((t, P), (gP, P), (gQ, Q), (gm, m), (gn, n)):
        assert g.shape == like.shape
        assert g.dtype == like.dtype
    k, one = np.abs(host(m) / host(n)), 1.0
    v = draw(*lead, d_out)
    for name, g, jv, terms in (
        ("P", gP, magnitude_forward(v, zero, m=m, n=n)[0], (k + one) * np.abs(host(v))),
        ("Q", gQ, magnitude_forward(zero, v, m=m, n=n)[0], k * np.abs(host(v))),
    ):
        assert_adjoint(host(g), host(v), host(gt), host(jv), total(host(gt), terms), f"g{name}")
    v = draw(d_out)  # t(m + v) − t(m − v) = 2v(P + Q)/n: a secant
    up, _ = magnitude_forward(P, Q, m=m + v, n=n)
    down, _ = magnitude_forward(P, Q, m=m - v, n=n)
    size = np.abs(host(P)) + np.abs(host(Q))
    terms = size * (2 * (np.abs(host(m)) + np.abs(host(v))) / host(n) + 2)
    assert_adjoint(host(gm), 2 * host(v), host(gt), host(up) - host(down), total(host(gt), terms), "gm")


@given(seed=seeds, lead=leads, d_out=sizes)
def test_the_gradient_by_the_norm_is_a_complex_step(seed, lead, d_out):
    """(dora.12): t is not affine in n; Im t(n + ih)/h to 8 eps of its terms."""
    draw = normals(seed)
    P, Q, gt, m, n = (
        draw(*lead, d_out),
        draw(*lead, d_out),
        draw(*lead, d_out),
        draw(d_out),
        abs(draw(d_out)) + 0.1,
    )
    _, saved = magnitude_forward(P, Q, m=m, n=n)
    *_, gn = magnitude_backward(gt, saved, m=m, n=n)
    t, _ = magnitude_forward(P, Q, m=m, n=n + 1e-30j)  # each entry of n has a column of its own
    want = np.sum((gt * (np.imag(t) / 1e-30)).reshape(-1, d_out), axis=0)
    terms = abs(P) * (abs(m) + n) + abs(Q) * abs(m)  # (m − n)/n has the terms 1/n and m/n²
    size = np.sum((abs(gt) * terms).reshape(-1, d_out), axis=0) / n**2
    rows = gt.size // d_out  # up to 27 terms
    assert_close("gn", gn, want, (8 + rows) * EPS * size)


@given(seed=seeds, lead=leads, d_out=sizes)
def test_the_magnitude_is_its_definition(seed, lead, d_out):
    """(dora.7) is k∘(P + Q) − P, and nothing where m = n: to the bit t = Q there."""
    draw = normals(seed)
    P, Q, m, n = draw(*lead, d_out), draw(*lead, d_out), draw(d_out), abs(draw(d_out)) + 0.1
    t, _ = magnitude_forward(P, Q, m=m, n=n)
    k = m / n
    assert_close("t", t, k * (P + Q) - P, 8 * EPS * ((abs(k) + 1) * abs(P) + abs(k * Q)))
    assert np.array_equal(magnitude_forward(P, Q, m=n, n=n)[0], Q)
    assert not magnitude_forward(P, Q * 0.0, m=n, n=n)[0].any()


def test_near_one_the_excess_of_the_magnitude_is_exact():
    """(dora.5) as (m − n)/n keeps what m/n − 1 rounds away."""
    n = np.array([3.0])
    m = np.nextafter(n, 4.0)
    t, _ = magnitude_forward(np.ones(1), np.zeros(1), m=m, n=n)
    assert t[0] == (m - n)[0] / 3.0
    assert t[0] != m[0] / 3.0 - 1


def test_a_magnitude_of_zero_has_a_gradient():
    """(dora.11) divides by n, and never takes k/m."""
    one = np.ones(1)
    _, saved = magnitude_forward(2 * one, 3 * one, m=0 * one, n=4 * one)
    gP, gQ, gm, gn = magnitude_backward(one, saved, m=0 * one, n=4 * one)
    assert [float(v[0]) for v in (gP, gQ, gm, gn)] == [-1.0, 0.0, 1.25, 0.0]


# ---- row norms ---------------------------------------------------------------------------------------------


@libraries
@given(seed=seeds, d_out=sizes, d_in=sizes)
def test_row_norms_and_their_gradient(library, seed, d_out, d_in):
    """(dora.1) to (dora.4): the definition, and every element of gV by a complex step."""
    draw, host = normals(seed, library), library.host
    V, gn = draw(d_out, d_in), draw(d_out)
    n = row_norm_forward(V)
    gV = row_norm_backward(gn, V, n=n)
    assert (n.shape, gV.shape) == ((d_out,), (d_out, d_in))
    assert n.dtype == gV.dtype == V.dtype
    at = host(V)
    assert_close("n", host(n), np.sqrt(np.sum(at * at, axis=1)), 8 * EPS * host(n))
    want = np.empty(at.shape)
    for column in range(d_in):  # each row has its own norm
        stepped = at.astype("complex128")
        stepped[:, column] += 1e-30j
        stepped_norm = host(row_norm_forward(library.place(stepped)))
        want[:, column] = host(gn) * np.imag(stepped_norm) / 1e-30
    assert_close("gV", host(gV), want, 8 * EPS * np.abs(host(gn))[:, None] * np.ones(d_in))
    along = np.sum(host(gV) * at, axis=1)  # n is homogeneous of degree 1: <gV_j, V_j> = gn_j n_j
    assert_close("<gV, V>", along, host(gn) * host(n), 16 * EPS * np.abs(host(gn) * host(n)))


@pytest.mark.parametrize(("dtype", "decades", "eps"), [("float64", 200, EPS), ("float32", 30, 2.0**-23)])
@given(seed=seeds, data=st.data())
def test_row_norms_at_every_scale(dtype, decades, eps, seed, data):
    """(dora.1) to (dora.3): scaling first keeps the squares from overflowing and from vanishing."""
    rng = np.random.default_rng(seed)
    V = rng.standard_normal((6, 5))
    V[:, 3] *= 1e-6
    power = data.draw(st.lists(st.integers(-decades, decades), min_size=6, max_size=6))
    scaled = (V * 10.0 ** np.array(power)[:, None]).astype(dtype)
    n = row_norm_forward(scaled)
    assert n.dtype == dtype
    exponent = np.frexp(np.max(np.abs(scaled.astype("float64")), axis=1))[1]
    exact = np.ldexp(scaled.astype("float64"), -exponent[:, None])
    want = np.ldexp(np.sqrt(np.sum(exact * exact, axis=1)), exponent)
    assert_close("n", n, want, 8 * eps * want)
    gV = row_norm_backward(np.ones(6, dtype), scaled, n=n)
    assert_close("gV", np.sum(gV.astype("float64") ** 2, axis=1), np.ones(6), 32 * eps)


def test_row_norms_of_pythagorean_rows_are_exact_in_float64():
    """(dora.3): dividing by 4 and by 8 is exact, and so is the root."""
    V = np.array([[3.0, 4.0], [0.0, -8.0]])
    assert row_norm_forward(V).tolist() == [5.0, 8.0]


@libraries
def test_a_row_of_zeros_is_not_hidden(library):
    """(dora.2) divides 0 by 0: such a row has no direction, and its norm says so."""
    with np.errstate(invalid="ignore"):
        n = row_norm_forward(library.place(np.array([[0.0, 0.0], [3.0, 4.0]])))
    assert np.isnan(library.host(n)[0])
    assert library.host(n)[1] == 5.0


def test_strided_arrays_are_read_as_they_are():
    draw = normals(0)
    V, gn, P, gt = draw(7, 10).T[::-2], draw(10)[::-2], draw(6, 10)[::2, ::2], draw(5, 3).T
    assert np.array_equal(row_norm_forward(V), row_norm_forward(np.ascontiguousarray(V)))
    n = row_norm_forward(V)
    assert np.array_equal(row_norm_backward(gn, V, n=n), row_norm_backward(gn.copy(), V.copy(), n=n))
    t, saved = magnitude_forward(P, gt, m=gn, n=n)
    t2, saved2 = magnitude_forward(P.copy(), gt.copy(), m=gn.copy(), n=n)
    assert np.array_equal(t, t2)
    got = magnitude_backward(gt, saved, m=gn, n=n)
    want = magnitude_backward(gt.copy(), saved2, m=gn.copy(), n=n)
    gm = np.sum(abs(gt) * (abs(P) + abs(gt)), axis=0) / n  # sums of five terms, in another order
    for one, other, size in zip(got, want, (0, 0, gm, gm * abs(gn) / n), strict=True):
        assert_close("view", one, other, 8 * EPS * size)


@libraries
def test_zero_tokens_give_zero_gradients(library):
    draw = normals(0, library)
    n = library.place(np.ones(4))
    t, saved = magnitude_forward(draw(0, 4), draw(0, 4), m=draw(4), n=n)
    _, _, gm, gn = magnitude_backward(draw(0, 4), saved, m=draw(4), n=n)
    assert t.shape == (0, 4)
    assert not library.host(gm).any()
    assert not library.host(gn).any()


def test_float32_stays_float32():
    draw = normals(0, dtype="float32")
    V, m, n, P = draw(4, 3), draw(4), abs(draw(4)), draw(2, 4)
    t, saved = magnitude_forward(P, P, m=m, n=n)
    results = row_norm_forward(V), row_norm_backward(m, V, n=n), t, *magnitude_backward(P, saved, m=m, n=n)
    assert {str(v.dtype) for v in results} == {"float32"}


def test_arguments_that_do_not_fit_are_named():
    draw = normals(0)
    P, m = draw(2, 4), draw(4)
    for call, message in (
        (lambda: row_norm_forward(m), "V: expected (d_out, d_in), got (4,)"),
        (lambda: row_norm_forward(draw(3, 0)), "V: expected (d_out, d_in) with axes of at least 1, got (3, 0)"),
        (
            lambda: row_norm_backward(draw(3), draw(4, 2), n=m),
            "V: expected (d_out, d_in) with d_out=3 set by gn, got (4, 2)",
        ),
        (
            lambda: magnitude_forward(P, draw(3, 4), m=m, n=m),
            "Q: expected (..., d_out) with ...=(2,) set by P, d_out=4 set by P, got (3, 4)",
        ),
        (
            lambda: magnitude_forward(P, P, m=draw(3), n=m),
            "m: expected (d_out,) with d_out=4 set by P, got (3,)",
        ),
        (
            lambda: magnitude_forward(P, P, m=m, n=draw(4, 1)),
            "n: expected (d_out,) with d_out=4 set by P, got (4, 1)",
        ),
    ):
        with pytest.raises(ShapeError) as caught:
            call()
        assert str(caught.value) == message
    with pytest.raises(DtypeError, match=r"^m: expected float64, set by P, got float32$"):
        magnitude_forward(P, P, m=m.astype("float32"), n=m)
