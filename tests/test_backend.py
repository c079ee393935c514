"""Which library an array belongs to, where new ones are born, and the moves and casts between them."""

import os
import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from checkers import nearest
from often import one_in
from strategies import LIBRARIES, normals

from lorax_np import backend
from lorax_np.backend import (
    all_finite,
    backend_info,
    cast,
    compute_dtype,
    copy,
    dtype_name,
    from_host,
    namespace,
    namespace_of,
    one_dtype,
    quiet,
    real,
    to_host,
)
from lorax_np.errors import BackendError, DtypeError

libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda x: x.name)
STRICT = next(x for x in LIBRARIES if x.name == "array_api_strict")
BF16 = np.dtype(ml_dtypes.bfloat16)
ROOT = Path(backend.__file__).parents[1]
without_cupy = pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is installed here")


# ---- which library ------------------------------------------------------------------------------------------


@libraries
def test_arrays_name_their_library(library):
    x = normals(0, library)(3)
    assert namespace_of(x=x, b=None, y=x) is library.xp


def test_two_libraries_are_refused_by_name():
    x, A = np.ones(3), STRICT.place(np.ones(3))
    for arrays, message in (
        ({"x": x, "A": A}, "arrays must share one library, got x in numpy, A in array_api_strict"),
        (
            {"b": None, "A": A, "c": A, "x": x},
            "arrays must share one library, got A in array_api_strict, x in numpy",
        ),
    ):
        with pytest.raises(TypeError) as caught:
            namespace_of(**arrays)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([1.0], "builtins.list"),
        ((1.0,), "builtins.tuple"),
        (1.0, "builtins.float"),
        (np.float64(1), "numpy.float64"),
        ("x", "builtins.str"),
        (memoryview(b"x"), "builtins.memoryview"),
        (np, "builtins.module"),
    ],
)
def test_what_is_no_array_is_refused_by_name(value, kind):
    with pytest.raises(TypeError) as caught:
        namespace_of(x=value)
    assert str(caught.value) == f"x: expected an array of numpy, cupy or an array-standard library, got {kind}"


def test_arrays_with_other_operators_are_refused():
    """A matrix multiplies where an array would not, and a masked array hides values."""
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0]])
    for value, kind in ((matrix, "numpy.matrix"), (np.ma.masked_array([1.0]), "numpy.ma.MaskedArray")):
        with pytest.raises(TypeError) as caught:
            namespace_of(x=value)
        assert str(caught.value) == f"x: expected a plain array, got {kind}"


# ---- where new arrays are born ------------------------------------------------------------------------------

FAKE = """
__version__ = "14.2.0"
class Device:
    id = 0
class Runtime:
    def getDeviceProperties(self, i):
        return {{"name": b"FAKE 9000"}}
class cuda:
    runtime = Runtime()
    Device = Device
    @staticmethod
    def is_available():
        {available}
class Ones:
    def __matmul__(self, other):
        {product}
    def __getitem__(self, key):
        return self
    def item(self):
        return {value}
def ones(shape):
    return Ones()
"""
WORKS = {"available": "return True", "product": "return self", "value": "2.0"}


def python(code, word=None, path=None):
    """Run code in a fresh interpreter: (stdout, stderr)."""
    env = {k: v for k, v in os.environ.items() if k != "LORAX_NP_BACKEND"}
    env["PYTHONPATH"] = os.pathsep.join([*([str(path)] if path else []), str(PACKAGES)])
    if word is not None:
        env["LORAX_NP_BACKEND"] = word
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.strip(), done.stderr.strip()


PACKAGES = ROOT
ASK = """
from lorax_np.backend import namespace
from lorax_np.errors import BackendError
try:
    print(namespace().__name__)
except BackendError as error:
    print("BackendError:", error)
"""


@pytest.fixture
def fake(tmp_path):
    """Write a module named cupy: fake(**what it does), or fake(source)."""

    def write(source=None, **how):
        (tmp_path / "cupy.py").write_text(FAKE.format(**{**WORKS, **how}) if source is None else source)
        return tmp_path

    return write


@pytest.mark.parametrize("word", one_in(4, [None, "", "numpy", "NumPy", " numpy "]))
def test_numpy_is_the_default(word):
    assert python(ASK, word) == ("numpy", "")


@pytest.mark.parametrize("word", one_in(4, ["torch", "numpy,cupy", "1", "cpu"]))
def test_an_unknown_word_is_refused(word):
    assert python(ASK, word) == (
        f"BackendError: LORAX_NP_BACKEND: expected one of numpy, cupy, auto, got {word!r}",
        "",
    )


@without_cupy
def test_without_cupy_the_word_cupy_is_an_error_with_the_reason():
    out, err = python(ASK, "CuPy")
    assert out.startswith(
        "BackendError: LORAX_NP_BACKEND: expected a working cupy, got: CuPy cannot be imported (No module"
    )
    assert "pip install 'lorax-np[cupy12]'" in out
    assert err == ""


@without_cupy
def test_without_cupy_auto_says_so_in_one_line():
    """Once in a process, on stderr, however often it is asked."""
    out, err = python(ASK + "namespace(); namespace()", "auto")
    assert out == "numpy"
    assert err.startswith(
        "lorax_np: LORAX_NP_BACKEND=auto uses numpy: CuPy cannot be imported (No module named 'cupy')"
    )
    assert "\n" not in err


def test_a_cupy_that_works_is_used(fake):
    path = fake()
    for word in ("cupy", "auto", "CUPY"):
        assert python(ASK, word, path) == ("cupy", "")
    assert python(ASK, "numpy", path) == ("numpy", "")
    assert python(ASK, None, path) == ("numpy", "")


@pytest.mark.parametrize(
    ("how", "reason"),
    one_in(
        3,
        [
            ({"available": "return False"}, "CuPy 14.2.0 found, but no CUDA device or driver"),
            (
                {"available": "raise RuntimeError('driver too old\\nsecond line')"},
                "CuPy 14.2.0 found, but it does not work: driver too old",
            ),
            (
                {"product": "raise OSError('libcublas.so.12')"},
                "CuPy 14.2.0 found, but it does not work: libcublas.so.12",
            ),
            ({"product": "raise ValueError"}, "CuPy 14.2.0 found, but it does not work: ValueError"),
            ({"value": "3.0"}, "CuPy 14.2.0 found, but a 2 x 2 product came out wrong"),
            (
                {"source": "raise ImportError('libnvrtc is missing')"},
                "CuPy cannot be imported (libnvrtc is missing)",
            ),
        ],
    ),
)
def test_a_cupy_that_does_not_work_says_why(fake, how, reason):
    path = fake(**how)
    out, err = python(ASK, "cupy", path)
    assert out.startswith(f"BackendError: LORAX_NP_BACKEND: expected a working cupy, got: {reason}")
    assert err == ""
    out, err = python(ASK, "auto", path)
    assert out == "numpy"
    assert err.startswith(f"lorax_np: LORAX_NP_BACKEND=auto uses numpy: {reason}")
    assert "\n" not in err


def test_importing_never_imports_cupy(fake):
    path = fake("raise SystemExit('cupy was imported')")
    code = "import lorax_np.layer, lorax_np.merge, lorax_np.random, sys; print('cupy' in sys.modules)"
    for word in (None, "numpy", "cupy", "auto"):
        assert python(code, word, path) == ("False", "")


def test_the_variable_is_read_at_first_use():
    code = "import os; from lorax_np.backend import namespace; os.environ['LORAX_NP_BACKEND'] = 'torch'; " + (
        "print(namespace('numpy').__name__)\ntry:\n    namespace()\nexcept RuntimeError as error: print(error)"
    )
    out, _ = python(code)
    assert out.splitlines() == ["numpy", "LORAX_NP_BACKEND: expected one of numpy, cupy, auto, got 'torch'"]


def test_the_argument_comes_before_the_variable():
    code = "import numpy; from lorax_np.backend import namespace; print(namespace('numpy') is namespace(numpy))"
    assert python(code, "cupy") == ("True", "")


def test_the_variable_never_changes_a_pure_function():
    code = (
        "import numpy as np; from lorax_np.params import *; from lorax_np.layer import *; "
        "one = np.ones((1, 1)); y, _ = lora_linear_forward(one, Linear(one), Adapter(one, one), scaling=0.5); "
        "print(type(y).__module__, y.tolist())"
    )
    for word in ("cupy", "torch"):
        assert python(code, word) == ("numpy [[1.5]]", "")


def test_a_module_or_a_word_may_be_given():
    assert namespace(np) is np
    assert namespace("NUMPY") is np
    assert namespace(array_api_strict) is array_api_strict
    with pytest.raises(BackendError, match=r"^xp: expected one of numpy, cupy, auto, got 'jax'$"):
        namespace("jax")
    for wrong in (3, os, np.ones(2), object()):
        with pytest.raises(TypeError, match=r"^xp: expected numpy, cupy or an array-standard module, got "):
            namespace(wrong)


@pytest.mark.parametrize(
    ("word", "backend_", "why"),
    [
        (None, "numpy", "LORAX_NP_BACKEND is not set"),
        ("numpy", "numpy", "LORAX_NP_BACKEND=numpy"),
        ("torch", "none", "LORAX_NP_BACKEND: expected one of numpy, cupy, auto, got 'torch'"),
    ],
)
def test_what_is_found_is_told(word, backend_, why):
    out, err = python(
        "from lorax_np.backend import backend_info; i = backend_info(); print(i['backend']); print(i['why'])",
        word,
    )
    assert (out.splitlines(), err) == ([backend_, why], "")
    info = backend_info()
    assert set(info) == {"backend", "why", "python", "numpy", "blas", "cupy", "gemm"}
    assert all(isinstance(v, str) and v for v in info.values())
    assert info["numpy"] == np.__version__


def test_a_fake_cupys_device_is_told(fake):
    out, _ = python("from lorax_np.backend import backend_info; print(backend_info()['cupy'])", None, fake())
    assert out == "CuPy 14.2.0 on FAKE 9000"


# ---- between the host and a library --------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128", "int64", "uint64", "bool"])
def test_to_the_library_and_back(library, dtype):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    like = library.place(np.ones(1))
    there = from_host(values, like)
    assert namespace_of(x=there) is library.xp
    assert getattr(there, "device", None) == getattr(like, "device", None)
    back = to_host(there)
    assert type(back) is np.ndarray
    assert back.dtype == values.dtype
    assert np.array_equal(back, values)
    assert np.array_equal(to_host(from_host(values, library.xp)), values)


def test_to_host_of_a_host_array_is_itself():
    x = np.ones(3)
    assert to_host(x) is x


@libraries
def test_a_copy_is_a_copy_where_it_was(library):
    x = library.place(np.ones((2, 3)))
    twin = copy(x)
    assert twin is not x
    assert namespace_of(x=twin) is library.xp
    assert getattr(twin, "device", None) == getattr(x, "device", None)
    assert np.array_equal(library.host(twin), library.host(x))
    if library.xp is np:
        assert not np.shares_memory(twin, x)


# ---- dtypes -------------------------------------------------------------------------------------------------


@libraries
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128", "int32", "bool"])
def test_the_name_of_a_dtype(library, dtype):
    x = library.place(np.ones(2, dtype))
    assert dtype_name(x) == compute_dtype(x) == dtype


def test_storage_dtypes_compute_in_float32():
    for dtype, name in ((np.float16, "float16"), (BF16, "bfloat16")):
        x = np.ones(2, dtype)
        assert (dtype_name(x), compute_dtype(x)) == (name, "float32")


def test_one_dtype_is_shared():
    f32, f64, c = np.ones(1, "float32"), np.ones(1), np.ones(1, "complex128")
    assert one_dtype(x=f32, y=None, z=f32) == "float32"
    assert one_dtype(x=f64, y=c) == one_dtype(x=c, y=f64) == one_dtype(x=c, y=c) == "complex128"
    assert one_dtype(x=np.ones(1, BF16)) == "bfloat16"
    for arrays, message in (
        ({"x": f32, "y": f64}, "y: expected float32, set by x, got float64"),
        ({"x": f64, "y": None, "z": f32}, "z: expected float64, set by x, got float32"),
        ({"x": f32, "y": c}, "y: expected float32, set by x, got complex128"),
        ({"x": np.ones(1, "float16"), "y": np.ones(1, BF16)}, "y: expected float16, set by x, got bfloat16"),
    ):
        with pytest.raises(DtypeError) as caught:
            one_dtype(**arrays)
        assert str(caught.value) == message
    for dtype in ("int64", "bool", "complex64", "uint8", "object", "longdouble"):
        x = np.ones(1, dtype)
        with pytest.raises(DtypeError) as caught:
            one_dtype(f=f64, x=x)
        assert str(caught.value) == (
            f"x: expected one of float16, bfloat16, float32, float64, complex128, got {x.dtype.name}"
        )


def test_casts():
    """To the named dtype, and the very array where nothing changes; complex128 and None stay."""
    x = np.array([1 + 2.0**-30, 3.0])
    for dtype in ("float16", "float32", "float64"):
        got = cast(x, dtype)
        assert got.dtype == dtype
        assert np.array_equal(got, x.astype(dtype))
    assert cast(x, "float64") is x
    assert cast(x, "bfloat16").dtype == BF16
    assert cast(x.astype(BF16), "float32").dtype == "float32"
    assert cast(None, "float32") is None
    c = x + 1j
    assert cast(c, "float32") is c


def test_bfloat16_is_rounded_once():
    """From float64 to nearest, ties to even; by way of float32 1 + 2⁻⁸ + 2⁻⁴⁰ would become 1."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal(300) * 2.0 ** rng.integers(-140, 120, 300)
    ties = (1 + (2 * rng.integers(0, 128, 300) + 1) * 2.0**-8) * 2.0 ** rng.integers(-120, 120, 300)
    near = ties * (1 + rng.choice([-1, 0, 1], 300) * 2.0 ** -rng.integers(26, 50, 300))
    small = rng.integers(-300, 300, 100) * 2.0**-135  # below 2⁻¹²⁶ the steps are 2⁻¹³³
    x = np.concatenate([plain, ties, near, -near, small, [1 + 2.0**-8 + 2.0**-40]])
    got = cast(x, "bfloat16")
    assert got.dtype == BF16
    assert got.astype("float64").tolist() == [nearest(Fraction(v), "bfloat16") for v in x.tolist()]
    assert (got.astype("float64") != x.astype("float32").astype(BF16).astype("float64")).any()
    assert cast(x[::-2].reshape(-1, 1).T, "bfloat16").tolist() == [got[::-2].tolist()]
    assert cast(x.astype("float32"), "bfloat16").tolist() == x.astype("float32").astype(BF16).tolist()


def test_bfloat16_of_what_is_no_number():
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e300, -1e300, 1e-300, -1e-300, 3.3895e38, 3.3962e38])
    with quiet():
        got = cast(x, "bfloat16").astype("float64")
    assert np.isnan(got[0])
    assert got[1:3].tolist() == [np.inf, -np.inf]
    assert got[3:5].tolist() == got[7:9].tolist() == [0.0, 0.0]
    assert np.signbit(got[[4, 8]]).all()
    assert not np.signbit(got[[3, 7]]).any()
    assert got[5:7].tolist() == [np.inf, -np.inf]
    assert got[9:].tolist() == [(2 - 2.0**-7) * 2.0**127, np.inf]


@libraries
def test_casts_stay_where_they_are(library):
    x = library.place(np.ones(3))
    got = cast(x, "float32")
    assert dtype_name(got) == "float32"
    assert type(got) is type(x)
    assert getattr(got, "device", None) == getattr(x, "device", None)


def test_a_dtype_that_the_library_lacks_is_named():
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(DtypeError, match=f"^x: expected a dtype that array_api_strict has, got {dtype}$"):
            cast(STRICT.place(np.ones(3)), dtype)


def test_bfloat16_without_ml_dtypes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(DtypeError) as caught:
        cast(np.ones(3), "bfloat16")
    assert (
        str(caught.value) == "bfloat16: expected the package ml_dtypes, got none; pip install 'lorax-np[bf16]'"
    )


@libraries
def test_the_real_part(library):
    x = library.place(np.array([1 + 2j]))
    assert library.host(real(x)).tolist() == [1.0]
    y = library.place(np.ones(2))
    assert real(y) is y


def test_finiteness():
    for library in (x for x in LIBRARIES if x.name != "guarded"):
        assert all_finite(library.place(np.ones(3)))
        assert all_finite(library.place(np.ones((0, 3))))
        for bad in (np.nan, np.inf, -np.inf):
            assert not all_finite(library.place(np.array([1.0, bad])))
    assert not all_finite(np.array([1.0, np.inf], BF16))


def test_quiet_silences_only_what_is_looked_at():
    big = np.full(1, 1e30)
    with quiet():
        assert np.isinf(big.astype("float16"))
    with pytest.warns(RuntimeWarning):
        big.astype("float16")
