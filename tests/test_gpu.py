"""On a real device: CuPy gives what NumPy gives, a step never waits for the host, masks are the same bits."""

import importlib

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.backend import namespace
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
