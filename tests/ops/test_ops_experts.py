"""The stored factors of fused experts: apart, together, and their updates."""

import numpy as np
import pytest
from checkers import Refused, assert_adjoint, assert_close, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, scalings, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops.experts import (
    experts_delta_backward,
    experts_delta_forward,
    join_experts,
    split_experts,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
small = st.integers(1, 5)


@libraries
@given(seed=seeds, E=small, r=small, d_in=sizes, d_out=sizes)
def test_the_split_is_by_rows_of_a_and_strides_of_b(library, seed, E, r, d_in, d_out):
    """(experts.1), (experts.2) entry by entry: A[e·r + ρ, i] and B[o, ρ·E + e]; joined, they are A and B."""
    draw, host = normals(seed, library), library.host
    A, B = draw(r * E, d_in), draw(d_out, r * E)
    As, Bs = split_experts(A, B, experts=E)
    assert len(As) == len(Bs) == E
    for e in range(E):
        rows = [e * r + rho for rho in range(r)]
        columns = [rho * E + e for rho in range(r)]
        assert np.array_equal(host(As[e]), host(A)[rows])
        assert np.array_equal(host(Bs[e]), host(B)[:, columns])
    for got, want in zip(join_experts(As, Bs), (A, B), strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(host(got), host(want))


def test_the_factors_are_views():
    A, B = np.zeros((6, 4)), np.zeros((5, 6))
    As, Bs = split_experts(A, B, experts=3)
    assert all(np.shares_memory(A, A_e) for A_e in As)
    assert all(np.shares_memory(B, B_e) for B_e in Bs)


@libraries
@given(seed=seeds, E=small, r=small, d_in=sizes, d_out=sizes, s=scalings)
def test_delta_backward_is_the_adjoint(library, seed, E, r, d_in, d_out, s):
    """(experts.3) to (experts.5): delta is linear in A and in B."""
    draw, host = normals(seed, library), library.host
    at, gdelta = {"A": draw(r * E, d_in), "B": draw(d_out, r * E)}, draw(E, d_out, d_in)
    grads = experts_delta_backward(gdelta, at["A"], at["B"], scaling=s)
    for (name, value), g in zip(at.items(), grads, strict=True):
        assert g.shape == value.shape
        assert g.dtype == value.dtype
        v = draw(*value.shape)
        moved = {**at, name: v}
        jv = experts_delta_forward(**moved, experts=E, scaling=s)
        terms = experts_delta_forward(**{k: np.abs(host(a)) for k, a in moved.items()}, experts=E, scaling=s)
        assert_adjoint(host(g), host(v), host(gdelta), host(jv), total(host(gdelta), terms), f"g{name}")


@given(seed=seeds, E=small, r=small, d_in=sizes, d_out=sizes, s=scalings)
def test_delta_is_one_sum_over_the_stored_axes(seed, E, r, d_in, d_out, s):
    """(experts.3) by its entries: Σ over ρ of s·B[o, ρ·E + e]·A[e·r + ρ, i]."""
    draw = normals(seed)
    A, B = draw(r * E, d_in), draw(d_out, r * E)
    want = s * np.einsum("ore,eri->eoi", B.reshape(d_out, r, E), A.reshape(E, r, d_in))
    size = experts_delta_forward(abs(A), abs(B), experts=E, scaling=s)
    assert_close("delta", experts_delta_forward(A, B, experts=E, scaling=s), want, 32 * 2.0**-52 * size)


@pytest.mark.parametrize(("E", "r"), [(3, 3), (4, 2), (2, 5)])
def test_the_wrong_order_keeps_every_norm(E, r):
    """(experts.13): why a test of sizes cannot see experts paired with others' columns."""
    draw = normals(5)
    A, B = draw(r * E, 4), draw(3, r * E)
    wrong = B.reshape(3, E, r).transpose(0, 2, 1).reshape(3, r * E)  # read expert-slowest
    assert np.allclose(np.linalg.norm(wrong), np.linalg.norm(B))
    right_deltas = experts_delta_forward(A, B, experts=E, scaling=1.0)
    wrong_deltas = experts_delta_forward(A, wrong, experts=E, scaling=1.0)
    assert not np.allclose(right_deltas, wrong_deltas)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda gA, gB, E: (1.001 * gA, gB),
        lambda gA, gB, E: (gA, 0.999 * gB),
        lambda gA, gB, E: (gA[::-1], gB),
        lambda gA, gB, E: (gA, gB.reshape(len(gB), E, -1).transpose(0, 2, 1).reshape(gB.shape)),
    ],
    ids=["gA", "gB", "experts turned round", "gB expert-slowest"],
)
@given(seed=seeds)
def test_a_wrong_adjoint_is_refused(wrong, seed):
    draw, E = normals(seed), 3
    at, gdelta = {"A": draw(6, 4), "B": draw(5, 6)}, draw(E, 5, 4)
    grads = wrong(*experts_delta_backward(gdelta, at["A"], at["B"], scaling=0.7), E)
    refused = 0
    for (name, value), g in zip(at.items(), grads, strict=True):
        v = draw(*value.shape)
        moved = {**at, name: v}
        jv = experts_delta_forward(**moved, experts=E, scaling=0.7)
        terms = experts_delta_forward(**{k: np.abs(a) for k, a in moved.items()}, experts=E, scaling=0.7)
        try:
            assert_adjoint(g, v, gdelta, jv, total(gdelta, terms))
        except Refused:
            refused += 1
    assert refused == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A, B: split_experts(A, B, experts=4), ShapeError, "A: expected (r·E, d_in) with E=4 set by W"),
        (lambda A, B: split_experts(A, B, experts=0), ShapeError, "A: expected (r·E, d_in) with E=0 set by W"),
        (lambda A, B: split_experts(A, B[:, :4], experts=2), ShapeError, "B: expected (d_out, r·E) with r·E=6"),
        (lambda A, B: split_experts(A, B.astype("float32"), experts=2), DtypeError, "B: expected float64"),
        (lambda A, B: join_experts([], []), ShapeError, "A: expected the factors of one expert at least"),
        (
            lambda A, B: join_experts([A, A[:3]], [B, B[:, :3]]),
            ShapeError,
            "A: expected every expert's factors",
        ),
        (
            lambda A, B: experts_delta_backward(np.ones((3, 5, 9)), A, B, scaling=1.0),
            ShapeError,
            "A: expected (r·E, d_in) with d_in=9 set by gdelta",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call(np.ones((6, 4)), np.ones((5, 6)))
    assert str(caught.value).startswith(message)
