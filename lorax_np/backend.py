"""Which library an array belongs to, and where new arrays are born.  Reasons: specs/backend.md.

The only file that names CuPy or reads the environment. Arrays decide where mathematics runs; the variable
LORAX_NP_BACKEND (numpy, cupy or auto) decides only where arrays made from nothing are born.
"""

import importlib
import os
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, overload

import numpy as np

from .arrays import FLOATS as FLOATS  # handed on: callers ask here for whatever concerns arrays
from .arrays import Array as Array
from .arrays import HostArray as HostArray
from .arrays import compute_dtype as compute_dtype
from .arrays import dtype_name as dtype_name
from .arrays import one_dtype as one_dtype
from .errors import BackendError, DtypeError

BACKENDS = ("numpy", "cupy", "auto")
VARIABLE = "LORAX_NP_BACKEND"

Namespace = Any  # a module: numpy, cupy, or one that follows the array standard


# ---- which library an array belongs to ---------------------------------------------------------------------


def namespace_of(**arrays: Array | None) -> Namespace:
    """Return the one library that the named arrays share; None stands for an absent array.

    Raises TypeError where an argument is not an array, or where two libraries meet.

    >>> import numpy as np
    >>> namespace_of(x=np.ones(3), b=None).__name__
    'numpy'
    """
    found: Namespace = None
    for name, value in arrays.items():
        if value is not None:
            xp = _library(name, value)
            if found is None:
                first, found = name, xp
            elif xp is not found:
                raise TypeError(
                    f"arrays must share one library, got {first} in {found.__name__}, {name} in {xp.__name__}"
                )
    return found


def _library(name: str, value: Any) -> Namespace:
    kind = type(value)
    if kind is np.ndarray:
        return np
    if isinstance(value, np.ndarray):
        if isinstance(value, (np.matrix, np.ma.MaskedArray)):
            raise TypeError(f"{name}: expected a plain array, got {kind.__module__}.{kind.__qualname__}")
        return np
    if kind.__module__.partition(".")[0] == "cupy":
        return sys.modules.get("cupy") or importlib.import_module("cupy")
    if hasattr(value, "__array_namespace__") and not isinstance(value, np.generic):
        return value.__array_namespace__()
    raise TypeError(
        f"{name}: expected an array of numpy, cupy or an array-standard library, "
        f"got {kind.__module__}.{kind.__qualname__}"
    )


# ---- where new arrays are born -----------------------------------------------------------------------------


def namespace(which: Namespace | str | None = None, *, who: str = "xp") -> Namespace:
    """Return the library in which to make new arrays: the argument, else LORAX_NP_BACKEND, else NumPy.

    which : a module, or one of the words numpy, cupy, auto, in any case
    who : what an error calls it

    Raises BackendError for another word, and for cupy where it does not work, with the reason.
    """
    if which is None:
        return _from_environment()
    if isinstance(which, str):
        return _named(which, who)
    if which is np or getattr(which, "__name__", "") == "cupy" or hasattr(which, "__array_api_version__"):
        return which
    raise TypeError(f"{who}: expected numpy, cupy or an array-standard module, got {which!r}")


@cache
def _from_environment() -> Namespace:
    return _named(os.environ.get(VARIABLE) or "numpy", VARIABLE)


def _named(word: str, who: str) -> Namespace:
    name = word.strip().lower()
    if name not in BACKENDS:
        raise BackendError(f"{who}: expected one of {', '.join(BACKENDS)}, got {word!r}")
    if name == "numpy":
        return np
    cupy, reason = _cupy()
    if cupy is not None:
        return cupy
    if name == "cupy":
        raise BackendError(f"{who}: expected a working cupy, got: {reason}")
    print(f"lorax_np: {who}=auto uses numpy: {reason}", file=sys.stderr)
    return np


@cache
def _cupy() -> tuple[Namespace | None, str]:
    """CuPy and what it runs on, or None and why not: imported, a device present, one product computed."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        return None, f"CuPy cannot be imported ({_line(error)}); pip install 'lorax-np[cupy12]' or [cupy13]"
    try:
        if not cupy.cuda.is_available():
            return None, f"CuPy {cupy.__version__} found, but no CUDA device or driver"
        if (cupy.ones((2, 2)) @ cupy.ones((2, 2)))[0, 0].item() != 2.0:
            return None, f"CuPy {cupy.__version__} found, but a 2 x 2 product came out wrong"
        device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    except Exception as error:  # the driver, the toolkit and cuBLAS each fail in their own way
        return None, f"CuPy {cupy.__version__} found, but it does not work: {_line(error)}"
    return cupy, f"CuPy {cupy.__version__} on {device}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_facts: dict[str, Callable[[], str]] = {}


def add_fact(name: str, tell: Callable[[], str]) -> None:
    """Have backend_info say one thing more, asked for when it is called."""
    _facts[name] = tell


def backend_info() -> dict[str, str]:
    """Versions and backends of this process: what is used for new arrays, and what for products, and why."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    word = os.environ.get(VARIABLE)
    try:
        chosen, why = _from_environment().__name__, f"{VARIABLE}={word}" if word else f"{VARIABLE} is not set"
    except BackendError as error:
        chosen, why = "none", str(error)
    return {
        "backend": chosen,
        "why": why,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "cupy": _cupy()[1],
        **{name: tell() for name, tell in _facts.items()},
    }


LAUNCHERS = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"  # set by mpiexec for each process it starts


def launched_ranks() -> int:
    """Return as one of how many ranks MPI's launcher started this process; 1 without a launcher."""
    return max(int(word) if (word := os.environ.get(name, "")).isdecimal() else 1 for name in LAUNCHERS)


# ---- between the host and a library ------------------------------------------------------------------------


def takes_numpy(xp: Namespace) -> bool:
    """Whether a library makes its arrays of NumPy's as they are, and has NumPy's methods: NumPy and CuPy."""
    return xp is np or str(xp.__name__) == "cupy"


def on_device(x: Any) -> bool:
    """Whether x is one of CuPy's arrays, which live on a GPU."""
    return not isinstance(x, np.ndarray) and type(x).__module__.partition(".")[0] == "cupy"


def to_host(x: Array) -> HostArray:
    """Return x as a NumPy array: itself if it is one, else a copy in the host's memory."""
    xp = namespace_of(x=x)
    if xp is np:
        return np.asarray(x)
    if xp.__name__ == "cupy":
        return np.asarray(xp.asnumpy(x))
    home = xp.__array_namespace_info__().default_device()
    return np.asarray(x.to_device(home))  # type: ignore[attr-defined]


def from_host(values: Array, like: Array | Namespace) -> Any:
    """Return NumPy values as an array of the library, and on the device, of `like` (an array or a module)."""
    if isinstance(like, ModuleType):
        xp, device = like, None
    else:
        xp, device = namespace_of(like=like), getattr(like, "device", None)
    if takes_numpy(xp):
        return xp.asarray(values)
    return xp.asarray(values, device=device)


def free_bytes(x: Array) -> int | None:
    """Return how many bytes are free on the device where x lives, those that CuPy keeps too; None elsewhere."""
    if not on_device(x):
        return None
    cupy = namespace_of(x=x)
    return int(cupy.cuda.runtime.memGetInfo()[0]) + int(cupy.get_default_memory_pool().free_bytes())


def held_bytes(x: Array) -> int | None:
    """Return how many bytes CuPy has taken of the device where x lives, which it keeps; None elsewhere."""
    if not on_device(x):
        return None
    cupy = namespace_of(x=x)
    return int(cupy.get_default_memory_pool().total_bytes())


def beside(values: Array, like: Array) -> Any:
    """Return values where `like` lives: the host's are moved there, and any other have to be there already.

    For ids and labels, which are looked at on the host before they go to work. Raises TypeError otherwise.
    """
    if namespace_of(values=values) is np:
        return from_host(values, like)
    namespace_of(like=like, values=values)
    return values


# ---- casts, copies, checks ---------------------------------------------------------------------------------


@overload
def cast(x: Array, dtype: str) -> Array: ...
@overload
def cast(x: None, dtype: str) -> None: ...
def cast(x: Any, dtype: str) -> Any:
    """Return x in the named dtype, and x itself where nothing changes.

    None stays None, and complex128 stays complex128, so that a complex step survives every cast.
    """
    if x is None or dtype_name(x) in (dtype, "complex128"):
        return x
    xp = namespace_of(x=x)
    if takes_numpy(xp):
        return _to_bfloat16(x, xp) if dtype == "bfloat16" else x.astype(dtype)
    if not hasattr(xp, dtype):
        raise DtypeError(f"x: expected a dtype that {xp.__name__} has, got {dtype}")
    return xp.astype(x, getattr(xp, dtype))


def _to_bfloat16(x: Any, xp: Namespace) -> Any:
    """Round x to bfloat16 once. From float64 the way leads through float32, rounded to odd: truncated, and the
    last bit set where that lost something, so that the second rounding decides as the only one would."""
    try:
        bfloat16 = importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        raise DtypeError(
            "bfloat16: expected the package ml_dtypes, got none; pip install 'lorax-np[bf16]'"
        ) from None
    if dtype_name(x) != "float64":
        return x.astype(bfloat16)
    near = x.astype("float32")
    bits = near.view("uint32") - (xp.abs(near) > xp.abs(x)).astype("uint32")
    return (bits | (near != x).astype("uint32")).view("float32").astype(bfloat16)


def real(x: Array) -> Array:
    """Return the real part of a complex array, and any other array itself."""
    if dtype_name(x) != "complex128":
        return x
    part: Array = namespace_of(x=x).real(x)
    return part


def all_finite(x: Array) -> bool:
    """Whether x holds neither NaN nor infinity. Reads the answer on the host."""
    xp = namespace_of(x=x)
    return bool(xp.all(xp.isfinite(x)))


def quiet() -> Any:
    """Within this context NumPy does not warn of overflow, for a caller that looks at the result itself."""
    return np.errstate(over="ignore", invalid="ignore")


def copy(x: Array) -> Array:
    """Return a copy of x, where x lives."""
    xp = namespace_of(x=x)
    twin: Array = xp.array(x) if takes_numpy(xp) else xp.asarray(x, copy=True)
    return twin
