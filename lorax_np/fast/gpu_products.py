"""Products on a device by cuBLAS, which accumulates: out ← α·ab + β·out."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import numpy as np

from ..backend import cast, compute_dtype, dtype_name, namespace_of
from ..errors import BackendError
from .gpu_arrays import Device, contiguous, count_of, empty, run

# cuBLAS's own numbers: element types, and in which arithmetic products of them are added up
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
IN_FLOAT32, IN_FLOAT64, ANY_ALGORITHM = 68, 70, -1


def product(a: Device, b: Device, out: Device, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out ← α·ab + β·out, added up in float32, or in float64 where out is; where β is 0, out is not read.

    a : (m, k), b : (k, n), out : (m, n)   of any real dtypes; a and b as they lie, transposed views too
    Factors of one dtype are read as they are, float16 and bfloat16 by the device's matrix units; others cast.
    """
    if not out.size:
        return
    if not a.shape[1]:  # a sum over no tokens
        if beta:
            out *= beta
        else:
            out.fill(0)
        return
    kinds, to = {dtype_name(a), dtype_name(b)}, dtype_name(out)
    if len(kinds) == 1 and to in (*kinds, compute_dtype(a)):
        _gemm(a, b, out, alpha, beta)
        return
    wide = "float64" if "float64" in (*kinds, to) else "float32"
    a, b = cast(a, wide), cast(b, wide)
    if to == wide:
        _gemm(a, b, out, alpha, beta)
        return
    t = empty(out, out.shape, wide)
    _gemm(a, b, t, alpha, 0.0)
    if beta not in (0.0, 1.0):
        out *= beta
    if beta:
        run("add", out, (out, t, count_of(out)), out, t)
    else:
        out[...] = cast(t, to)


def _gemm(a: Device, b: Device, out: Device, alpha: float, beta: float) -> None:
    """One call of cuBLAS. It counts along columns, where out and both factors are the transposes of ours."""
    (m, k), n, lib = a.shape, b.shape[1], namespace_of(out=out)
    a, across_a, step_a = _laid(a)
    b, across_b, step_b = _laid(b)
    wide = dtype_name(out) == "float64"
    scale = np.array([alpha, beta], dtype=np.float64 if wide else np.float32)
    at = scale.ctypes.data
    own: Cublas | None = getattr(_here, "cublas", None)
    call, handle = (
        (lib.cuda.cublas.gemmEx, lib.cuda.get_cublas_handle()) if own is None else (own.gemm_ex, own.handle)
    )
    call(
        *(handle, across_b, across_a, n, m, k),
        *(at, b.data.ptr, TYPES[dtype_name(b)], step_b, a.data.ptr, TYPES[dtype_name(a)], step_a),
        *(at + scale.itemsize, out.data.ptr, TYPES[dtype_name(out)], n),
        *(IN_FLOAT64 if wide else IN_FLOAT32, ANY_ALGORITHM),
    )


def _laid(x: Device) -> tuple[Device, int, int]:
    """A factor as cuBLAS can read it: itself or a copy, whether as its transpose, and the step of its lines."""
    (count, length), (down, along), size = x.shape, x.strides, x.itemsize
    if (along == size or length == 1) and (down >= length * size or count == 1) and down % size == 0:
        return x, 0, max(down // size if count > 1 else length, length)
    if (down == size or count == 1) and (along >= count * size or length == 1) and along % size == 0:
        return x, 1, max(along // size if length > 1 else count, count)
    return contiguous(x), 0, length


# ---- while a graph is captured -----------------------------------------------------------------------------

WORKSPACE = 32 << 20  # bytes, what NVIDIA names for its largest devices
_here = threading.local()  # .cublas, the handle that this thread's products go by


@contextmanager
def products_by(cublas: "Cublas") -> Iterator[None]:
    """Within this context, and in this thread alone, products go by a handle of their own."""
    _here.cublas = cublas
    try:
        yield
    finally:
        del _here.cublas


class Cublas:
    """cuBLAS on one stream, by ctypes: CuPy's own calls refuse while a graph is captured, the library does not.

    Its workspace is its own, since in a graph the memory of one product may not be another stream's.
    """

    def __init__(self, lib: Any, stream: Any) -> None:
        """lib : CuPy; stream : one of its streams. Raises BackendError where the library cannot be had."""
        self._library = library_of(lib)
        handle = ctypes.c_void_p()
        self._done("cublasCreate_v2", ctypes.byref(handle))
        self.handle = handle
        finalize(self, self._library.cublasDestroy_v2, handle)
        self._space = lib.empty((WORKSPACE,), dtype=np.uint8)
        self._done("cublasSetStream_v2", handle, ctypes.c_void_p(stream.ptr))
        self._done(
            "cublasSetWorkspace_v2",
            *(handle, ctypes.c_void_p(self._space.data.ptr), ctypes.c_size_t(WORKSPACE)),
        )
        self._library.cublasGemmEx.argtypes = GEMM_EX

    def gemm_ex(self, *arguments: Any) -> None:
        """cublasGemmEx, its arguments in their order."""
        self._done("cublasGemmEx", *arguments)

    def _done(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise BackendError(f"cuBLAS: expected {name} to succeed, got status {status}")


_int, _at = ctypes.c_int, ctypes.c_void_p
GEMM_EX = [_at, *[_int] * 5, *(_at, _at, _int, _int), *(_at, _int, _int), *(_at, _at, _int, _int), _int, _int]


def library_of(lib: Any) -> Any:
    """The cuBLAS that CuPy has loaded, by the name that its loader knows."""
    major = lib.cuda.cublas.getVersion(lib.cuda.get_cublas_handle()) // 10000
    names = (f"libcublas.so.{major}", f"cublas64_{major}.dll")
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendError(f"cuBLAS: expected one of {', '.join(names)} to capture a graph with, got neither")
