"""Operations of the general pass planned for a processor: the numbers of the reference, however stacked."""

import faulthandler
import os
import threading
import time
import warnings
from itertools import pairwise

import numpy as np
import pytest
from checkers import assert_close

from lorax_np import ops
from lorax_np.errors import DtypeError, ShapeError
from lorax_np.fast import gemm, general
from lorax_np.fast.gemm import engine
from lorax_np.fast.general import attention, gelu, layer_norm
from lorax_np.fast.llama import threads
from lorax_np.models.masks import dropout_masks
from lorax_np.models.pairs import FAST, REFERENCE
from lorax_np.models.passes import Pass
from lorax_np.models.records import Model, Trained
from lorax_np.random import DropoutKey, dropout_mask

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
D, E, BUCKETS = 3, 2, 8
ALIKE, UNLIKE = [0, 5, 10, 15, 20], [0, 3, 4, 4, 9]
CASES = {
    "alike": {"starts": ALIKE, "causal": False},
    "alike, causal": {"starts": ALIKE, "causal": True},
    "alike, window": {"starts": ALIKE, "causal": True, "window": 3},
    "alike, cross": {"starts": ALIKE, "causal": False, "key_starts": [0, 4, 8, 12, 16]},
    "alike queries alone": {"starts": ALIKE, "causal": False, "key_starts": [0, 4, 8, 13, 16]},
    "unlike": {"starts": UNLIKE, "causal": False, "window": 2},
    "cached": {"starts": UNLIKE, "causal": True, "window": 2, "key_starts": [0, 3, 5, 5, 11]},
    "nothing": {"starts": [0, 0], "causal": True},
}


def drawn(case, H, K, *, table, dtype="float64"):
    """q, k, v as views whose rows are not neighbours, options, and a cotangent nobody may write to."""
    rng, options = np.random.default_rng(7), {"scale": 0.7, **CASES[case]}
    N, M = options["starts"][-1], options.get("key_starts", options["starts"])[-1]
    q, k, v = (
        rng.standard_normal((n, h, 2 * d)).astype(dtype)[:, :, ::2]
        for n, h, d in ((N, H, D), (M, K, D), (M, K, E))
    )
    go = rng.standard_normal((N, H, E)).astype(dtype)
    go.flags.writeable = False
    if table:
        R = rng.standard_normal((BUCKETS, H)).astype(dtype)
        options["relative"] = ops.Relative(R, not options["causal"], 12)
    return (q, k, v), options, go


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("table", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_references(case, table, dtype, monkeypatch):
    for H, K in ((6, 6), (6, 2)):
        at, options, go = drawn(case, H, K, table=table, dtype=dtype)
        o, saved = ops.attention_forward(*at, **options)
        want = {
            "o": o,
            "L": saved.L,
            **dict(zip("qkvR", ops.attention_backward(go, saved, **options), strict=True)),
        }
        for most, small in ((1, 0), (100, 1 << 18), (1 << 18, 0), (1 << 18, 1 << 18)):
            monkeypatch.setattr(attention, "MOST", most)
            monkeypatch.setattr(gemm, "SMALL", small)  # 0: each product for itself
            for block in (3, 128):
                how = {**options, "block": block}
                o, saved = general.attention_forward(*at, **how)
                got = {"o": o, "L": saved.L}
                got |= dict(zip("qkvR", general.attention_backward(go, saved, **how), strict=True))
                assert (got["R"] is None) == (not table)
                for name, g in got.items():
                    if g is not None:
                        assert g.dtype == dtype
                        size = np.abs(want[name]).max(initial=1.0)
                        assert_close(f"g{name}", g, want[name], 64 * EPS[dtype] * size)


def test_alike_sequences_are_stacked_and_others_are_not():
    def stacks(case, K=2):
        (q, k, _), options, _ = drawn(case, 6, K, table=False)
        rule = ops.attention.Rule(0.7, options["causal"], options.get("window"), None)
        bounds = (options["starts"], options.get("key_starts"))
        return [s.copies for s in attention._stacks(ops.attention.parts(q, k, *bounds, rule, 128), K)]

    assert stacks("alike") == [4]
    assert stacks("alike, cross") == [4]
    assert stacks("alike queries alone") == [2, 1, 1]
    assert stacks("unlike") == [1, 1, 1]
    assert stacks("nothing") == []


def test_what_the_reference_refuses_is_refused():
    (q, k, v), options, _ = drawn("alike", 6, 2, table=False)
    with pytest.raises(ShapeError, match="starts: expected bounds"):
        general.attention_forward(q, k, v, **{**options, "starts": [0, 5]})
    with pytest.raises(DtypeError):
        general.attention_forward(q, k.astype("float32"), v, **options)
    with pytest.raises(ShapeError, match="expected"):
        general.layer_norm_forward(np.ones((2, 3)), np.ones(4), np.ones(3), eps=0.0)
    with pytest.raises(ShapeError, match="expected"):
        general.linear_forward(np.ones((2, 3)), np.ones((4, 5)))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("n", [0, 1, 7, 11])
def test_gelu_and_its_slope_are_the_references(n, dtype, monkeypatch):
    monkeypatch.setattr(gelu, "BLOCK", 16)  # n rows of 5: no block, a part of one, some and a part
    far = np.array([0.0, -0.0, 4.2, -5.9, 6.0, -6.0, 12.0, -40.0, 1e4, -1e4, 1e-30, -1e-42])
    u = np.random.default_rng(3).standard_normal((n, 10)).astype(dtype)
    u.reshape(-1)[: len(far)] = far[: u.size]
    u = u[:, ::2]
    for got, want in zip(general.gelu_sloped(u), ops.activation.gelu_sloped(u), strict=True):
        assert got.dtype == dtype
        assert_close("gelu", got, want, 8 * EPS[dtype] * (1 + np.abs(u)))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_layer_norm_is_the_references(n, dtype, monkeypatch):
    monkeypatch.setattr(layer_norm, "HEIGHT", 3)
    rng = np.random.default_rng(n)
    x, gy = (rng.standard_normal((n, 11)).astype(dtype) * 3 + 5 for _ in range(2))
    w, b = (rng.standard_normal(11).astype(dtype) for _ in range(2))
    y, saved = general.layer_norm_forward(x, w, b, eps=1e-5)
    want, kept = ops.layer_norm_forward(x, w, b, eps=1e-5)
    bound = 64 * EPS[dtype] * 8
    assert_close("y", y, want, bound)
    assert_close("h", saved.h, kept.h, bound)
    assert_close("rho", saved.rho, kept.rho, bound)
    size = np.abs(kept.rho).max(initial=1.0) * np.abs(gy).max(initial=1.0) * np.abs(w).max()
    assert_close(
        "gx", general.layer_norm_backward(gy, saved, w), ops.layer_norm_backward(gy, kept, w), bound * size
    )


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_plain_layer_is_the_references(dtype, biased):
    rng = np.random.default_rng(1)
    for n in (0, 1, 6):
        x, gy = rng.standard_normal((n, 5)).astype(dtype), rng.standard_normal((n, 7)).astype(dtype)
        W = np.asfortranarray(rng.standard_normal((7, 5)).astype(dtype))
        b = rng.standard_normal(7).astype(dtype) if biased else None
        size = 64 * EPS[dtype] * 16
        assert_close("y", general.linear_forward(x, W, b), ops.linear.linear_forward(x, W, b), size)
        assert_close("gx", general.linear_backward_x(gy, W), ops.linear.linear_backward_x(gy, W), size)


def test_a_pass_takes_them_on_the_host_in_the_dtypes_they_are_for():
    weights = {"a.weight": np.eye(2, dtype="float32")}
    model, nothing = Model("", "bert", {}, weights), Trained({}, {})
    assert Pass(model, {}, nothing, pair=FAST).op(ops.attention_forward) is general.attention_forward
    assert Pass(model, {}, nothing, pair=REFERENCE).op(ops.attention_forward) is ops.attention_forward
    assert (
        Pass(model, {}, nothing, pair=FAST, dtype="complex128").op(ops.attention_forward)
        is ops.attention_forward
    )
    assert Pass(model, {}, nothing, pair=FAST).op(ops.rope_forward) is ops.rope_forward


def test_masks_of_sequences_are_theirs_one_below_the_other():
    keys = [DropoutKey(0.3, 5, 2, 11, c3=i) for i in (4, 0, 9)]
    lengths = [3, 0, 5]
    for dtype in EPS:
        whole = dropout_masks(keys, lengths, 7, dtype=dtype, xp=np)
        assert whole.dtype == dtype
        for key, (a, b) in zip(keys, pairwise(np.cumsum([0, *lengths])), strict=True):
            assert np.array_equal(whole[a:b], dropout_mask((b - a, 7), 0.3, 5, 2, 11, dtype, c3=key.c3))
    assert dropout_masks([], [], 7, dtype="float32", xp=np) is None


# ---- threads -----------------------------------------------------------------------------------------------


def two_threads(work):
    if engine().threads is None:
        pytest.skip("this BLAS cannot be told its threads, so that there is one worker")
    return threads.in_threads(lambda who, given: work(who), [None, None])


def test_threads_stay_and_all_have_ended_when_one_fails():
    meet, ended = threading.Barrier(2), []

    def ident(_):
        meet.wait()
        return threading.get_ident()

    def fails(who):
        if who == 0:
            raise ValueError("planted")
        time.sleep(0.1)
        ended.append(who)

    assert set(two_threads(ident)) == set(two_threads(ident))
    with pytest.raises(ValueError, match="planted"):
        two_threads(fails)
    assert ended == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_makes_threads_of_its_own():
    assert two_threads(lambda who: who) == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other threads that do not follow: that is the point
        child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(20, exit=True)
        os._exit(0 if two_threads(lambda who: who + 1) == [1, 2] else 3)
    assert os.waitpid(child, 0)[1] == 0
