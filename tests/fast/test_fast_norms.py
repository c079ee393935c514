"""Row norms from factors: never worse than the squares of V summed in float32, in five regimes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

import lorax_np as lx
from lorax_np.fast import norms
from lorax_np.fast.norms import row_norms

REGIMES = {
    "sBA = 0.05 W": 0.05,
    "sBA = 3 W": 3.0,
    "V = 0.1 W": -0.9,
    "V = 0.01 W": -0.99,
    "V = 0.001 W": -0.999,
}


def layer(seed, share, d_out=24, d_in=96, r=4, scale=1.0):
    """W of rank r plus a hundredth of noise of the update's size, so that s·BA is about share·W."""
    rng = np.random.default_rng(seed)
    A, C = rng.standard_normal((r, d_in)), rng.standard_normal((d_out, r))
    W = (C @ A + 1e-3 * abs(1 + share) * rng.standard_normal((d_out, d_in))) * scale
    B = C * share * scale / 0.7
    return *(np.asarray(v, np.float32) for v in (W, A, B)), 0.7


def truth(W, A, B, s):
    W, A, B = (v.astype(np.longdouble) for v in (W, A, B))
    return np.sqrt(np.sum((W + np.longdouble(s) * (B @ A)) ** 2, axis=1))


def direct(W, A, B, s):
    V = W + np.float32(s) * (B @ A)
    return np.sqrt(np.sum(V * V, axis=1))


def error(n, want):
    return float(np.max(np.abs(n.astype(np.longdouble) / want - 1)))


@pytest.mark.parametrize("regime", REGIMES)
@given(seed=seeds, d_in=st.integers(60, 300), r=st.integers(1, 6))
def test_never_worse_than_direct_in_float32(regime, seed, d_in, r):
    """Within the error of the direct sum, or, where that is lucky, within 2 roundings of float32."""
    W, A, B, s = layer(seed, REGIMES[regime], d_in=d_in, r=r)
    want = truth(W, A, B, s)
    assert error(row_norms(W, A, B, s).n, want) <= max(error(direct(W, A, B, s), want), 2 * 2.0**-24)


@pytest.mark.parametrize("regime", list(REGIMES)[2:])
def test_without_the_guard_cancellation_shows(regime, monkeypatch):
    """The factored sum alone is worse than direct here: the test above would refuse it."""
    monkeypatch.setattr(norms, "CANCELLED", 0.0)
    worse = 0
    for seed in range(10):
        W, A, B, s = layer(seed, REGIMES[regime])
        want = truth(W, A, B, s)
        with np.errstate(invalid="ignore"):
            worse += not error(row_norms(W, A, B, s).n, want) <= 4 * error(direct(W, A, B, s), want)
    assert worse >= 8


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_large_and_small_rows_have_their_norm(size, dtype):
    """Squares that leave the range send a row to V itself."""
    rng = np.random.default_rng(1)
    size = size if dtype == "float32" else np.float64(size) ** 5
    W = (rng.standard_normal((9, 70)) * size).astype(dtype)
    A, B = rng.standard_normal((2, 70)).astype(dtype), np.zeros((9, 2), dtype)
    want = np.sqrt(np.sum((W.astype(np.longdouble) / size) ** 2, axis=1)) * size
    assert error(row_norms(W, A, B, 1.0).n, want) <= 4 * np.finfo(dtype).eps


def test_a_row_of_zeros_has_none():
    W, A = np.zeros((2, 5), np.float32), np.ones((1, 5), np.float32)
    W[1] = 1
    with np.errstate(invalid="ignore"):
        n = row_norms(W, A, np.zeros((2, 1), np.float32), 1.0).n
    assert np.isnan(n[0])
    assert n[1] == np.sqrt(5.0)


@pytest.mark.parametrize("start", [True, "pissa"])
def test_at_the_start_k_is_one_to_a_rounding(start):
    """m of init_adapter is n rounded another way, so that c is at most 2 roundings of float32, often 0."""
    W = np.random.default_rng(0).standard_normal((40, 130)).astype(np.float32)
    config = lx.LoraConfig(r=4, use_dora=True, init_lora_weights=start)
    base, adapter = lx.init_adapter(lx.Linear(W), config, rng=lx.torch_generator(0))
    n = row_norms(base.W, adapter.A, adapter.B, config.scaling).n
    assert np.max(np.abs((adapter.m - n) / n)) <= 130 / 2 * 2.0**-24
    assert np.median(np.abs((adapter.m - n) / n)) <= 2 * 2.0**-24
