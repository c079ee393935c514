"""The plan for a GPU on a stand-in for CuPy: judged by the harness, and never reading a value on the host."""

import contextlib
import gc
import sys

import numpy as np
import pytest
import standin

import lorax_np as lx
from lorax_np.backend import cast
from lorax_np.fast import gpu, gpu_arrays, gpu_graph, gpu_kernels, gpu_merging, gpu_products
from lorax_np.verify import subjects
from lorax_np.verify.verdict import verify

pytestmark = standin.needs_compiler
HOW = {"scaling": 0.7}


@pytest.fixture
def cupy(monkeypatch):
    module = standin.module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param("fp64", marks=pytest.mark.thorough),
        pytest.param("fp32", marks=pytest.mark.thorough),
        "bf16",
        pytest.param("fp16", marks=pytest.mark.thorough),
    ],
)
def test_the_plan_passes_the_harness(cupy, profile):
    report = verify(subjects.fast(cupy), profile, "quick")
    assert report.passed, str(report)


def layer(
    cupy, *, dora=False, biases=False, dtype="float32", adapter_dtype=None, lead=(2, 19), size=(45, 70, 5)
):
    """Arrays on the host and on the stand-in: x, gy, base, adapter of each."""
    d_out, d_in, r = size
    rng = np.random.default_rng(1)

    def draw(*shape, kind=dtype):
        return cast(rng.standard_normal(shape), kind)

    low = adapter_dtype or dtype
    parts = {"A": draw(r, d_in, kind=low), "B": draw(d_out, r, kind=low)}
    parts["m"] = draw(d_out, kind=low) if dora else None
    parts |= {"b": draw(d_out)} if biases else {}
    parts |= {"bB": draw(d_out, kind=low)} if biases and not dora else {}
    W, b, x, gy = draw(d_out, d_in), draw(d_out) if biases else None, draw(*lead, d_in), draw(*lead, d_out)

    def there(value):
        return None if value is None else cupy.asarray(value)

    host = x, gy, lx.Linear(W, b), lx.Adapter(**parts)
    device = (
        there(x),
        there(gy),
        lx.Linear(there(W), there(b)),
        lx.Adapter(**{name: there(value) for name, value in parts.items()}),
    )
    return host, device


def by_reference(x, gy, base, adapter, drop, **how):
    low = "float64" if adapter.A.dtype == np.float64 else "float32"
    mask = None if drop is None else lx.dropout_mask(x.shape, *drop, dtype=low)
    y, saved = lx.lora_linear_forward(x, base, adapter, mask=mask, **HOW)
    return {"y": y, **named(*lx.lora_linear_backward(gy, saved, base, adapter, **HOW, **how))}


def by_plan(x, gy, base, adapter, drop, **how):
    y, saved = gpu.forward(x, base, adapter, dropout=drop, **HOW)
    found = {"y": y, **named(*gpu.backward(gy, saved, base, adapter, **HOW, **how))}
    return {name: value.host for name, value in found.items()}


def named(gx, g):
    found = {"gx": gx, **{f"g{name}": getattr(g, name) for name in ("A", "B", "m", "b", "bB")}}
    return {name: value for name, value in found.items() if value is not None}


def assert_close(got, want, units):
    """Within so many roundings of the largest sum in a tensor, since its terms are of one size."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == value.dtype, name
        a, b = (np.asarray(v, dtype=np.float64) for v in (got[name], value))
        assert np.abs(a - b).max() <= units[value.dtype.name] * np.abs(b).max(), name


# a sum of at most 70·5 roundings, each of at most one unit roundoff of what is added up
SUM = {"float64": 350 * 2.0**-53, "float32": 350 * 2.0**-24, "float16": 8 * 2.0**-11, "bfloat16": 8 * 2.0**-8}


@pytest.mark.parametrize("drop", [None, (0.3, 2**63, 5, 2**64 - 1), (0.5, 1)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dropout_by_counter_is_the_mask(cupy, dtype, dora, drop):
    host, device = layer(cupy, dora=dora, biases=True, dtype=dtype)
    want, got = by_reference(*host, drop, norm_gradient=True), by_plan(*device, drop, norm_gradient=True)
    assert_close(got, want, SUM)


@pytest.mark.parametrize("drop", [pytest.param(None, marks=pytest.mark.thorough), (0.3, 7, 5, 1)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
        ("float32", "bfloat16"),
        ("float32", "float64"),
        ("float64", "float32"),
    ],
)
def test_dtypes_that_mix(cupy, dtype, adapter_dtype, dora, drop):
    """Each gradient in the dtype of what it differentiates; what is narrow somewhere is judged as narrow."""
    host, device = layer(cupy, dora=dora, biases=True, dtype=dtype, adapter_dtype=adapter_dtype)
    want, got = by_reference(*host, drop), by_plan(*device, drop)
    coarse = max(SUM[dtype], SUM[adapter_dtype])
    assert_close(got, want, dict.fromkeys(SUM, coarse))


def test_without_the_gradient_by_x(cupy):
    _, device = layer(cupy, dora=True)
    for drop in (None, (0.3, 1, 2, 3)):
        full, less = by_plan(*device, drop), by_plan(*device, drop, need_gx=False)
        assert "gx" not in less
        assert all(np.array_equal(less[name], full[name]) for name in less)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (1,), (3, 1)])
@pytest.mark.parametrize("drop", [None, (0.3, 1, 2, 3)])
def test_any_leading_axes(cupy, lead, drop):
    for dora in (False, True):
        host, device = layer(cupy, dora=dora, lead=lead, size=(3, 7, 2))
        want, got = by_reference(*host, drop), by_plan(*device, drop)
        assert {n: v.shape for n, v in got.items()} == {n: v.shape for n, v in want.items()}
        if 0 not in lead:
            assert_close(got, want, SUM)
        else:
            assert not any(got[name].any() for name in ("gA", "gB"))


def test_only_a_bias_trains(cupy):
    rng = np.random.default_rng(0)
    x, gy, W, b = (rng.standard_normal(s) for s in ((4, 3), (4, 2), (2, 3), (2,)))
    base, adapter = lx.Linear(cupy.asarray(W)), lx.Adapter(None, None, b=cupy.asarray(b))
    y, saved = gpu.forward(cupy.asarray(x), base, adapter, scaling=1.0)
    gx, g = gpu.backward(cupy.asarray(gy), saved, base, adapter, scaling=1.0)
    np.testing.assert_allclose(y.host, x @ W.T + b)
    np.testing.assert_allclose(gx.host, gy @ W)
    np.testing.assert_allclose(g.b.host, gy.sum(axis=0))


def test_strided_weights_are_read_as_they_lie(cupy):
    """W as a transposed view, as Conv1D stores it."""
    host, (x, gy, base, adapter) = layer(cupy)
    across = lx.Linear(cupy.asarray(np.ascontiguousarray(base.W.host.T)).T)
    assert_close(by_plan(x, gy, across, adapter, None), by_reference(*host, None), SUM)


def test_nothing_is_written_to(cupy):
    _, device = layer(cupy, dora=True, biases=True)
    x, gy, base, adapter = device
    given = [x, gy, base.W, base.b, adapter.A, adapter.B, adapter.m, adapter.b]
    before = [value.host.copy() for value in given]
    by_plan(*device, (0.3, 1, 2, 3), norm_gradient=True)
    assert all(np.array_equal(value.host, old) for value, old in zip(given, before, strict=True))


def test_between_the_passes_only_z_is_kept(cupy):
    """x is the caller's, and the mask is made again."""
    _, (x, _, base, adapter) = layer(cupy)
    _, saved = gpu.forward(x, base, adapter, scaling=0.7, dropout=(0.3, 1, 2, 3))
    assert saved.x is x
    assert saved.z.shape == (38, 5)
    assert saved.dora is None
    assert saved.at is None


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_merge_in_place(cupy, dtype, dora):
    """Within a rounding of the product, and one of what is stored."""
    (_, _, base, adapter), device = layer(cupy, dora=dora, biases=True, dtype=dtype)
    want = lx.merge(base, adapter, scaling=0.7)
    merged = gpu_merging.merge_into(*device[2:], scaling=0.7)
    assert merged.W is device[2].W
    assert_close({"W": merged.W.host, "b": merged.b.host}, {"W": want.W, "b": want.b}, SUM)


def test_what_a_merge_refuses_is_not_written(cupy):
    _, (_, _, base, adapter) = layer(cupy)
    before = base.W.host.copy()
    huge = lx.Adapter(adapter.A, cupy.asarray(np.full((45, 5), 3e38, np.float32)))
    with (
        pytest.raises(lx.ConfigError, match="W: expected finite numbers once merged"),
        np.errstate(all="ignore"),
    ):
        gpu_merging.merge_into(base, huge, scaling=10.0)
    assert np.array_equal(base.W.host, before)
    with pytest.raises(TypeError, match="W: expected an array on a device"):
        gpu_merging.merge_into(lx.Linear(before), lx.Adapter(adapter.A.host, adapter.B.host), scaling=1.0)


# ---- refusals ----------------------------------------------------------------------------------------------


def test_refusals_name_the_argument(cupy):
    host, (x, gy, base, adapter) = layer(cupy)
    with pytest.raises(TypeError, match="x: expected an array on a device, got one of numpy"):
        gpu.forward(host[0], host[2], host[3], scaling=1.0)
    with pytest.raises(TypeError, match="arrays must share one library"):
        gpu.forward(host[0], base, adapter, scaling=1.0)
    with pytest.raises(lx.ConfigError, match="p: expected 0 <= p < 1"):
        gpu.forward(x, base, adapter, scaling=1.0, dropout=(1.0, 0, 0, 0))
    with pytest.raises(lx.ConfigError, match="dropout: expected"):
        gpu.forward(x, base, adapter, scaling=1.0, dropout=())
    with pytest.raises(lx.ConfigError, match="scaling: expected a finite float"):
        gpu.forward(x, base, adapter, scaling=float("nan"))
    y, saved = gpu.forward(x, base, adapter, scaling=1.0)
    with pytest.raises(lx.ShapeError, match="gy: expected"):
        gpu.backward(x, saved, base, adapter, scaling=1.0)
    with pytest.raises(TypeError, match="saved: expected what"):
        gpu.backward(gy, (x,), base, adapter, scaling=1.0)
    assert y.shape == gy.shape


# ---- the stand-in sees what it is for ----------------------------------------------------------------------


def test_a_value_read_on_the_host_is_seen(cupy):
    x = cupy.asarray(np.ones(3))
    for read in (float, bool, list, np.asarray):
        with pytest.raises(AssertionError, match="read on the host"):
            read(x)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("lane >= dropped", "lane > dropped"),
        ("at ? *at : step", "0"),
        pytest.param("(i % 4)", "(3 - i % 4)", marks=pytest.mark.thorough),
        pytest.param("k1 += 0xBB67", "k1 += 0xBB66", marks=pytest.mark.thorough),
        pytest.param("c2, c3, w)", "c3, c2, w)", marks=pytest.mark.thorough),
    ],
)
def test_a_fault_in_the_mask_is_seen(cupy, monkeypatch, right, wrong):
    assert right in gpu_kernels.SOURCE
    monkeypatch.setattr(gpu_arrays, "SOURCE", gpu_kernels.SOURCE.replace(right, wrong))
    gpu_arrays.kernel_of.cache_clear()
    host, device = layer(cupy)
    drop = (0.5, 3, 5, 7, 11, 13)
    mask = lx.dropout_mask(host[0].shape, 0.5, 3, 5, 7, c2=11, c3=13)
    y, _ = lx.lora_linear_forward(host[0], host[2], host[3], mask=mask, **HOW)
    got = gpu.forward(device[0], device[2], device[3], dropout=drop, **HOW)[0].host
    gpu_arrays.kernel_of.cache_clear()
    off = np.abs(got - y).max() / np.abs(y).max()
    assert off > 1e-3 or (right == "lane >= dropped" and off < 1e-3)  # one lane of 65536: see the bits test


# ---- a graph -----------------------------------------------------------------------------------------------


@pytest.fixture
def cublas(monkeypatch):
    library = standin.Library()
    monkeypatch.setattr(gpu_products, "library_of", lambda lib: library)
    return library


@pytest.mark.parametrize("drop", [(0.3, 9, 0, 4), pytest.param(None, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("dora", [False, True])
def test_a_captured_step_computes_what_a_step_does(cupy, cublas, dora, drop):
    """With new inputs, parameters changed in place, and a mask for each step."""
    _, (x, gy, base, adapter) = layer(cupy, dora=dora)
    graph = gpu_graph.Captured(x, gy, base, adapter, dropout=drop, norm_gradient=True, **HOW)
    rng = np.random.default_rng(5)
    for step in (0, 3, 2**63):
        x, gy = (cupy.asarray(rng.standard_normal(v.shape).astype("float32")) for v in (x, gy))
        adapter.B.host[...] = rng.standard_normal(adapter.B.shape)
        y, gx, g = graph(x, gy, step=step)
        now = drop and (*drop[:2], step, *drop[3:])
        want = by_plan(x, gy, base, adapter, now, norm_gradient=True)
        got = {"y": y, **named(gx, g)}
        assert all(np.array_equal(got[name].host, want[name]) for name in want)
    assert graph.stream.waited == 3
    assert cublas.failure is None
    del graph
    gc.collect()
    assert cublas.made == cublas.ended == 1


def test_products_in_a_graph_go_by_a_handle_of_its_own(cupy, cublas, monkeypatch):
    """CuPy's refuse to be captured, and what cuBLAS refuses is said."""
    _, (x, gy, base, adapter) = layer(cupy)
    monkeypatch.setattr(gpu_graph, "products_by", lambda cublas: contextlib.nullcontext())
    try:
        with pytest.raises(NotImplementedError, match="during stream capture"):
            gpu_graph.Captured(x, gy, base, adapter, **HOW)
    finally:
        standin.tape = None
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(gpu_products, "library_of", lambda lib: cublas)
    monkeypatch.setattr(gpu_products, "WORKSPACE", 5)
    with pytest.raises(lx.BackendError, match="cuBLAS: expected cublasGemmEx to succeed, got status 1"):
        gpu_graph.Captured(x, gy, base, adapter, **HOW)


def test_where_cublas_is_not_found_is_said(cupy, monkeypatch):
    asked = []

    def none(name):
        asked.append(name)
        raise OSError

    monkeypatch.setattr(gpu_products.ctypes, "CDLL", none)
    with pytest.raises(
        lx.BackendError, match=r"expected one of libcublas\.so\.13, cublas64_13\.dll to capture"
    ):
        gpu_products.library_of(cupy)
    assert asked == ["libcublas.so.13", "cublas64_13.dll"]


def test_a_graph_refuses_other_shapes(cupy, cublas):
    _, (x, gy, base, adapter) = layer(cupy)
    graph = gpu_graph.Captured(x, gy, base, adapter, **HOW)
    with pytest.raises(lx.ConfigError, match=r"x: expected \(2, 19, 70\) float32, set by the capture, got"):
        graph(cupy.asarray(np.ones((3, 70), np.float32)), gy)
