"""CBLAS by ctypes: the gemm of a C library on strided views as they lie.  Choice: specs/decisions/gemm.md."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import HostArray

Multiply = Callable[
    [HostArray, HostArray, HostArray, float, float], None
]  # out ← α·ab + β·out: a, b, out, α, β

Squares = Callable[[HostArray], float]  # Σ x² of an array without gaps

KINDS = (("s", "float32", ctypes.c_float), ("d", "float64", ctypes.c_double))
ROWS, PLAIN, TRANSPOSED = 101, 111, 112  # CBLAS: row-major order, and how a factor lies


def by_cblas(shared: Any, pattern: str, integer: Any) -> Multiply:
    """The two functions of a C library as one, on strided views as they lie."""
    functions = {}
    for letter, dtype, real in KINDS:
        functions[np.dtype(dtype)] = _typed(getattr(shared, pattern.format(letter)), integer, real)
    return _on_views(functions)


def squares_by_cblas(shared: Any, pattern: str, integer: Any) -> Squares:
    """The dot of the same library, of an array with itself."""
    functions = {}
    for letter, dtype, real in KINDS:
        function = functions[np.dtype(dtype)] = getattr(shared, pattern.replace("gemm", "dot").format(letter))
        function.restype, place = real, ctypes.c_void_p
        function.argtypes = [integer, place, integer, place, integer]
    return lambda x: float(functions[x.dtype](x.size, address(x), 1, address(x), 1))


def by_bf16(shared: Any) -> Multiply:
    """MKL's product of bfloat16 matrices into float32."""
    function = _typed(shared.cblas_gemm_bf16bf16f32, ctypes.c_int32, ctypes.c_float)
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
                apart(multiply, a, b, out, alpha, beta)
            else:
                multiply(b.T, a.T, out.T, alpha, beta)
            return
        (m, k), n = a.shape, b.shape[1]
        a, how_a, step_a = _laid(a)
        b, how_b, step_b = _laid(b)
        functions[out.dtype](
            *(ROWS, how_a, how_b, m, n, k, alpha, address(a), step_a, address(b), step_b),
            *(beta, address(out), _step(out)),
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


def address(x: HostArray) -> int:
    """Where x begins in memory."""
    at: int = x.__array_interface__["data"][0]
    return at


def apart(multiply: Multiply, a: HostArray, b: HostArray, out: HostArray, alpha: float, beta: float) -> None:
    """By way of a product in an array of its own, which is then added."""
    product = np.empty(out.shape, out.dtype)
    multiply(a, b, product, alpha, 0.0)
    if beta == 0:
        out[...] = product
        return
    if beta != 1:
        out *= beta
    out += product
