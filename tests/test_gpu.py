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


# ---- the family's other layers -----------------------------------------------------------------------------


def _experts(put, rng):
    base = lx.Experts(put(rng.standard_normal((3, 5, 7))))
    adapter = lx.Adapter(put(rng.standard_normal((6, 7))), put(rng.standard_normal((5, 6))))
    x, ids = put(rng.standard_normal((8, 7))), put(np.array([0, 2, 2, 0, 2, 0, 0, 2]))
    y, saved = lx.lora_experts_forward(x, base, adapter, scaling=0.7, ids=ids)
    gx, g = lx.lora_experts_backward(put(rng.standard_normal((8, 5))), saved, base, adapter, scaling=0.7)
    return y, gx, g.A, g.B, lx.merge_experts(base, adapter, scaling=0.7).W


def _packed(put, rng):
    adapters = [
        [lx.Adapter(put(rng.standard_normal((r, 7))), put(rng.standard_normal((5, r))))] for r in (2, 4, 1)
    ]
    pack = lx.pack(adapters, [0.7, 1.9, 0.3])
    x, ids = put(rng.standard_normal((8, 7))), put(np.array([2, 2, -1, 0, 1, 1, -1, 0]))
    y, saved = lx.lora_packed_forward(x, pack.A, pack.B, ids, pack.ranks, pack.scalings, d_outs=pack.d_outs)
    gy = put(rng.standard_normal((8, 5)))
    return y, *lx.lora_packed_backward(gy, saved, pack.A, pack.B, pack.scalings)


def _several(put, rng):
    base = lx.Linear(put(rng.standard_normal((5, 7))), put(rng.standard_normal(5)))
    adapters = {
        str(r): lx.Adapter(put(rng.standard_normal((r, 7))), put(rng.standard_normal((5, r)))) for r in (2, 4)
    }
    x, gy = put(rng.standard_normal((2, 3, 7))), put(rng.standard_normal((2, 3, 5)))
    scalings = {"2": 0.7, "4": 1.9}
    y, saved = lx.lora_several_forward(x, base, adapters, scalings=scalings)
    gx, g = lx.lora_several_backward(gy, saved, base, adapters, scalings=scalings)
    return y, gx, g["2"].A, g["4"].B


def _related(put, rng):
    base = lx.Linear(put(rng.standard_normal((5, 7))))
    x, gy = put(rng.standard_normal((3, 7))), put(rng.standard_normal((3, 5)))
    shared = lx.VeraShared(put(rng.standard_normal((4, 7))), put(rng.standard_normal((5, 4))))
    vera = lx.VeraAdapter(put(rng.standard_normal(4)), put(rng.standard_normal(5)))
    y, saved = lx.vera_linear_forward(x, base, shared, vera)
    gx, g = lx.vera_linear_backward(gy, saved, base, shared, vera)
    form = lx.AdaLoraAdapter(*(put(rng.standard_normal(shape)) for shape in ((4, 7), (5, 4), (4,))))
    how = {"alpha": 3.0, "rank": 4}
    y2, saved2 = lx.adalora_linear_forward(x, base, form, **how)
    gx2, g2 = lx.adalora_linear_backward(gy, saved2, base, form, **how)
    return y, gx, g.lambda_d, g.lambda_b, y2, gx2, g2.A, g2.B, g2.E


def _token_rows(put, rng):
    base = lx.Embedding(put(rng.standard_normal((9, 5))))
    rows = lx.TokenRows(put(np.array([1, 4])), put(rng.standard_normal((2, 5))))
    y, saved = lx.token_rows_forward(put(np.array([[4, 4, 0], [8, 1, 4]])), base, rows)
    g = lx.token_rows_backward(put(rng.standard_normal((2, 3, 5))), saved, base, rows)
    return y, g.rows, lx.token_rows_merge(base, rows).W


@pytest.mark.parametrize("layer", [_experts, _packed, _several, _related, _token_rows])
def test_the_other_layers_on_the_device_are_those_of_the_host(cupy, layer):
    """Embeddings and convolutions the harness judges there; these beside NumPy in float64."""
    there = layer(cupy.asarray, np.random.default_rng(0))
    here = layer(np.asarray, np.random.default_rng(0))
    for got, want in zip(there, here, strict=True):
        assert type(got) is cupy.ndarray
        np.testing.assert_allclose(got.get(), want, rtol=0, atol=1e-13 * (1 + np.abs(want).max()))


def test_a_looked_up_gradient_has_the_same_bits_each_time(cupy):
    """No atomic additions: the order of sums is the tokens'."""
    rng = np.random.default_rng(0)
    base = lx.Embedding(cupy.asarray(rng.standard_normal((50, 8)).astype("f4")))
    adapter = lx.Adapter(*(cupy.asarray(rng.standard_normal(s).astype("f4")) for s in ((4, 50), (8, 4))))
    ids, gy = cupy.asarray(rng.integers(0, 50, 4000)), cupy.asarray(rng.standard_normal((4000, 8)).astype("f4"))
    _, saved = lx.lora_embedding_forward(ids, base, adapter, scaling=0.7)
    first = lx.lora_embedding_backward(gy, saved, base, adapter, scaling=0.7).A
    for _ in range(5):
        assert (first == lx.lora_embedding_backward(gy, saved, base, adapter, scaling=0.7).A).all()


def test_starts_and_quantised_weights_on_the_device(cupy):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((24, 16)).astype("f4")
    for start in ("olora", "orthogonal", "loftq", "pissa"):
        more = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 2}} if start == "loftq" else {}
        config = lx.LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, **more)
        base, adapter = lx.init_adapter(lx.Linear(cupy.asarray(W)), config, rng=np.random.default_rng(1))
        want, beside = lx.init_adapter(lx.Linear(W), config, rng=np.random.default_rng(1))
        for got, value in ((base.W, want.W), (adapter.A, beside.A), (adapter.B, beside.B)):
            assert type(got) is cupy.ndarray
            assert np.array_equal(got.get(), value)
