"""The r largest singular triples without the others, beside the SVD of all: bounds derived in specs/init.md."""

from math import e, pi, sqrt

import numpy as np
import pytest

from lorax_np import singular
from lorax_np.config import LoraConfig
from lorax_np.init import init_adapter
from lorax_np.params import Linear
from lorax_np.singular import SPARE, Triples, largest, sketched

EPS = 2.0**-52
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def spectrum(m, n, S, seed=0):
    """A float64 matrix (m, n) with the singular values S, then zeros, by eight reflections on either side."""
    rng, W = np.random.default_rng(seed), np.zeros((m, n))
    W[: len(S), : len(S)] = np.diag(S)
    for _ in range(8):
        u, v = (w / np.linalg.norm(w) for w in (rng.standard_normal(m), rng.standard_normal(n)))
        W -= 2 * np.outer(u, u @ W)
        W -= 2 * np.outer(W @ v, v)
    return W


def faults(W, r, found):
    """What is wrong with triples of W. They are to be the r largest of W + E, ‖E‖ ≤ √r·(init.18).

    By Weyl each value is off by ‖E‖ at most, and by what the SVD beside it is, m·2⁻⁵²·S[1] each way; the update
    U S Vh is off the best one of W by ‖E‖ twice, in the norm that tells how far W is from it.
    """
    power = int(np.frexp(np.abs(W).max())[1])
    wide = np.ldexp(W.astype("float64"), -power)
    U, S, Vh = (
        found.U.astype("float64"),
        np.ldexp(found.S.astype("float64"), -power),
        found.Vh.astype("float64"),
    )
    want, m = np.linalg.svd(wide, compute_uv=False), max(W.shape)
    slack = 2 * m * EPS * want[0]
    away = sqrt(r) * max(UNIT[W.dtype.name] * want[r - 1], m * EPS * want[0]) + slack
    after = want[r] if r < len(want) else 0.0
    checks = {
        "shape": U.shape == (len(W), r) and S.shape == (r,) and Vh.shape == (r, W.shape[1]),
        "order": (np.diff(S) <= 0).all() and (S >= 0).all(),
        "values": np.abs(S - want[:r]).max() <= away,
        "orthonormal": max(np.abs(Q.T @ Q - np.eye(r)).max() for Q in (U, Vh.T)) <= 2 * m * EPS,
        "pairs": max(np.linalg.norm(wide @ Vh.T - U * S, 2), np.linalg.norm(wide.T @ U - Vh.T * S, 2)) <= away,
        "best": np.linalg.norm(wide - (U * S) @ Vh, 2) <= after + 2 * away,
    }
    return [name for name, right in checks.items() if not right]


N = 300  # above 2·6·(r + 16) for r = 2
i = np.arange(1.0, N + 1)
SPECTRA = {
    "i^-1": 1 / i,
    "i^-1/2": i**-0.5,
    "a thousandfold outlier": np.r_[1e3, i[1:] ** -0.5],
    "0.7^i": 0.7**i,
    "down to 1e-300": 10.0 ** -np.minimum(2 * i, 300),
    "all equal": np.ones(N),
    "forty equal": np.r_[np.ones(40), np.full(N - 40, 0.5)],
    "the r-th and next apart by 1e-9": np.r_[1, 0.5, 0.5 * (1 - 1e-9), 0.5 * (1 - 2e-9), np.full(N - 4, 0.1)],
    "the r-th and next equal": np.r_[1, 0.5, 0.5, np.full(N - 3, 0.1)],
    "rank 1": np.r_[3.0, np.zeros(N - 1)],
    "rank r": np.r_[3.0, 2.0, np.zeros(N - 2)],
}


@pytest.fixture
def searched(monkeypatch):
    """How often the search was asked, and how often it found."""
    asked, real = [], singular._searched

    def watched(*how):
        asked.append(real(*how))
        return asked[-1]

    monkeypatch.setattr(singular, "_searched", watched)
    return asked


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((N, N), "float32"), ((N, N), "float64"), ((N + 50, N), "float64"), ((N, N + 50), "float64")],
    ids=["float32", "square", "tall", "wide"],
)
@pytest.mark.parametrize("name", SPECTRA)
def test_the_largest_triples_are_those_of_the_svd(name, shape, dtype, searched):
    """(init.16) to (init.18), found by search and not by the SVD of all."""
    W = spectrum(*shape, SPECTRA[name]).astype(dtype)
    before = W.copy()
    assert faults(W, 2, largest(W, 2)) == []
    assert searched[0] is not None
    assert np.array_equal(W, before)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("order", ["C", "F"])
def test_normals_whose_values_fall_slowest(order, dtype, searched):
    """A weight as it is before training: the 18 largest of 600 lie within 7 % of one another.

    To 2⁻²⁴ the search comes in time; 2⁻⁵³ it leaves to the SVD.
    """
    W = np.asarray(np.random.default_rng(1).standard_normal((600, 600)), dtype, order)
    assert faults(W, 2, largest(W, 2)) == []
    assert (searched[0] is not None) == (dtype == "float32")


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 1e-30), ("float32", 1e30), ("float64", 1e-300), ("float64", 1e300)]
)
def test_squares_beyond_the_range_do_not_matter(dtype, scale, searched):
    W = (scale * spectrum(N, N, SPECTRA["i^-1/2"])).astype(dtype)
    with np.errstate(over="raise", invalid="raise"):
        found = largest(W, 2)
    assert faults(W, 2, found) == []
    assert searched[0] is not None


def test_a_weight_of_zeros_has_values_of_zero():
    found = largest(np.zeros((N, N)), 2)
    assert not found.S.any()
    assert all(np.abs(Q.T @ Q - np.eye(2)).max() < 1e-13 for Q in (found.U, found.Vh.T))


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(
    ("shape", "r"), [((N, N), 10), ((40, 50), 40), ((50, 40), 40), ((1, 9), 1), ((215, 215), 2)]
)
def test_small_weights_and_large_ranks_are_the_svd_to_the_bit(shape, r, dtype, searched):
    W = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    found = largest(W, r)
    assert searched == []
    for got, want in zip(found, (U[:, :r], S[:r], Vh[:r]), strict=True):
        assert np.array_equal(got, want)


def test_values_too_close_to_one_another_are_left_to_the_svd(searched):
    """(init.19): 1 − (i/300)⁴: the first eighteen lie within 2e-5 of one another, the others reach to 0."""
    W = spectrum(N, N, 1 - (i / N) ** 4)
    found = largest(W, 2)
    assert searched == [None]
    assert np.array_equal(found.S, np.linalg.svd(W)[1][:2])
    assert faults(W, 2, found) == []


def test_one_weight_gives_one_answer():
    """No state between calls: the columns that the search starts from are the same ones each time."""
    W = spectrum(N, N, SPECTRA["i^-1/2"])
    one, _, again = largest(W, 2), largest(W[::-1], 2), largest(W, 2)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))


def test_the_start_sees_every_direction():
    """(init.21): the chance that a singular direction is all but absent from 18 random columns, counted.

    Of 2·10⁴ draws none may be below 0.05, where the bound allows 10⁻²⁰ of them; and no more than it allows.
    """
    r, c = 2, 2 + SPARE
    draws = np.random.default_rng(0).standard_normal((20_000, r, c))
    least = np.linalg.svd(draws, compute_uv=False)[:, -1]

    def chance(eps):
        return (e * sqrt(c) * eps / (SPARE + 1)) ** (SPARE + 1) / sqrt(2 * pi * (SPARE + 1))

    assert chance(0.05) < 1e-20
    assert least.min() > 0.05
    for eps in (1.0, 1.2, 1.4):
        assert (least <= eps).mean() <= min(1.0, chance(eps)) + 5 / sqrt(len(least))
    assert chance(2.0**-26) < 1e-120


# ---- faults planted ------------------------------------------------------------------------------------------


def next_for_first(U, S, Vh):
    return U[:, 1:3], S[1:3], Vh[1:3]


def last_for_largest(U, S, Vh):
    return U[:, -2:], S[-2:], Vh[-2:]


WRONG = {
    "the largest missed": next_for_first,
    "the r-th missed": lambda U, S, Vh: (U[:, [0, 2]], S[[0, 2]], Vh[[0, 2]]),
    "the smallest": last_for_largest,
    "a value off by 1e-6": lambda U, S, Vh: (U[:, :2], S[:2] * (1 + 1e-6), Vh[:2]),
    "a vector turned by 1e-6": lambda U, S, Vh: (U[:, :2] + 1e-6 * U[:, 2:4], S[:2], Vh[:2]),
    "one vector twice": lambda U, S, Vh: (U[:, [0, 0]], S[[0, 0]], Vh[[0, 0]]),
}


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_triples_are_refused(wrong, dtype):
    """The check itself: on the spectrum that falls slowest here."""
    W = np.random.default_rng(1).standard_normal((N, N)).astype(dtype)
    U, S, Vh = np.linalg.svd(W.astype("float64"))
    assert faults(W, 2, Triples(U[:, :2], S[:2], Vh[:2])) == []
    assert faults(W, 2, Triples(*WRONG[wrong](U, S, Vh)))


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("worst", [1.0, 1e-3, 1e-7, 1e-12, 0.0])
def test_a_basis_is_orthonormal_whatever_it_is_of(dtype, worst):
    """(init.22), and QR where the columns lie too close or one is 0; the span is that of Y while Y has one."""
    rng = np.random.default_rng(2)
    Y = (np.linalg.qr(rng.standard_normal((50, 6)))[0] * np.geomspace(1.0, worst or 1e-9, 6)) @ np.tri(6)
    Y[:, 2] *= worst > 0
    Y = Y.astype(dtype)
    Q = singular._basis(Y).astype("float64")
    assert np.abs(Q.T @ Q - np.eye(6)).max() <= 8 * 50 * UNIT[dtype]
    off = np.linalg.norm(Y - Q @ (Q.T @ Y), 2)
    assert off <= 8 * 50 * UNIT[dtype] * np.linalg.norm(Y.astype("float64"), 2)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200, 1e300])
def test_a_basis_of_numbers_whose_squares_are_out_of_range(size):
    """QR stands in, and nothing is warned of, which here would be an error."""
    Y = np.random.default_rng(2).standard_normal((50, 6))
    Q = singular._basis(size * Y)
    assert np.abs(Q.T @ Q - np.eye(6)).max() <= 8 * 50 * 2.0**-53
    assert np.linalg.norm(Y - Q @ (Q.T @ Y), 2) <= 8 * 50 * 2.0**-53 * np.linalg.norm(Y, 2)


def test_one_cholesky_alone_would_be_seen(monkeypatch):
    """At a condition of 1e6 the first leaves 1e-4, which the second takes away."""
    Y = np.linalg.qr(np.random.default_rng(2).standard_normal((50, 6)))[0] * np.geomspace(1.0, 1e-6, 6)
    Y = Y @ np.linalg.qr(np.random.default_rng(3).standard_normal((6, 6)))[0]
    once = Y @ np.linalg.inv(np.linalg.cholesky(Y.T @ Y)).T
    assert np.abs(once.T @ once - np.eye(6)).max() > 1e-8
    monkeypatch.setattr(np.linalg, "qr", None)
    Q = singular._basis(Y)
    assert np.abs(Q.T @ Q - np.eye(6)).max() <= 8 * 50 * 2.0**-53


def test_a_sketch_and_a_search_that_is_not_asked_for_its_residual_are_refused(monkeypatch):
    """(init.18) planted as always met: what the first basis holds of normals is not exact, and that is seen."""
    W = np.random.default_rng(1).standard_normal((N, N))
    assert faults(W, 2, sketched(W, 2, 4, np.random.default_rng(0)))
    right = largest(W, 2)
    monkeypatch.setattr(np.linalg, "norm", lambda values, **how: np.zeros(1))
    wrong = largest(W, 2)
    monkeypatch.undo()
    assert faults(W, 2, right) == []
    assert "pairs" in faults(W, 2, wrong)


def test_a_basis_that_repeats_itself_is_not_believed(monkeypatch):
    """Orthonormalised once, the basis of a weight of rank 1 holds directions twice; the SVD answers then."""
    plain = np.linalg.qr
    monkeypatch.setattr(singular, "_orthonormal", lambda Q, P: plain(Q - P @ (P.T @ Q))[0])
    for name in ("rank r", "forty equal", "down to 1e-300"):
        W = spectrum(N, N, SPECTRA[name])
        assert faults(W, 2, largest(W, 2)) == []


# ---- the start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", *UNIT])
def test_a_start_from_the_search_obeys_the_laws(dtype, searched):
    """(init.9), (init.14), (init.15) at a size where nothing but the r triples is computed."""
    W = spectrum(N, N + 20, SPECTRA["i^-1/2"]).astype(dtype)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa")
    base, adapter = init_adapter(Linear(W), config)
    assert searched[0] is not None
    s, wide = config.scaling, W.astype("float64")
    S = np.linalg.svd(wide, compute_uv=False)
    A, B, left = (v.astype("float64") for v in (adapter.A, adapter.B, base.W))
    unit = UNIT[adapter.A.dtype.name]
    stored = {"float16": 2.0**-11}.get(dtype, unit)
    # each entry of a factor is off by a rounding and by the search; norms of rows and columns then by as much
    off = 8 * unit * S[0] + 8 * (N + 20) * EPS * S[0]
    assert np.abs(left + s * B @ A - wide).max() <= stored * np.abs(left).max() * 1.01 + 1e-14
    assert np.abs(A @ A.T - np.diag(S[:2] / s)).max() <= off / s
    assert np.abs(B.T @ B - np.diag(S[:2] / s)).max() <= off / s
    assert np.linalg.norm(left, 2) <= S[2] + off + stored * np.linalg.norm(left)
