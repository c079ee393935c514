"""Merging in place: what merge gives, in W's own memory, and nothing written where it refuses."""

import ml_dtypes
import numpy as np
import pytest
from checkers import KINDS, STEP, Kind, assert_close, layer_of

import lorax_np as lx
from lorax_np.errors import ConfigError, DtypeError
from lorax_np.fast import merging

DTYPES = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
BF16 = np.dtype(ml_dtypes.bfloat16)


def drawn(kind, seed, dtype, shape=(9, 13, 4)):
    """Base and adapter of a random layer; W in the dtype and writable."""
    case = layer_of(kind, seed, shape=shape, lead=(2,), dtype="float32" if dtype != "float64" else dtype)
    kinds = dict.fromkeys(("W", "b0"), BF16 if dtype == "bfloat16" else np.dtype(dtype))
    at = {name: np.array(value, dtype=kinds.get(name, value.dtype)) for name, value in case.at.items()}
    _, base, adapter = case._replace(at=at).records()
    return base, adapter, case


def bound(base, adapter, s):
    """STEP·eps of the terms in the dtype summed in, and one rounding of the result."""
    W, A, B = (np.abs(np.asarray(v, np.float64)) for v in (base.W, adapter.A, adapter.B))
    terms, k = W + abs(s) * B @ A, 1.0
    if adapter.m is not None:
        n = lx.row_norms(base, adapter, scaling=s)
        k = (np.abs(adapter.m) / n * np.sqrt(np.sum(terms**2, 1)) / n)[:, None]  # with n's own cancellation
    eps = 2.0**-52 if str(base.W.dtype) == "float64" else 2.0**-23
    return k * terms * STEP * eps, 2 * DTYPES[str(base.W.dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if not kind.masked and kind.form != "dora full"], ids=str
)
def test_it_is_merge_in_place(kind, dtype, small_blocks):
    for seed in range(3):
        base, adapter, case = drawn(kind, seed, dtype)
        want = lx.merge(base, adapter, scaling=case.s)
        sums, rounding = bound(base, adapter, case.s)
        W = base.W
        got = lx.fast.merge_into(base, adapter, scaling=case.s)
        assert got.W is W
        assert got.W.dtype == want.W.dtype
        assert_close("W", W.astype(float), want.W.astype(float), sums + rounding * np.abs(want.W.astype(float)))
        assert (got.b is None) == (want.b is None)
        if want.b is not None:
            assert (got.b.dtype, got.b.tolist()) == (want.b.dtype, want.b.tolist())


@pytest.mark.parametrize(
    "change", [np.asfortranarray, lambda W: np.repeat(W, 2, 1)[:, ::2], lambda W: W.astype(">f4")]
)
def test_any_layout_of_w(change):
    base, adapter, case = drawn(Kind(False, "none", "lora"), 1, "float32")
    want = lx.merge(base, adapter, scaling=case.s).W
    W = change(np.array(base.W))
    lx.fast.merge_into(lx.Linear(W), adapter, scaling=case.s)
    assert_close("W", W, want, sum(bound(base, adapter, case.s)[:1]) + 2.0**-23 * np.abs(want))


def test_a_bias_alone_leaves_w():
    W = np.ones((2, 3))
    merged = lx.fast.merge_into(lx.Linear(W), lx.Adapter(None, None, b=np.array([1.0, 2.0])), scaling=1.0)
    assert (W.tolist(), merged.b.tolist()) == ([[1.0] * 3] * 2, [1.0, 2.0])


def test_16_bits_are_rounded_once():
    """The update is a quarter of a step, six times: rounded at each sum it would be lost."""
    W = np.full((4, 6), 256, BF16)
    adapter = lx.Adapter(np.full((6, 6), 0.25, np.float32), np.ones((4, 6), np.float32))
    lx.fast.merge_into(lx.Linear(W), adapter, scaling=1.0)
    assert (W == 258).all()


READ_ONLY = np.ones((2, 3))
READ_ONLY.flags.writeable = False
SHARED = np.ones((3, 3))
A, B = np.ones((1, 3)), np.ones((2, 1))
ZERO = np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
REFUSED = {
    "read-only": (
        READ_ONLY,
        lx.Adapter(A, B),
        r"^W: expected an array that may be written to, got a read-only one",
    ),
    "shared": (
        SHARED[:2],
        lx.Adapter(SHARED[:1], B),
        r"^W: expected memory of its own to write to, got some sh",
    ),
    "NaN in W": (np.full((2, 3), np.nan), lx.Adapter(A, B), r"^W: expected finite numbers once merged"),
    "infinite A": (np.ones((2, 3)), lx.Adapter(A * np.inf, B), r"^W: expected finite numbers once merged"),
    "zero row": (ZERO, lx.Adapter(A, B, m=np.ones(2)), r"got 1 rows of zeros \(first: 1\)"),
    "overflow": (np.full((2, 3), 6e4, np.float16), lx.Adapter(A * 1e4, B), r"^W: expected finite numbers once"),
    "infinite m": (
        np.ones((2, 3)),
        lx.Adapter(A, B, m=np.full(2, np.inf)),
        r"^W: expected finite numbers once",
    ),
    "bias": (
        np.ones((2, 3)),
        lx.Adapter(A, B, bB=np.full(2, np.inf)),
        r"^b: expected finite numbers once merged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_refuses_nothing_is_written(name):
    W, adapter, says = REFUSED[name]
    before = W.tobytes()
    with pytest.raises(ConfigError, match=says):
        lx.fast.merge_into(lx.Linear(W), adapter, scaling=1.0)
    assert W.tobytes() == before


def test_only_the_last_row_overflows_and_none_is_written(small_blocks):
    W = np.ones((64, 3), np.float16)
    B = np.zeros((64, 1), np.float32)
    B[63] = 1e6
    with pytest.raises(ConfigError, match="finite"):
        lx.fast.merge_into(lx.Linear(W), lx.Adapter(A.astype(np.float32), B), scaling=1.0)
    assert (W == 1).all()


def test_near_the_range_but_within_it_is_merged():
    """Past the quick bound, which takes all maxima together, the rehearsal decides."""
    W = np.array([[6e4, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float16)
    adapter = lx.Adapter(np.array([[0.0, 1.0, 1.0]], np.float32), np.array([[6e4], [1.0]], np.float32))
    want = lx.merge(lx.Linear(W), adapter, scaling=1.0).W
    lx.fast.merge_into(lx.Linear(W), adapter, scaling=1.0)
    assert np.array_equal(W, want)


def test_complex_and_foreign_weights_are_refused():
    import array_api_strict as strict

    with pytest.raises(DtypeError, match=r"^W: expected real arrays in the fast engine, got complex128$"):
        lx.fast.merge_into(lx.Linear(np.ones((2, 3), complex)), lx.Adapter(A, B), scaling=1.0)
    base, adapter = lx.Linear(strict.ones((2, 3))), lx.Adapter(strict.ones((1, 3)), strict.ones((2, 1)))
    with pytest.raises(
        TypeError, match=r"^W: expected a NumPy or CuPy array in the fast engine, got array_api_strict$"
    ):
        lx.fast.merge_into(base, adapter, scaling=1.0)


def test_no_second_w_is_made():
    """Scratch stays at a few blocks of rows, measured by what NumPy allocates."""
    import tracemalloc

    W = np.ones((2048, 1024), np.float32)
    for m in (None, np.ones(2048, np.float32)):
        adapter = lx.Adapter(np.ones((4, 1024), np.float32), np.ones((2048, 4), np.float32), m=m)
        lx.fast.merge_into(lx.Linear(W), adapter, scaling=0.1)
        tracemalloc.start()
        lx.fast.merge_into(lx.Linear(W), adapter, scaling=0.1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < W.nbytes / 2


def test_the_range_of_a_dtype_is_known():
    assert merging._range(np.ones(1, np.float16)) == float(np.finfo(np.float16).max)
    assert merging._range(np.ones(1, BF16)) < float(ml_dtypes.finfo(BF16).max) < 4e38
