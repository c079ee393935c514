"""One thread for each product while several of ours compute: two pools would wait for each other."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

NAMES = (  # of the functions that tell and set it, in the library behind NumPy's products
    "scipy_openblas_{}_num_threads64_",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
    "scipy_openblas_{}_num_threads",
)
_lock = threading.Lock()
_inside = 0
_before = 0


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within this context NumPy's BLAS uses one thread a product, as far as it can be told to."""
    global _inside, _before
    get, put = _functions()
    with _lock:
        _inside += 1
        if _inside == 1:
            _before = get()
            put(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                put(_before)


def _functions() -> tuple[Any, Any]:
    """What tells the number of threads, and what sets it; two that do nothing where the library has none."""
    try:
        shared = ctypes.CDLL(import_module("numpy._core._multiarray_umath").__file__)
    except (ImportError, OSError):
        return (lambda: 0), (lambda _: None)
    for name in NAMES:
        if hasattr(shared, name.format("set")) and hasattr(shared, name.format("get")):
            return getattr(shared, name.format("get")), getattr(shared, name.format("set"))
    return (lambda: 0), (lambda _: None)
