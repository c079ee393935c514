"""out ← α·ab + β·out in place, by the first of four libraries that works.  Choice: specs/decisions/gemm.md.

Every product of the fast engine goes through gemm, so that one pool of threads does all the work: a second pool
makes each wait for the other's idle workers.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import HostArray, add_fact, dtype_name
from ..errors import BackendError

Multiply = Callable[[HostArray, HostArray, HostArray, float, float], None]

ROWS, PLAIN, TRANSPOSED = 101, 111, 112  # CBLAS: row-major order, and how a factor lies
SYMBOLS = (  # of one function, and the integers it takes; NumPy's wheels, Accelerate, then everybody else's
    ("scipy_cblas_{}gemm64_", ctypes.c_int64),
    ("cblas_{}gemm64_", ctypes.c_int64),
    ("cblas_{}gemm$NEWLAPACK$ILP64", ctypes.c_int64),
    ("cblas_{}gemm", ctypes.c_int32),
)


class Engine(NamedTuple):
    """A library that multiplies."""

    name: str  # mkl, openblas, scipy or numpy
    what: str  # which library and function that is
    multiply: Multiply  # float32 or float64 matrices that are neither empty nor of another byte order
    stored: Multiply | None = None  # bfloat16 matrices into a float32 one, where the processor is made for it


def gemm(a: HostArray, b: HostArray, out: HostArray, alpha: float = 1.0, beta: float = 0.0) -> None:
    """Write α·ab + β·out into out; where β is 0, out is not read.

    a : (m, k), b : (k, n), out : (m, n)   float32 or float64, all the same; views of any strides
    out overlaps neither a nor b. Nothing is checked: the callers have.
    """
    if not out.size:
        return
    if not a.shape[1]:
        out[...] = beta * out if beta else 0.0
        return
    engine().multiply(a, b, out, alpha, beta)


def gemm_stored(a: HostArray, b: HostArray, out: HostArray, alpha: float = 1.0, beta: float = 0.0) -> bool:
    """As gemm, of two bfloat16 factors into float32, in which their products are exact and their sums taken.

    Returns whether it could: False, with nothing written, for other dtypes, and where no matrix unit is.
    """
    multiply = engine().stored
    if multiply is None or not (dtype_name(a) == dtype_name(b) == "bfloat16") or out.dtype != np.float32:
        return False
    if out.size:
        multiply(a, b, out, alpha, beta)
    return True


# ---- which library ----------------------------------------------------------------------------------------

_asked: ContextVar[Engine | None] = ContextVar("blas", default=None)


def engine() -> Engine:
    """The engine of this context: what blas() asked for, else the first that works."""
    return _asked.get() or _first()


@contextmanager
def blas(name: str) -> Iterator[Engine]:
    """Within this context, and in this thread alone, products are by the engine of that name.

    name : "mkl" (the extra), "openblas" (the library that NumPy itself loaded), "scipy", or "numpy" (matmul)

    Raises BackendError for another name, and where the engine does not work here, with what does.

    >>> with blas("numpy") as engine:
    ...     engine.name
    'numpy'
    """
    if name not in _MAKERS:
        raise BackendError(f"blas: expected one of {', '.join(_MAKERS)}, got {name!r}")
    found = _tried(name)
    if isinstance(found, str):
        raise BackendError(
            f"blas: expected one of {', '.join(engines())}, which work here, got {name}: {found}"
        )
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


def engines() -> tuple[str, ...]:
    """Names of the engines that work here, the preferred first. Loads each to see."""
    return tuple(name for name in _MAKERS if isinstance(_tried(name), Engine))


def describe() -> str:
    """The engine in use, and why none before it is."""
    found = engine()
    before = list(_MAKERS)[: list(_MAKERS).index(found.name)] if _asked.get() is None else []
    return "; ".join([f"{found.name}: {found.what}", *(f"no {name}: {_tried(name)}" for name in before)])


@cache
def _first() -> Engine:
    return next(found for name in _MAKERS if isinstance(found := _tried(name), Engine))


@cache
def _tried(name: str) -> Engine | str:
    """The engine, proved by one product in each dtype, or why there is none."""
    try:
        found = _MAKERS[name]()
        wrong = _disproved(found.multiply)
    except Exception as error:  # a loader, a symbol, a package: each fails in its own way
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return wrong or found


def _disproved(multiply: Multiply) -> str:
    """What is wrong with a product of small whole numbers, through views; nothing where it is right."""
    for dtype in ("float32", "float64"):
        whole = np.arange(60, dtype=dtype).reshape(6, 10)
        a, b, out = whole[1:4, 2:7], whole.T[2:7, 1:5], whole.copy()
        want = out.copy()
        want[:3, 3:7] = 2.0 * (a[:, :, None] * b).sum(axis=1) + 0.5 * out[:3, 3:7]
        multiply(a, b, out[:3, 3:7], 2.0, 0.5)
        if not np.array_equal(out, want):
            return f"a product of small whole numbers came out wrong in {dtype}"
    return ""


# ---- the four ---------------------------------------------------------------------------------------------


def _mkl() -> Engine:
    """The mkl extra: libmkl_rt, found among the files of its package."""
    metadata = import_module("importlib.metadata")
    try:
        package = metadata.distribution("mkl")
    except metadata.PackageNotFoundError:
        raise BackendError("the package mkl is not installed; pip install 'lorax-np[mkl]'") from None
    for file in package.files or ():
        if re.match(r"(lib)?mkl_rt\..*(so|dll|dylib)", file.name):
            library = ctypes.CDLL(str(Path(str(file.locate())).resolve()))
            multiply = _by_cblas(library, "cblas_{}gemm", ctypes.c_int32)
            stored = _by_bf16(library) if has_matrix_unit() else None
            what = f"MKL {package.version}, by ctypes{', bfloat16 by its matrix unit' if stored else ''}"
            return Engine("mkl", what, multiply, stored)
    raise BackendError(f"the package mkl {package.version} lists no mkl_rt library")


def has_matrix_unit() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself (AMX); without, MKL is quicker in float32."""
    about = Path("/proc/cpuinfo")
    return about.is_file() and "amx_bf16" in about.read_text(encoding="utf-8", errors="replace")


def _openblas() -> Engine:
    """Whatever CBLAS NumPy's own extension module is linked to: its symbols are looked up through it."""
    library = ctypes.CDLL(import_module("numpy._core._multiarray_umath").__file__)
    for pattern, integer in SYMBOLS:
        if hasattr(library, pattern.format("s")):
            config = getattr(library, "scipy_openblas_get_config64_", None)
            if config is not None:
                config.restype = ctypes.c_char_p
            what = config().decode().strip() if config is not None else "NumPy's own BLAS"
            return Engine("openblas", f"{what}, by {pattern.format('s')}", _by_cblas(library, pattern, integer))
    raise BackendError("NumPy's library exports no CBLAS")


def _scipy() -> Engine:
    blas = import_module("scipy.linalg.blas")
    functions = {"float32": blas.sgemm, "float64": blas.dgemm}

    def multiply(a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> None:
        if not out.flags.f_contiguous:
            if out.flags.c_contiguous:
                multiply(b.T, a.T, out.T, alpha, beta)
            else:  # SciPy would write into a copy of out, and say nothing
                _apart(multiply, a, b, out, alpha, beta)
            return
        (fa, ta), (fb, tb) = ((x, 0) if x.flags.f_contiguous else (x.T, 1) for x in (a, b))
        found = functions[out.dtype.name](
            alpha, fa, fb, beta=beta, c=out, trans_a=ta, trans_b=tb, overwrite_c=1
        )
        if _address(found) != _address(out):
            raise BackendError("scipy: expected gemm to write into the array it was given, got a copy")

    return Engine("scipy", f"SciPy {import_module('scipy').__version__}'s BLAS", multiply)


def _numpy() -> Engine:
    def multiply(a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> None:
        if beta == 0:
            np.matmul(a, b, out=out)
            if alpha != 1:
                out *= alpha
        else:
            _apart(multiply, a, b, out, alpha, beta)

    return Engine("numpy", f"NumPy {np.__version__}'s matmul, and additions", multiply)


_MAKERS = {"mkl": _mkl, "openblas": _openblas, "scipy": _scipy, "numpy": _numpy}


def _apart(multiply: Multiply, a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> None:
    """By way of a product of its own, which is then added."""
    product = np.empty(out.shape, out.dtype)
    multiply(a, b, product, alpha, 0.0)
    if beta == 0:
        out[...] = product
        return
    if beta != 1:
        out *= beta
    out += product


# ---- CBLAS by ctypes --------------------------------------------------------------------------------------


def _by_cblas(library: Any, pattern: str, integer: Any) -> Multiply:
    """The two functions of a C library as one, on strided views as they lie."""
    kinds = (("s", "float32", ctypes.c_float), ("d", "float64", ctypes.c_double))
    functions = {}
    for letter, dtype, real in kinds:
        functions[np.dtype(dtype)] = _typed(getattr(library, pattern.format(letter)), integer, real)
    return _on_views(functions)


def _by_bf16(library: Any) -> Multiply:
    """MKL's product of bfloat16 matrices into float32."""
    function = _typed(library.cblas_gemm_bf16bf16f32, ctypes.c_int32, ctypes.c_float)
    return _on_views({np.dtype("float32"): function})


def _typed(function: Any, integer: Any, real: Any) -> Any:
    """A C function with the arguments that every gemm of CBLAS has."""
    flag, place = ctypes.c_int, ctypes.c_void_p
    factors = [real, place, integer, place, integer]
    function.restype, function.argtypes = None, [flag] * 3 + [integer] * 3 + factors + [real, place, integer]
    return function


def _on_views(functions: dict[Any, Any]) -> Multiply:
    """C functions, by the dtype of their result, as one that takes strided views."""

    def multiply(a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> None:
        if _step(out) is None:
            if _step(out.T) is None:
                _apart(multiply, a, b, out, alpha, beta)
            else:
                multiply(b.T, a.T, out.T, alpha, beta)
            return
        (m, k), n = a.shape, b.shape[1]
        a, how_a, step_a = _laid(a)
        b, how_b, step_b = _laid(b)
        functions[out.dtype](
            *(ROWS, how_a, how_b, m, n, k, alpha, _address(a), step_a, _address(b), step_b),
            *(beta, _address(out), _step(out)),
        )

    return multiply


def _laid(x: HostArray) -> tuple[HostArray, int, int]:
    """A factor as CBLAS can read it, copied only where it must be; how it lies, and the step of its lines."""
    for how, view in ((PLAIN, x), (TRANSPOSED, x.T)):
        step = _step(view)
        if step is not None:
            return x, how, step
    x = np.ascontiguousarray(x)
    return x, PLAIN, x.shape[1]


def _step(x: HostArray) -> int | None:
    """The distance of the rows of x in elements, or None where BLAS cannot walk along them."""
    (count, length), (down, along), size = x.shape, x.strides, x.itemsize
    if length > 1 and along != size:
        return None
    if count == 1:
        return length if x.flags.aligned else None
    fits = down >= length * size and down % size == 0 and x.flags.aligned
    return down // size if fits else None


def _address(x: HostArray) -> int:
    address: int = x.__array_interface__["data"][0]
    return address


add_fact("gemm", describe)
