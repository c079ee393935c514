"""Rows looked up, rows added up by id, and the low-rank update of rows."""

import ml_dtypes
import numpy as np
import pytest
from checkers import assert_adjoint, assert_close, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, leads, normals, scalings, seeds, sizes

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops.embedding import lookup_backward, lookup_forward, lora_lookup_backward, lora_lookup_forward
from lorax_np.ops.lora import lora_backward, lora_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
vocabs = st.integers(1, 7)


def drawn_ids(seed, lead, vocab, library=LIBRARIES[0]):
    """Ids of few values, so that they come often, and the array of them on the host."""
    rng = np.random.default_rng([seed, 1])
    some = rng.integers(0, vocab, size=max(1, vocab // 2))
    ids = rng.choice(some, size=lead).astype("int64")
    return library.place(ids), ids


def one_hot(ids, vocab):
    return np.eye(vocab)[ids]


def integers(seed, *shape):
    return np.random.default_rng([seed, 2]).integers(-9, 10, shape).astype("float64")


def tree(rows):
    """The sum of rows as a balanced tree over their order, each node its left half first: (embedding.3)."""
    if len(rows) == 1:
        return rows[0]
    half = 1
    while 2 * half < len(rows):
        half *= 2
    return tree(rows[:half]) + tree(rows[half:])


@libraries
@given(seed=seeds, lead=leads, vocab=vocabs, d=sizes)
def test_looking_up_is_the_product_with_one_hot_rows(library, seed, lead, vocab, d):
    """(embedding.1), to the bit: the other products of that sum are zeros."""
    T = normals(seed, library)(vocab, d)
    ids, host = drawn_ids(seed, lead, vocab, library)
    y = lookup_forward(T, ids)
    assert y.shape == (*lead, d)
    assert np.array_equal(library.host(y), one_hot(host, vocab) @ library.host(T))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex128"])
def test_rows_are_looked_up_in_any_dtype(dtype):
    like = np.dtype(getattr(ml_dtypes, dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    T = normals(0)(5, 3).astype(like)
    y = lookup_forward(T, np.array([[4, 0], [4, 4]], dtype="uint8"))
    assert y.dtype == like
    assert y.tobytes() == np.ascontiguousarray(T[[[4, 0], [4, 4]]]).tobytes()


@libraries
@given(seed=seeds, lead=leads, vocab=vocabs, d=sizes)
def test_adding_up_is_the_adjoint_exactly(library, seed, lead, vocab, d):
    """(embedding.2) to (embedding.4): xᵀgy of one-hot rows x, where all sums of integers are exact."""
    ids, host = drawn_ids(seed, lead, vocab, library)
    gy, T = integers(seed, *lead, d), integers(seed + 1, vocab, d)
    gT = lookup_backward(library.place(gy), ids, library.place(T))
    assert gT.shape == (vocab, d)
    want = one_hot(host, vocab).reshape(-1, vocab).T @ gy.reshape(-1, d)
    assert np.array_equal(library.host(gT), want)


@libraries
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 100])
def test_the_bits_are_those_of_a_balanced_tree(library, count):
    """(embedding.3): whatever the library, and whatever stands between the tokens of one id."""
    rng = np.random.default_rng(count)
    ids = rng.permutation(np.repeat([4, 1, 6], [count, 3, 2]))
    gy = rng.standard_normal((len(ids), 5)).astype("float32")
    got = library.host(
        lookup_backward(library.place(gy), library.place(ids), library.place(gy[:1].repeat(8, 0)))
    )
    for v in range(8):
        mine = gy[ids == v]
        want = tree(list(mine)) if len(mine) else np.zeros(5, "float32")
        assert got[v].tobytes() == want.tobytes()
    by_id = np.argsort(ids, kind="stable")  # other ids out of the way: the same bits
    again = lookup_backward(gy[by_id], ids[by_id], gy[:1].repeat(8, 0))
    assert again.tobytes() == got.tobytes()


@given(seed=seeds, lead=leads, vocab=vocabs, d=sizes)
def test_padding_and_frequency(seed, lead, vocab, d):
    """(embedding.5); padding alone is 0, and rows without a token are 0 exactly."""
    ids, _ = drawn_ids(seed, lead, vocab)
    gy, T, pad = normals(seed)(*lead, d), normals(seed)(vocab, d), seed % vocab
    plain = lookup_backward(gy, ids, T)
    count = np.bincount(ids.reshape(-1), minlength=vocab)
    assert np.array_equal(plain[count == 0], np.zeros((int((count == 0).sum()), d)))
    padded = lookup_backward(gy, ids, T, padding=pad)
    assert not padded[pad].any()
    rest = np.arange(vocab) != pad
    assert np.array_equal(padded[rest], plain[rest])
    shared = lookup_backward(gy, ids, T, by_frequency=True)
    assert np.array_equal(shared, plain / np.maximum(count, 1)[:, None])


def test_what_is_not_finite_stays_with_its_id():
    ids, gy = np.array([0, 1, 0, 2, 1]), np.ones((5, 2))
    gy[1] = [np.inf, np.nan]
    g = lookup_backward(gy, ids, np.ones((4, 2)))
    assert np.isfinite(g[[0, 2, 3]]).all()
    assert np.isinf(g[1, 0])
    assert np.isnan(g[1, 1])


@libraries
@given(seed=seeds, lead=leads, vocab=vocabs, dim=sizes, r=sizes, s=scalings)
def test_the_update_is_the_linear_one_on_one_hot_rows(library, seed, lead, vocab, dim, r, s):
    """(embedding.6) and (embedding.7) are (lora.1) and (lora.8): forward to the bit, gradients on integers."""
    draw = normals(seed, library)
    A, B = draw(r, vocab), draw(dim, r)
    ids, host = drawn_ids(seed, lead, vocab, library)
    x = library.place(one_hot(host, vocab))
    y, z = lora_lookup_forward(ids, A, B, scaling=s)
    want, saved = lora_forward(x, A, B, scaling=s)
    assert np.array_equal(library.host(z), library.host(saved.z))
    assert np.array_equal(library.host(y), library.host(want))
    A, B, gy = (
        library.place(integers(seed + i, *size)) for i, size in enumerate(((r, vocab), (dim, r), (*lead, dim)))
    )
    _, z = lora_lookup_forward(ids, A, B, scaling=0.5)
    _, saved = lora_forward(x, A, B, scaling=0.5)
    gA, gB = lora_lookup_backward(gy, ids, z, A, B, scaling=0.5)
    _, gA_x, gB_x = lora_backward(gy, saved, A, B, scaling=0.5)
    assert np.array_equal(library.host(gA), library.host(gA_x))
    assert np.array_equal(library.host(gB), library.host(gB_x))


@given(seed=seeds, lead=leads, vocab=vocabs, dim=sizes, r=sizes, s=scalings)
def test_the_update_s_backward_is_the_adjoint(seed, lead, vocab, dim, r, s):
    """y is linear in A and in B alone."""
    draw = normals(seed)
    A, B, gy = draw(r, vocab), draw(dim, r), draw(*lead, dim)
    ids, host = drawn_ids(seed, lead, vocab)
    _, z = lora_lookup_forward(ids, A, B, scaling=s)
    gA, gB = lora_lookup_backward(gy, ids, z, A, B, scaling=s)
    for name, g, v, at in (("A", gA, draw(r, vocab), {"B": B}), ("B", gB, draw(dim, r), {"A": A})):
        jv, _ = lora_lookup_forward(ids, **{name: v}, **at, scaling=s)
        parts = {name: np.abs(v), **{k: np.abs(value) for k, value in at.items()}}
        size = total(gy, s * (one_hot(host, vocab) @ parts["A"].T) @ parts["B"].T)
        assert_adjoint(g, v, gy, jv, size, f"g{name}")
    assert_close("A", gA, s * B.T @ (gy.reshape(-1, dim).T @ one_hot(host, vocab).reshape(-1, vocab)), 1e-9)


def test_what_does_not_fit_is_refused():
    T, ids = np.ones((4, 2)), np.array([[0, 1]])
    with pytest.raises(
        ShapeError, match=r"^gy: expected \(\.\.\., d\) with \.\.\.=\(1, 2\) set by ids, got \(2, 2\)$"
    ):
        lookup_backward(np.ones((2, 2)), ids, T)
    with pytest.raises(ShapeError, match=r"^gy: expected \(\.\.\., d\) with d=2 set by T, got \(1, 2, 3\)$"):
        lookup_backward(np.ones((1, 2, 3)), ids, T)
    with pytest.raises(ShapeError, match=r"^B: expected \(dim, r\) with r=3 set by A, got \(5, 2\)$"):
        lora_lookup_forward(ids, np.ones((3, 4)), np.ones((5, 2)), scaling=1.0)
    with pytest.raises(DtypeError, match="gy: expected float64, set by T, got float32"):
        lookup_backward(np.ones((1, 2, 2), "float32"), ids, T)
    with pytest.raises(TypeError, match="arrays must share one library"):
        lookup_forward(T, LIBRARIES[2].place(ids))
