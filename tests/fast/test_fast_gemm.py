"""One gemm, whichever library stands behind it: values, views, the choice, and what goes wrong unwatched."""

import ast
import ctypes
import itertools
import subprocess
import sys
import threading
import time
from importlib.metadata import distribution
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

import lorax_np as lx
from lorax_np.errors import BackendError
from lorax_np.fast import blas, cblas, engines, libraries
from lorax_np.fast import gemm as module
from lorax_np.fast.gemm import gemm

FAST = Path(lx.fast.__file__).parent
ALL = ("mkl", "openblas", "scipy", "numpy")
every_engine = pytest.mark.parametrize("name", engines())
LAYOUTS = (
    "rows",
    "columns",
    "a window of rows",
    "a window of columns",
    "every second",
    "backwards",
    "repeated",
)


def laid(values, how):
    """The same numbers in memory of another layout."""
    m, n = values.shape
    if how == "columns":
        return np.asfortranarray(values)
    if how == "a window of rows":
        home = np.full((m + 2, n + 3), np.nan, values.dtype)
        home[1 : m + 1, 2 : n + 2] = values
        return home[1 : m + 1, 2 : n + 2]
    if how == "a window of columns":
        return laid(values.T, "a window of rows").T
    if how == "every second":
        home = np.full((2 * m, 2 * n), np.nan, values.dtype)
        home[::2, ::2] = values
        return home[::2, ::2]
    if how == "backwards":
        return np.ascontiguousarray(values[::-1, ::-1])[::-1, ::-1]
    if how == "repeated":
        return np.broadcast_to(values[:1], values.shape)
    return np.ascontiguousarray(values)


@every_engine
@given(
    seed=seeds,
    sizes=st.tuples(*[st.integers(1, 7)] * 3),
    how=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    dtype=st.sampled_from(["float32", "float64"]),
    alpha=st.sampled_from([1.0, -0.5, 3.0]),
    beta=st.sampled_from([0.0, 1.0, -2.0, 0.5]),
)
def test_whole_numbers_come_out_exactly_through_any_view(name, seed, sizes, how, dtype, alpha, beta):
    """α·ab + β·out of small whole numbers is exact in any order; what lies around out stays."""
    (m, k, n), rng = sizes, np.random.default_rng(seed)
    a, b, c = (rng.integers(-8, 9, shape).astype(dtype) for shape in ((m, k), (k, n), (m, n)))
    a, b = laid(a, how[0]), laid(b, how[1])
    out = laid(c, "rows" if how[2] == "repeated" else how[2])
    want = alpha * (a[:, :, None] * b).sum(axis=1) + beta * out
    before = a.copy(), b.copy()
    around = out if out.base is None else out.base.copy()
    with blas(name):
        gemm(a, b, out, alpha, beta)
    assert np.array_equal(out, want)
    assert np.array_equal(a, before[0])
    assert np.array_equal(b, before[1])
    if out.base is not None and out.base.size > out.size:
        assert np.isnan(around).sum() == np.isnan(out.base).sum()


@every_engine
def test_memory_that_is_not_to_be_read_is_not(name):
    """β = 0 over memory that holds NaN; nothing to sum, nothing to write."""
    with blas(name):
        for dtype in ("float32", "float64"):
            out = np.full((3, 2), np.nan, dtype)
            gemm(np.ones((3, 4), dtype), np.ones((4, 2), dtype), out, 2.0)
            assert np.array_equal(out, np.full((3, 2), 8.0))
            out.fill(np.nan)
            gemm(np.ones((3, 0), dtype), np.ones((0, 2), dtype), out)
            assert np.array_equal(out, np.zeros((3, 2)))
            gemm(np.ones((3, 0), dtype), np.ones((0, 2), dtype), out, 1.0, 1.0)
            assert np.array_equal(out, np.zeros((3, 2)))
            gemm(np.ones((0, 4), dtype), np.ones((4, 2), dtype), out[:0])


def test_scipy_alone_would_lose_a_result_written_into_a_view():
    """The hazard itself, without which the engine would not need its care; then the engine on the same view."""
    linalg = pytest.importorskip("scipy.linalg.blas", reason="SciPy is not installed")
    home = np.zeros((4, 6), np.float32)
    a, b = np.ones((4, 2), np.float32), np.ones((2, 3), np.float32)
    linalg.sgemm(1.0, b.T, a.T, beta=1.0, c=home[:, 1:4].T, overwrite_c=1)
    assert not home.any(), "SciPy computes into a copy"
    with blas("scipy"):
        gemm(a, b, home[:, 1:4], 1.0, 1.0)
    assert np.array_equal(home[:, 1:4], np.full((4, 3), 2.0))
    assert not home[:, [0, 4, 5]].any()


def test_scipy_writing_elsewhere_is_seen(monkeypatch):
    """A SciPy that copied a contiguous block as well would be refused, not believed."""
    linalg = pytest.importorskip("scipy.linalg.blas", reason="SciPy is not installed")
    real = linalg.sgemm
    monkeypatch.setattr(linalg, "sgemm", lambda *a, c, **how: real(*a, c=c.copy(order="F"), **how))
    with pytest.raises(BackendError, match=r"^scipy: expected gemm to write into the array it was given"):
        libraries._scipy().multiply(*(np.ones((2, 2), np.float32) for _ in range(3)), 1.0, 0.0)


# ---- the choice -------------------------------------------------------------------------------------------


def test_there_is_always_one_and_it_is_told():
    assert engines()[-1] == "numpy"
    assert tuple(name for name in ALL if name in engines()) == engines()
    told = lx.backend_info()["gemm"]
    assert told.startswith(f"{engines()[0]}: ")
    for name in ALL[: ALL.index(engines()[0])]:
        assert f"no {name}: " in told


def test_a_choice_holds_for_its_context_and_its_thread():
    first, seen = module.engine().name, []
    with blas("numpy") as chosen:
        assert module.engine() is chosen
        assert lx.backend_info()["gemm"].startswith("numpy: ")
        thread = threading.Thread(target=lambda: seen.append(module.engine().name))
        thread.start()
        thread.join()
        with blas(first):
            assert module.engine().name == first
        assert module.engine() is chosen
    assert seen == [first]
    assert module.engine().name == first


def test_an_engine_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    with pytest.raises(
        BackendError, match=r"^blas: expected one of mkl, openblas, scipy, numpy, mkl-split3, got 'atlas'$"
    ):
        blas("atlas").__enter__()

    def absent():
        raise BackendError("the package mkl is not installed; pip install 'lorax-np[mkl]'")

    monkeypatch.setitem(libraries.MAKERS, "mkl", absent)
    module._tried.cache_clear()
    try:
        with pytest.raises(
            BackendError, match=r"which work here, got mkl: the package mkl is not installed; pip"
        ):
            blas("mkl").__enter__()
    finally:
        module._tried.cache_clear()


def wrong_integers(a, b, out, alpha, beta):
    out[...] = beta * out + alpha * (a @ b)[::-1]


def raises(a, b, out, alpha, beta):
    raise OSError("symbol not found")


@pytest.mark.parametrize(
    ("multiply", "says"),
    [
        (wrong_integers, "a product of small whole numbers came out wrong in float32"),
        (raises, "symbol not found"),
        (lambda a, b, out, alpha, beta: None, "a product of small whole numbers came out wrong in float32"),
        (lambda a, b, out, alpha, beta: np.matmul(a, b, out=out), "came out wrong in float32"),
    ],
    ids=["wrong rows", "raises", "writes nothing", "forgets alpha and beta"],
)
def test_a_library_that_multiplies_wrongly_is_not_used(multiply, says, monkeypatch):
    """Proved before the first use: integers of another width, or a symbol of another meaning, end here."""
    monkeypatch.setitem(libraries.MAKERS, "openblas", lambda: module.Engine("openblas", "a fake", multiply))
    module._tried.cache_clear()
    try:
        assert says in module._tried("openblas")
        assert "openblas" not in engines()
    finally:
        module._tried.cache_clear()


def test_importing_the_engine_loads_and_tries_no_library():
    code = (
        "import sys, lorax_np as lx; from lorax_np.fast import gemm;"
        "assert not gemm._tried.cache_info().currsize; assert 'scipy' not in sys.modules;"
        "lx.fast.engines(); assert gemm._tried.cache_info().currsize == 4"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- 16 bits as they are stored ---------------------------------------------------------------------------


def bf16(values):
    return values.astype(ml_dtypes.bfloat16)


def widened(calls):
    """A stand-in for a matrix unit: exact products, sums in float32, in any order."""

    def stored(a, b, out, alpha, beta):
        calls.append(out.shape)
        real = module._tried("numpy").multiply
        real(a.astype(np.float32), b.astype(np.float32), out, alpha, beta)

    return stored


def test_a_matrix_unit_is_used_for_what_is_stored_so_and_for_nothing_else(monkeypatch):
    calls, numpy = [], module._tried("numpy")
    monkeypatch.setattr(module, "_first", lambda: module.Engine("fake", "", numpy.multiply, widened(calls)))
    assert lx.verify.verify("fast", "bf16", "quick").passed
    assert calls
    calls.clear()
    for profile in ("fp16", "fp32"):
        assert lx.verify.verify("fast", profile, "quick").passed
    assert not calls


def test_mkls_product_of_bfloat16_is_exact_on_whole_numbers():
    if "mkl" not in engines():
        pytest.skip(f"mkl: {module._tried('mkl')}")
    rng = np.random.default_rng(0)
    multiply = cblas.by_bf16(mkl_library())
    for how in itertools.product(LAYOUTS[:5], repeat=2):
        a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((5, 7), (7, 6)))
        out = np.ones((5, 6), np.float32)
        multiply(laid(bf16(a), how[0]), laid(bf16(b), how[1]), out, 2.0, 0.5)
        assert np.array_equal(out, 2 * (a[:, :, None] * b).sum(axis=1) + 0.5)


@pytest.mark.parametrize("name", ["openblas", "mkl"])
def test_squares_are_summed_by_the_library_itself(name):
    if name not in engines():
        pytest.skip(f"{name}: does not work here")
    with blas(name) as engine:
        for dtype in ("float32", "float64"):
            x = np.random.default_rng(0).integers(-9, 9, (7, 300)).astype(dtype)
            assert engine.squares(x) == (x * x).sum() > 0
            assert np.isnan(engine.squares(np.array([1.0, np.nan], dtype)))


def test_a_library_whose_squares_are_wrong_is_refused():
    right = libraries.MAKERS["openblas"]()
    assert libraries.proved(lambda: right) is right
    wrong = right._replace(squares=lambda x: right.squares(x) + 1)
    assert libraries.proved(lambda: wrong) == "a sum of small whole squares came out wrong in float32"


def mkl_library():
    found = [file for file in distribution("mkl").files if file.name.startswith("libmkl_rt")]
    return ctypes.CDLL(str(found[0].locate()))


def test_the_processor_is_asked_for_a_matrix_unit(monkeypatch):
    for text, has in (("flags: avx512_bf16 amx_tile amx_bf16", True), ("flags: avx512_bf16", False)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text, **how: text)
        monkeypatch.setattr(Path, "is_file", lambda self: True)
        assert libraries.has_matrix_unit() is has


# ---- one pool ---------------------------------------------------------------------------------------------

PRODUCTS = {"matmul", "dot", "vdot", "inner", "tensordot", "linalg", "vecdot", "matvec"}


def other_products(source):
    """Lines where a product is formed by something else than gemm."""
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)) or (
            isinstance(node, ast.Attribute) and node.attr in PRODUCTS
        ):
            yield ast.unparse(node)


def test_one_pool_does_all_the_work():
    """No product in fast/ but gemm's: a second pool would cost 5 to 50 times the step (specs/speed.md)."""
    on_the_host = [path for path in FAST.rglob("*.py") if not path.name.startswith("gpu")]
    found = {
        str(path.relative_to(FAST)): list(other_products(path.read_text(encoding="utf-8")))
        for path in on_the_host
    }
    assert found.pop("libraries.py") == ["np.matmul"], "the engine numpy"
    assert found.pop("gemm.py") == ["a @ b", "np.matmul"], "small ones, for which no thread starts"
    assert {"general/attention.py", "llama/attention.py"} < set(found)
    assert not any(found.values()), found


@pytest.mark.parametrize("line", ["a @ b", "np.dot(a, b)", "a.dot(b)", "np.linalg.norm(a)", "np.matmul(a, b)"])
def test_another_product_is_seen(line):
    assert list(other_products(line))


def test_two_pools_are_not_what_a_step_meets():
    """Time of alternating calls: a NumPy product between two steps must not cost milliseconds of waiting.

    With NumPy's own library behind gemm the pool is one. Medians of 30, and a bound of five times the sum of
    both alone, which two pools exceed by far and a noisy machine does not.
    """
    if engines()[0] != "openblas":
        pytest.skip(f"the engine in use is {engines()[0]}, which has a pool of its own")
    a = np.ones((512, 576), np.float32)
    w, out = np.ones((576, 576), np.float32), np.empty((512, 576), np.float32)

    def median(*runs):
        times = []
        for _ in range(30):
            start = time.perf_counter()
            for run in runs:
                run()
            times.append(time.perf_counter() - start)
        return sorted(times)[15]

    ours, theirs = (lambda: gemm(a, w, out)), (lambda: a @ w)
    alone = median(ours, ours) + median(theirs, theirs)
    assert median(ours, theirs) < 5 * alone
