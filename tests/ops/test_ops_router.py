"""Routers: which experts, their weights, and the gradient by every logit by a complex step."""

import numpy as np
import pytest
from checkers import assert_close, by_complex_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

from lorax_np.errors import ConfigError
from lorax_np.ops.router import (
    softmax_topk_backward,
    softmax_topk_forward,
    topk_sigmoid_backward,
    topk_sigmoid_forward,
    topk_softmax_backward,
    topk_softmax_forward,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
few = settings(max_examples=8)


@libraries
@few
@given(seed=seeds, N=st.integers(0, 4), E=st.integers(1, 6), data=st.data())
def test_softmax_of_the_largest(library, seed, N, E, data):
    """(router.1) to (router.3) and (router.8)."""
    k = data.draw(st.integers(1, E))
    z, gw = normals(seed)(N, E), normals(seed + 1)(N, k)
    ids, w, saved = topk_softmax_forward(library.place(z), k)
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    assert np.array_equal(library.host(ids), order)
    e = np.exp(np.take_along_axis(z, order, axis=1))
    assert_close("w", library.host(w), e / e.sum(axis=1, keepdims=True), 16 * EPS)
    gz = library.host(topk_softmax_backward(library.place(gw), saved))
    assert gz.shape == (N, E)
    step = by_complex_steps(lambda t: np.sum(gw * topk_softmax_forward(t, k)[1]), z)
    bound = 16 * EPS * np.abs(gw).sum(axis=1, keepdims=True)
    assert_close("gz", gz, step, bound)
    off = np.ones((N, E), bool)
    np.put_along_axis(off, order, False, axis=1)
    assert not gz[off].any()
    if N and k > 1:
        with pytest.raises(AssertionError):
            assert_close("gz", gz * 1.001, step, bound)


@libraries
@few
@given(
    seed=seeds,
    N=st.integers(0, 4),
    E=st.integers(1, 6),
    scale=st.sampled_from([1.0, 2.5]),
    biased=st.booleans(),
    data=st.data(),
)
def test_shares_of_sigmoids(library, seed, N, E, scale, biased, data):
    """(router.4) to (router.7): the bias chooses, and is in no weight."""
    k = data.draw(st.integers(1, E))
    z, gw, bias = normals(seed)(N, E), normals(seed + 1)(N, k), normals(seed + 2)(E)
    given_bias = library.place(bias) if biased else None
    ids, w, saved = topk_sigmoid_forward(library.place(z), k, bias=given_bias, scale=scale)
    s = 1 / (1 + np.exp(-z))
    order = np.argsort(-(s + bias * biased), axis=1, kind="stable")[:, :k]
    assert np.array_equal(library.host(ids), order)
    kept = np.take_along_axis(s, order, axis=1)
    assert_close("w", library.host(w), scale * kept / kept.sum(axis=1, keepdims=True), 16 * EPS * scale)
    gz = library.host(topk_sigmoid_backward(library.place(gw), saved))
    step = by_complex_steps(
        lambda t: np.sum(gw * topk_sigmoid_forward(t, k, bias=bias if biased else None, scale=scale)[1]), z
    )
    bound = 32 * EPS * scale * np.abs(gw).sum(axis=1, keepdims=True)
    assert_close("gz", gz, step, bound)
    if N and k > 1:
        with pytest.raises(AssertionError):
            assert_close("gz", gz * 1.001, step, bound)
        with pytest.raises(AssertionError):  # the sum taken for a constant
            assert_close("gz", np.where(gz != 0, gz + gz.mean() + 1e-3, gz), step, bound)


@libraries
@few
@given(seed=seeds, N=st.integers(0, 4), E=st.integers(1, 6), data=st.data())
def test_the_largest_of_a_softmax(library, seed, N, E, data):
    """(router.9) and (router.10): the gradient reaches the logits that were not chosen, too."""
    k = data.draw(st.integers(1, E))
    z, gw = normals(seed)(N, E), normals(seed + 1)(N, k)
    ids, w, saved = softmax_topk_forward(library.place(z), k)
    order = np.argsort(-z, axis=1, kind="stable")[:, :k]
    P = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert np.array_equal(library.host(ids), order)
    assert_close("w", library.host(w), np.take_along_axis(P, order, axis=1), 16 * EPS)
    gz = library.host(softmax_topk_backward(library.place(gw), saved))
    step = by_complex_steps(lambda t: np.sum(gw * softmax_topk_forward(t, k)[1]), z)
    bound = 16 * EPS * np.abs(gw).sum(axis=1, keepdims=True)
    assert_close("gz", gz, step, bound)
    if N and k < E:
        with pytest.raises(AssertionError):  # zero off the kept, which is another router's
            assert_close("gz", library.host(topk_softmax_backward(library.place(gw), saved)), step, bound)


@libraries
@few
@given(seed=seeds, N=st.integers(1, 4), groups=st.integers(1, 4), size=st.integers(1, 4), data=st.data())
def test_experts_are_chosen_from_the_best_groups(library, seed, N, groups, size, data):
    """(router.11): by the sum of the two best of each group, bias included."""
    keep = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, keep * size))
    z, bias = normals(seed)(N, groups * size), normals(seed + 1)(groups * size)
    ids, _, _ = topk_sigmoid_forward(
        library.place(z), k, bias=library.place(bias), groups=groups, keep_groups=keep
    )
    for row, got in zip(1 / (1 + np.exp(-z)) + bias, library.host(ids), strict=True):
        sums = np.sort(row.reshape(groups, size), axis=1)[:, -2:].sum(axis=1)
        best = np.argsort(-sums, kind="stable")[:keep]
        allowed = [e for e in range(groups * size) if e // size in best]
        assert got.tolist() == sorted(allowed, key=lambda e, row=row: -row[e])[:k]


@libraries
def test_of_equal_logits_the_lowest_index_goes_first(library):
    z = library.place(np.array([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5]))
    ids, w, _ = topk_softmax_forward(z, 4)
    assert library.host(ids).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert np.array_equal(library.host(w)[1], np.full(4, 0.25))
    ids, w, _ = topk_sigmoid_forward(z, 4)
    assert library.host(ids).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_logits_do_not_overflow(dtype):
    z = np.array([[-500.0, 900.0, 899.0], [-900.0, -901.0, -950.0]], dtype)
    _, w, saved = topk_softmax_forward(z, 2)
    assert_close("w", w, np.full((2, 2), 1) * [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], 1e-6)
    assert w.dtype == topk_softmax_backward(w, saved).dtype == dtype


def test_what_has_no_meaning_is_refused():
    for k in (0, 4):
        with pytest.raises(ConfigError, match=rf"^k: expected 1 to 3, the number of experts, got {k}$"):
            topk_softmax_forward(np.ones((2, 3)), k)
    _, w, saved = topk_softmax_forward(np.ones((2, 3)), 2)
    with pytest.raises(ConfigError, match=r"^saved: expected topk_sigmoid_forward's, got"):
        topk_sigmoid_backward(w, saved)
    with pytest.raises(ConfigError, match=r"^saved: expected softmax_topk_forward's, got"):
        softmax_topk_backward(w, saved)
    for groups, keep, k in ((2, 1, 2), (3, 4, 2), (3, 1, 3), (0, 0, 1)):
        with pytest.raises(ConfigError, match=r"^groups: expected a divisor of [56] experts, and"):
            topk_sigmoid_forward(np.ones((2, 6 if groups == 3 else 5)), k, groups=groups, keep_groups=keep)
