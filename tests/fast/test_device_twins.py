"""Operations of ops/ by kernels of a device, on a stand-in for CuPy: the reference's numbers."""

import sys

import numpy as np
import pytest
import standin
from checkers import EPS

from lorax_np import ops
from lorax_np.errors import DtypeError, ShapeError
from lorax_np.fast.device import ON_DEVICE, source, twins
from lorax_np.ops import activation
from lorax_np.ops.norm import NormSaved

pytestmark = standin.needs_compiler
CASES = {
    "whole": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "window, whole": {"causal": False, "window": 9},
}
DTYPES = "float64", "float32"


@pytest.fixture
def cupy(monkeypatch):
    module = standin.module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def near(got, want, dtype, units):
    """Within so many roundings of the largest entry."""
    assert got.shape == want.shape
    assert got.dtype == np.dtype(dtype)
    assert np.abs(got.host - want).max(initial=0) <= units * EPS[dtype] * np.abs(want).max(initial=1)


def both(f, arguments, **how):
    """What the twin gives on the device, and the reference in float64 on the host."""
    there = [standin.ndarray(x.copy()) for x in arguments]
    return ON_DEVICE[f](*there, **how), f(*(x.astype("float64") for x in arguments), **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_references(cupy, name, dtype):
    """40 queries are two tiles, and one of 5 rows has empty ones; scores of order 1, so 64 roundings."""
    rng, starts = np.random.default_rng(0), [0, 40, 40, 45]
    for H, K, D in ((4, 2, 6), (2, 2, 34)):
        how = {"starts": starts, "scale": D**-0.5, **CASES[name]}
        q, k, v = (rng.standard_normal((45, heads, D)).astype(dtype) for heads in (H, K, K))
        (o, saved), (right, kept) = both(ops.attention_forward, (q, k, v), **how)
        near(o, right, dtype, 64)
        near(saved.L, kept.L, dtype, 64)
        go = rng.standard_normal(o.shape)
        found = ON_DEVICE[ops.attention_backward](standin.ndarray(go.astype(dtype)), saved, **how)
        for got, want in zip(found, ops.attention_backward(go, kept, **how), strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                near(got, want, dtype, 256)


def test_attention_refuses_what_the_reference_refuses(cupy):
    q = standin.ndarray(np.zeros((3, 2, 4)))
    for starts in ([0, 2], [0, 2, 1, 3], []):
        with pytest.raises(ShapeError, match="starts: expected bounds"):
            ON_DEVICE[ops.attention_forward](q, q, q, starts=starts, scale=1.0, causal=True)
    with pytest.raises(ShapeError, match="key_starts: expected bounds"):
        ON_DEVICE[ops.attention_forward](q, q[:2], q[:2], starts=[0, 3], scale=1.0, causal=True)
    _, saved = ON_DEVICE[ops.attention_forward](q, q, q, starts=[0, 3], scale=1.0, causal=True)
    for go, error in ((np.zeros((3, 2, 5)), ShapeError), (np.zeros((3, 2, 4), "float32"), DtypeError)):
        with pytest.raises(error):
            ON_DEVICE[ops.attention_backward](standin.ndarray(go), saved, starts=[0, 3], scale=1.0, causal=True)
    with pytest.raises(ShapeError, match="k"):
        ON_DEVICE[ops.attention_forward](q, q[:, :, :2], q, starts=[0, 3], scale=1.0, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 300), (0, 4)])
def test_norms_are_the_references(cupy, shape, dtype):
    rng = np.random.default_rng(0)
    x, gy = (3 + rng.standard_normal(shape).astype(dtype) for _ in range(2))
    w, b = rng.standard_normal((2, shape[-1])).astype(dtype)
    for forward, backward, more in (
        (ops.layer_norm_forward, ops.layer_norm_backward, (w, b)),
        (ops.rms_norm_forward, ops.rms_norm_backward, (w,)),
    ):
        (y, saved), (right, kept) = both(forward, (x, *more), eps=1e-5)
        near(y, right, dtype, 64)
        near(saved.h, kept.h, dtype, 64)
        near(saved.rho, kept.rho, dtype, 64)
        got = ON_DEVICE[backward](standin.ndarray(gy), saved, standin.ndarray(w))
        near(got, backward(gy.astype("float64"), kept, w.astype("float64")), dtype, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [activation.gelu_sloped, activation.gelu_tanh_sloped])
def test_activations_are_the_references(cupy, f, dtype):
    u = np.concatenate([np.linspace(-12, 12, 601), [0.0, -50.0, 50.0]]).astype(dtype).reshape(4, 151)
    for got, want in zip(*both(f, (u,)), strict=True):
        near(got, want, dtype, 64)  # a rounding of tanh counts ten times in the slope


def test_a_view_with_gaps_is_read_as_it_is(cupy):
    x = np.random.default_rng(0).standard_normal((4, 10))
    wide, w = standin.ndarray(x), standin.ndarray(np.ones(5))
    y, _ = twins.rms_norm_forward(wide[:, ::2], w, eps=1e-5)
    near(y, ops.rms_norm_forward(x[:, ::2], np.ones(5), eps=1e-5)[0], "float64", 64)


FAULTS = {
    "no mean": ("mean = summed(mean, part) / d;\n  }", "}"),
    "the mean of the gradient": ("- mean - h[row + j] * dot", "- h[row + j] * dot"),
    "a slope": ("Phi + v *", "Phi - v *"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(cupy, fault, monkeypatch):
    right, wrong = FAULTS[fault]
    assert right in source.SOURCE
    monkeypatch.setattr(source, "SOURCE", source.SOURCE.replace(right, wrong))
    rng = np.random.default_rng(0)
    x, w, b = (3 + rng.standard_normal(shape) for shape in ((3, 5), 5, 5))
    (y, saved), (want, kept) = both(ops.layer_norm_forward, (x, w, b), eps=1e-5)
    back = twins.layer_norm_backward(y, NormSaved(*saved), standin.ndarray(w))
    gaps = [
        np.abs(y.host - want).max(),
        np.abs(back.host - ops.layer_norm_backward(want, kept, w)).max(),
        np.abs(twins.gelu_sloped(standin.ndarray(x))[1].host - activation.gelu_sloped(x)[1]).max(),
    ]
    assert max(gaps) > 1e-3
