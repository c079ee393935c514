"""The fast pair is the reference's pair: values, dtypes, refusals, dropout by key, and what it leaves alone."""

import gc
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import ml_dtypes
import numpy as np
import pytest
from checkers import EPS, KINDS, STEP, Kind, assert_close, layer_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import leads, ranks, seeds, sizes

import lorax_np as lx
from lorax_np.errors import ConfigError, DtypeError, ShapeError
from lorax_np.fast import buffers, cpu_branch, weights
from lorax_np.fast import gemm as gemms

MORE = (pytest.param(name, marks=pytest.mark.thorough) for name in ("fp64", "fp16"))
PROFILES = ("fp32", "bf16", *MORE)
MASKED = Kind(True, "trained", "lora+bB")
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def both(case, dropout="mask"):
    """y and the gradients of a case by the fast pair and by the reference, as two dictionaries."""
    x, base, adapter = case.records()
    found = []
    for engine, word in ((lx.fast, "dropout"), (lx, "mask")):
        given_mask = {word: case.mask if dropout == "mask" or engine is lx else dropout}
        y, saved = engine.lora_linear_forward(x, base, adapter, scaling=case.s, **given_mask)
        how = {"scaling": case.s, "norm_gradient": case.full}
        gx, g = engine.lora_linear_backward(case.gy, saved, base, adapter, **how)
        found.append({"y": y, "x": gx} | {f.name: getattr(g, f.name) for f in fields(g)})
    return found


def assert_same_layer(case, dropout="mask"):
    """Both within the bound that each has by itself: STEP·eps of its terms."""
    fast, want = both(case, dropout)
    size = case.sizes()
    for name, value in want.items():
        assert (fast[name] is None) == (value is None), name
        if value is not None:
            assert fast[name].dtype == value.dtype, name
            assert_close(name, fast[name], value, 2 * STEP * case.eps * size[name])


# ---- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_the_harness_passes_it(profile):
    report = lx.verify.verify("fast", profile)
    assert report.passed, str(report)


@pytest.mark.parametrize("name", lx.fast.engines())
@pytest.mark.parametrize("profile", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_the_harness_passes_it_on_every_blas(name, profile):
    with lx.fast.blas(name):
        report = lx.verify.verify("fast", profile, "quick")
    assert report.passed, str(report)


@pytest.mark.usefixtures("poisoned", "small_blocks")
@pytest.mark.parametrize("profile", PROFILES)
def test_nothing_is_read_before_it_is_written(profile):
    report = lx.verify.verify("fast", profile, "quick")
    assert report.passed, str(report)


@pytest.mark.usefixtures("poisoned")
def test_what_is_read_too_early_is_seen(monkeypatch):
    """A gemm that reads out where β = 0 fails the test above."""

    def reads(a, b, out, alpha=1.0, beta=0.0):
        out[...] = beta * out + alpha * (a @ b)

    monkeypatch.setattr(cpu_branch, "gemm", reads)
    assert not lx.verify.verify("fast", "fp32", "quick").passed


@every_kind
@given(seed=seeds, d_out=sizes, d_in=sizes, r=ranks, lead=leads, dtype=st.sampled_from(["float32", "float64"]))
def test_any_layer_is_the_references(kind, seed, d_out, d_in, r, lead, dtype):
    assert_same_layer(layer_of(kind, seed, shape=(d_out, d_in, r), lead=lead, dtype=dtype))


@pytest.mark.usefixtures("small_blocks")
@every_kind
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_of_rows_and_their_tail_add_up(kind, dtype):
    """13 and 18 tokens in blocks of 4: a tail of one, and of two; 11 rows of W likewise."""
    for seed, lead in enumerate(((13,), (3, 6), (1,), (4,))):
        assert_same_layer(layer_of(kind, seed, shape=(11, 9, 3), lead=lead, dtype=dtype))


@pytest.mark.parametrize("shape", [(96, 130, 16), (257, 64, 1), (70, 200, 8)], ids=str)
@every_kind
def test_layers_with_whole_segments_and_tiles(kind, shape):
    assert_same_layer(layer_of(kind, 5, shape=shape, lead=(3, 50), dtype="float32"))


@pytest.mark.parametrize("low", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("wide", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["lora+bB", "dora", "dora full"])
@pytest.mark.parametrize("masked", [False, True])
def test_mixed_dtypes_round_where_the_reference_does(wide, low, form, masked):
    """(linear.6) to (linear.9). Sums in another order may fall on the other side of a tie: then one step apart.

    The narrowest step is counted at the size of the terms, twice, since y is rounded twice.
    """
    case = layer_of(Kind(masked, "frozen", form), 3, shape=(9, 13, 4), lead=(2, 5), dtype="float64")
    kinds = {"x": wide, "W": wide, "b0": wide, "A": low, "B": low, "m": low, "bB": low}
    at = {name: value.astype(_dtype(kinds[name])) for name, value in case.at.items()}
    case = case._replace(at=at, gy=case.gy.astype(_dtype(wide)))
    fast, want = both(case)
    steps = {"float16": 2.0**-10, "bfloat16": 2.0**-7, **EPS}
    size = case.sizes()
    for name, value in want.items():
        if value is None:
            continue
        assert fast[name].dtype == value.dtype, name
        inner = max(EPS["float32" if kind in ("float16", "bfloat16") else kind] for kind in (wide, low))
        bound = 2 * STEP * inner * size[name] + 2 * steps[str(value.dtype)] * size[name]
        assert_close(name, fast[name].astype(float), value.astype(float), bound)
        if str(value.dtype) in ("float16", "bfloat16"):
            assert np.mean(fast[name] == value) > 0.9, name


def _dtype(name):
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


@every_kind
def test_any_strides_and_byte_order(kind):
    case = layer_of(kind, 7, shape=(8, 12, 3), lead=(2, 6), dtype="float32")
    want, _ = both(case)

    def strided(value):
        home = np.full((*value.shape[:-1], 2 * value.shape[-1] + 1), np.nan, value.dtype)
        home[..., 1::2] = value
        return home[..., 1::2]

    def foreign(value):
        return value.astype(value.dtype.newbyteorder())

    for change in (strided, foreign, np.asfortranarray):
        changed = {name: change(value) for name, value in case.at.items()}
        mask = None if case.mask is None else change(case.mask)
        got, _ = both(case._replace(at=changed, mask=mask, gy=change(case.gy)))
        size = case.sizes()
        for name, value in want.items():
            if value is not None:
                assert got[name].dtype.isnative
                assert_close(name, got[name], value, 2 * STEP * case.eps * size[name])


def test_a_bias_alone():
    base, adapter = lx.Linear(np.ones((2, 3))), lx.Adapter(None, None, b=np.array([5.0, 6.0]))
    y, saved = lx.fast.lora_linear_forward(np.ones((4, 3)), base, adapter, scaling=1.0)
    assert y.tolist() == [[8.0, 9.0]] * 4
    gx, g = lx.fast.lora_linear_backward(np.ones((4, 2)), saved, base, adapter, scaling=1.0)
    assert (gx.tolist(), g.b.tolist(), g.A) == ([[2.0] * 3] * 4, [4.0, 4.0], None)
    gx, g = lx.fast.lora_linear_backward(np.ones((4, 2)), saved, base, adapter, scaling=1.0, need_gx=False)
    assert (gx, g.b.tolist()) == (None, [4.0, 4.0])


# ---- dropout by its key -----------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, 1 << 18])
@pytest.mark.parametrize("form", ["lora", "lora+bB", "dora", "dora full"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_key_stands_for_the_mask_of_its_numbers(form, dtype, entries, monkeypatch):
    """The same bits at any block height, sizes that are no multiple of a word included."""
    monkeypatch.setattr(weights, "ENTRIES", entries)
    for seed, (d_in, lead) in enumerate(((7, (3, 5)), (16, (9,)), (5, (1,)), (1, (23,)), (3, (0,)))):
        case = layer_of(Kind(True, "frozen", form), seed, shape=(6, d_in, 2), lead=lead, dtype=dtype)
        key = (0.3, 2**64 - 1 - seed, seed, 2**63 + seed)
        case = case._replace(mask=lx.dropout_mask(case.at["x"].shape, *key, dtype=dtype))
        assert_same_layer(case, key)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_entries_kept_are_those_of_the_mask(dtype):
    """W = 0 and A the identity: y is x∘mask itself, to the bit, where B is the identity too."""
    x = np.random.default_rng(0).standard_normal((37, 24)).astype(dtype)
    eye = np.eye(24, dtype=dtype)
    base, adapter, key = lx.Linear(0 * eye), lx.Adapter(eye, eye), (0.37, 5, 6, 7)
    y, saved = lx.fast.lora_linear_forward(x, base, adapter, scaling=1.0, dropout=key)
    mask = lx.dropout_mask(x.shape, *key, dtype=dtype)
    assert np.array_equal(y, x * mask)
    gx, _ = lx.fast.lora_linear_backward(x, saved, base, adapter, scaling=1.0)
    assert np.array_equal(gx, x * mask)


def test_what_is_kept_beside_x_is_z_and_the_key():
    """At most 4Nr + 16 bytes of arrays and numbers, whatever the width."""
    N, d, r = 64, 512, 8
    x, W = np.ones((N, d), np.float32), np.ones((d, d), np.float32)
    adapter = lx.Adapter(np.ones((r, d), np.float32), np.ones((d, r), np.float32))
    _, saved = lx.fast.lora_linear_forward(x, lx.Linear(W), adapter, scaling=1.0, dropout=(0.1, 1, 2, 3))
    assert saved.x is x
    arrays = [value for value in (saved.z, saved.dora) if value is not None]
    assert sum(value.nbytes for value in arrays) == 4 * N * r
    assert saved.dropout == (0.1, 1, 2, 3, 0, 0), "p, and the words of the seed, the step and the site"


@pytest.mark.parametrize(
    ("dropout", "says"),
    [
        ((1.0, 0, 0, 0), r"^p: expected 0 <= p < 1"),
        ((0.1, -1, 0, 0), r"^seed: expected an integer from 0 to 2\*\*64 - 1, got -1$"),
        ((0.1, 0, 0.5, 0), r"^step: expected an integer"),
        ((), r"^dropout: expected \(p, seed, step, site\), got 0 numbers$"),
        ((0.1,) + (0,) * 6, r"^dropout: expected \(p, seed, step, site\), got 7 numbers$"),
    ],
)
def test_a_key_that_is_none_is_refused(dropout, says):
    adapter = lx.Adapter(np.ones((1, 2)), np.ones((2, 1)))
    with pytest.raises(ConfigError, match=says):
        lx.fast.lora_linear_forward(np.ones(2), lx.Linear(np.eye(2)), adapter, scaling=1.0, dropout=dropout)


# ---- refusals ---------------------------------------------------------------------------------------------

EYE, ONE = np.eye(3), lx.Adapter(np.ones((1, 3)), np.ones((3, 1)))
REFUSED = {
    "x's width": {"x": np.ones(4)},
    "x's dtype": {"x": np.ones(3, np.float32)},
    "A's width": {"adapter": lx.Adapter(np.ones((1, 4)), np.ones((3, 1)))},
    "scaling": {"scaling": float("nan")},
    "a record": {"base": EYE},
    "the mask's shape": {"mask": np.ones(4)},
    "the mask's dtype": {"mask": np.ones(3, int)},
    "a mask for nothing": {"adapter": lx.Adapter(None, None, b=np.ones(3)), "mask": np.ones(3)},
    "no array": {"x": [1.0, 2.0, 3.0]},
    "none": {"x": None},
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_the_reference_refuses_in_the_same_words(name):
    change = {"x": np.ones(3), "base": lx.Linear(EYE), "adapter": ONE, "scaling": 1.0, "mask": None}
    change |= REFUSED[name]
    x, base, adapter, scaling, mask = change.values()
    with pytest.raises((ShapeError, DtypeError, ConfigError, TypeError)) as want:
        lx.lora_linear_forward(x, base, adapter, scaling=scaling, mask=mask)
    with pytest.raises(type(want.value), match=f"^{re.escape(str(want.value))}$"):
        lx.fast.lora_linear_forward(x, base, adapter, scaling=scaling, dropout=mask)


BACK = {
    "gy's width": {"gy": np.ones(4)},
    "gy's dtype": {"gy": np.ones(3, np.float32)},
    "another adapter": {"adapter": lx.Adapter(np.ones((2, 3)), np.ones((3, 2)))},
    "another kind of adapter": {"adapter": lx.Adapter(np.ones((1, 3)), np.ones((3, 1)), m=np.ones(3))},
    "complex": {"gy": np.ones(3, complex)},
    "a bias alone": {"adapter": lx.Adapter(None, None, b=np.ones(3))},
}


@pytest.mark.parametrize("name", BACK)
def test_backward_refuses_what_the_reference_refuses_in_the_same_words(name):
    change = {"gy": np.ones(3), "adapter": ONE} | BACK[name]
    words = []
    for engine in (lx, lx.fast):
        _, saved = engine.lora_linear_forward(np.ones(3), lx.Linear(EYE), ONE, scaling=1.0)
        with pytest.raises((ShapeError, DtypeError, ConfigError, TypeError)) as found:
            engine.lora_linear_backward(change["gy"], saved, lx.Linear(EYE), change["adapter"], scaling=1.0)
        words.append((type(found.value), str(found.value)))
    assert words[0] == words[1]


def test_what_only_the_fast_engine_refuses():
    with pytest.raises(DtypeError, match=r"^x: expected real arrays in the fast engine, got complex128$"):
        lx.fast.lora_linear_forward(np.ones(3, complex), lx.Linear(EYE), ONE, scaling=1.0)
    _, saved = lx.lora_linear_forward(np.ones(3), lx.Linear(EYE), ONE, scaling=1.0)
    with pytest.raises(
        TypeError, match=r"^saved: expected what fast.lora_linear_forward returned, got LoraLinear"
    ):
        lx.fast.lora_linear_backward(np.ones(3), saved, lx.Linear(EYE), ONE, scaling=1.0)
    bias = lx.Adapter(None, None, b=np.ones(3))
    with pytest.raises(ConfigError, match=r"^dropout: expected None beside an adapter without A"):
        lx.fast.lora_linear_forward(np.ones(3), lx.Linear(EYE), bias, scaling=1.0, dropout=(0.1, 0, 0, 0))


def test_arrays_of_another_library_are_refused():
    import array_api_strict as strict

    x, eye = strict.ones(3), strict.eye(3)
    adapter = lx.Adapter(strict.ones((1, 3)), strict.ones((3, 1)))
    with pytest.raises(
        TypeError, match=r"^x: expected a NumPy or CuPy array in the fast engine, got array_api_strict$"
    ):
        lx.fast.lora_linear_forward(x, lx.Linear(eye), adapter, scaling=1.0)


# ---- without gx -------------------------------------------------------------------------------------------


@every_kind
def test_without_gx_the_rest_is_the_same_bits(kind):
    case = layer_of(kind, 4, shape=(8, 12, 3), lead=(2, 6), dtype="float32")
    x, base, adapter = case.records()
    _, saved = lx.fast.lora_linear_forward(x, base, adapter, scaling=case.s, dropout=case.mask)
    how = {"scaling": case.s, "norm_gradient": case.full}
    _, want = lx.fast.lora_linear_backward(case.gy, saved, base, adapter, **how)
    gx, got = lx.fast.lora_linear_backward(case.gy, saved, base, adapter, **how, need_gx=False)
    assert gx is None
    for field in fields(want):
        one, other = getattr(got, field.name), getattr(want, field.name)
        assert (one is None and other is None) or one.tobytes() == other.tobytes()


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_without_gx_no_weight_is_read(form):
    """W of NaN at the time of the backward: no gradient shows it."""
    case = layer_of(Kind(True, "none", form), 4, shape=(8, 12, 3), lead=(6,), dtype="float32")
    x, base, adapter = case.records()
    _, saved = lx.fast.lora_linear_forward(x, base, adapter, scaling=case.s, dropout=case.mask)
    gone = lx.Linear(np.full_like(base.W, np.nan))
    _, g = lx.fast.lora_linear_backward(case.gy, saved, gone, adapter, scaling=case.s, need_gx=False)
    assert all(np.isfinite(value).all() for value in (g.A, g.B))


# ---- memory -----------------------------------------------------------------------------------------------


def layers(count, dtype="float32", N=96, d=256, r=4):
    """Large enough that results come from the pool; DoRA and dropout in turn."""
    for i in range(count):
        kind = Kind(i % 2 == 1, "trained", ("lora", "dora full", "lora+bB")[i % 3])
        case = layer_of(kind, i, shape=(d + 8 * (i % 2), d, r), lead=(N,), dtype=dtype)
        yield case, ((0.2, i, i, i) if case.mask is not None else None)


def forward(case, dropout):
    x, base, adapter = case.records()
    return lx.fast.lora_linear_forward(x, base, adapter, scaling=case.s, dropout=dropout)


def backward(case, saved):
    _, base, adapter = case.records()
    return lx.fast.lora_linear_backward(case.gy, saved, base, adapter, scaling=case.s, norm_gradient=case.full)


def step(case, dropout):
    y, saved = forward(case, dropout)
    return bits(y, *backward(case, saved))


def bits(y, gx, g):
    return [value.tobytes() for value in (y, gx, *(getattr(g, f.name) for f in fields(g))) if value is not None]


def test_layers_interleaved_give_the_bits_they_give_alone():
    several = list(layers(6))
    alone = [step(*one) for one in several]
    lx.fast.release()
    for _ in range(3):
        there = [(case, *forward(case, dropout)) for case, dropout in several]
        found = [bits(y, *backward(case, saved)) for case, y, saved in reversed(there)][::-1]
        assert found == alone


def test_two_threads_at_once_give_the_bits_they_give_alone():
    several = list(layers(6))
    alone = [step(*one) for one in several]
    ready = threading.Barrier(2)

    def run(first):
        ready.wait()
        return [step(*several[(first + i) % 6]) == alone[(first + i) % 6] for i in range(12)]

    with ThreadPoolExecutor(2) as pool:
        assert all(ok for oks in pool.map(run, (0, 3)) for ok in oks)


def test_what_is_held_is_not_handed_out_again():
    """y and gx of many calls stay what they were, and so does a view of a row after its array is gone."""
    case, dropout = next(layers(1))
    held = []
    for i in range(8):
        case = case._replace(at={**case.at, "x": case.at["x"] + np.float32(i)})
        y, saved = forward(case, dropout)
        held += [(y[3], y[3].copy()), (saved.z, saved.z.copy())]
        gx, _ = backward(case, saved)
        held.append((gx.T[5:], gx.T[5:].copy()))
        del y, gx, saved
    assert all(np.array_equal(value, before) for value, before in held)


def test_the_test_above_sees_a_pool_that_does_not_look(monkeypatch):
    monkeypatch.setattr(buffers, "_holders", lambda blocks, i: buffers.FREE)
    lx.fast.release()
    with pytest.raises(AssertionError):
        test_what_is_held_is_not_handed_out_again()
    lx.fast.release()


def test_memory_is_handed_out_again_once_nobody_holds_it():
    lx.fast.release()
    one = buffers.empty((300, 300), "float32")
    place, view = one.__array_interface__["data"][0], one[1:2]
    del one
    other = buffers.empty((300, 300), "float32")
    assert other.__array_interface__["data"][0] != place
    del view
    assert buffers.empty((300, 300), "float32").__array_interface__["data"][0] == place
    assert place % buffers.LINE == 0


def test_memory_kept_has_a_limit_and_can_be_let_go():
    lx.fast.release()
    held = [buffers.empty((1 << 20,), "float64") for _ in range(40)]
    assert buffers._pool.held <= buffers.LIMIT
    kept = [weakref.ref(block) for blocks in buffers._pool.blocks.values() for block in blocks]
    assert kept
    del held
    lx.fast.release()
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    assert buffers.empty((4, 4), "float32").base is None, "small arrays are NumPy's own"


def test_each_thread_has_memory_of_its_own():
    lx.fast.release()
    place = buffers.empty((300, 300), "float32").__array_interface__["data"][0]
    seen = []
    thread = threading.Thread(
        target=lambda: seen.append(buffers.empty((300, 300), "float32").__array_interface__["data"][0])
    )
    thread.start()
    thread.join()
    assert seen[0] != place


def test_a_weight_changed_in_place_never_meets_a_norm_of_before():
    """No key of an array's memory is safe: the norms are taken at each forward, and kept in saved alone."""
    case = layer_of(Kind(False, "none", "dora full"), 2, shape=(40, 70, 3), lead=(9,), dtype="float32")
    W = case.at["W"].copy()
    case = case._replace(at={**case.at, "W": W})
    assert_same_layer(case)
    W *= 1.5
    W[3] = -W[3][::-1]
    assert_same_layer(case)


def test_parameters_changed_in_place_count_at_once():
    case, dropout = list(layers(2))[1]
    at = {name: value.copy() for name, value in case.at.items()}
    case = case._replace(at=at)
    first = step(case, dropout)
    at["A"] *= np.float32(2)
    assert step(case, dropout) != first
    at["A"] /= np.float32(2)
    assert step(case, dropout) == first


def test_a_thousand_steps_do_not_drift():
    """The same call again and again, others in between: the same bits at the end as at the start."""
    several = list(layers(3, N=64, d=160))
    first = [step(*one) for one in several]
    for i in range(1000):
        step(*several[i % 3])
    assert [step(*one) for one in several] == first


def test_backward_may_be_asked_twice():
    for case, dropout in layers(3):
        y, saved = forward(case, dropout)
        assert bits(y, *backward(case, saved)) == bits(y, *backward(case, saved))


def test_no_argument_is_written_to():
    """They are write-protected in every case here, and this compares them besides."""
    for case, dropout in layers(6):
        before = {name: value.tobytes() for name, value in case.at.items()} | {"gy": case.gy.tobytes()}
        at = {name: value.copy() for name, value in case.at.items()}
        writable = case._replace(at=at)
        step(writable, dropout if dropout is None else case.mask)
        assert {name: value.tobytes() for name, value in at.items()} | {"gy": case.gy.tobytes()} == before


def test_the_engine_in_use_is_the_one_that_multiplies(monkeypatch):
    calls = []
    real = gemms.engine().multiply
    fake = gemms.Engine("fake", "", lambda *a: (calls.append(1), real(*a)))
    monkeypatch.setattr(gemms, "_first", lambda: fake)
    step(*next(layers(1)))
    assert calls
