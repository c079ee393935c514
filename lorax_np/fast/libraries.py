"""The libraries that can stand behind gemm, each proved before it is used.  Choice: specs/decisions/gemm.md."""

import ctypes
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import HostArray, cast
from ..errors import BackendError
from .cblas import Multiply, Squares, address, apart, by_bf16, by_cblas, squares_by_cblas
from .split import split3

SYMBOLS = (  # of one function, and the integers it takes; NumPy's wheels, Accelerate, then everybody else's
    ("scipy_cblas_{}gemm64_", ctypes.c_int64),
    ("cblas_{}gemm64_", ctypes.c_int64),
    ("cblas_{}gemm$NEWLAPACK$ILP64", ctypes.c_int64),
    ("cblas_{}gemm", ctypes.c_int32),
)

WIDE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # what kernels for SkylakeX are made of


class Threads(NamedTuple):
    """How many threads a library's products use: of the whole process, or of the calling thread alone."""

    get: Callable[[], int]
    set: Callable[[int], None]


class Engine(NamedTuple):
    """A library that multiplies."""

    name: str  # mkl, openblas, scipy, numpy or mkl-split3
    what: str  # which library and function that is
    multiply: Multiply  # float32 or float64 matrices that are neither empty nor of another byte order
    stored: Multiply | None = None  # bfloat16 matrices into a float32 one, where the processor is made for it
    squares: Squares | None = None  # of a float32 or float64 array, by the same pool of threads
    threads: Threads | None = None  # where they can be counted and set
    advice: str = ""  # how to have it faster, where that is known


def proved(make: Callable[[], Engine]) -> Engine | str:
    """The engine, proved by one product in each dtype, or why there is none."""
    try:
        found = make()
        wrong = disproved(found.multiply) or _squares_disproved(found.squares)
    except Exception as error:  # a loader, a symbol, a package: each fails in its own way
        return _reason(error)
    return wrong or found


def disproved(multiply: Multiply, dtypes: tuple[str, ...] = ("float32", "float64")) -> str:
    """What is wrong with a product of small whole numbers, through views; nothing where it is right."""
    for dtype in dtypes:
        whole = np.arange(60, dtype="float32" if dtype == "bfloat16" else dtype).reshape(6, 10)
        a, b, out = whole[1:4, 2:7], whole.T[2:7, 1:5], whole.copy()
        want = out.copy()
        want[:3, 3:7] = 2.0 * (a[:, :, None] * b).sum(axis=1) + 0.5 * out[:3, 3:7]
        given: Any = cast(whole, dtype)
        multiply(given[1:4, 2:7], given.T[2:7, 1:5], out[:3, 3:7], 2.0, 0.5)
        if not np.array_equal(out, want):
            return f"a product of small whole numbers came out wrong in {dtype}"
    return ""


def _squares_disproved(squares: Squares | None) -> str:
    """The same of a sum of squares."""
    if squares is not None:
        for dtype in ("float32", "float64"):
            if squares(np.arange(30, dtype=dtype).reshape(5, 6)) != 8555:
                return f"a sum of small whole squares came out wrong in {dtype}"
    return ""


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- MKL --------------------------------------------------------------------------------------------------


def _mkl_library() -> tuple[Any, str]:
    """libmkl_rt of the mkl extra, found among the files of its package; and the package's version."""
    metadata = import_module("importlib.metadata")
    try:
        package = metadata.distribution("mkl")
    except metadata.PackageNotFoundError:
        raise BackendError("the package mkl is not installed; pip install 'lorax-np[mkl]'") from None
    for file in package.files or ():
        if re.match(r"(lib)?mkl_rt\..*(so|dll|dylib)", file.name):
            return ctypes.CDLL(str(Path(str(file.locate())).resolve())), package.version
    raise BackendError(f"the package mkl {package.version} lists no mkl_rt library")


def _mkl() -> Engine:
    shared, version = _mkl_library()
    found = _bf16(shared) if has_matrix_unit() else "the processor has no matrix unit for it"
    about = f"no bfloat16: {found}" if isinstance(found, str) else "bfloat16 by the processor's matrix unit"
    stored = None if isinstance(found, str) else found
    parts = shared, "cblas_{}gemm", ctypes.c_int32
    multiply, squares = by_cblas(*parts), squares_by_cblas(*parts)
    threads = _threads(shared, "MKL_Get_Max_Threads", "MKL_Set_Num_Threads")
    return Engine("mkl", f"MKL {version}, by ctypes; {about}", multiply, stored, squares, threads)


def _mkl_split3() -> Engine:
    """Only for who asks: 5e-5 of its terms is what a sum may be off, (speed.21), beside float32's roundings."""
    shared, version = _mkl_library()
    stored, unit = _bf16(shared), has_matrix_unit()
    if isinstance(stored, str):
        raise BackendError(stored)
    about = "" if unit else "; slow, the processor has no matrix unit for them"
    multiply = split3(stored, by_cblas(shared, "cblas_{}gemm", ctypes.c_int32))
    what = f"MKL {version}, float32 by three products of bfloat16{about}"
    return Engine("mkl-split3", what, multiply, stored if unit else None)


def _bf16(shared: Any) -> Multiply | str:
    """MKL's product of bfloat16 matrices, or why there is none."""
    try:
        multiply = by_bf16(shared)
        return disproved(multiply, ("bfloat16",)) or multiply
    except Exception as error:  # no ml_dtypes, or an MKL of before
        return _reason(error)


def has_matrix_unit() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself (AMX); without, MKL is quicker in float32."""
    return "amx_bf16" in _flags()


def _flags() -> set[str]:
    """What this processor says it can do; nothing where the system does not tell."""
    about = Path("/proc/cpuinfo")
    return set(about.read_text(encoding="utf-8", errors="replace").split()) if about.is_file() else set()


def half_wide(config: str, flags: set[str]) -> str:
    """What to do where OpenBLAS took kernels of 256 bits on a processor that has 512, as on newer ones of AMD.

    >>> half_wide("OpenBLAS 0.3.31 DYNAMIC_ARCH Haswell MAX_THREADS=64", {"avx2", *WIDE})
    'kernels for Haswell on a processor with AVX-512: OPENBLAS_CORETYPE=SkylakeX takes wider ones'
    >>> half_wide("OpenBLAS 0.3.31 DYNAMIC_ARCH SkylakeX MAX_THREADS=64", {"avx2", *WIDE})
    ''
    """
    core = next((word for word in config.split() if word in ("Haswell", "Zen")), None)
    if core is None or not flags >= WIDE:
        return ""
    wider = "OPENBLAS_CORETYPE=SkylakeX takes wider ones"
    return f"kernels for {core} on a processor with AVX-512: {wider}"


# ---- the others -------------------------------------------------------------------------------------------


def _openblas() -> Engine:
    """Whatever CBLAS NumPy's own extension module is linked to: its symbols are looked up through it."""
    shared = ctypes.CDLL(import_module("numpy._core._multiarray_umath").__file__)
    for pattern, integer in SYMBOLS:
        if hasattr(shared, pattern.format("s")):
            config = getattr(shared, "scipy_openblas_get_config64_", None)
            if config is not None:
                config.restype = ctypes.c_char_p
            what = config().decode().strip() if config is not None else "NumPy's own BLAS"
            parts, advice = (shared, pattern, integer), half_wide(what, _flags())
            what = f"{what}, by {pattern.format('s')}{advice and f'; {advice}'}"
            threads = _threads(shared, *(pattern_of_threads(pattern, word) for word in ("get", "set")))
            return Engine("openblas", what, by_cblas(*parts), None, squares_by_cblas(*parts), threads, advice)
    raise BackendError("NumPy's library exports no CBLAS")


def pattern_of_threads(pattern: str, word: str) -> str:
    """The name beside a gemm's in one library: scipy_cblas_{}gemm64_ -> scipy_openblas_get_num_threads64_."""
    return pattern.replace("cblas_{}gemm", f"openblas_{word}_num_threads")


def _threads(shared: Any, get: str, put: str) -> Threads | None:
    """The two functions of a library, where it has both."""
    if not (hasattr(shared, get) and hasattr(shared, put)):
        return None
    reads, writes = getattr(shared, get), getattr(shared, put)
    reads.restype, reads.argtypes, writes.restype, writes.argtypes = ctypes.c_int, [], None, [ctypes.c_int]
    return Threads(lambda: int(reads()), lambda count: writes(count))


def _scipy() -> Engine:
    blas = import_module("scipy.linalg.blas")
    functions = {"float32": blas.sgemm, "float64": blas.dgemm}

    def multiply(a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> None:
        if not out.flags.f_contiguous:
            if out.flags.c_contiguous:
                multiply(b.T, a.T, out.T, alpha, beta)
            else:  # SciPy would write into a copy of out, and say nothing
                apart(multiply, a, b, out, alpha, beta)
            return
        (fa, ta), (fb, tb) = ((x, 0) if x.flags.f_contiguous else (x.T, 1) for x in (a, b))
        found = functions[out.dtype.name](
            alpha, fa, fb, beta=beta, c=out, trans_a=ta, trans_b=tb, overwrite_c=1
        )
        if address(found) != address(out):
            raise BackendError("scipy: expected gemm to write into the array it was given, got a copy")

    return Engine("scipy", f"SciPy {import_module('scipy').__version__}'s BLAS", multiply)


def _numpy() -> Engine:
    def multiply(a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> None:
        if beta == 0:
            np.matmul(a, b, out=out)
            if alpha != 1:
                out *= alpha
        else:
            apart(multiply, a, b, out, alpha, beta)

    return Engine("numpy", f"NumPy {np.__version__}'s matmul, and additions", multiply)


MAKERS = {"mkl": _mkl, "openblas": _openblas, "scipy": _scipy, "numpy": _numpy}  # the preferred first
COARSE = {"mkl-split3": _mkl_split3}  # by name alone: what they compute is less than float32
