"""What is asked of an array, whatever its library, and the dtypes it may have.  Reasons: specs/backend.md."""

from functools import cache, lru_cache
from typing import Any, Protocol, Self

import numpy as np

from .errors import DtypeError

HostArray = np.ndarray[Any, np.dtype[Any]]


class Array(Protocol):
    """What an array of any library offers, and all that the mathematics asks of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def ndim(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> Any: ...  # noqa: D102
    @property
    def T(self) -> Self: ...  # noqa: D102
    def __matmul__(self, other: Any, /) -> "Array": ...
    def __add__(self, other: Any, /) -> "Array": ...
    def __sub__(self, other: Any, /) -> "Array": ...
    def __mul__(self, other: Any, /) -> "Array": ...
    def __rmul__(self, other: Any, /) -> "Array": ...
    def __truediv__(self, other: Any, /) -> "Array": ...
    def __neg__(self) -> "Array": ...
    def __getitem__(self, key: Any, /) -> "Array": ...


# ---- dtypes ------------------------------------------------------------------------------------------------

STORAGE = {"float16": "float32", "bfloat16": "float32"}  # stored only; the dtype each is computed in
FLOATS = (*STORAGE, "float32", "float64", "complex128")


def dtype_name(x: Array) -> str:
    """Return the bare name of x's dtype, such as float32, whatever library x belongs to."""
    dtype = x.dtype
    return _name_of(dtype) if isinstance(dtype, np.dtype) else str(dtype).rpartition(".")[2]


@cache
def _name_of(dtype: np.dtype[Any]) -> str:  # NumPy takes microseconds over it
    return dtype.name


def compute_dtype(x: Array) -> str:
    """Return the dtype in which x takes part in arithmetic: float32 where x's own is for storage only."""
    name = dtype_name(x)
    return STORAGE.get(name, name)


def one_dtype(**arrays: Array | None) -> str:
    """Return the one floating dtype that the named arrays share; None stands for an absent array.

    complex128 may stand among float64, so that one argument alone can take a complex step.
    Raises DtypeError where two dtypes meet, and where one cannot be computed with.
    """
    return _shared(*[(name, dtype_name(value)) for name, value in arrays.items() if value is not None])


@lru_cache(maxsize=1024)  # a step asks for the same few again and again
def _shared(*given: tuple[str, str]) -> str:
    """The one dtype, of names and the dtypes they have."""
    for name, got in given:
        if got not in FLOATS:
            raise DtypeError(f"{name}: expected one of {', '.join(FLOATS)}, got {got}")
    (first, want), *rest = given
    for name, got in rest:
        if got != want and {got, want} != {"float64", "complex128"}:
            raise DtypeError(f"{name}: expected {want}, set by {first}, got {got}")
    return "complex128" if any(got == "complex128" for _, got in given) else want
