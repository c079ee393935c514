"""AdaLoRA's update, its adjoint, and the orthogonality penalty."""

import numpy as np
import pytest
from checkers import TINY, Refused, assert_adjoint, assert_close, total
from hypothesis import given
from strategies import LIBRARIES, leads, normals, ranks, scalings, seeds, sizes

from lorax_np.errors import ShapeError
from lorax_np.ops.adalora import gram_backward, gram_forward, svd_backward, svd_delta, svd_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
NAMES = "x", "A", "B", "E"


def drawn(draw, lead, d_in, d_out, r):
    shapes = {"x": (*lead, d_in), "A": (r, d_in), "B": (d_out, r), "E": (r,)}
    return {name: draw(*shape) for name, shape in shapes.items()}


@libraries
@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks, alpha=scalings)
def test_svd_backward_is_the_adjoint(library, seed, lead, d_in, d_out, r, alpha):
    """(adalora.1) to (adalora.12): y is linear in each of x, A, B and E alone."""
    draw, host = normals(seed, library), library.host
    at, how = drawn(draw, lead, d_in, d_out, r), {"alpha": alpha, "rank": r + 1}
    y, saved = svd_forward(**at, **how)
    gy = draw(*lead, d_out)
    assert (y.shape, y.dtype) == (gy.shape, gy.dtype)
    for name, g in zip(NAMES, svd_backward(gy, saved, at["A"], at["B"], at["E"], **how), strict=True):
        assert (g.shape, g.dtype) == (at[name].shape, at[name].dtype)
        v = draw(*g.shape)
        moved = {**at, name: v}
        jv, _ = svd_forward(**moved, **how)
        terms, _ = svd_forward(**{k: np.abs(host(a)) for k, a in moved.items()}, **how)
        assert_adjoint(host(g), host(v), host(gy), host(jv), total(host(gy), terms), f"g{name}")


@given(seed=seeds, lead=leads, d_in=sizes, d_out=sizes, r=ranks, alpha=scalings)
def test_the_forward_is_the_matrix_it_stands_for(seed, lead, d_in, d_out, r, alpha):
    """(adalora.4) and (adalora.13), written out; (adalora.20) and (adalora.21) hold of the gradients."""
    draw = normals(seed)
    at, c = drawn(draw, lead, d_in, d_out, r), alpha / (r + 1e-5)
    x, A, B, E = (at[k] for k in NAMES)
    want = c * np.einsum("or,r,ri->oi", B, E, A)
    size = c * np.einsum("or,r,ri->oi", abs(B), abs(E), abs(A))
    assert_close("delta", svd_delta(A, B, E, alpha=alpha, rank=r), want, 64 * 2.0**-52 * size)
    y, saved = svd_forward(x, A, B, E, alpha=alpha, rank=r)
    assert_close("y", y, x @ want.T, 64 * 2.0**-52 * (abs(x) @ size.T))
    gy = draw(*lead, d_out)
    _, gA, gB, gE = svd_backward(gy, saved, A, B, E, alpha=alpha, rank=r)
    terms = abs(gy.reshape(-1, d_out)).T @ abs(x.reshape(-1, d_in))  # |gdelta|
    each = c * np.einsum("oi,or,ri->r", terms, abs(B), abs(A)) * abs(E)
    for name, got in (("A", np.sum(gA * A, axis=1)), ("B", np.sum(gB * B, axis=0))):
        assert_close(f"⟨g{name}, {name}⟩", got, gE * E, 256 * 2.0**-52 * each)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.001, -1.0])
@given(seed=seeds)
def test_a_wrong_adjoint_is_refused(name, factor, seed):
    draw, how = normals(seed), {"alpha": 0.7, "rank": 2}
    at = drawn(draw, (4,), 5, 2, 3)
    _, saved = svd_forward(**at, **how)
    gy, v = draw(4, 2), draw(*at[name].shape)
    g = dict(zip(NAMES, svd_backward(gy, saved, at["A"], at["B"], at["E"], **how), strict=True))[name]
    moved = {**at, name: v}
    jv, _ = svd_forward(**moved, **how)
    size = total(gy, svd_forward(**{k: np.abs(a) for k, a in moved.items()}, **how)[0])
    assert_adjoint(g, v, gy, jv, size)
    with pytest.raises(Refused):
        assert_adjoint(factor * g, v, gy, jv, size)


def test_rank_0_divides_by_nothing():
    """(adalora.4): the 1e-5 is there so that a rank of 0 gives no NaN."""
    at = drawn(normals(0), (2,), 3, 4, 2)
    assert np.isfinite(svd_forward(**at, alpha=1.0, rank=0)[0]).all()


# ---- the penalty --------------------------------------------------------------------------------------------


@given(seed=seeds, d=sizes, r=ranks)
def test_gram_backward_along_a_complex_step(seed, d, r):
    """(adalora.14) to (adalora.17), every element."""
    P = normals(seed)(d, r)
    f, R = gram_forward(P, np.eye(r))
    got = gram_backward(0.7, f, R, P)
    size = 2 * 0.7 * abs(P) @ (abs(P.T) @ abs(P) + np.eye(r)) / f
    for i in np.ndindex(P.shape):
        stepped = P.astype("complex128")
        stepped[i] += TINY * 1j
        want = 0.7 * gram_forward(stepped, np.eye(r))[0].imag.item() / TINY
        # R carries the roundings of r + d terms, and f those of r² squares
        assert abs(got[i] - want) <= 8 * (d + r * r) * 2.0**-52 * size[i] * (1 + size_of(P) / f.item())


def size_of(P):
    return float(np.linalg.norm(abs(P.T) @ abs(P) + np.eye(P.shape[1])))


@libraries
def test_the_penalty_in_every_library(library):
    P = normals(3, library)(5, 3)
    f, R = gram_forward(P, library.place(np.eye(3)))
    host = library.host(P)
    want = np.linalg.norm(host.T @ host - np.eye(3))
    assert abs(library.host(f).item() - want) <= 64 * 2.0**-52 * size_of(host)
    assert library.host(gram_backward(1.0, f, R, P)).shape == (5, 3)


def test_orthonormal_columns_have_no_gradient():
    """At f = 0 the norm has a corner; its least subgradient is taken, and no NaN."""
    P = np.eye(4)[:, :2]
    f, R = gram_forward(P, np.eye(2))
    assert f.tolist() == [[0.0]]
    assert not gram_backward(1.0, f, R, P).any()


def test_shapes_that_do_not_fit_are_named():
    draw = normals(0)
    with pytest.raises(ShapeError, match=r"^E: expected \(r,\) with r=2 set by A, got \(3,\)$"):
        svd_forward(draw(2, 3), draw(2, 3), draw(4, 2), draw(3), alpha=1.0, rank=2)
    with pytest.raises(ShapeError, match=r"^identity: expected \(r, r\) with r=2 set by P, "):
        gram_forward(draw(4, 2), np.eye(3))
