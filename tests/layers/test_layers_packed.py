"""Packed adapters: tokens of many requests in one matrix, forward, backward, and the stacked form itself."""

import numpy as np
import pytest
from checkers import COMPLEX, EPS, TINY, assert_adjoint, assert_close, pairing, total
from hypothesis import given
from hypothesis import strategies as st
from strategies import LIBRARIES, normals, seeds

import lorax_np as lx
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.layers.packed import NONE, lora_packed_backward, lora_packed_forward
from lorax_np.layers.packing import pack, unpack

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
slices = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
S = (0.7, -1.3, 2.9, 0.31)


def drawn(seed, library=LIBRARIES[0], *, T=9, L=3, d_in=4, d_outs=(5,), pad=2, dtype="float64"):
    """x, y, ids, gy, and a stack of adapters of unequal rank with NaN past each."""
    draw, rng = normals(seed, library, dtype), np.random.default_rng(seed)
    ranks = tuple(int(r) for r in rng.integers(1, 4, L))
    r_max = max(ranks) + pad
    A, B = (
        np.full((L, len(d_outs) * r_max, d_in), np.nan, dtype),
        np.full((L, sum(d_outs), r_max), np.nan, dtype),
    )
    for a, r in enumerate(ranks):
        for i in range(len(d_outs)):
            A[a, i * r_max : i * r_max + r] = rng.standard_normal((r, d_in))
        B[a, :, :r] = rng.standard_normal((sum(d_outs), r))
    ids = rng.integers(NONE, L, T)
    stack = library.place(A), library.place(B)
    return draw(T, d_in), draw(T, sum(d_outs)), ids, draw(T, sum(d_outs)), stack, ranks, S[:L]


def definition(x, y, A, B, ids, ranks, scalings, d_outs):
    """(packed.1), (packed.2) token by token, written out from the stacked layout."""
    y, r_max = y.copy(), B.shape[2]
    for t, a in enumerate(ids):
        begin = 0
        for i, d_out in enumerate(d_outs):
            for o in range(begin, begin + d_out):
                for rho in range(ranks[a] if a >= 0 else 0):
                    y[t, o] += scalings[a] * B[a, o, rho] * (A[a, i * r_max + rho] @ x[t])
            begin += d_out
    return y


@libraries
@given(seed=seeds, T=st.integers(0, 7), L=st.integers(1, 4), d_in=st.integers(1, 5), d_outs=slices)
def test_the_forward_is_the_definition_and_the_backward_its_adjoint(library, seed, T, L, d_in, d_outs):
    """(packed.1) to (packed.5): y − y₀ is linear in each of x, A and B, token by token."""
    x, y0, ids, gy, (A, B), ranks, s = drawn(seed, library, T=T, L=L, d_in=d_in, d_outs=d_outs)
    host = library.host
    y, saved = lora_packed_forward(x, A, B, ids, ranks, s, d_outs=d_outs, y=y0)
    grads = lora_packed_backward(gy, saved, A, B, s)
    at = {"x": host(x), "A": host(A), "B": host(B)}
    hy0, hgy, more = host(y0), host(gy), (ids, ranks, s, d_outs)
    size = definition(abs(at["x"]), abs(hy0), abs(at["A"]), abs(at["B"]), ids, ranks, np.abs(s), d_outs)
    assert_close("y", host(y), definition(at["x"], hy0, at["A"], at["B"], *more), 64 * EPS["float64"] * size)
    rng, zero = np.random.default_rng(seed), 0 * hy0
    for (name, value), g in zip(at.items(), grads, strict=True):
        assert g.shape == value.shape
        v = rng.standard_normal(value.shape)
        moved = {**at, name: v}
        jv = definition(moved["x"], zero, moved["A"], moved["B"], *more)
        terms = definition(
            *(np.abs(moved[k]) if k else zero for k in ("x", "", "A", "B")), ids, ranks, np.abs(s), d_outs
        )
        assert_adjoint(host(g), v, hgy, jv, total(hgy, terms) + total(host(g), v), f"g{name}")


def test_every_element_by_complex_steps():
    d_outs = (3, 2)
    x, y0, ids, gy, (A, B), ranks, s = drawn(3, L=4, d_outs=d_outs)
    ids = np.where(ids == 2, 0, ids)  # adapter 2 has no token
    _, saved = lora_packed_forward(x, A, B, ids, ranks, s, d_outs=d_outs, y=y0)
    at = {"x": x, "A": A, "B": B}
    for (name, value), g in zip(at.items(), lora_packed_backward(gy, saved, A, B, s), strict=True):
        want, size = np.zeros(value.shape), 0.0
        for i in np.ndindex(value.shape):
            if not np.isnan(value[i]):
                moved = {**at, name: value.astype("complex128")}
                moved[name][i] += TINY * 1j
                y, _ = lora_packed_forward(
                    moved["x"], moved["A"], moved["B"], ids, ranks, s, d_outs=d_outs, y=y0
                )
                want[i], size = pairing(gy, np.imag(y) / TINY), max(size, total(gy, np.imag(y) / TINY))
        assert_close(f"g{name}", g, want, 64 * COMPLEX * EPS["float64"] * size)
        idle = {"x": ids == NONE, "A": 2, "B": 2}[name]
        assert not g[idle].any()
        assert not np.isnan(g).any(), "what lies past a rank is never read, and has a gradient of 0"


def test_tokens_of_none_keep_y_bit_for_bit():
    x, y0, ids, _, (A, B), ranks, s = drawn(4, T=20)
    y0, x = y0.copy(), x.copy()
    y0[ids == NONE] = np.nan
    y0[np.flatnonzero(ids == NONE)[0]] = -0.0
    x[ids == NONE] = np.inf
    y, _ = lora_packed_forward(x, A, B, ids, ranks, s, y=y0)
    assert (ids == NONE).any()
    assert y[ids == NONE].tobytes() == y0[ids == NONE].tobytes()
    assert not np.isnan(y[ids != NONE]).any()


@given(seed=seeds, cuts=st.lists(st.integers(0, 12), min_size=1, max_size=5), L=st.integers(1, 4))
def test_segments_are_ids_bit_for_bit(seed, cuts, L):
    """A segment may be empty, and may follow another of the same adapter."""
    starts = [0, *sorted(cuts)[1:]]
    x, y0, _, gy, (A, B), ranks, s = drawn(seed, T=12, L=L)
    of = np.random.default_rng(seed).integers(NONE, L, len(starts))
    ids = np.repeat(of, np.diff([*starts, 12]))
    one, saved = lora_packed_forward(x, A, B, of, ranks, s, starts=starts, y=y0)
    two, saved2 = lora_packed_forward(x, A, B, ids, ranks, s, y=y0)
    assert np.array_equal(one, two)
    for g, g2 in zip(
        lora_packed_backward(gy, saved, A, B, s), lora_packed_backward(gy, saved2, A, B, s), strict=True
    ):
        assert np.array_equal(g, g2)


@given(seed=seeds)
def test_y_and_gx_permute_with_the_tokens(seed):
    """Which row a token stands in says nothing; so packed equals the loop over sorted segments."""
    x, y0, ids, gy, (A, B), ranks, s = drawn(seed, T=12)
    order = np.argsort(ids, kind="stable")
    y, saved = lora_packed_forward(x, A, B, ids, ranks, s, y=y0)
    y2, saved2 = lora_packed_forward(x[order], A, B, ids[order], ranks, s, y=y0[order])
    assert np.array_equal(y[order], y2)
    gx, gA, gB = lora_packed_backward(gy, saved, A, B, s)
    gx2, gA2, gB2 = lora_packed_backward(gy[order], saved2, A, B, s)
    assert np.array_equal(gx[order], gx2)
    assert np.array_equal(gA, gA2)
    assert np.array_equal(gB, gB2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(seed=seeds)
def test_one_adapter_for_all_tokens_is_the_layer_without_base(dtype, seed):
    """Against lora_linear_forward on W = 0, bit for bit."""
    x, _, _, gy, (A, B), ranks, s = drawn(seed, L=1, dtype=dtype)
    adapter, base = unpack(lx_pack(A, B, ranks, s))[0][0], lx.Linear(np.zeros((5, 4), dtype))
    y, saved = lora_packed_forward(x, A, B, np.zeros(9, int), ranks, s)
    want, saved2 = lx.lora_linear_forward(x, base, adapter, scaling=s[0])
    assert np.array_equal(y, want)
    gx, gA, gB = lora_packed_backward(gy, saved, A, B, s)
    gx2, g = lx.lora_linear_backward(gy, saved2, base, adapter, scaling=s[0])
    for got, expected in ((gx, gx2), (gA[0, : ranks[0]], g.A), (gB[0, :, : ranks[0]], g.B)):
        assert got.dtype == dtype
        assert np.array_equal(got, expected)


def lx_pack(A, B, ranks, scalings, d_outs=(5,)):
    from lorax_np.layers.packing import Pack

    return Pack(A, B, ranks, scalings, d_outs)


def test_dtypes_are_the_layer_s():
    """bfloat16 tokens beside float32 adapters: z in float32, one rounding of y and of gx."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, y0, ids, gy, (A, B), ranks, s = drawn(7, dtype="float32")
    half = [v.astype(ml_dtypes.bfloat16) for v in (x, y0, gy)]
    y, saved = lora_packed_forward(half[0], A, B, ids, ranks, s, y=half[1])
    wide, _ = lora_packed_forward(half[0].astype("float32"), A, B, ids, ranks, s, y=half[1].astype("float32"))
    assert y.dtype == half[0].dtype
    assert np.array_equal(y, wide.astype(ml_dtypes.bfloat16))
    gx, gA, gB = lora_packed_backward(half[2], saved, A, B, s)
    assert (gx.dtype, gA.dtype, gB.dtype) == (half[0].dtype, A.dtype, B.dtype)
    low = A.astype(ml_dtypes.bfloat16), B.astype(ml_dtypes.bfloat16)
    _, saved = lora_packed_forward(x, *low, ids, ranks, s)
    gx, gA, gB = lora_packed_backward(gy, saved, *low, s)
    assert (gx.dtype, gA.dtype, gB.dtype) == (np.float32, low[0].dtype, low[1].dtype)


# ---- the stacked form --------------------------------------------------------------------------------------


def adapter_of(draw, r, d_out=5, d_in=4):
    return lx.Adapter(draw(r, d_in), draw(d_out, r))


@libraries
def test_pack_then_unpack_is_the_identity(library):
    draw, host = normals(1, library), library.host
    rows = [[adapter_of(draw, r, d_out) for d_out in (5, 3)] for r in (2, 4, 1)]
    stacked = pack(rows, [0.5, 2.0, -1.0], r_max=6)
    assert (stacked.ranks, stacked.d_outs, stacked.scalings) == ((2, 4, 1), (5, 3), (0.5, 2.0, -1.0))
    assert (stacked.A.shape, stacked.B.shape) == ((3, 12, 4), (3, 8, 6))
    for row, got in zip(rows, unpack(stacked), strict=True):
        for one, two in zip(row, got, strict=True):
            assert np.array_equal(host(one.A), host(two.A))
            assert np.array_equal(host(one.B), host(two.B))
    total_entries = sum(one.A.shape[0] * 4 for row in rows for one in row)
    assert np.count_nonzero(host(stacked.A)) == total_entries, "the padding is 0"


def test_a_pack_computes_what_its_adapters_compute():
    """Each token against lora_linear_forward on W = 0 with its adapter, slice by slice."""
    draw = normals(2)
    rows = [[adapter_of(draw, r, d_out) for d_out in (5, 3)] for r in (2, 4)]
    stacked, x, ids = pack(rows, [0.5, 2.0]), draw(6, 4), [1, 0, NONE, 1, 1, 0]
    y, _ = lora_packed_forward(
        x, stacked.A, stacked.B, ids, stacked.ranks, stacked.scalings, d_outs=stacked.d_outs
    )
    for t, a in enumerate(ids):
        want = [
            lx.lora_linear_forward(x[t], lx.Linear(np.zeros((d, 4))), rows[a][i], scaling=stacked.scalings[a])[
                0
            ]
            for i, d in enumerate((5, 3))
        ]
        want = np.concatenate(want) * (a != NONE)
        assert_close("y", y[t], want, 64 * EPS["float64"] * (1 + np.abs(want)))


# ---- what does not fit -------------------------------------------------------------------------------------


def forward(x=(4, 4), A=(2, 6, 4), B=(2, 5, 3), ids=(0, 1, -1, 0), ranks=(2, 3), s=(1.0, 2.0), **more):
    return lora_packed_forward(np.ones(x), np.ones(A), np.ones(B), ids, ranks, s, d_outs=(3, 2), **more)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: forward(x=(4, 3)), ShapeError, "A: expected (L, S·r_max, d_in) with d_in=3 set by x"),
        (lambda: forward(x=(2, 2, 4)), ShapeError, "x: expected (T, d_in), got (2, 2, 4)"),
        (
            lambda: forward(A=(2, 3, 4)),
            ShapeError,
            "A: expected (L, S·r_max, d_in) with S=2 set by d_outs, r_max=3",
        ),
        (lambda: forward(A=(1, 6, 4)), ShapeError, "B: expected (L, Σd_out, r_max) with L=1 set by A"),
        (lambda: forward(B=(2, 6, 3)), ShapeError, "d_outs: expected a sum of 6, set by B, got 5"),
        (lambda: forward(ids=(0, 1)), ShapeError, "ids: expected 4 of them, one for each token, got 2"),
        (lambda: forward(ids=(0, 1, 2, 0)), ConfigError, "ids: expected integers from -1 to 1, got 2"),
        (lambda: forward(ids=(0, 1, -2, 0)), ConfigError, "ids: expected integers from -1 to 1, got -2"),
        (lambda: forward(ids=(0.5, 1, 1, 0)), ConfigError, "ids: expected integers, got float64"),
        (lambda: forward(ranks=(2,)), ShapeError, "ranks: expected 2 of them, one for each adapter, got 1"),
        (lambda: forward(ranks=(2, 4)), ConfigError, "ranks: expected integers from 1 to 3, got 4"),
        (lambda: forward(ranks=(0, 3)), ConfigError, "ranks: expected integers from 1 to 3, got 0"),
        (lambda: forward(ranks=(2.0, 3)), ConfigError, "ranks: expected integers from 1 to 3, got 2.0"),
        (lambda: forward(s=(1.0,)), ShapeError, "scalings: expected 2 of them, one for each adapter, got 1"),
        (lambda: forward(s=(1.0, np.nan)), ConfigError, "scalings: expected finite floats, got nan"),
        (lambda: forward(s=(1.0, "2")), ConfigError, "scalings: expected finite floats, got '2'"),
        (lambda: forward(y=np.ones((4, 6))), ShapeError, "y: expected (..., Σd_out) with ...=(4,) set by x"),
        (
            lambda: forward(y=np.ones((4, 5), "float32")),
            DtypeError,
            "y: expected float64, set by x, got float32",
        ),
        (
            lambda: forward(ids=(0, 1), starts=(1, 2)),
            ConfigError,
            "starts: expected 0 first, and no start before",
        ),
        (
            lambda: forward(ids=(0, 1, 1), starts=(0, 3, 2)),
            ConfigError,
            "starts: expected 0 first, and no start",
        ),
        (
            lambda: forward(ids=(0, 1), starts=(0, 5)),
            ConfigError,
            "starts: expected integers from 0 to 4, got 5",
        ),
        (lambda: forward(ids=(0,), starts=(0, 2)), ShapeError, "ids: expected 2 of them, one for each segment"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_what_cannot_be_packed_is_named():
    draw = normals(3)
    one = adapter_of(draw, 2)
    for rows, s, error, message in (
        ([], [], ConfigError, "adapters: expected one at least"),
        (
            [one, lx.Adapter(one.A, one.B, m=np.ones(5))],
            [1, 1],
            ConfigError,
            "adapters[1]: expected A and B alone in",
        ),
        (
            [one, lx.Adapter(None, None, b=np.ones(5))],
            [1, 1],
            ConfigError,
            "adapters[1]: expected A and B, got a bias",
        ),
        ([one, adapter_of(draw, 2, 6)], [1, 1], ShapeError, "adapters[1]: expected slices of d_out [5]"),
        ([one, [one, one]], [1, 1], ShapeError, "adapters[1]: expected slices of d_out [5]"),
        ([[one, adapter_of(draw, 3)]], [1], ConfigError, "adapters[0]: expected one rank for all slices"),
        ([one, adapter_of(draw, 2, 5, 3)], [1, 1], ShapeError, "adapters[1].A: expected (r, d_in) with d_in=4"),
        ([one], [1, 2], ShapeError, "scalings: expected 1 of them"),
        ([one, "two"], [1, 1], TypeError, "adapters[1]: expected Adapter, got str"),
    ):
        with pytest.raises(error) as caught:
            pack(rows, s)
        assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError, match="r_max: expected at least 2, the largest rank, got 1"):
        pack([one], [1.0], r_max=1)


def test_a_backward_fits_its_forward():
    x, _, ids, gy, (A, B), ranks, s = drawn(5)
    _, saved = lora_packed_forward(x, A, B, ids, ranks, s)
    with pytest.raises(ShapeError, match=r"gy: expected \(9, 5\), set by the forward, got \(8, 5\)"):
        lora_packed_backward(gy[:8], saved, A, B, s)
    with pytest.raises(DtypeError, match="gy: expected real arrays in a backward pass"):
        lora_packed_backward(gy.astype("complex128"), saved, A, B, s)
