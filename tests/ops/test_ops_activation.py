"""Activations and erf: values against the math module, gradients by complex steps."""

import math

import numpy as np
import pytest
from checkers import assert_close
from strategies import LIBRARIES

from lorax_np.ops import activation as act
from lorax_np.ops.erf import erf

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
EPS = 2.0**-52
U = np.concatenate([np.linspace(-9, 9, 181), [-700.0, 700.0, 1e-300, -1e-8]])
PAIRS = {
    "silu": (act.silu_forward, act.silu_backward),
    "gelu": (act.gelu_forward, act.gelu_backward),
    "gelu_tanh": (act.gelu_tanh_forward, act.gelu_tanh_backward),
    "relu": (act.relu_forward, act.relu_backward),
}


@libraries
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_complex_steps(library, name):
    forward, backward = PAIRS[name]
    gy = np.cos(np.arange(len(U)) + 1.0)
    got = backward(library.place(gy), library.place(U))
    want = np.imag(library.host(forward(library.place(U + 1e-30j)))) / 1e-30
    assert_close("gu", library.host(got), gy * want, 16 * EPS * np.abs(gy) * (1 + np.abs(U)))


@libraries
def test_swiglu(library):
    rng = np.random.default_rng(0)
    u, w, gy = (rng.standard_normal((4, 5)) for _ in range(3))
    place, host = library.place, library.host
    y, saved = act.swiglu_forward(place(u), place(w))
    gu, gw = act.swiglu_backward(place(gy), saved)
    assert_close("y", host(y), u / (1 + np.exp(-u)) * w, 8 * EPS * np.abs(u * w))
    up = np.imag(host(act.swiglu_forward(place(u + 1e-30j), place(w))[0])) / 1e-30
    assert_close("gu", host(gu), gy * up, 16 * EPS * np.abs(gy * w) * (1 + np.abs(u)))
    assert_close("gw", host(gw), gy * u / (1 + np.exp(-u)), 8 * EPS * np.abs(gy * u))


@pytest.mark.parametrize(("dtype", "ulps"), [("float64", 2), ("float32", 3)])
def test_erf_to_a_few_last_digits(dtype, ulps):
    u = np.linspace(-7, 7, 5001).astype(dtype)
    got, want = erf(u), np.array([math.erf(float(t)) for t in u])
    assert got.dtype == dtype
    assert_close("erf", got, want, ulps * np.abs(np.spacing(want.astype(dtype))))


def test_tanh_and_ends():
    y = act.tanh_forward(np.array([0.3, 20.0]))
    assert_close("gu", act.tanh_backward(np.ones(2), y), 1 / np.cosh([0.3, 20.0]) ** 2, 4 * EPS)
    assert np.isnan(act.relu_forward(np.array([np.nan]))[0])
    assert act.relu_backward(np.ones(1), np.zeros(1))[0] == 0.0
    assert act.sigmoid(np.array([-800.0, 800.0], "float32")).tolist() == [0.0, 1.0]
