"""Cross entropy, whole and by chunks, spans, squares: every gradient by a complex step, and sums over parts."""

import numpy as np
import pytest
from checkers import assert_close, by_complex_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.ops.loss import (
    bce_backward,
    bce_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    head_cross_entropy,
    mse_backward,
    mse_forward,
)
from lorax_np.ops.span import count_spans, span_backward, span_forward
from lorax_np.ops.targets import count_kept

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
few = settings(max_examples=8)
shares = st.sampled_from([0.0, 0.1, 0.37])


def labels_of(seed, N, V, share=0.6):
    """Labels of which some are ignored, at least one kept where there is a row."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(N) < share, rng.integers(0, V, N), -100)
    if N:
        labels[rng.integers(N)] = rng.integers(V)
    return labels


def by_loop(z, labels, n, smoothing):
    """The definition, row by row."""
    total = 0.0
    for row, y in zip(z, labels, strict=True):
        if y != -100:
            logs = row - row.max() - np.log(np.sum(np.exp(row - row.max())))
            q = np.full(len(row), smoothing / len(row))
            q[y] += 1 - smoothing
            total -= float(np.sum(q * logs))
    return total / n


@libraries
@few
@given(seed=seeds, N=st.integers(0, 6), V=st.integers(1, 7), smoothing=shares)
def test_cross_entropy_and_every_entry_of_its_gradient(library, seed, N, V, smoothing):
    """(loss.1) to (loss.6)."""
    z, labels, n = 3 * normals(seed)(N, V), labels_of(seed, N, V), 17
    at = library.place(z)
    loss, saved = cross_entropy_forward(at, library.place(labels), n=n, smoothing=smoothing)
    gz = cross_entropy_backward(saved)
    assert (loss.shape, gz.shape, loss.dtype, gz.dtype) == ((), (N, V), at.dtype, at.dtype)
    size = (np.abs(z).max(initial=1) + np.log(V) + 1) * max(N, 1) / n
    assert_close("loss", library.host(loss), by_loop(z, labels, n, smoothing), 64 * EPS * size)
    want = by_complex_steps(
        lambda t: library.host(
            cross_entropy_forward(library.place(t), library.place(labels), n=n, smoothing=smoothing)[0]
        ),
        z,
    )
    # exp(z − L) carries the error of z − L, at most 2·max|z| + log V in size
    bound = (8 + 4 * np.abs(z).max(initial=1) + np.log(V)) * EPS / n
    assert_close("gz", library.host(gz), want, bound)
    assert not library.host(gz)[labels == -100].any()
    assert_close("Σ gz", library.host(gz).sum(axis=1), 0 * labels, bound * V)


@few
@given(seed=seeds, V=st.integers(2, 6), smoothing=shares)
def test_the_checker_refuses_wrong_gradients(seed, V, smoothing):
    """Without the ignored rows' zeros, without 1/n, without the spread share, 0.1 % too large: each is seen."""
    z, labels, n = normals(seed)(5, V), np.array([0, -100, 1, -100, 1]), 3
    _, saved = cross_entropy_forward(z, labels, n=n, smoothing=smoothing)
    right = cross_entropy_backward(saved)
    want = by_complex_steps(lambda t: cross_entropy_forward(t, labels, n=n, smoothing=smoothing)[0], z)
    wrong = [
        cross_entropy_backward(saved._replace(kept=np.ones(5, bool))),
        cross_entropy_backward(saved._replace(n=1)),
        cross_entropy_backward(saved._replace(smoothing=smoothing + 0.01)),
        cross_entropy_backward(saved._replace(y=(saved.y + 1) % V)),
        right * 1.001,
    ]
    assert_close("gz", right, want, 64 * EPS)
    for planted in wrong:
        with pytest.raises(AssertionError):
            assert_close("gz", planted, want, 64 * EPS)


@libraries
@few
@given(
    seed=seeds,
    N=st.integers(0, 9),
    d=st.integers(1, 4),
    V=st.integers(1, 7),
    rows=st.integers(1, 5),
    block=st.sampled_from([None, 1, 2, 3]),
    smoothing=shares,
    scale=st.sampled_from([1.0, 0.3]),
)
def test_the_chunked_head_is_the_head_and_then_the_loss(library, seed, N, d, V, rows, block, smoothing, scale):
    """(loss.7) to (loss.10), for every size of chunk and block, and inputs that may not be written to."""
    draw = normals(seed)
    h, E, labels, n = draw(N, d), draw(V, d), labels_of(seed, N, V), 11
    at = [library.place(value) for value in (h, E, labels)]
    loss, gh, gE = head_cross_entropy(
        *at, n=n, rows=rows, block=block, smoothing=smoothing, need_gE=True, scale=scale
    )
    assert (loss.shape, gh.shape, gE.shape, gh.dtype) == ((), (N, d), (V, d), at[0].dtype)
    z = scale * h @ E.T
    want, saved = cross_entropy_forward(z, labels, n=n, smoothing=smoothing)
    gz = cross_entropy_backward(saved)
    size = 4 + 4 * np.abs(z).max(initial=1)
    assert_close("loss", library.host(loss), want, 16 * EPS * size * max(N, 1) / n)
    G = np.abs(gz) + size * EPS / n
    bound = 32 * size * EPS
    assert_close("gh", library.host(gh), scale * gz @ E, bound * (scale * G @ np.abs(E) + d / n))
    assert_close("gE", library.host(gE), scale * gz.T @ h, bound * (scale * G.T @ np.abs(h) + d / n))
    assert not library.host(gh)[labels == -100].any()
    without = head_cross_entropy(*at, n=n, rows=rows, block=block, smoothing=smoothing, scale=scale)
    assert without[2] is None
    assert np.array_equal(library.host(without[1]), library.host(gh))


def test_the_head_multiplies_labelled_rows_only_and_never_all_at_once():
    """Rows without a label may hold anything; no product has more rows than asked for."""
    seen = []

    class Watched(np.ndarray):
        def __matmul__(self, other):
            seen.append(self.shape)
            return np.asarray(self) @ np.asarray(other)

    h, E = normals(1)(40, 3).copy(), normals(2)(5, 3)
    labels = np.where(np.arange(40) % 3 == 0, 2, -100)
    h[labels == -100] = np.nan
    loss, gh, _ = head_cross_entropy(h.view(Watched), E, labels, n=14, rows=4)
    assert np.isfinite(loss)
    assert np.isfinite(gh).all()
    assert [shape[0] for shape in seen] == [4, 4, 4, 2]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parts_of_a_step_add_up_whatever_the_parts(dtype):
    """Eight sequences of unequal length as 1 × 8, 2 × 4 and 8 × 1: one n, gradients added; means of means are
    another loss."""
    draw = normals(5, dtype=dtype)
    lengths = np.array([3, 9, 1, 14, 2, 6, 11, 5])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    h, E, labels = draw(51, 7), draw(23, 7), labels_of(5, 51, 23)
    n = count_kept(labels)
    whole = head_cross_entropy(h, E, labels, n=n, need_gE=True, smoothing=0.1)
    eps = np.finfo(dtype).eps
    means = 0.0
    for parts in (2, 4, 8):
        loss, gE, gh, means = 0.0, 0.0, [], 0.0
        for part in np.array_split(np.arange(8), parts):
            rows = slice(bounds[part[0]], bounds[part[-1] + 1])
            one = head_cross_entropy(h[rows], E, labels[rows], n=n, need_gE=True, smoothing=0.1)
            loss, gE, gh = loss + one[0], gE + one[2], [*gh, one[1]]
            kept = count_kept(labels[rows])
            means += float(one[0]) * n / kept / parts if kept else 0.0
        assert_close("loss", loss, whole[0], 8 * eps * abs(whole[0]))
        assert_close("gh", np.concatenate(gh), whole[1], 8 * eps * np.abs(whole[1]).max())
        assert_close("gE", gE, whole[2], 8 * eps * np.abs(whole[2]).max())
    assert abs(means - float(whole[0])) > 0.02 * abs(means)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_logits_neither_overflow_nor_lose_the_loss(dtype):
    z = np.array([[3e4, 0.0, 3e4], [-1e4, -1e4, -3e4]], dtype)
    loss, saved = cross_entropy_forward(z, np.array([0, 1]), n=2)
    assert_close("loss", loss, np.log(2.0), 2.0**-8 if dtype == "float32" else 2.0**-36)
    assert np.isfinite(cross_entropy_backward(saved)).all()
    loss, saved = bce_forward(z, (z > 0).astype(dtype), n=6)
    assert_close("loss", loss, np.log(2.0) / 6, 4 * np.finfo(dtype).eps)
    assert np.isfinite(bce_backward(saved)).all()


# ---- spans -------------------------------------------------------------------------------------------------


@libraries
@few
@given(seed=seeds, lengths=st.lists(st.integers(1, 5), max_size=4))
def test_spans_and_every_entry_of_their_gradient(library, seed, lengths):
    """(loss.11) to (loss.13): a softmax over the rows of each sequence, in each column."""
    rng = np.random.default_rng(seed)
    starts, N = np.concatenate([[0], np.cumsum(lengths, dtype=int)]).astype("int64"), sum(lengths)
    spans = rng.integers(0, 7, (len(lengths), 2))
    spans[rng.random(spans.shape) < 0.2] = -100
    z, n = normals(seed)(N, 2), 9
    loss, saved = span_forward(library.place(z), library.place(starts), library.place(spans), n=n)
    gz = library.host(span_backward(saved))
    want, kept = 0.0, 0
    for s, T in enumerate(lengths):
        block = z[starts[s] : starts[s + 1]]
        for c in (0, 1):
            if 0 <= spans[s, c] < T:
                want += np.log(np.sum(np.exp(block[:, c]))) - block[spans[s, c], c]
                kept += 1
    assert_close("loss", library.host(loss), want / n, 64 * EPS)
    assert count_spans(spans, starts) == kept
    step = by_complex_steps(lambda t: span_forward(t, starts, spans, n=n)[0], z)
    assert_close("gz", gz, step, 64 * EPS / n)
    if kept:
        planted = library.host(span_backward(saved._replace(hit=saved.hit & ~saved.hit)))
        with pytest.raises(AssertionError):
            assert_close("gz", planted, step, 64 * EPS / n)


# ---- numbers as labels -------------------------------------------------------------------------------------


@libraries
@few
@given(seed=seeds, lead=st.sampled_from([(1,), (0,), (4,), (3, 2)]))
def test_squares_and_sigmoids_and_their_gradients(library, seed, lead):
    """(loss.14) to (loss.17)."""
    draw = normals(seed)
    z, y, n = 3 * draw(*lead), draw(*lead), 7
    y01 = 1 / (1 + np.exp(-y))
    for forward, backward, at, want in (
        (mse_forward, mse_backward, y, np.sum((z - y) ** 2) / n),
        (bce_forward, bce_backward, y01, np.sum(np.log(1 + np.exp(z)) - z * y01) / n),
    ):
        loss, saved = forward(library.place(z), library.place(at), n=n)
        assert_close("loss", library.host(loss), want, 256 * EPS)
        gz = library.host(backward(saved))
        step = by_complex_steps(lambda t, f=forward, at=at: f(t, at, n=n)[0], z)
        bound = 16 * EPS * (np.abs(z) + np.abs(at) + 1)
        assert_close("gz", gz, step, bound)
        if z.size:
            with pytest.raises(AssertionError):
                assert_close("gz", gz * 1.001, step, bound)


def test_numbers_of_numpy_widen_nothing():
    """n, scale and smoothing as NumPy's own numbers: float32 stays float32, and every bit the same."""
    draw, labels = normals(4, dtype="float32"), np.array([0, -100, 3])
    h, E = draw(3, 2), draw(4, 2)
    one = head_cross_entropy(h, E, labels, n=3, scale=0.3, smoothing=0.1, need_gE=True)
    other = head_cross_entropy(
        h, E, labels, n=np.int64(3), scale=np.float64(0.3), smoothing=np.float64(0.1), need_gE=True
    )
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype == np.float32
        assert a.tobytes() == b.tobytes()
    loss, saved = span_forward(h, (0, 2, 3), np.array([[1, 0], [0, 0]]), n=np.int64(4))
    assert loss.dtype == span_backward(saved).dtype == np.float32
    for forward, backward in ((mse_forward, mse_backward), (bce_forward, bce_backward)):
        loss, saved = forward(h, 1 / (1 + h * h), n=np.int64(6))
        assert loss.dtype == backward(saved).dtype == np.float32


def test_the_chunked_loss_takes_a_complex_step():
    """Along h and along E, against the gradients that come with it."""
    h, E, labels = normals(1)(5, 3), normals(2)(4, 3), np.array([1, -100, 3, 0, 0])
    how = {"n": 4, "rows": 2, "smoothing": 0.1, "scale": 0.7}
    _, gh, gE = head_cross_entropy(h, E, labels, need_gE=True, **how)
    assert_close("gh", gh, by_complex_steps(lambda t: head_cross_entropy(t, E, labels, **how)[0], h), 64 * EPS)
    assert_close("gE", gE, by_complex_steps(lambda t: head_cross_entropy(h, t, labels, **how)[0], E), 64 * EPS)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_what_has_no_meaning_is_refused():
    z, labels = np.ones((3, 4)), np.array([0, 3, -100])
    for n in (0, -1, True, 2.0, None):
        with pytest.raises(
            ConfigError, match=r"^n: expected the number of labels of the whole step, at least 1, got"
        ):
            cross_entropy_forward(z, labels, n=n)
    with pytest.raises(ConfigError, match=r"^labels: expected 0 to 3 or −100, got 4 in row 1$"):
        cross_entropy_forward(z, np.array([0, 4, -100]), n=2)
    with pytest.raises(ConfigError, match=r"^labels: expected 0 to 3 or −100, got -1 in row 2$"):
        head_cross_entropy(z, np.ones((4, 4)), np.array([0, 3, -1]), n=2)
    for wrapped in (2**64 - 100, 2**64 - 1, 2**63):  # as int64 the first is −100
        for refused in (
            lambda y: cross_entropy_forward(z, y, n=2),
            lambda y: head_cross_entropy(z, np.ones((4, 4)), y, n=2),
        ):
            with pytest.raises(
                ConfigError, match=rf"^labels: expected 0 to 3 or −100, got {wrapped} in row 1$"
            ):
                refused(np.array([0, wrapped, 3], "uint64"))
    small = cross_entropy_forward(z, np.array([0, 3, 1], "uint8"), n=3)[0]
    assert small == cross_entropy_forward(z, np.array([0, 3, 1]), n=3)[0]
    with pytest.raises(ShapeError, match=r"^labels: expected \(N,\) with N=3 set by the rows, got \(2,\)$"):
        cross_entropy_forward(z, labels[:2], n=2)
    with pytest.raises(DtypeError, match=r"^labels: expected integers, got float64$"):
        cross_entropy_forward(z, labels.astype(float), n=2)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"^smoothing: expected 0 ≤ smoothing < 1, got"):
            cross_entropy_forward(z, labels, n=2, smoothing=share)
    with pytest.raises(ShapeError, match=r"^z: expected two axes, got \(4,\)$"):
        cross_entropy_forward(z[0], labels[:1], n=2)
    with pytest.raises(ConfigError, match=r"^rows, block: expected at least 1 each, got 0 and 4$"):
        head_cross_entropy(z, np.ones((4, 4)), labels, n=2, rows=0)
    with pytest.raises(ConfigError, match=r"^spans: expected rows from 0, or −100 for none, got"):
        span_forward(np.ones((3, 2)), np.array([0, 3]), np.array([[-1, 0]]), n=1)
    past = np.array([[2**64 - 100, 0]], "uint64")  # is past the end, as 3 is
    assert count_spans(past, np.array([0, 3])) == 1
    with pytest.raises(ShapeError, match=r"^spans: expected"):
        span_forward(np.ones((3, 2)), np.array([0, 3]), np.array([[1, 0], [0, 0]]), n=1)
    for starts in ([0, 2], [1, 3], [0, 2, 2, 3], []):
        with pytest.raises(ShapeError, match=r"^starts: expected"):
            span_forward(np.ones((3, 2)), np.array(starts, "int64"), np.array([[1, 0]]), n=1)
    shares = np.array([[0.0, 0.3], [1.0, 0.7]])
    for wrong in (1.0000001, -1e-9, np.nan, np.inf):
        y = shares.copy()
        y[1, 0] = wrong
        with pytest.raises(ConfigError, match=rf"^y: expected labels from 0 to 1, got {wrong} in row 1$"):
            bce_forward(np.ones((2, 2)), y, n=4)
    with pytest.raises(ConfigError, match=r"^y: expected labels from 0 to 1, got 2.0 in row 0$"):
        bce_forward(np.ones(()), np.array(2.0), n=1)
    with pytest.raises(DtypeError, match=r"^y: expected float64, set by z, got float32$"):
        mse_forward(np.ones(2), np.ones(2, "float32"), n=1)
    with pytest.raises(ShapeError, match=r"^y: expected"):
        mse_forward(np.ones(2), np.ones(3), n=1)
