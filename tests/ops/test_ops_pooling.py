"""Mean, picked rows, rows of length 1, losses of pairs: adjoints, and complex steps where not linear."""

import itertools

import numpy as np
import pytest
from checkers import assert_adjoint, assert_close, by_complex_steps, total
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.ops.pooling import (
    contrastive_backward,
    contrastive_forward,
    cosine_mse_backward,
    cosine_mse_forward,
    mean_pool_backward,
    mean_pool_forward,
    pick_backward,
    pick_forward,
    unit_backward,
    unit_forward,
)

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
few = settings(max_examples=8)
lengths_of = st.lists(st.integers(1, 6), max_size=5)


def bounds(lengths):
    return np.concatenate([[0], np.cumsum(lengths, dtype="int64")]).astype("int64")


@libraries
@few
@given(seed=seeds, lengths=lengths_of, d=st.integers(1, 5))
def test_means_and_their_adjoint(library, seed, lengths, d):
    """(pooling.1) and (pooling.2): linear in h."""
    draw, host, starts = normals(seed, library), library.host, bounds(lengths)
    h, gm = draw(sum(lengths), d), draw(len(lengths), d)
    m, gh = mean_pool_forward(h, library.place(starts)), mean_pool_backward(gm, library.place(starts))
    again = mean_pool_forward(h, tuple(starts.tolist()))  # a tuple of integers, as batches have it
    assert np.array_equal(host(again), host(m))
    assert (m.shape, gh.shape, m.dtype, gh.dtype) == (gm.shape, h.shape, h.dtype, h.dtype)
    parts = [host(h)[a:b].mean(axis=0) for a, b in itertools.pairwise(starts)]
    assert_close("m", host(m), np.reshape(parts, gm.shape), 16 * EPS * np.abs(host(h)).max(initial=0))
    size = total(np.repeat(host(gm) / np.reshape(lengths, (-1, 1)), lengths, axis=0), host(h))
    assert_adjoint(host(gh), host(h), host(gm), host(m), size, "gh")
    if lengths and d > 1 and sum(lengths) > 1:
        with pytest.raises(AssertionError):
            assert_adjoint(host(gh) * 1.001, host(h), host(gm), host(m), size / 1e6, "gh")


@libraries
@few
@given(seed=seeds, N=st.integers(0, 7), d=st.integers(1, 4))
def test_picked_rows_and_their_adjoint(library, seed, N, d):
    """(pooling.3) and (pooling.4): to the bit, whatever the order."""
    rng = np.random.default_rng(seed)
    index = rng.permutation(N)[: rng.integers(0, N + 1)]
    draw, host = normals(seed, library), library.host
    h, g = draw(N, d), draw(len(index), d)
    picked = pick_forward(h, library.place(index))
    assert np.array_equal(host(picked), host(h)[index])
    want = np.zeros((N, d))
    want[index] = host(g)
    gh = pick_backward(g, library.place(index), N)
    assert gh.dtype == g.dtype
    assert np.array_equal(host(gh), want)


@libraries
@few
@given(seed=seeds, S=st.integers(0, 5), d=st.integers(2, 6))
def test_rows_of_length_one_and_their_gradient(library, seed, S, d):
    """(pooling.5) to (pooling.7)."""
    m, gy = normals(seed)(S, d), normals(seed + 1)(S, d)
    y, saved = unit_forward(library.place(m))
    gm = library.host(unit_backward(library.place(gy), saved))
    assert_close("‖y‖", np.sum(library.host(y) ** 2, axis=1), np.ones(S), 8 * EPS)
    want = by_complex_steps(lambda t: np.sum(gy * unit_forward(t)[0]), m)
    bound = 16 * EPS * np.linalg.norm(gy, axis=1) / np.linalg.norm(m, axis=1)
    assert_close("gm", gm, want, bound[:, None])
    assert_close("<gm, m>", np.sum(gm * m, axis=1), np.zeros(S), 16 * EPS * np.linalg.norm(gy, axis=1))
    if S:
        with pytest.raises(AssertionError):
            assert_close("gm", gy / np.linalg.norm(m, axis=1)[:, None], want, bound[:, None])


@libraries
@few
@given(seed=seeds, S=st.integers(1, 5), d=st.integers(1, 4), scale=st.sampled_from([1.0, 20.0]))
def test_losses_of_pairs_and_every_entry_of_their_gradients(library, seed, S, d, scale):
    """(pooling.8) to (pooling.11)."""
    rows = (unit_forward(normals(seed + i)(S, d))[0] for i in (0, 1))
    (y1, y2), scores, n = rows, normals(seed + 2)(S), 11
    at = library.place(y1), library.place(y2)
    loss, saved = contrastive_forward(*at, n=n, scale=scale)
    z = scale * y1 @ y2.T
    want = np.sum(np.log(np.sum(np.exp(z), axis=1)) - np.diag(z)) / n
    assert_close("loss", library.host(loss), want, 64 * EPS * scale)
    found = [library.host(g) for g in contrastive_backward(saved)]
    bound = 64 * EPS * scale * scale * S / n
    steps = (
        by_complex_steps(lambda t: contrastive_forward(t, y2, n=n, scale=scale)[0], y1),
        by_complex_steps(lambda t: contrastive_forward(y1, t, n=n, scale=scale)[0], y2),
    )
    for name, g, step in zip(("gy1", "gy2"), found, steps, strict=True):
        assert_close(name, g, step, bound)
    if S > 1 and d > 1:
        with pytest.raises(AssertionError):
            assert_close("gy1", found[0] / scale * 1.001, steps[0] / scale, bound / 1e3)
    loss, saved = cosine_mse_forward(*at, library.place(scores), n=n)
    assert_close("loss", library.host(loss), np.sum((np.sum(y1 * y2, axis=1) - scores) ** 2) / n, 64 * EPS)
    found = [library.host(g) for g in cosine_mse_backward(saved)]
    size = 32 * EPS * (1 + np.abs(scores[:, None])) / n
    assert_close(
        "gy1", found[0], by_complex_steps(lambda t: cosine_mse_forward(t, y2, scores, n=n)[0], y1), size
    )
    assert_close(
        "gy2", found[1], by_complex_steps(lambda t: cosine_mse_forward(y1, t, scores, n=n)[0], y2), size
    )


@libraries
def test_no_pairs_cost_nothing(library):
    """A rank's share of a step may be empty."""
    y = library.place(np.ones((0, 3)))
    loss, saved = contrastive_forward(y, y, n=4)
    assert float(library.host(loss)) == 0
    assert [g.shape for g in contrastive_backward(saved)] == [(0, 3), (0, 3)]
    loss, saved = cosine_mse_forward(y, y, y[:, 0], n=4)
    assert float(library.host(loss)) == 0
    assert [g.shape for g in cosine_mse_backward(saved)] == [(0, 3), (0, 3)]


def test_what_does_not_fit_is_refused():
    h = np.ones((5, 2))
    with pytest.raises(
        ShapeError, match=r"^starts: expected 0, then rising bounds up to N=5 set by the rows, got 0, 4$"
    ):
        mean_pool_forward(h, np.array([0, 4]))
    with pytest.raises(ShapeError, match=r"^gm: expected \(S, d\) with S=2 set by starts, got \(5, 2\)$"):
        mean_pool_backward(h, np.array([0, 2, 5]))
    with pytest.raises(DtypeError, match=r"^starts: expected integers, got \(0, 2.5\)$"):
        mean_pool_forward(h, (0, 2.5))
    with pytest.raises(DtypeError, match=r"^index: expected integers, got float64$"):
        pick_forward(h, np.ones(2))
    with pytest.raises(ShapeError, match=r"^index: expected one axis, got \(1, 1\)$"):
        pick_forward(h, np.ones((1, 1), int))
    for index in ([5], [-1], [1, 1]):
        with pytest.raises(ShapeError, match=r"^index: expected distinct rows from 0 to 4, got"):
            pick_forward(h, np.array(index))
    with pytest.raises(ShapeError, match=r"^index: expected \(S,\) with S=5 set by g, got \(2,\)$"):
        pick_backward(h, np.array([0, 1]), 9)
    with pytest.raises(ConfigError, match=r"^n: expected"):
        contrastive_forward(h, h, n=0)
    with pytest.raises(ShapeError, match=r"^y2: expected"):
        contrastive_forward(h, h[:3], n=5)
