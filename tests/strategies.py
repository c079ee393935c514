"""What the tests draw from: array libraries, shapes, and arrays of normals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_strict
import numpy as np
from hypothesis import strategies as st

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)
ranks = st.integers(1, 11)  # past min(d_in, d_out) too
leads = st.lists(st.integers(0, 3), max_size=3).map(tuple)  # no axis, several, and zero tokens
scalings = st.floats(0.1, 10).filter(lambda s: abs(s - round(s)) > 1e-3)


class Guarded(np.ndarray):
    """An ndarray that may not be read on the host in the middle of a computation."""

    def _refuse(self, *args: Any) -> Any:
        raise AssertionError("a value was read on the host")

    __float__ = __int__ = __bool__ = __complex__ = __index__ = __iter__ = item = tolist = _refuse


class Library(NamedTuple):
    """One array library as the tests use it: how values get there and back."""

    name: str
    xp: Any
    place: Callable[[np.ndarray], Any]
    host: Callable[[Any], np.ndarray]


def _numpy() -> Library:
    def place(values: np.ndarray) -> np.ndarray:
        out = np.array(values)
        out.flags.writeable = False
        return out

    return Library("numpy", np, place, np.asarray)


def _guarded() -> Library:
    def place(values: np.ndarray) -> Guarded:
        out = np.array(values).view(Guarded)
        out.flags.writeable = False
        return out

    return Library("guarded", np, place, lambda x: np.array(np.asarray(x)))


def _strict() -> Library:
    device = array_api_strict.Device("device1")  # its CPU device lets NumPy functions through
    home = array_api_strict.Device("CPU_DEVICE")
    return Library(
        "array_api_strict",
        array_api_strict,
        lambda values: array_api_strict.asarray(np.array(values), device=device),
        lambda x: np.asarray(x.to_device(home)),
    )


def _cupy() -> list[Library]:
    try:
        import cupy

        cupy.ones(1).sum().item()
    except Exception:
        return []
    return [Library("cupy", cupy, cupy.asarray, cupy.asnumpy)]


LIBRARIES = [_numpy(), _guarded(), _strict(), *_cupy()]


def normals(seed: int, library: Library = LIBRARIES[0], dtype: str = "float64") -> Callable[..., Any]:
    """Return draw(*shape): standard normals in the library, write-protected where it can be."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return library.place(rng.standard_normal(shape).astype(dtype))

    return draw


def mask_of(shape: tuple[int, ...], p: float, seed: int, library: Library = LIBRARIES[0]) -> Any:
    """Return a dropout mask of float64, made without the product's own generator."""
    kept = np.random.default_rng(seed).random(shape) >= p
    return library.place(np.where(kept, 1 / (1 - p), 0.0))
