"""Arrays on a device, and the kernels of gpu_kernels.py started on them."""

from functools import cache
from typing import Any

import numpy as np

from ..backend import cast, dtype_name, namespace_of
from .gpu_kernels import COLUMNS, ENTRIES, ROWS, SOURCE, STRIPES, THREADS, name_of

Device = Any  # an array on the device


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Device:
    """An array beside `like`, of whatever lies there."""
    lib = namespace_of(like=like)
    return lib.empty(shape, dtype=dtype_of(dtype))


@cache
def dtype_of(name: str) -> Any:
    """The dtype of a name; bfloat16 is ml_dtypes', by way of a cast, which says how to install it.

    >>> dtype_of("float16").itemsize
    2
    """
    return cast(np.zeros(1, np.float32), name).dtype


def contiguous(x: Any) -> Device:
    """X itself, or a copy without gaps."""
    lib = namespace_of(x=x)
    return lib.ascontiguousarray(x)


# ---- kernels ----------------------------------------------------------------------------------------------


@cache
def kernel_of(lib: Any, name: str) -> Any:
    """A compiled kernel. CuPy keeps it on disk, so that only the first process waits for NVRTC."""
    module = lib.RawModule(code=SOURCE, options=("--std=c++17",), name_expressions=(name,))
    return module.get_function(name)


@cache
def functions_of(lib: Any, source: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Kernels of one source, compiled together, by their names without dtypes."""
    module = lib.RawModule(code=source, options=("--std=c++17",), name_expressions=names)
    return {name.partition("<")[0]: module.get_function(name) for name in names}


def run(kernel: str, out: Device, arguments: tuple[Any, ...], *typed: Device) -> None:
    """Start a kernel over the entries of `out`, for the dtypes of the arrays `typed`."""
    threads = -(-out.size // ENTRIES)
    if threads:
        found = kernel_of(namespace_of(x=out), name_of(kernel, *map(dtype_name, typed)))
        found((-(-threads // THREADS),), (THREADS,), tuple(map(_argument, arguments)))


def count_of(x: Device) -> Any:
    """How many entries x has, as kernels take it."""
    return np.uint64(x.size)


def u32(value: int) -> Any:
    """A number as kernels take it."""
    return np.uint32(value)


def _argument(value: Any) -> Any:
    """A Python 0 stands for a pointer to nothing."""
    return np.uint64(0) if isinstance(value, int) else value


def column_sums(G: Device, P: Device | None = None) -> Device:
    """Σ gy or Σ gy∘P over tokens, in float64: over stripes of tokens, then over the stripes, in one order."""
    G, (tokens, width) = contiguous(G), G.shape
    stripes = min(STRIPES, max(1, tokens))
    parts = empty(G, (stripes, width), "float64")
    kernel = kernel_of(namespace_of(G=G), name_of("column_sums", *map(dtype_name, (G, G if P is None else P))))
    arguments = (parts, G, 0 if P is None else P, u32(tokens), u32(width), u32(stripes))
    kernel((-(-width // COLUMNS) * stripes,), (THREADS,), tuple(map(_argument, arguments)))
    sums: Device = namespace_of(G=G).sum(parts, axis=0)
    return sums


def norms_of_rows(W: Device, A: Device, sB: Device, low: str) -> Device:
    """The row norms of W + sB·A in float64, by the kernel of that name."""
    n = empty(W, (W.shape[0],), "float64")
    kernel = kernel_of(namespace_of(W=W), name_of("row_norms", dtype_name(W), low))
    sizes = (u32(W.shape[0]), u32(W.shape[1]), u32(A.shape[0]))
    kernel((-(-W.shape[0] // ROWS),), (THREADS,), (n, W, A, sB, *sizes))
    return n
