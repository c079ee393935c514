"""Activations and erf: values against the math module, gradients by complex steps, both ends."""

from math import cosh, erf, exp, pi, sqrt, tanh

import numpy as np
import pytest
from checkers import assert_close, pairing
from strategies import LIBRARIES

from lorax_np.errors import DtypeError, ShapeError
from lorax_np.ops import activation as act
from lorax_np.ops.erf import erf as erf_of

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
UNITS = {"float32": 2.0**-24, "float64": 2.0**-53}
U = np.concatenate(
    [np.linspace(-9, 9, 181), [-700.0, 700.0, 1e-300, -1e-8, 0.0, 37.5]]
)  # 0 among the first too
GY = np.cos(np.arange(U.size) + 1.0)


def sigma(u):
    return 1 / (1 + exp(-u)) if u >= 0 else exp(u) / (1 + exp(u))


def Phi(u):
    return 0.5 * (1 + erf(u / sqrt(2)))


def inner(u):
    return sqrt(2 / pi) * (u + 0.044715 * u**3)


PAIRS = {  # forward, backward, the definition, its slope, and its terms' sizes
    "silu": (
        *(act.silu_forward, act.silu_backward, lambda u: u * sigma(u)),
        lambda u: sigma(u) + u * sigma(u) * sigma(-u),
    ),
    "gelu": (
        *(act.gelu_forward, act.gelu_backward, lambda u: u * Phi(u)),
        lambda u: Phi(u) + u * exp(-u * u / 2) / sqrt(2 * pi),
    ),
    "gelu_tanh": (
        *(act.gelu_tanh_forward, act.gelu_tanh_backward, lambda u: 0.5 * u * (1 + tanh(inner(u)))),
        lambda u: (
            0.5 * (1 + tanh(inner(u)))
            + (0.5 * u * sqrt(2 / pi) * (1 + 0.134145 * u * u) / cosh(inner(u)) ** 2 if abs(u) < 9.5 else 0)
        ),
    ),
    "relu": (act.relu_forward, act.relu_backward, lambda u: max(u, 0.0), lambda u: float(u > 0)),
}
pairs = pytest.mark.parametrize("name", PAIRS)


@libraries
@pairs
@pytest.mark.parametrize("dtype", UNITS)
def test_values_and_gradients(library, name, dtype):
    """(activation.1) to (activation.18): the definitions, at numbers that both precisions have."""
    forward, backward, value, slope = PAIRS[name]
    u, gy = (v.astype("float32").astype(dtype) for v in (U, GY))
    want, steep = (np.array([f(float(v)) for v in u]) for f in (value, slope))
    y, gu = library.host(forward(library.place(u))), library.host(backward(library.place(gy), library.place(u)))
    assert y.dtype == gu.dtype == dtype
    assert_close("y", y, want, 16 * UNITS[dtype] * np.abs(u))
    flat = 1 + np.minimum(np.abs(u), 30.0) ** 2  # what a rounding of the argument of exp or tanh costs, at most
    assert_close("gu", gu, gy * steep, 16 * UNITS[dtype] * np.abs(gy) * flat)


@libraries
@pairs
def test_gradients_are_complex_steps(library, name):
    """Each forward is analytic along a step, with no modulus in it."""
    forward, backward, *_ = PAIRS[name]
    got = library.host(backward(library.place(GY), library.place(U)))
    want = np.imag(library.host(forward(library.place(U + 1e-30j)))) / 1e-30
    assert_close("gu", got, GY * want, 64 * EPS * np.abs(GY) * (1 + np.minimum(np.abs(U), 30.0)))


@libraries
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_the_slope_comes_with_the_value(library, name):
    """(activation.12), (activation.16), (activation.25), (activation.26): the same bits as apart."""
    forward, backward, *_ = PAIRS[name]
    y, slope = getattr(act, f"{name}_sloped")(library.place(U))
    assert np.array_equal(library.host(y), library.host(forward(library.place(U))))
    gu = library.host(backward(library.place(GY), library.place(U)))
    assert np.array_equal(GY * library.host(slope), gu)


@libraries
@pytest.mark.parametrize("name", PAIRS)
def test_more_entries_than_a_block(library, name, monkeypatch):
    """No bit depends on blocks, of which the last is short; arrays may lie in any order."""
    rng = np.random.default_rng(1)
    u, gy = rng.standard_normal((2, 7, 3, 11)).transpose(0, 2, 3, 1)  # strided
    forward, backward, *_ = PAIRS[name]
    both = getattr(act, f"{name}_sloped", lambda v: (forward(v),))
    calls = [lambda v, g: (forward(v),), lambda v, g: (backward(g, v),), lambda v, g: both(v)]
    place, host = library.place, library.host
    for dtype in UNITS:
        v, g = place(u.astype(dtype)), place(gy.astype(dtype))
        whole = [host(x) for call in calls for x in call(v, g)]
        with monkeypatch.context() as patch:
            patch.setattr("lorax_np.blocks.BLOCK", 10)
            parts = [host(x) for call in calls for x in call(v, g)]
        for one, other in zip(whole, parts, strict=True):
            assert one.shape == other.shape == (3, 11, 7)
            assert one.dtype == other.dtype == dtype
            assert np.array_equal(one, other)


@libraries
def test_the_gated_unit(library):
    """(activation.6) to (activation.8)."""
    rng, place, host = np.random.default_rng(0), library.place, library.host
    u, w, gy = 3 * rng.standard_normal((3, 4, 5))
    y, saved = act.swiglu_forward(place(u), place(w))
    gu, gw = (host(g) for g in act.swiglu_backward(place(gy), saved))
    silu = np.vectorize(PAIRS["silu"][2])(u)
    assert_close("y", host(y), silu * w, 8 * EPS * np.abs(u * w))
    assert_close("gw", gw, gy * silu, 8 * EPS * np.abs(gy * u))
    assert_close(
        "gu", gu, gy * w * np.vectorize(PAIRS["silu"][3])(u), 16 * EPS * np.abs(gy * w) * (1 + np.abs(u))
    )
    empty = place(np.zeros((0, 5)))
    y, saved = act.swiglu_forward(empty, empty)
    assert [g.shape for g in (y, *act.swiglu_backward(empty, saved))] == [(0, 5)] * 3


@libraries
def test_tanh(library):
    """(activation.19) and (activation.20), to where tanh rounds to 1."""
    u = np.linspace(-20, 20, 81)
    y = act.tanh_forward(library.place(u))
    gu = library.host(act.tanh_backward(library.place(np.ones(81)), y))
    assert_close("y", library.host(y), np.tanh(u), 2 * EPS)
    assert_close("gu", gu, 1 / np.cosh(u) ** 2, 4 * EPS)


@pytest.mark.parametrize("dtype", UNITS)
def test_sigmoids_on_both_sides(dtype):
    """(activation.3): σ(−u) = 1 − σ(u) to its own last digits, and no overflow."""
    u = np.array([-1e4, -80.0, -30.0, -1.0, -0.0, 0.0, 1.0, 30.0, 80.0, 1e4], dtype)
    want = np.array([sigma(float(v)) if abs(v) < 700 else float(v > 0) for v in u])
    assert_close("σ(u)", act.sigmoid(u), want, 8 * UNITS[dtype] * want)
    gu = act.silu_backward(np.ones(10, dtype), u)
    slope = np.array([PAIRS["silu"][3](float(v)) if abs(v) < 700 else float(v > 0) for v in u])
    assert_close("gu", gu, slope, 8 * UNITS[dtype] * np.abs(slope) * (1 + (np.abs(slope) < 1e-9) * 2))


def test_what_is_not_a_number_stays_so():
    nan = np.array([np.nan])
    one = np.ones(1)
    for forward, backward, *_ in PAIRS.values():
        assert np.isnan(forward(nan)[0])
        assert np.isnan(backward(nan, one)[0])
    assert np.isnan(act.silu_backward(one, nan)[0])
    assert np.isnan(act.gelu_backward(one, nan)[0])
    assert act.relu_backward(one, 0 * one)[0] == 0.0


def test_what_does_not_fit_is_refused():
    for call in (*(backward for _, backward, *_ in PAIRS.values()), act.tanh_backward, act.swiglu_forward):
        with pytest.raises(ShapeError, match=r"set by (gy|u), got \(3,\)$"):
            call(np.ones(2), np.ones(3))
        with pytest.raises(DtypeError, match=r"expected float64, set by (gy|u), got float32$"):
            call(np.ones(2), np.ones(2, "float32"))


# ---- erf ---------------------------------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize(("dtype", "units"), [("float64", 2), ("float32", 2.5)])
def test_erf_to_its_last_digits(library, dtype, units):
    """(activation.21) to (activation.24): against the C library's, which is within one unit in float64."""
    rng = np.random.default_rng(0)
    u = np.concatenate(
        [np.linspace(-7, 7, 4001), rng.uniform(-1.2, 1.2, 4001), 10.0 ** rng.uniform(-30, 1, 1000)]
    )
    edges = [1.0, np.nextafter(np.asarray(1.0, dtype), 0), 3.95, 4.2, 5.95, 1e4, np.inf, 0.0]
    u = np.concatenate([u, edges, np.negative(edges)]).astype(dtype)
    got = library.host(erf_of(library.place(u)))
    want = np.array([erf(float(t)) for t in u])
    assert got.dtype == dtype
    assert_close("erf", got, want, units * np.abs(np.spacing(want.astype(dtype))))
    assert np.abs(got).max() == 1.0
    assert np.array_equal(library.host(erf_of(library.place(-u))), -got)


@libraries
def test_erf_s_slope(library):
    """Along a complex step erf′ = 2e^−u²/√π, with the error of the fit's own slope."""
    u = np.linspace(-5.9, 5.9, 801)
    slope = np.imag(library.host(erf_of(library.place(u + 1e-30j)))) / 1e-30
    assert_close("slope", slope, 2 / sqrt(pi) * np.exp(-u * u), 16 * EPS)
    step = np.imag(library.host(erf_of(library.place(np.full(3, 0.3) + 1e-30j * np.arange(3))))) / 1e-30
    assert pairing(step[1:], [2.0, -1.0]) == 0.0  # linear in the step
