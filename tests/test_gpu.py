"""On a real device: CuPy gives what NumPy gives, a step never waits for the host, masks are the same bits."""

import importlib

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.backend import namespace
from lorax_np.fast import gpu, gpu_arrays, gpu_graph
from lorax_np.random import DropoutKey
from lorax_np.verify import subjects
from lorax_np.verify.verdict import verify

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy():
    try:
        return namespace("cupy")
    except lx.BackendError as error:
        pytest.skip(f"not run on a GPU: {error}")


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
def test_the_reference_on_the_device_passes_the_harness(cupy, profile):
    report = verify(subjects.reference(cupy), profile)
    assert report.passed, str(report)


def test_masks_are_the_same_bits(cupy):
    """(dropout.3) to (dropout.6)"""
    for shape in ((3, 5, 7), (0, 4), (1 << 16,)):
        how = {"p": 0.3, "seed": 2**63, "step": 5, "site": 7, "c2": 2**33, "c3": 9}
        assert np.array_equal(
            lx.dropout_mask(shape, xp=cupy, **how).get(), lx.dropout_mask(shape, xp=np, **how)
        )


# CuPy 14 says that it cannot be sure to see each wait; what it sees would still be one
waits = pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize:UserWarning")


@waits
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_never_waits_for_the_host(cupy, dora, dtype):
    cupyx = importlib.import_module("cupyx")
    rng = np.random.default_rng(0)

    def draw(*shape):
        return cupy.asarray(rng.standard_normal(shape).astype(dtype))

    x, gy, base = draw(2, 3, 7), draw(2, 3, 5), lx.Linear(draw(5, 7), draw(5))
    adapter = lx.Adapter(draw(3, 7), draw(5, 3), m=draw(5) if dora else None)
    mask = lx.dropout_mask(x.shape, 0.3, dtype=dtype, xp=cupy)
    how = {"scaling": 0.7}
    for quiet in (False, True):  # the first round compiles kernels
        with cupyx.allow_synchronize(not quiet):
            _, saved = lx.lora_linear_forward(x, base, adapter, mask=mask, **how)
            lx.lora_linear_backward(gy, saved, base, adapter, norm_gradient=dora, **how)
            lx.lora_linear_backward_base(gy, saved, base, adapter, norm_gradient=dora, **how)


# ---- the fast plan on the device ----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["fp32", "fp64", "bf16", "fp16"])
def test_the_fast_plan_on_the_device_passes_the_harness(cupy, profile):
    report = verify(subjects.fast(cupy), profile)
    assert report.passed, str(report)


def test_the_fast_plans_masks_are_the_same_bits(cupy):
    """(dropout.3) to (dropout.6), by the kernels that use them."""
    drop = DropoutKey(0.3, 2**63, 5, 7, 2**33, 9)
    for count in (1, 17, 1 << 16, (1 << 20) + 3):
        ones = cupy.ones(count, dtype="float32")
        want = lx.dropout_mask(count, 0.3, 2**63, 5, 7, c2=2**33, c3=9) != 0
        assert np.array_equal(
            gpu._dropped(ones, drop, "float32", "float32", None).get(), want.astype("float32")
        )
        gx, xd = gpu._both_dropped(ones, 3 * ones, drop, "float32", "float32", None)
        assert np.array_equal(gx.get(), want.astype("float32"))
        assert np.array_equal(xd.get(), 3 * want.astype("float32"))


def random_layer(cupy, dtype, dora):
    rng = np.random.default_rng(0)
    kind = gpu_arrays.dtype_of(dtype)

    def draw(*shape):
        return cupy.asarray(rng.standard_normal(shape).astype(kind))

    x, gy, base = draw(2, 30, 70), draw(2, 30, 50), lx.Linear(draw(50, 70), draw(50))
    return x, gy, base, lx.Adapter(draw(16, 70), draw(50, 16), m=draw(50) if dora else None)


@waits
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("drop", [None, (0.3, 1, 2, 3)])
def test_a_fast_step_never_waits_for_the_host(cupy, dtype, dora, drop):
    cupyx = importlib.import_module("cupyx")
    x, gy, base, adapter = random_layer(cupy, dtype, dora)
    for quiet in (False, True):  # the first round compiles kernels
        with cupyx.allow_synchronize(not quiet):
            _, saved = gpu.forward(x, base, adapter, scaling=0.7, dropout=drop)
            gpu.backward(gy, saved, base, adapter, scaling=0.7, norm_gradient=dora)


@waits
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("drop", [None, (0.3, 9, 0, 4)])
def test_a_captured_step_computes_what_a_step_does(cupy, dora, drop):
    cupyx = importlib.import_module("cupyx")
    x, gy, base, adapter = random_layer(cupy, "float32", dora)
    graph = gpu_graph.Captured(x, gy, base, adapter, scaling=0.7, dropout=drop, norm_gradient=True)
    for step in (0, 3, 2**63):
        x, gy = x * 1.5, gy * 0.5
        with cupyx.allow_synchronize(False):
            y, gx, g = graph(x, gy, step=step)
        now = drop and (*drop[:2], step, *drop[3:])
        want_y, saved = gpu.forward(x, base, adapter, scaling=0.7, dropout=now)
        want_gx, want = gpu.backward(gy, saved, base, adapter, scaling=0.7, norm_gradient=True)
        for a, b in ((y, want_y), (gx, want_gx), (g.A, want.A), (g.B, want.B)):
            cupy.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(cupy.abs(b).max()))
