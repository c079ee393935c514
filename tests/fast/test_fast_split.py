"""float32 as sums of bfloat16: parts, bounds of the products, and that nobody meets them unasked."""

from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, distribution

import ml_dtypes
import numpy as np
import pytest

import lorax_np as lx
from lorax_np.errors import BackendError
from lorax_np.fast import blas, engines, libraries, split
from lorax_np.fast import gemm as module
from lorax_np.fast.gemm import gemm, gemm_stored
from lorax_np.fast.split import mixed, parts, split3

U = 2.0**-24
TINY = 2.0**-126  # a matrix unit takes what is smaller for 0


def bf16(values):
    return values.astype(ml_dtypes.bfloat16)


def exact(a, b):
    """In float64, where products of float32 are exact and sums nearly."""
    return a.astype("float64") @ b.astype("float64")


def plain(a, b, out, alpha, beta):
    """A product in float32, α and β applied once each."""
    out[...] = np.float32(alpha) * (a @ b) + (np.float32(beta) * out if beta else np.float32(0))


def widened(a, b, out, alpha, beta):
    """A stand-in for a matrix unit: products of bfloat16 exact in float32, sums in float32."""
    assert a.dtype == b.dtype == ml_dtypes.bfloat16
    plain(a.astype("float32"), b.astype("float32"), out, alpha, beta)


def mkls():
    """MKL's own product, which computes without a matrix unit as well, only slower; or why there is none."""
    try:
        return libraries._bf16(libraries._mkl_library()[0])
    except BackendError as error:
        return str(error)


STORED = {"a stand-in": widened, "mkl": mkls()}
every_unit = pytest.mark.parametrize("unit", STORED)


def product_of(unit):
    if isinstance(STORED[unit], str):
        pytest.skip(f"{unit}: {STORED[unit]}")
    return STORED[unit]


def floats(rng, *shape, spread=20):
    """float32 numbers of all bits, of sizes from 2⁻ˢ to 2ˢ."""
    values = rng.uniform(1, 2, shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)
    return (values * rng.choice([-1, 1], shape)).astype("float32")


@pytest.fixture(autouse=True)
def narrow(monkeypatch, request):
    """Products of any width are split, a few rows at a time; but not in the test that is about the width."""
    if "width" not in request.node.name:
        monkeypatch.setattr(split, "WIDE", 1)
    monkeypatch.setattr(split, "ENTRIES", 120)


# ---- the parts --------------------------------------------------------------------------------------------


def test_three_parts_are_the_number_itself():
    """(speed.18): over all exponents from which no part falls below the range."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 400_000, dtype=np.uint32).view("float32")
    x = x[np.isfinite(x) & (np.abs(x) >= 2.0**-103) & (np.abs(x) < float(ml_dtypes.finfo("bfloat16").max))]
    assert len(x) > 300_000
    x = x[:300_000].reshape(-1, 40)
    pieces = parts(x, 3)
    assert len(pieces) == 3
    assert np.array_equal(sum(piece.astype("float64") for piece in pieces), x.astype("float64"))
    two = x - pieces[0].astype("float64") - pieces[1].astype("float64")
    assert (np.abs(pieces[1].astype("float64")) <= (2.0**-8 + 2.0**-15) * np.abs(x)).all()
    assert (np.abs(two) <= 2.0**-16 * np.abs(x.astype("float64"))).all()
    assert (np.abs(two) > 2.0**-18 * np.abs(x.astype("float64"))).any(), "two parts are not enough"


def test_numbers_below_the_range_lose_less_than_its_smallest():
    x = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view("float32")
    x = x[np.abs(x) < 2.0**-103][None]
    left = x.astype("float64") - sum(piece.astype("float64") for piece in parts(x, 3))
    assert (np.abs(left) <= 2.0**-134).all()


def test_what_bfloat16_holds_already_is_one_product():
    calls = []

    def stored(*how):
        calls.append(1)
        widened(*how)

    for x in (bf16(floats(np.random.default_rng(0), 5, 6)).astype("float32"), np.zeros((5, 6), "float32")):
        calls.clear()
        out = np.full((5, 6), np.nan, "float32")
        assert mixed(stored, x, bf16(np.eye(6)), out, 1.0, 0.0)
        assert np.array_equal(out, x)
        assert len(calls) == 1


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 3.4e38])
def test_what_is_not_finite_or_rounds_to_infinity_has_no_parts(bad):
    assert parts(np.array([[1.0, bad], [1.0, 1.0]], "float32"), 3) is None


# ---- float32 with a bfloat16 weight -----------------------------------------------------------------------


def mixed_bound(a, b, out, alpha, beta):
    """(speed.23)"""
    terms = abs(alpha) * exact(np.abs(a), np.abs(b)) * (1 + 2.0**-6) + abs(beta) * np.abs(out.astype("float64"))
    k = a.shape[1]
    return (k + 4) * U / (1 - (k + 4) * U) * terms + 6 * k * TINY * max(1, abs(alpha)) * (1 + np.abs(b).max())


def mixed_faults(unit, change=lambda pieces: pieces, k=9, seed=0):
    """Whether a product of float32 and bfloat16 passes its bound in an entry; `change` plants a fault."""
    rng = np.random.default_rng(seed)
    a, b, out = floats(rng, 7, k), bf16(floats(rng, k, 5)), floats(rng, 7, 5)
    wide = b.astype("float32")
    for alpha, beta in ((1.0, 0.0), (-0.5, 1.0), (3.0, 0.25)):
        got, real = out.copy(), split.parts
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(split, "parts", lambda x, n, real=real: change(real(x, n)))
            assert mixed(unit, a, b, got, alpha, beta)
        want = alpha * exact(a, wide) + beta * out.astype("float64")
        if not (np.abs(got - want) <= mixed_bound(a, wide.astype("float64"), out, alpha, beta)).all():
            return True
    return False


@every_unit
@pytest.mark.parametrize("k", [1, 9, 300])
def test_float32_with_a_bfloat16_weight_is_as_accurate_as_float32(unit, k):
    """(speed.19) within (speed.23), over draws; β = 0 does not read what is there."""
    multiply = product_of(unit)
    assert not any(mixed_faults(multiply, k=k, seed=seed) for seed in range(20))
    out = np.full((2, 3), np.nan, "float32")
    assert mixed(multiply, np.ones((2, 4), "float32"), bf16(np.ones((4, 3))), out, 1.0, 0.0)
    assert (out == 4).all()


@pytest.mark.parametrize("left", [1, 2])
def test_fewer_parts_are_refused(left):
    """One part is x rounded to bfloat16, two keep 16 bits: neither is float32."""
    assert mixed_faults(widened, lambda pieces: pieces[:left])


def test_what_is_not_finite_is_left_to_float32():
    """A part of 0 times infinity would be NaN where float32 has infinity; nothing has been written."""
    for x, w in ((np.inf, 1.0), (np.nan, 1.0), (3.4e38, 1.0), (1.0, np.inf), (1.0, np.nan)):
        out = np.full((1, 1), 5.0, "float32")
        assert not mixed(widened, np.full((1, 1), x, "float32"), bf16(np.full((1, 1), w)), out, 1.0, 0.0)
        assert out == 5


def test_a_product_too_narrow_in_width_is_left_to_float32():
    """Splitting costs 2.6 ns an entry of a, (speed.24), which three products of few columns do not save."""
    a, out = np.ones((4, 5), "float32"), np.ones((4, split.WIDE), "float32")
    assert mixed(widened, a, bf16(np.ones((5, split.WIDE))), out, 1.0, 0.0)
    assert (out == 5).all()
    assert not mixed(widened, a, bf16(np.ones((5, split.WIDE - 1))), out[:, 1:], 1.0, 0.0)


def test_parts_are_the_same_of_any_layout():
    x = floats(np.random.default_rng(0), 14, 10)
    want = parts(x, 3)
    for other in (
        np.asfortranarray(x),
        np.repeat(x, 2, axis=1)[:, ::2],
        x[::-1, ::-1].copy()[::-1, ::-1],
        x.T.copy().T,
    ):
        assert all(np.array_equal(p, q) for p, q in zip(parts(other, 3), want, strict=True))


# ---- both split in two ------------------------------------------------------------------------------------


def split_bound(a, b, out, alpha, beta):
    """(speed.21)"""
    size, k = exact(np.abs(a), np.abs(b)), a.shape[1]
    gamma = (k + 4) * U / (1 - (k + 4) * U)
    terms = abs(alpha) * size * (1 + 2.0**-6) + abs(beta) * np.abs(out.astype("float64"))
    return (
        (3 + 2.0**-6) * 2.0**-16 * abs(alpha) * size + gamma * terms + 6 * k * TINY * (1 + np.abs(b).max()) ** 2
    )


def split_faults(unit, dropped=None, seed=0):
    """Whether the three products pass their bound in an entry, whole or without one of them.

    The tails of all entries have one sign, so that what is left out adds up.
    """
    rng = np.random.default_rng(seed)
    a, b = (
        ((1 + rng.uniform(0.7, 0.99, shape) * 2.0**-8) * 2.0 ** rng.integers(-9, 10, shape)).astype("float32")
        for shape in ((130, 140), (140, 150))
    )
    out, calls = floats(rng, 130, 150), []

    def stored(x, w, *how):
        calls.append(1)
        x = x * bf16(np.zeros(())) if len(calls) - 1 == dropped else x
        unit(x, w, *how)

    got = out.copy()
    split3(stored, None)(a, b, got, -2.0, 0.5)
    assert len(calls) == 3
    want = -2 * exact(a, b) + 0.5 * out.astype("float64")
    return not (np.abs(got - want) <= split_bound(a, b, out, -2.0, 0.5)).all()


@every_unit
def test_three_products_keep_to_their_bound(unit):
    """(speed.20) within (speed.21)."""
    multiply = product_of(unit)
    assert not any(split_faults(multiply, seed=seed) for seed in range(5))


@pytest.mark.parametrize("dropped", range(3))
def test_a_product_forgotten_is_refused(dropped):
    assert split_faults(widened, dropped)


def test_three_products_are_not_float32():
    """What the name warns of: errors thirty times those of float32, so no profile of float32 is claimed."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((130, 140)).astype("float32"), rng.standard_normal((140, 150)).astype("float32")
    got, want = np.empty((130, 150), "float32"), exact(a, b)
    split3(widened, None)(a, b, got, 1.0, 0.0)
    size = np.linalg.norm(want)
    assert 30 * U < np.linalg.norm(got - want) / size < 5e-5


def test_small_products_float64_and_what_is_not_finite_are_plain():
    def refused(*how):
        raise AssertionError("split")

    multiply = split3(refused, plain)
    whole = np.ones((split.LEAST, split.LEAST), "float32")
    for a, b in (
        (whole[:, :-1], whole[:-1]),
        (whole[:-1], whole),
        (whole, whole[:, :-1]),
        (whole.astype("float64"), whole.astype("float64")),
        (whole * np.inf, whole),
        (whole, whole * np.float32(3.4e38)),
    ):
        out = np.empty((len(a), b.shape[1]), a.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            multiply(a, b, out, 1.0, 0.0)
            assert np.array_equal(out, a @ b)


# ---- who chooses ------------------------------------------------------------------------------------------


def unit_of(monkeypatch, calls):
    """An engine whose processor has a matrix unit, as far as gemm knows."""

    def stored(*how):
        calls.append(how[2].shape)
        widened(*how)

    monkeypatch.setattr(module, "_first", lambda: libraries.Engine("fake", "", plain, stored))


def test_what_float32_meets_of_a_bfloat16_weight_is_by_the_unit(monkeypatch):
    """DoRA of bfloat16 with an adapter in float32: y = x Wᵀ + c∘(xd Wᵀ) + ..., gx = (gy∘k)W + ....

    x takes one product, xd is x in float32 and one part, gy∘k is three.
    """
    calls, rng = [], np.random.default_rng(0)
    W, x, gy = (bf16(floats(rng, *shape, spread=3)) for shape in ((30, 40), (20, 40), (20, 30)))
    m = rng.uniform(1, 2, 30).astype("float32")
    base = lx.Linear(W)
    adapter = lx.Adapter(floats(rng, 4, 40, spread=3), floats(rng, 30, 4, spread=3), m=m)

    def step():
        y, saved = lx.fast.lora_linear_forward(x, base, adapter, scaling=0.5)
        gx, g = lx.fast.lora_linear_backward(gy, saved, base, adapter, scaling=0.5)
        return [value.astype("float64") for value in (y, gx, g.A, g.B, g.m)]

    with blas("numpy"):
        want = step()
    unit_of(monkeypatch, calls)
    got = step()
    assert calls == [(20, 30)] * 2 + [(20, 40)] * 3
    for one, other, unit in zip(got, want, (2.0**-8, 2.0**-8, U, U, U), strict=True):
        # a rounding to bfloat16 may fall the other way; of float32 there are fewer than 40 terms in any order
        assert np.abs(one - other).max() <= (2 * unit + 80 * U) * np.abs(other).max() * 8


def test_other_dtypes_and_processors_do_not(monkeypatch):
    one = np.ones((2, 2), "float32")
    with blas("numpy"):
        assert not gemm_stored(one, bf16(one), one.copy())
    calls = []
    unit_of(monkeypatch, calls)
    for a, b, out in (
        (one, one, one),
        (bf16(one), one, one),
        (one.astype("float16"), bf16(one), one),
        (one, bf16(one), one.astype("float64")),
    ):
        assert not gemm_stored(a, b, out.copy())
    assert not calls


def test_nothing_chooses_the_coarse_engine_unasked(monkeypatch):
    """Not by order, not where it alone works, and not within a processor that has a matrix unit."""
    assert "mkl-split3" not in engines()
    assert not set(libraries.COARSE) & set(libraries.MAKERS)
    assert module.engine().name != "mkl-split3"
    for name in engines():
        with blas(name) as engine:
            assert engine.name == name
    calls = []
    unit_of(monkeypatch, calls)
    a = floats(np.random.default_rng(0), 200, 200)
    out = np.empty_like(a)
    gemm(a, a, out)
    assert not calls, "float32 by float32 is one product of float32"


def test_the_coarse_engine_by_its_name():
    """On this processor, whatever it has: within its bound, and four times and more the error of float32."""
    try:
        distribution("mkl")
    except PackageNotFoundError:
        with pytest.raises(
            BackendError, match=r"which work here, got mkl-split3: the package mkl is not installed"
        ):
            blas("mkl-split3").__enter__()
        pytest.skip("the package mkl is not installed")
    rng = np.random.default_rng(0)
    a, b, out = (
        floats(rng, 150, 160, spread=3),
        floats(rng, 160, 170, spread=3),
        floats(rng, 150, 170, spread=1),
    )
    with blas("mkl-split3") as engine:
        assert "three products of bfloat16" in engine.what
        assert ("slow" in engine.what) != libraries.has_matrix_unit()
        assert lx.backend_info()["gemm"].startswith("mkl-split3: MKL ")
        got = out.copy()
        gemm(a, b, got, 2.0, 0.5)
    want = 2 * exact(a, b) + 0.5 * out.astype("float64")
    error = np.abs(got - want)
    assert (error <= split_bound(a, b, out, 2.0, 0.5)).all()
    with blas("mkl") if "mkl" in engines() else nullcontext():
        gemm(a, b, out, 2.0, 0.5)
    assert np.linalg.norm(out - want) < np.linalg.norm(error) / 4


def test_a_library_that_multiplies_bfloat16_wrongly_is_not_used(monkeypatch):
    """An MKL without the function, and one whose function is another: the reason is told."""

    class Without:
        pass

    assert "cblas_gemm_bf16bf16f32" in libraries._bf16(Without())
    for wrong in (lambda *how: None, lambda a, b, out, alpha, beta: widened(a, b, out, 1.0, beta)):
        monkeypatch.setattr(libraries, "by_bf16", lambda shared, wrong=wrong: wrong)
        assert libraries._bf16(None) == "a product of small whole numbers came out wrong in bfloat16"
    monkeypatch.setattr(libraries, "by_bf16", lambda shared: widened)
    assert libraries._bf16(None) is widened
