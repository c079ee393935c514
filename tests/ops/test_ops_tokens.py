"""A table some of whose rows are trained, and its adjoint."""

import numpy as np
import pytest
from checkers import Refused, assert_adjoint, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, normals, seeds, sizes

from lorax_np.errors import ShapeError
from lorax_np.ops.tokens import tokens_backward, tokens_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)


def drawn(seed, library, lead, vocab, dim, n):
    """ids that hit trained rows more than once, a table, rows and their index in any order."""
    rng, draw = np.random.default_rng(seed), normals(seed, library)
    index = rng.permutation(vocab)[:n]
    ids = np.where(rng.random(lead) < 0.5, rng.choice(index, lead), rng.integers(0, vocab, lead))
    return library.place(ids), draw(vocab, dim), draw(n, dim), library.place(index)


@libraries
@given(seed=seeds, lead=leads, vocab=st.integers(1, 12), dim=sizes, data=st.data())
def test_the_table_with_its_rows_replaced(library, seed, lead, vocab, dim, data):
    """(tokens.1) to (tokens.3), to the bit, against the table written out."""
    n = data.draw(st.integers(1, vocab))
    ids, W, T, index = drawn(seed, library, lead, vocab, dim, n)
    host = library.host
    y, H = tokens_forward(ids, W, T, index)
    table = np.array(host(W))
    table[host(index)] = host(T)
    assert (host(y) == table[host(ids)]).all()
    assert y.shape == (*lead, dim)
    assert H.shape == (*lead, n)


@libraries
@given(seed=seeds, lead=leads, vocab=st.integers(1, 12), dim=sizes, data=st.data())
def test_tokens_backward_is_the_adjoint(library, seed, lead, vocab, dim, data):
    """(tokens.4): y is affine in T, and linear where W is 0."""
    n = data.draw(st.integers(1, vocab))
    ids, W, T, index = drawn(seed, library, lead, vocab, dim, n)
    draw, host = normals(seed + 1, library), library.host
    gy, v = draw(*lead, dim), draw(n, dim)
    _, H = tokens_forward(ids, W, T, index)
    g = tokens_backward(gy, H)
    assert (g.shape, g.dtype) == (T.shape, T.dtype)
    jv, _ = tokens_forward(ids, W * 0.0, v, index)
    assert_adjoint(host(g), host(v), host(gy), host(jv), total(host(gy), np.abs(host(jv))), "gT")
    untouched = ~np.isin(host(index), host(ids))
    assert not host(g)[untouched].any()


@pytest.mark.parametrize("wrong", [lambda g: 1.001 * g, lambda g: g[::-1], lambda g: np.roll(g, 1, axis=0)])
@given(seed=seeds)
def test_a_wrong_adjoint_is_refused(wrong, seed):
    """0.1 % too large, and rows that were scattered into other rows."""
    ids, W, T, index = drawn(seed, LIBRARIES[0], (30,), 9, 3, 4)
    draw = normals(seed + 1)
    gy, v = draw(30, 3), draw(4, 3)
    _, H = tokens_forward(ids, W, T, index)
    jv, _ = tokens_forward(ids, W * 0.0, v, index)
    size = total(gy, np.abs(jv))
    assert_adjoint(tokens_backward(gy, H), v, gy, jv, size)
    with pytest.raises(Refused):
        assert_adjoint(wrong(tokens_backward(gy, H)), v, gy, jv, size)


def test_shapes_that_do_not_fit_are_named():
    draw = normals(0)
    with pytest.raises(ShapeError, match=r"^index: expected \(n,\) with n=2 set by T, got \(3,\)$"):
        tokens_forward(np.zeros(2, int), draw(4, 3), draw(2, 3), np.arange(3))
    with pytest.raises(ShapeError, match=r"^T: expected \(n, dim\) with dim=3 set by W, got \(2, 5\)$"):
        tokens_forward(np.zeros(2, int), draw(4, 3), draw(2, 5), np.arange(2))
