"""The CUDA source: compiled by NVRTC for three generations of devices, and run on the CPU, bit for bit."""

import ctypes
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import standin

import lorax_np as lx
from lorax_np.backend import cast
from lorax_np.fast import gpu, gpu_arrays, gpu_kernels, gpu_products
from lorax_np.fast.device import attention_source, source
from lorax_np.fast.device.attention_source import chunks_of
from lorax_np.fast.gpu_kernels import name_of
from lorax_np.random import DropoutKey

WORD = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def cupy(monkeypatch):
    if standin.COMPILER is None:
        pytest.skip(standin.NO_COMPILER)
    module = standin.module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


# ---- NVRTC -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvrtc():
    found = find_spec("nvidia") and find_spec("nvidia.cuda_nvrtc")
    libraries = [] if not found else [*Path(next(iter(found.submodule_search_locations))).rglob("libnvrtc.so*")]
    if not libraries:
        pytest.skip("the kernels are not compiled for a GPU: no NVRTC here; pip install 'lorax-np[nvrtc]'")
    return ctypes.CDLL(str(libraries[0]))


def compiled(nvrtc, source, names, arch):
    """NVRTC's status and its log."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert not nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"gpu_kernels.cu", 0, None, None
    )
    for name in names:
        assert not nvrtc.nvrtcAddNameExpression(program, name.encode())
    options = (ctypes.c_char_p * 2)(b"--std=c++17", f"-arch=sm_{arch}".encode())
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert not nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    assert not nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log.value.decode()


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_every_kernel_compiles_for_a_device(nvrtc, arch):
    names = gpu_kernels.every_kernel() if arch == 90 else gpu_kernels.every_kernel()[::7]
    assert compiled(nvrtc, gpu_kernels.SOURCE, names, arch) == (0, "")


@pytest.mark.parametrize("arch", [75, 80, 90])
@pytest.mark.parametrize("module", [source, attention_source])
def test_every_kernel_of_a_model_compiles_for_a_device(nvrtc, module, arch):
    chunks = attention_source.CHUNKS if module is attention_source else (0,)
    names = [
        name_of(name, dtype, *[str(C)] * bool(C))
        for C in (chunks if arch == 90 else chunks[2:3] or chunks)
        for dtype, size in (("float32", 4), ("float64", 8))
        for name in module.NAMES
        if not C or chunks_of(16 * C, size)
    ]
    assert compiled(nvrtc, module.SOURCE, names, arch) == (0, "")


def test_every_kernel_of_a_model_is_listed():
    for module in (source, attention_source):
        own = module.SOURCE.removeprefix(gpu_kernels.SOURCE)
        assert set(re.findall(r"__global__ void (\w+)", own)) == set(module.NAMES)


def test_a_fault_does_not_compile(nvrtc):
    status, log = compiled(nvrtc, gpu_kernels.SOURCE.replace("u64 w[4];", ""), ("keep<float, float>",), 80)
    assert status
    assert "identifier" in log


def test_every_kernel_of_the_plan_is_listed():
    """So that NVRTC sees all that a step may ask for."""
    files = (gpu, gpu_arrays, gpu_products)
    source = "".join(Path(file.__file__).read_text(encoding="utf-8") for file in files)
    asked = set(re.findall(r'(?:run|name_of)\("(\w+)"', source))
    assert asked == {name.partition("<")[0] for name in gpu_kernels.every_kernel()}
    assert asked == set(re.findall(r"__global__ void (\w+)", gpu_kernels.SOURCE))


# ---- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 2.0**-16, 2.0**-16])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 4099])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_masks_are_the_same_bits(cupy, dtype, count, p):
    """(dropout.3) to (dropout.6): x where the mask is not 0, alone or of two arrays at once."""
    words = {"seed": 2**63 + 1, "step": 5, "site": 2**64 - 1, "c2": 2**33, "c3": 9}
    mask = lx.dropout_mask(count, p, **words) != 0
    drop = DropoutKey(p, words["seed"], words["step"], words["site"], words["c2"], words["c3"])
    ones = cupy.asarray(np.ones(count, gpu_arrays.dtype_of(dtype)))
    out = gpu._dropped(ones, drop, "float32", "float32", None).host
    assert np.array_equal(out, mask.astype(np.float32))
    gx, xd = gpu._both_dropped(ones, cupy.asarray(3 * ones.host), drop, "float32", "float32", None)
    assert gx is ones
    assert np.array_equal(gx.host.astype(float), mask)
    assert np.array_equal(xd.host, 3.0 * mask)


def test_each_lane_is_kept_from_its_threshold_on(cupy):
    """lane ≥ T, not lane > T: at p = lane/65536 the entry with that lane is kept, one step on it is not."""
    lane = 0x314C  # of the first entry of seed 0, as specs/dropout.md has it
    x = cupy.asarray(np.ones(1, np.float32))
    for T, kept in ((lane, 1.0), (lane + 1, 0.0)):
        assert gpu._dropped(x, DropoutKey(T / 65536), "float32", "float32", None).host[0] == kept


def test_arrays_that_begin_anywhere(cupy):
    """Packs of 16 bytes where the address allows, single entries elsewhere: the same values."""
    drop, whole = DropoutKey(0.4, 1, 2, 3), np.arange(1.0, 70.0, dtype=np.float32)
    mask = lx.dropout_mask(64, 0.4, 1, 2, 3) != 0
    for start in range(4):
        part = standin.ndarray(whole[start : start + 64])
        out = gpu._dropped(part, drop, "float32", "float32", None).host
        assert np.array_equal(out, whole[start : start + 64] * mask)


def test_the_step_may_stand_on_the_device(cupy):
    drop = DropoutKey(0.4, 1, 2, 3)
    x = cupy.asarray(np.ones(100, np.float32))
    at = cupy.asarray(np.array([77], np.uint64))
    got = gpu._dropped(x, drop, "float32", "float32", at).host
    assert np.array_equal(got, (lx.dropout_mask(100, 0.4, 1, 77, 3) != 0).astype(np.float32))


# ---- conversions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), WORD], ids=str)
def test_every_stored_number_widens_as_numpy_does(cupy, dtype):
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    got = gpu_arrays.column_sums(standin.ndarray(values[None, :])).host
    with np.errstate(invalid="ignore"):  # NaN that signals
        want = values.astype(np.float64)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), WORD], ids=str)
@pytest.mark.parametrize("given", ["float32", "float64"])
def test_numbers_are_rounded_once(cupy, dtype, given):
    """To the nearest, ties to even; from float64 without a stop at float32; halves, subnormals, NaN."""
    rng = np.random.default_rng(0)
    with np.errstate(invalid="ignore"):
        every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float64)
    every = np.sort(every[np.isfinite(every)])
    between = (every[1:] + every[:-1]) / 2
    with np.errstate(over="ignore"):
        some = rng.standard_normal(10_000) * 1e3
        ends = [np.inf, -np.inf, np.nan, 65519.9, 65520.0, 1e300, -1e300, 1e-300]
        beside = between * (1 + 2.0**-40), between * (1 - 2.0**-40)
        values = np.concatenate([every, between, *beside, some, ends]).astype(given)
        want = cast(values, dtype.name)
    out = standin.ndarray(np.zeros(values.shape, dtype))
    one = cupy.asarray(np.ones(1, given))
    many = standin.ndarray(values)
    arguments = out, many, one, 0, np.uint64(values.size), np.uint32(1)
    gpu_arrays.run("by_columns", out, arguments, many, out, one)
    np.testing.assert_array_equal(out.host.astype(np.float64), want.astype(np.float64))


# ---- sums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 300])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 70])
def test_sums_over_tokens(cupy, tokens, width):
    rng = np.random.default_rng(0)
    g, p = (rng.standard_normal((tokens, width)).astype(np.float32) for _ in range(2))
    for other, want in ((None, g.astype(float)), (cupy.asarray(p), g.astype(float) * p)):
        got = gpu_arrays.column_sums(cupy.asarray(g), other).host
        np.testing.assert_allclose(
            got, want.sum(axis=0), rtol=0, atol=tokens * 2.0**-52 * np.abs(want).max(initial=0)
        )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 2), (9, 300, 9), (16, 256, 1), (9, 300, 64), (9, 300, 65)])
def test_row_norms(cupy, dtype, shape):
    """(dora.1) to (dora.3), against float64; each entry of V is a sum of r + 1 rounded terms."""
    d_out, d_in, r = shape
    rng = np.random.default_rng(0)
    kind = gpu_arrays.dtype_of(dtype)
    W, A, B = (rng.standard_normal(s).astype(kind) for s in ((d_out, d_in), (r, d_in), (d_out, r)))
    got = gpu.row_norms(*(cupy.asarray(v) for v in (W, A, B)), 0.7).host
    V, size = (
        f(W.astype(float)) + 0.7 * f(B.astype(float)) @ f(A.astype(float)) for f in (lambda v: v, np.abs)
    )
    unit = 2.0**-53 if dtype == "float64" else 2.0**-24
    bound = (r + 3) * unit * np.linalg.norm(size, axis=1)
    assert np.all(np.abs(got - np.linalg.norm(V, axis=1)) <= bound)


def test_row_norms_of_extreme_rows(cupy):
    """No square overflows or vanishes, a row of zeros has no norm, a row that is not finite has none either."""
    rows = {"float32": (1e38, 1e-38), "float64": (1e300, 1e-300)}
    for dtype, (huge, tiny) in rows.items():
        W = np.array([[huge, huge], [3 * tiny, 4 * tiny], [0, 0], [np.nan, 1]], dtype)
        A, B = np.zeros((1, 2), dtype), np.zeros((4, 1), dtype)
        got = gpu.row_norms(*(cupy.asarray(v) for v in (W, A, B)), 1.0).host
        np.testing.assert_allclose(got, [huge * np.sqrt(2), 5 * tiny, np.nan, np.nan], rtol=1e-6)


# ---- short passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16), (5, 33), (40, 70)])
def test_passes_by_columns(cupy, shape):
    """Threads of 16 entries begin in any column; float64 is exact here."""
    rng = np.random.default_rng(0)
    y, P, Q = (rng.integers(-9, 9, shape).astype(np.float64) for _ in range(3))
    c, k = (rng.integers(-9, 9, shape[1]).astype(np.float64) for _ in range(2))
    there = [cupy.asarray(v) for v in (y, P, Q, c, k)]
    arguments = (*there, np.uint64(y.size), np.uint32(shape[1]))
    gpu_arrays.run("magnify", there[0], arguments, there[0], there[4])
    assert np.array_equal(there[0].host, y + c * P + k * Q)
    assert np.array_equal(there[1].host, P + Q)
    gpu_arrays.run(
        "by_columns", there[0], (there[0], there[2], there[4], there[3], *arguments[5:]), *there[:2], there[4]
    )
    assert np.array_equal(there[0].host, k * Q + c)
    gpu_arrays.run("add", there[0], (there[0], there[1], arguments[5]), *there[:2])
    assert np.array_equal(there[0].host, k * Q + c + P + Q)
