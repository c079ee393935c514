"""Large products in parts by several threads: values through views, bits, and what goes wrong."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from test_fast_gemm import LAYOUTS, laid
from test_fast_llama import Case

from lorax_np.fast import parts
from lorax_np.fast.gemm import engine, gemm
from lorax_np.fast.llama import threads
from lorax_np.fast.parts import in_parts, multiply_parts


@pytest.fixture
def seen(monkeypatch):
    """Every product is large; into how many parts each was cut."""
    found = []

    def watched(multiply, count, *given):
        found.append(count)
        multiply_parts(multiply, count, *given)

    monkeypatch.setattr(parts, "LEAST", 1)
    monkeypatch.setattr("lorax_np.fast.gemm.multiply_parts", watched)
    return found


@given(
    seed=seeds,
    sizes=st.tuples(*[st.integers(1, 70)] * 3),
    how=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    count=st.integers(2, 5),
    alpha=st.sampled_from([1.0, -0.5]),
    beta=st.sampled_from([0.0, 1.0, -2.0]),
)
def test_whole_numbers_come_out_exactly_in_any_number_of_parts(seed, sizes, how, count, alpha, beta):
    (m, k, n), rng = sizes, np.random.default_rng(seed)
    a, b, c = (rng.integers(-8, 9, shape).astype("float32") for shape in ((m, k), (k, n), (m, n)))
    a, b, out = laid(a, how[0]), laid(b, how[1]), laid(c, "rows" if how[2] == "repeated" else how[2])
    want, around = alpha * (a @ b) + beta * out, None if out.base is None else np.isnan(out.base).sum()
    multiply_parts(engine().multiply, count, a, b, out, alpha, beta)
    assert np.array_equal(out, want)
    assert out.base is None or np.isnan(out.base).sum() == around


@pytest.mark.parametrize("sizes", [(256, 576, 1008), (1008, 48, 521), (16, 1009, 1100), (301, 300, 602)])
def test_parts_have_the_bits_of_one_thread(sizes):
    """So that no gradient depends on how many threads there are. Of sizes within a kernel's step, too.

    It is what kernels of AVX-512 do; those for Haswell end a matrix by other sums, to rounding.
    """
    (m, k, n), rng, control = sizes, np.random.default_rng(3), engine().threads
    if control is None or engine().name != "openblas":
        pytest.skip("this is what OpenBLAS does; another library is used here")
    before = control.get()
    control.set(1)
    try:
        a, b = (rng.standard_normal(shape, "float32") for shape in ((m, k), (n, k)))
        whole, cut = np.empty((m, n), "float32"), np.empty((m, n), "float32")
        gemm(a, b.T, whole)
        with in_parts(2):
            assert parts.parts_of(a, b.T) == 2
            gemm(a, b.T, cut)
        off = k * 2.0**-23 * np.abs(a) @ np.abs(b).T  # of any order of k sums
        assert np.all(np.abs(whole - cut) <= off)
        exact = {"SkylakeX", "Cooperlake", "SapphireRapids"} & set(engine().what.split())
        assert np.array_equal(whole, cut) or not exact
    finally:
        control.set(before)


def test_one_worker_has_the_threads_that_are_left(seen):
    """Of a BLAS with three: a batch of one sequence uses them in each product, one of two has workers."""
    control = engine().threads
    if control is None:
        pytest.skip("this BLAS cannot be told its threads")
    case, before = Case(), control.get()
    plan = case.plan(workers=2)
    ids, starts, index, labels, n = case.batch
    one = ids[: starts[1]], starts[:2], index[:1], labels[: starts[1]]
    try:
        control.set(1)
        want = plan.loss_and_gradients(case.adapters, {}, *one, n=n, dropout=(5, 6))
        assert not seen
        control.set(3)
        found = plan.loss_and_gradients(case.adapters, {}, *one, n=n, dropout=(5, 6))
        assert control.get() == 3
        assert set(seen) == {3}
        assert found[0] == pytest.approx(want[0], rel=1e-12)
        for name, g in want[1].items():
            for a, b in ((found[1][name].A, g.A), (found[1][name].B, g.B)):
                assert np.abs(a - b).max() <= 1e-11 * np.abs(b).max()
        seen.clear()
        plan.loss_and_gradients(case.adapters, {}, *case.batch[:4], n=n)
        assert not seen
    finally:
        control.set(before)


def test_small_products_are_not_cut():
    a, b = np.ones((250, 180)), np.ones((180, 180))
    with in_parts(4):
        assert parts.parts_of(a, b) == 1
        assert parts.parts_of(np.ones((500, 1000)), np.ones((1000, 40))) == 2
    assert parts.parts_of(np.ones((500, 1000)), np.ones((1000, 40))) == 1


@pytest.mark.parametrize("broken", [28, 32])
def test_what_one_part_raises_comes_out_when_all_have_ended(broken):
    ended = []

    def multiply(a, b, out, alpha, beta):
        if len(a) == broken:
            raise ValueError("no")
        time.sleep(0.05)
        ended.append(len(a))

    with pytest.raises(ValueError, match="no"):
        multiply_parts(multiply, 2, np.ones((60, 3)), np.ones((3, 2)), np.zeros((60, 2)), 1.0, 0.0)
    assert ended == [60 - broken]


def test_whoever_shares_work_out_has_the_threads_that_are_left(seen):
    control = engine().threads
    if control is None:
        pytest.skip("this BLAS cannot be told its threads")
    before = control.get()
    control.set(2)
    try:
        a, b, out = np.ones((40, 3)), np.ones((3, 2)), np.zeros((40, 2))
        assert threads.in_threads(lambda who, given: gemm(a, b, out), [None]) == [None]
        assert seen == [2]
        threads.in_threads(lambda who, given: gemm(a, b, out), [None, None])
        assert seen == [2]
    finally:
        control.set(before)
