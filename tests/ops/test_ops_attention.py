"""Attention by blocks: the definition, every gradient, what a query may see, and what is never whole."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from checkers import assert_adjoint, assert_close, pairing, total
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.ops.attention import attention_backward, attention_forward
from lorax_np.ops.relative import Relative, relative_backward, relative_buckets, relative_forward

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
H, K, D, E, BUCKETS, FAR = 6, 2, 3, 2, 8, 12  # heads, key heads, their widths, and T5's table
STARTS = [0, 3, 4, 4, 9]  # unequal, one of them empty
CASES = {
    "all": {"causal": False},
    "causal": {"causal": True},
    "causal, window": {"causal": True, "window": 3},
    "window": {"causal": False, "window": 2},
    "cross": {"causal": False, "key_starts": [0, 3, 4, 4, 7]},
    "cached": {"causal": True, "key_starts": [0, 3, 5, 5, 11]},
    "cached, window": {"causal": True, "window": 2, "key_starts": [0, 3, 5, 5, 11]},
}
cases = pytest.mark.parametrize("case", CASES)


def drawn(case, seed=0, library=LIBRARIES[0], table=False, dtype="float64"):
    """Arguments by name, the options, and a cotangent."""
    draw, options = normals(seed, library, dtype), {"starts": STARTS, "scale": 0.7, "block": 3, **CASES[case]}
    N, M = STARTS[-1], options.get("key_starts", STARTS)[-1]
    at = {"q": draw(N, H, D), "k": draw(M, K, D), "v": draw(M, K, E)}
    return {**at, "R": draw(BUCKETS, H)} if table else at, options, draw(N, H, E)


def with_table(at, options):
    """The options, and of the arguments the table in them; one of them is an encoder's."""
    return {**options, "relative": Relative(at["R"], not options["causal"], FAR) if "R" in at else None}


def forward(at, options):
    return attention_forward(at["q"], at["k"], at["v"], **with_table(at, options))


def backward(go, at, options):
    _, saved = forward(at, options)
    return dict(zip("qkvR", attention_backward(go, saved, **with_table(at, options)), strict=True))


def bucket(r, bidirectional):
    return relative_buckets(r, r + 1, buckets=BUCKETS, bidirectional=bidirectional, max_distance=FAR)[0]


def definition(at, options):
    """One query and one head at a time: o, and the logarithm of each row's sum."""
    q, k, v, causal = at["q"], at["k"], at["v"], options["causal"]
    o, L = np.zeros((*q.shape[:2], E)), np.zeros(q.shape[:2])
    for (a, b), (c, d) in zip(pairwise(STARTS), pairwise(options.get("key_starts", STARTS)), strict=True):
        for t in range(a, b):
            place = t - a + (d - c - b + a if causal else 0)
            seen = [s for s in range(d - c) if not (causal and s > place)]
            seen = [s for s in seen if place - s < options.get("window", np.inf)]
            for h in range(H):
                rows = [c + s for s in seen]
                S = options["scale"] * k[rows, h // 3] @ q[t, h]
                if "R" in at:
                    S = S + at["R"][[bucket(s - place, not causal) for s in seen], h]
                L[t, h] = np.log(np.sum(np.exp(S)))
                o[t, h] = np.exp(S - L[t, h]) @ v[rows, h // 3]
    return o, L


@libraries
@cases
@pytest.mark.parametrize("table", [False, True], ids=["no bias", "bias"])
def test_the_blocks_are_the_definition(library, case, table):
    """(attention.1) to (attention.7), and (attention.18)."""
    at, options, _ = drawn(case, 1, library, table)
    o, saved = forward(at, options)
    assert {str(x.dtype).rpartition(".")[2] for x in (o, saved.L)} == {"float64"}
    host = {name: library.host(value) for name, value in at.items()}
    want, L = definition(host, options)
    assert_close("L", library.host(saved.L), L, 64 * EPS * (1 + np.abs(L)))
    assert_close("o", library.host(o), want, 64 * EPS * np.abs(host["v"]).max())
    assert saved.o is o
    assert saved.q is at["q"]


@cases
def test_every_gradient_is_a_complex_step(case):
    """(attention.8) to (attention.13), and (attention.19) to (attention.20)."""
    at, options, go = drawn(case, 2, table=True)
    got = backward(go, at, options)
    for name, value in at.items():
        want = np.empty(value.shape)
        for i in np.ndindex(value.shape):
            stepped = value.astype("complex128")
            stepped[i] += 1e-30j
            want[i] = pairing(go, np.imag(forward({**at, name: stepped}, options)[0]) / 1e-30)
        assert got[name].shape == value.shape
        assert_close(f"g{name}", got[name], want, 64 * EPS * np.abs(want).max())


@settings(max_examples=12)
@given(seed=seeds, case=st.sampled_from(sorted(CASES)), block=st.integers(1, 12))
def test_gv_is_the_adjoint_and_scores_have_a_free_constant(seed, case, block):
    """(attention.9): o is linear in v. (attention.11): a sequence's gk sums to 0, as each row of gS does."""
    at, options, go = drawn(case, seed, table=True)
    options["block"] = block
    g, v = backward(go, at, options), normals(seed + 1)(*at["v"].shape)
    jv, _ = forward({**at, "v": v}, options)
    size, _ = forward({**at, "v": np.abs(v)}, options)
    assert_adjoint(g["v"], v, go, jv, total(go, size), "gv")
    bounds = options.get("key_starts", STARTS)
    for c, d in pairwise(bounds):
        along = g["k"][c:d].sum(axis=0)
        assert_close("Σ gk", along, 0 * along, 512 * EPS * (1 + np.abs(g["k"]).max()))


@libraries
@cases
def test_libraries_and_blocks_agree(library, case):
    at, options, go = drawn(case, 3, table=True)
    want = {**backward(go, at, options), "o": forward(at, options)[0]}
    at, options, go = drawn(case, 3, library, table=True)
    for block in (1, 4, 128):
        options["block"] = block
        for name, g in {**backward(go, at, options), "o": forward(at, options)[0]}.items():
            assert_close(f"g{name}", library.host(g), want[name], 64 * EPS * np.abs(want[name]).max())


@cases
def test_float32_is_within_its_roundings(case):
    """A chain of at most 64 roundings a number, of terms whose sum is below 64 times the greatest entry."""
    at, options, go = drawn(case, 4, table=True, dtype="float32")
    got = {**backward(go, at, options), "o": forward(at, options)[0]}
    at = {name: value.astype("float64") for name, value in at.items()}
    want = {**backward(go.astype("float64"), at, options), "o": forward(at, options)[0]}
    for name, g in got.items():
        assert g.dtype == "float32"
        assert_close(name, g, want[name], 64 * 2.0**-24 * np.abs(want[name]).max())


# ---- what is seen ------------------------------------------------------------------------------------------


def test_a_block_reads_the_keys_it_needs():
    """Rows past a causal block, before a window, and of other sequences may hold anything."""
    at, options, go = drawn("causal, window", 5)
    options = {**options, "starts": [0, 9], "block": 2}
    want = {**backward(go, at, options), "o": forward(at, options)[0]}
    k, v = at["k"].copy(), at["v"].copy()
    k[6:], v[6:], k[:2], v[:2] = np.nan, np.nan, np.nan, np.nan
    go = np.array(go)
    got = {**backward(go, {**at, "k": k, "v": v}, options), "o": forward({**at, "k": k, "v": v}, options)[0]}
    for name in ("o", "q"):
        assert np.array_equal(got[name][4:6], want[name][4:6])  # queries 4 and 5 need keys 2 to 5
        assert np.isnan(got[name][6:]).any()


@cases
def test_sequences_do_not_mix(case):
    """To the bit each is what it is alone."""
    at, options, go = drawn(case, 6, table=True)
    bounds = options.pop("key_starts", STARTS)
    whole = {**backward(go, at, {**options, "key_starts": bounds})}
    o, _ = forward(at, {**options, "key_starts": bounds})
    for (a, b), (c, d) in zip(pairwise(STARTS), pairwise(bounds), strict=True):
        mine = {"q": at["q"][a:b], "k": at["k"][c:d], "v": at["v"][c:d], "R": at["R"]}
        alone = {**options, "starts": [0, b - a], "key_starts": [0, d - c]}
        assert np.array_equal(forward(mine, alone)[0], o[a:b])
        g = backward(go[a:b], mine, alone)
        assert np.array_equal(g["q"], whole["q"][a:b])
        assert np.array_equal(g["k"], whole["k"][c:d])
        assert np.array_equal(g["v"], whole["v"][c:d])


def test_one_token_at_a_time_is_the_whole():
    """The last query stands beside the last key."""
    at, options, _ = drawn("causal, window", 7, table=True)
    options = {**options, "starts": [0, 9]}
    o, _ = forward(at, options)
    for t in range(9):
        mine = {**at, "q": at["q"][t : t + 1], "k": at["k"][: t + 1], "v": at["v"][: t + 1]}
        one, _ = forward(mine, {**options, "starts": [0, 1], "key_starts": [0, t + 1]})
        assert_close("o", one, o[t : t + 1], 64 * EPS * np.abs(at["v"]).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_great_scores_neither_overflow_nor_warn(dtype):
    at, options, go = drawn("causal", 8, dtype=dtype)
    at["q"] = 1e6 * at["q"]
    o, saved = forward(at, {**options, "scale": 1e3})
    assert np.isfinite(saved.L).all()
    a, b = STARTS[-2:]
    best = [np.argmax(at["k"][a:b, h // 3] @ at["q"][b - 1, h]) for h in range(H)]
    assert_close("o", o[b - 1], at["v"][a:b][best, np.arange(H) // 3], 1e-6)
    assert all(
        np.isfinite(g).all() for g in backward(go, at, {**options, "scale": 1e3}).values() if g is not None
    )


@pytest.mark.parametrize("case", ["all", "causal"])
def test_no_table_of_scores_is_whole(case):
    """At 2048 tokens a table of scores would take 16 MiB a head; everything together stays under one."""
    T, heads = 2048, 3
    draw = normals(9, dtype="float32")
    q, k, v, go = draw(T, heads, 8), draw(T, 1, 8), draw(T, 1, 8), draw(T, heads, 8)
    options = {"starts": [0, T], "scale": 0.3, "block": 64, **CASES[case]}
    tracemalloc.start()
    try:
        _, saved = attention_forward(q, k, v, **options)
        attention_backward(go, saved, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * T * T


def test_strided_arrays_and_no_tokens():
    at, options, go = drawn("causal", 10, table=True)
    odd = {name: np.repeat(value, 2, axis=-1)[..., ::2] for name, value in at.items()}
    odd_go = np.asfortranarray(go)
    want, got = backward(go, at, options), backward(odd_go, odd, options)
    for name in "qkvR":
        assert_close(f"g{name}", got[name], want[name], 64 * EPS * np.abs(want[name]).max())
    none = {"q": at["q"][:0], "k": at["k"][:0], "v": at["v"][:0], "R": at["R"]}
    for starts in ([0], [0, 0, 0]):
        o, saved = forward(none, {**options, "starts": starts})
        g = backward(go[:0], none, {**options, "starts": starts})
        assert o.shape == (0, H, E)
        assert saved.L.shape == (0, H)
        assert [g[name].shape for name in "qkv"] == [(0, H, D), (0, K, D), (0, K, E)]
        assert not g["R"].any()


def test_what_does_not_fit_is_refused():
    at, options, _ = drawn("all", 0, table=True)
    for change, message in (
        ({"key_starts": [0, 0, 1, 1, 9]}, "key_starts: expected 1 keys at least for sequence 0, got 0"),
        ({"key_starts": [0, 9]}, "key_starts: expected 5 bounds, as many as starts has, got 2"),
        ({"starts": [0, 4, 3, 9]}, "starts: expected bounds that rise from 0 to the number of rows, 9, got"),
        ({"starts": [0, 12]}, "starts: expected bounds that rise from 0 to the number of rows, 9, got [0, 12]"),
        ({"starts": []}, "starts: expected bounds that rise from 0 to the number of rows, 9, got []"),
        (
            {"causal": True, "key_starts": [0, 2, 4, 4, 9]},
            "key_starts: expected 3 keys at least for sequence 0, got 2",
        ),
        (
            {"window": 2, "key_starts": [0, 1, 4, 4, 9]},
            "key_starts: expected 2 keys at least for sequence 0, got 1",
        ),
        ({"window": 0}, "window: expected 1 key at least, got 0"),
        ({"block": 0}, "block: expected 1 query at least, got 0"),
    ):
        with pytest.raises(ShapeError) as caught:
            forward(at, {**options, **change})
        assert str(caught.value).startswith(message)
    for change, message in (
        ({"k": at["k"][:, :, :2]}, "k: expected (M, K, 3) with K that divides 6, set by q, got (9, 2, 2)"),
        ({"k": at["k"][:, [0, 1, 0, 1]]}, "v: expected (..., K, E)"),
        ({"q": at["q"][:, :5], "R": at["R"][:, :5]}, "k: expected (M, K, 3) with K that divides 5, set by q"),
        ({"q": at["q"][0]}, "q, k: expected (N, H, D), (M, K, D), got (6, 3), (9, 2, 3)"),
        ({"R": at["R"][:, :2]}, "R: expected (buckets, 6), a column for each head of q, got (8, 2)"),
    ):
        with pytest.raises(ShapeError) as caught:
            forward({**at, **change}, options)
        assert str(caught.value).startswith(message)
    with pytest.raises(DtypeError, match=r"^k: expected float64, set by q, got float32$"):
        forward({**at, "k": at["k"].astype("float32"), "v": at["v"].astype("float32")}, options)
    with pytest.raises(TypeError, match="arrays must share one library"):
        forward({**at, "v": LIBRARIES[2].place(at["v"])}, options)


# ---- relative positions ------------------------------------------------------------------------------------


def test_buckets_by_hand():
    """(attention.14) to (attention.17): 8 buckets, distances to 12, both sides and one."""
    both = relative_buckets(-6, 7, buckets=8, bidirectional=True, max_distance=12)
    assert both.tolist() == [
        3,
        3,
        2,
        2,
        2,
        1,
        0,
        5,
        6,
        6,
        6,
        7,
        7,
    ]  # half = 2: 2 + ⌊2 ln(d/2)/ln 6⌋, from 5 on 3
    left = relative_buckets(-13, 3, buckets=8, bidirectional=False, max_distance=12)
    assert left.tolist() == [7, 7, 7, 7, 6, 6, 6, 5, 4, 4, 3, 2, 1, 0, 0, 0]  # 4 + ⌊4 ln(d/4)/ln 3⌋
    (single,) = relative_buckets(-24, -23, buckets=36, bidirectional=False, max_distance=32)
    assert (
        single == 27
    )  # 18 + ⌊18 ln(24/18)/ln(32/18)⌋ is 18 + 9 exactly: float64's logarithm falls short of it
    edges = relative_buckets(-128, 0, buckets=32, bidirectional=False, max_distance=128)[::-1]
    assert [1 + int(np.argmax(edges == b)) for b in range(16, 32)] == [
        *(16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)
    ]


@libraries
@settings(max_examples=10)
@given(seed=seeds, queries=st.integers(1, 6), keys=st.integers(1, 7), shift=st.integers(-4, 9))
def test_the_table_s_gradient_is_the_adjoint_exactly(library, seed, queries, keys, shift):
    """(attention.18) to (attention.20) on integers, where every sum is exact."""
    rng = np.random.default_rng(seed)
    R, v = rng.integers(-9, 10, (2, BUCKETS, H)).astype("float64")
    g = rng.integers(-9, 10, (H, queries, keys)).astype("float64")
    for bidirectional in (False, True):
        table = Relative(library.place(R), bidirectional, FAR)
        bias = library.host(relative_forward(table, queries=queries, keys=keys, shift=shift))
        for t, s in np.ndindex(queries, keys):
            assert np.array_equal(bias[:, t, s], R[bucket(s - t - shift, bidirectional)])
        gR = library.host(relative_backward(library.place(g), table, shift=shift))
        jv = library.host(
            relative_forward(table._replace(R=library.place(v)), queries=queries, keys=keys, shift=shift)
        )
        assert gR.shape == R.shape
        assert pairing(gR, v) == pairing(g, jv)


@pytest.mark.parametrize(("buckets", "most"), [(1, 9), (8, 4), (8, 3)])
def test_too_few_buckets_are_refused(buckets, most):
    with pytest.raises(ConfigError, match="buckets, max_distance: expected 2 buckets at least"):
        relative_buckets(-3, 3, buckets=buckets, bidirectional=False, max_distance=most)
