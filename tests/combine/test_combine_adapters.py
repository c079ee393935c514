"""Weighted combination at one site: laws, each method written out, low rank against dense, refusals."""

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from checkers import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, ranks, seeds, sizes

import lorax_np as lx
from lorax_np.combine import METHODS, combine
from lorax_np.combine.arithmetic import elected_mean, factored, largest_kept, some_kept
from lorax_np.errors import ConfigError, ShapeError

EPS = 2.0**-52
libraries = pytest.mark.parametrize(  # read on the host, so without the guarded one
    "library", [x for x in LIBRARIES if x.name != "guarded"], ids=lambda x: x.name
)
FACTORS = [name for name, method in METHODS.items() if method.of == "factors"]
UPDATES = [name for name, method in METHODS.items() if method.of == "update"]


def options(method, **more):
    """What a method has to be told: all kept, so that nothing is dropped or drawn in effect."""
    how = METHODS[method]
    told = {} if how.keeps == "all" else {"density": 1.0}
    if how.keeps == "some":
        told["rng"] = np.random.default_rng(0)
    return {"method": method, **told, **more}


def drawn(seed, d_out, d_in, rs, bias=True, library=LIBRARIES[0]):
    draw = normals(seed, library)
    adapters = {
        name: lx.Adapter(draw(r, d_in), draw(d_out, r), bB=draw(d_out) if bias else None)
        for name, r in zip("abcd", rs, strict=False)
    }
    rng = np.random.default_rng(seed)
    weights = {name: float(rng.choice([-1.3, 0.4, 0.7, 2.1])) for name in adapters}
    scalings = {name: float(rng.choice([0.3, 0.6, 1.7])) for name in adapters}
    return adapters, weights, scalings


def delta(adapter, s=1.0):
    """s·BA of any record, with its groups, as (d_out, everything else)."""
    A, B = np.asarray(adapter.A, "float64"), np.asarray(adapter.B, "float64")
    groups = len(A) // B.shape[1]
    A, B = A.reshape(groups, B.shape[1], -1), B.reshape(groups, len(B) // groups, -1)
    return s * (B @ A).reshape(groups * B.shape[1], -1)


def on_host(library, adapter):
    A, B, bB = (library.host(v) for v in (adapter.A, adapter.B, adapter.bB))
    return lx.Adapter(A, B, bB=bB)


def weighted(adapters, w, s):
    total = sum(w[name] * delta(v, s[name]) for name, v in adapters.items())
    size = sum(abs(w[name]) * delta(type(v)(abs(v.A), abs(v.B)), s[name]) for name, v in adapters.items())
    return total, size


# ---- laws ---------------------------------------------------------------------------------------------------


@libraries
@given(seed=seeds, d_out=sizes, d_in=sizes, rs=st.lists(ranks, min_size=1, max_size=4))
def test_cat_is_the_weighted_sum(library, seed, d_out, d_in, rs):
    """(combine.1), (combine.4)"""
    adapters, w, s = drawn(seed, d_out, d_in, rs, library=library)
    found, scaling = combine(adapters, w, s, method="cat")
    host = {
        n: lx.Adapter(*(library.host(v) for v in (a.A, a.B)), bB=library.host(a.bB))
        for n, a in adapters.items()
    }
    want, size = weighted(host, w, s)
    found = on_host(library, found)
    assert scaling == 1.0
    assert found.A.shape == (sum(rs[:4]), d_in)
    assert_close("delta", delta(found), want, 64 * EPS * size)
    bB = sum(w[n] * s[n] * a.bB for n, a in host.items())
    assert_close("bB", found.bB, bB, 8 * EPS * sum(abs(w[n] * s[n] * a.bB) for n, a in host.items()))


@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds, d_out=sizes, d_in=sizes, r=ranks)
def test_one_adapter_with_weight_1_is_itself(method, seed, d_out, d_in, r):
    """With nothing dropped; its b too. The scaling becomes 1, and what it was goes into A and B."""
    adapters, _, s = drawn(seed, d_out, d_in, [r])
    one = adapters["a"] = lx.Adapter(adapters["a"].A, adapters["a"].B, bB=adapters["a"].bB, b=np.ones(d_out))
    found, scaling = combine(adapters, {"a": 1.0}, s, **options(method))
    assert scaling == 1.0
    assert found.b is one.b
    size = np.linalg.norm(abs(one.B)) * np.linalg.norm(abs(one.A)) * s["a"]
    assert np.abs(delta(found) - delta(one, s["a"])).max() <= 64 * (d_out + d_in + r) * EPS * size
    assert_close("bB", found.bB, s["a"] * one.bB, 2 * EPS * abs(one.bB))


@pytest.mark.parametrize("method", FACTORS)
@pytest.mark.parametrize("c", [-2.7, 0.4])
def test_one_adapter_alone_is_scaled(method, c):
    """The sign stands on one side only, and each side has the root."""
    adapters, _, _ = drawn(0, 4, 5, [3])
    found, _ = combine(adapters, {"a": c}, {"a": 0.5}, **options(method))
    assert_close("delta", delta(found), delta(adapters["a"], 0.5 * c), 64 * EPS * 20)


@pytest.mark.parametrize("method", ["cat", *UPDATES])
def test_without_dropping_updates_are_added(method):
    """dare and magnitude_prune at density 1 are the sum; ties is not, it elects and divides."""
    adapters, w, s = drawn(1, 7, 6, [2, 2])
    found, _ = combine(adapters, w, s, **options(method, **({} if method == "cat" else {"rank": 4})))
    want, size = weighted(adapters, w, s)
    gap = np.abs(delta(found) - want).max()
    assert (gap > 0.01) == METHODS[method].elects
    if not METHODS[method].elects:
        assert gap <= 256 * EPS * np.linalg.norm(size)


def test_linear_has_cross_terms():
    """It is no sum of updates: the error of two random adapters is about as large as the sum."""
    adapters, _, s = drawn(0, 40, 50, [4, 4])
    w = {"a": 0.7, "b": 0.4}
    found, _ = combine(adapters, w, s, method="linear")
    want, _ = weighted(adapters, w, s)
    error = np.linalg.norm(delta(found) - want) / np.linalg.norm(want)
    print(f"linear: off by {error:.2f} of the weighted sum")
    assert error > 0.5


@given(seed=seeds)
def test_order_and_names_do_not_matter_where_nothing_is_drawn(seed):
    adapters, w, s = drawn(seed, 5, 6, [2, 2, 2])
    for method in METHODS:
        if METHODS[method].keeps == "some":
            continue
        one = delta(combine(adapters, w, s, **options(method))[0])
        turned = dict(reversed(adapters.items()))
        two = delta(combine(turned, w, s, **options(method))[0])
        assert np.abs(one - two).max() <= 1e4 * EPS * np.abs(one).max(), method


# ---- the methods, written out -------------------------------------------------------------------------------


def by_hand(tasks, weights, how, density, majority, masks):
    """One array's combination, entry by entry in Python's own numbers."""
    flat = [[float(v) for v in task.ravel()] for task in tasks]
    for i, values in enumerate(flat):
        if how.keeps == "largest":
            order = sorted(range(len(values)), key=lambda j: (-abs(values[j]), j))
            keep = set(order[: int(density * len(values))])
            flat[i] = [v if j in keep else 0.0 for j, v in enumerate(values)]
        elif how.keeps == "some":
            flat[i] = [v / density if k else 0.0 for v, k in zip(values, masks[i].ravel(), strict=True)]
    out = []
    for column in zip(*flat, strict=True):
        if how.elects:
            votes = column if majority == "total" else [(v > 0) - (v < 0) for v in column]
            sign = 1 if sum(map(Fraction, votes)) >= 0 else -1
            agree = [(w, v) for w, v in zip(weights, column, strict=True) if v * sign > 0]
            out.append(sum(w * v for w, v in agree) / max(len(agree), 1))
        else:
            out.append(sum(w * v for w, v in zip(weights, column, strict=True)))
    return np.array(out).reshape(tasks[0].shape)


@pytest.mark.parametrize("method", FACTORS)
@pytest.mark.parametrize("majority", [None, "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.77, 1.0])
def test_factors_entry_by_entry(method, majority, density):
    """(combine.2) to (combine.9) on A and on B apart, with masks drawn A's first."""
    how = METHODS[method]
    if majority and not how.elects:
        return
    adapters, w, s = drawn(3, 5, 7, [3, 3, 3])
    told = {} if how.keeps == "all" else {"density": density}
    if how.keeps == "some":
        told["rng"] = np.random.default_rng(9)
    found, _ = combine(adapters, w, s, method=method, majority_sign_method=majority, **told)
    rng = np.random.default_rng(9)
    for name in ("A", "B"):
        tasks = [getattr(v, name) for v in adapters.values()]
        masks = [rng.random(task.shape) < density for task in tasks]
        c = [w[n] * s[n] for n in adapters]
        numbers = [abs(v) ** 0.5 * (-1 if v < 0 and name == "A" else 1) for v in c]
        want = by_hand(tasks, numbers, how, density, majority or "total", masks)
        assert_close(name, getattr(found, name), want, 16 * EPS * (1 + np.abs(want)) / density)


@pytest.mark.parametrize("method", UPDATES)
@pytest.mark.parametrize("majority", [None, "frequency"])
def test_updates_entry_by_entry(method, majority):
    """(combine.10): of rank min(d_out, d_in), so that nothing is cut off."""
    how, density = METHODS[method], 0.6
    if majority and not how.elects:
        return
    adapters, w, s = drawn(4, 5, 6, [2, 3])
    told = {} if how.keeps == "all" else {"density": density}
    if how.keeps == "some":
        told["rng"] = np.random.default_rng(9)
    found, _ = combine(adapters, w, s, method=method, majority_sign_method=majority, rank=5, **told)
    rng = np.random.default_rng(9)
    tasks = [delta(v, s[n]) for n, v in adapters.items()]
    masks = [rng.random(task.shape) < density for task in tasks]
    want = by_hand(tasks, list(w.values()), how, density, majority or "total", masks)
    assert np.abs(delta(found) - want).max() <= 256 * EPS * np.linalg.norm(want) / density
    assert_close("A Aᵀ", found.A @ found.A.T, np.eye(len(found.A)), 64 * EPS)


def test_how_many_are_kept_and_which_of_equals():
    """int(density·size), and of equal magnitudes the first."""
    task = np.array([[1.0, -2.0, 2.0], [2.0, 0.5, -1.0]])
    assert largest_kept(task, 0.34).tolist() == [[0, -2.0, 2.0], [0, 0, 0]]
    assert largest_kept(task, 0.33).tolist() == [[0, -2.0, 0], [0, 0, 0]]
    assert np.count_nonzero(largest_kept(np.arange(1.0, 101.0), 0.29)) == 28  # 0.29·100 is below 29
    assert (largest_kept(task, 1.0) == task).all()


@given(seed=seeds, density=st.floats(0.05, 0.95))
def test_what_is_drawn_is_unbiased(seed, density):
    """The mean over 4000 entries of ones is 1 within 5 standard errors."""
    kept = some_kept(np.ones(4000), density, np.random.default_rng(seed))
    assert set(np.unique(kept)) <= {0.0, 1 / density}
    assert abs(kept.mean() - 1) <= 5 * np.sqrt((1 - density) / density / 4000)


def test_a_tie_of_signs_elects_plus_and_the_election_is_not_weighted():
    tasks = [np.array([1.0, 1.0, 0.0]), np.array([-1.0, -2.0, 0.0])]
    assert elected_mean(tasks, [1.0, 1.0], "total").tolist() == [1.0, -2.0, 0.0]
    assert elected_mean(tasks, [1.0, 1.0], "frequency").tolist() == [1.0, 1.0, 0.0]
    assert elected_mean(tasks, [1.0, 100.0], "total").tolist() == [1.0, -200.0, 0.0]


# ---- low rank against dense ---------------------------------------------------------------------------------


@given(seed=seeds, d_out=sizes, d_in=sizes, rs=st.lists(ranks, min_size=1, max_size=3), rank=st.integers(1, 6))
def test_factored_is_the_svd_of_the_product(seed, d_out, d_in, rs, rank):
    """(combine.11), (combine.12): singular values within Weyl's bound of the dense ones, and as good a cut.

    Both are backward stable: each σ is off by at most c·EPS·‖B‖‖A‖, c the sizes' sum; so is the error of a cut,
    by Mirsky's theorem √rank times that.
    """
    draw, R = normals(seed), sum(rs)
    A, B = draw(R, d_in), draw(d_out, R)
    dense = np.linalg.svd(B @ A, compute_uv=False)
    A2, B2 = factored(A, B, rank)
    assert len(A2) == min(rank, R, d_out, d_in)
    bound = 8 * (d_out + d_in + R) * EPS * np.linalg.norm(B) * np.linalg.norm(A)
    assert np.abs(np.linalg.norm(B2, axis=0) - dense[: len(A2)]).max() <= bound
    assert_close("A Aᵀ", A2 @ A2.T, np.eye(len(A2)), 8 * (d_in + R) * EPS)
    best = np.linalg.norm(dense[len(A2) :])
    assert np.linalg.norm(B2 @ A2 - B @ A) <= best + bound * np.sqrt(len(A2) + 1)
    assert (B2[np.abs(B2).argmax(0), np.arange(len(A2))] >= 0).all()


def test_svd_forms_no_update():
    """A sum of updates of 20000 × 20000, which would be 3.2 GB."""
    adapters, w, s = drawn(0, 20000, 20000, [2, 3], bias=False)
    found, _ = combine(adapters, w, s, method="svd", rank=5)
    rows = np.arange(0, 20000, 2500)
    want = sum(w[n] * s[n] * v.B[rows] @ v.A for n, v in adapters.items())
    size = sum(abs(w[n]) * s[n] * np.linalg.norm(v.B) * np.linalg.norm(v.A) for n, v in adapters.items())
    assert np.abs(found.B[rows] @ found.A - want).max() <= 1e3 * EPS * size


def test_a_rank_is_cut_to_what_the_sum_can_have():
    adapters, w, s = drawn(0, 3, 9, [1, 1])
    assert combine(adapters, w, s, method="svd", rank=7)[0].A.shape == (2, 9)
    assert combine(adapters, w, s, method="magnitude_prune_svd", rank=7, density=0.9)[0].A.shape == (3, 9)
    adapters, w, s = drawn(0, 5, 9, [1, 3])
    assert combine(adapters, w, s, method="svd")[0].A.shape == (3, 9)  # the largest of the ranks


def test_a_clamp_cuts_both_sides_at_one_quantile():
    """(combine.13)"""
    adapters, w, s = drawn(0, 6, 9, [2, 2])
    whole, _ = combine(adapters, w, s, method="svd")
    cut, _ = combine(adapters, w, s, method="svd", clamp=0.9)
    most = np.quantile(np.concatenate([whole.B.ravel(), whole.A.ravel()]), 0.9)
    assert (np.clip(whole.B, -most, most) == cut.B).all()
    assert (np.clip(whole.A, -most, most) == cut.A).all()
    assert np.abs(cut.B).max() == most


# ---- convolutions, and 16 bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("method", ["cat", "svd", "magnitude_prune_svd", "linear"])
def test_convolutions(groups, axes, method):
    draw, kernel, ones = normals(groups + axes), (3, 2, 2)[:axes], (1,) * axes
    adapters = {
        name: lx.ConvAdapter(draw(2 * groups, 4, *kernel), draw(2 * groups, 2, *ones), bB=draw(2 * groups))
        for name in "ab"
    }
    w, s = {"a": 0.7, "b": -1.3}, {"a": 0.5, "b": 2.0}
    more = {} if method in ("cat", "linear") else {"rank": 4 * groups}
    found, _ = combine(adapters, w, s, **options(method, **more))
    assert found.A.shape[1:] == (4, *kernel)
    assert found.B.shape[2:] == ones
    assert len(found.A) // found.B.shape[1] == groups
    if method == "linear":
        assert_close("A", found.A, 0.35**0.5 * adapters["a"].A - 2.6**0.5 * adapters["b"].A, 8 * EPS * 10)
    else:
        want, size = weighted(adapters, w, s)
        assert np.abs(delta(found) - want).max() <= 256 * EPS * np.linalg.norm(size)


def test_16_bits_round_once_and_the_wider_dtype_wins():
    adapters, w, s = drawn(0, 4, 5, [2, 2])
    half = {
        n: lx.Adapter(v.A.astype(ml_dtypes.bfloat16), v.B.astype(ml_dtypes.bfloat16))
        for n, v in adapters.items()
    }
    exact = {n: lx.Adapter(v.A.astype("float64"), v.B.astype("float64")) for n, v in half.items()}
    found, _ = combine(half, w, s, method="linear")
    want, _ = combine(exact, w, s, method="linear")
    assert found.A.dtype == ml_dtypes.bfloat16
    assert (want.A.astype(ml_dtypes.bfloat16) == found.A).all()
    mixed = {"a": half["a"], "b": lx.Adapter(exact["b"].A.astype("float16"), exact["b"].B.astype("float16"))}
    assert combine(mixed, w, s, method="cat")[0].A.dtype == np.float32
    assert combine({"a": half["a"], "b": exact["b"]}, w, s, method="cat")[0].A.dtype == np.float64


def test_biases_pass_and_missing_parts_count_as_nothing():
    adapters, w, s = drawn(0, 4, 5, [2, 2], bias=False)
    bB, b = np.arange(4.0), np.ones(4)
    some = {"a": lx.Adapter(adapters["a"].A, adapters["a"].B, bB=bB), "b": lx.Adapter(None, None, b=b)}
    found, _ = combine(some, w, s, method="linear")
    assert_close("delta", delta(found), delta(adapters["a"], w["a"] * s["a"]), 64 * EPS * 20)
    assert_close("bB", found.bB, w["a"] * s["a"] * bB, EPS * 10)
    assert found.b is b
    alone, scaling = combine({"a": lx.Adapter(None, None, b=b)}, {"a": 0.3}, {"a": 1.0}, method="svd")
    assert alone.A is None
    assert alone.b is b
    assert scaling == 1.0


# ---- refusals -----------------------------------------------------------------------------------------------

GOOD = {"method": "cat"}
ONES = lx.Adapter(np.ones((2, 3)), np.ones((4, 2)))
BAD = [
    ({"method": "tie"}, "method: expected one of cat, linear, svd, ties"),
    ({"method": "cat", "density": 0.5}, "density: expected None with method='cat'"),
    ({"method": "linear", "rank": 2}, "rank: expected None with method='linear'"),
    ({"method": "linear", "majority_sign_method": "total"}, "majority_sign_method: expected None with"),
    ({"method": "ties", "clamp": 0.5, "density": 0.5}, "clamp: expected None with method='ties'"),
    *(
        ({"method": "ties", "density": d}, "density: expected a share in (0, 1] with method='ties'")
        for d in (None, 0, -0.1, 1.1, float("nan"), True, "0.5")
    ),
    ({"method": "ties", "density": 0.5, "majority_sign_method": "most"}, "majority_sign_method: expected t"),
    ({"method": "svd", "rank": 0}, "rank: expected an int of at least 1, got 0"),
    ({"method": "svd", "rank": 2.0}, "rank: expected an int of at least 1, got 2.0"),
    ({"method": "svd", "clamp": 0.0}, "clamp: expected a quantile in (0, 1], got 0.0"),
    ({"method": "dare_ties", "density": 0.5}, "rng: expected a numpy.random.Generator with method="),
    ({"method": "dare_ties", "density": 0.5, "rng": 0}, "rng: expected a numpy.random.Generator with"),
]  # fmt: skip


@pytest.mark.parametrize(("told", "message"), BAD)
def test_options_are_checked(told, message):
    with pytest.raises(ConfigError) as caught:
        combine({"a": ONES}, {"a": 1.0}, {"a": 1.0}, **told)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        ({}, ConfigError, "adapters: expected at least one, got none"),
        ({"a": 3}, TypeError, "a: expected Adapter or ConvAdapter, got int"),
        (
            {"a": ONES, "b": lx.ConvAdapter(np.ones((2, 3, 1)), np.ones((4, 2, 1)))},
            TypeError,
            "b: expected Adapter, as a is, got ConvAdapter",
        ),
        (
            {"a": lx.Adapter(np.ones((2, 3)), np.ones((4, 2)), m=np.ones(4))},
            ConfigError,
            "a: expected no m, since a sum of updates has no magnitude",
        ),
        (
            {"a": ONES, "b": lx.Adapter(np.ones((2, 5)), np.ones((4, 2)))},
            ShapeError,
            "b: expected A of (r, *axes) with axes (3,), set by a, got (5,)",
        ),
        (
            {"a": ONES, "b": lx.Adapter(np.ones((2, 3)), np.ones((5, 2)))},
            ShapeError,
            "b: expected B of d_out and groups (4, 1), set by a, got (5, 1)",
        ),
        (
            {"a": lx.Adapter(np.full((2, 3), np.nan), np.ones((4, 2)))},
            ConfigError,
            "a: expected finite numbers in A, got NaN or infinity",
        ),
        (
            {n: lx.Adapter(ONES.A, ONES.B, b=np.ones(4)) for n in "ab"},
            ConfigError,
            "b: expected at most one adapter with a trained base bias",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_named(adapters, error, message):
    numbers = dict.fromkeys(adapters, 1.0)
    with pytest.raises(error) as caught:
        combine(adapters, numbers, numbers, method="cat")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("method", FACTORS)
def test_factors_of_two_ranks_are_not_added(method):
    adapters, w, s = drawn(0, 4, 5, [2, 3])
    with pytest.raises(
        ConfigError, match=r"^adapters: expected one rank with method='.*', .* got \[2, 3\]; cat"
    ):
        combine(adapters, w, s, **options(method))


def test_numbers_that_do_not_fit_are_named():
    one = {"a": ONES}
    for weights, message in (
        ({}, "weights: expected one for each of a, got none"),
        ({"b": 1.0}, "weights: expected one for each of a, got b"),
        ({"a": float("inf")}, "weights['a']: expected a finite float, got inf"),
        ({"a": True}, "weights['a']: expected a finite float, got True"),
    ):
        with pytest.raises(ConfigError) as caught:
            combine(one, weights, {"a": 1.0}, method="cat")
        assert str(caught.value) == message
    with pytest.raises(TypeError, match=r"^weights: expected a mapping by name, got list$"):
        combine(one, [1.0], {"a": 1.0}, method="cat")


def test_what_overflows_is_named():
    half = lx.Adapter(np.full((1, 2), 300, "float16"), np.full((2, 1), 1, "float16"))
    with pytest.raises(ConfigError, match=r"^A: expected finite numbers once combined into float16, got"):
        combine({"a": half}, {"a": 1e3}, {"a": 1.0}, method="cat")


def test_a_rank_that_the_groups_do_not_divide_is_named():
    conv = lx.ConvAdapter(np.ones((4, 3, 1)), np.ones((6, 2, 1)))
    with pytest.raises(ConfigError, match=r"^rank: expected a multiple of groups=2, got 3$"):
        combine({"a": conv}, {"a": 1.0}, {"a": 1.0}, method="svd", rank=3)


def test_every_method_is_tested():
    assert set(METHODS) == {"cat", *FACTORS, *UPDATES}
    assert len(METHODS) == 11
    assert len(list(itertools.chain(FACTORS, UPDATES))) == 10
