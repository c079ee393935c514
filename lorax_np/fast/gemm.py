"""out ← α·ab + β·out in place, by the first of four libraries that works.  Choice: specs/decisions/gemm.md.

Every product of the fast engine goes through gemm, so that one pool of threads does all the work: a second pool
makes each wait for the other's idle workers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import numpy as np

from ..backend import HostArray, add_fact, dtype_name
from ..errors import BackendError
from .libraries import COARSE, MAKERS, Engine, proved
from .parts import multiply_parts, parts_of
from .split import mixed

SMALL = 1 << 18  # multiplications, up to which OpenBLAS uses one thread


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
    multiply, count = engine().multiply, parts_of(a, b)
    if count == 1:
        multiply(a, b, out, alpha, beta)
    else:
        multiply_parts(multiply, count, a, b, out, alpha, beta)


def gemms(a: HostArray, b: HostArray, out: HostArray, beta: float = 0.0) -> None:
    """out ← ab + β·out, β 0 or 1, of the matrices in the last two axes, as many in all three arrays.

    Small ones NumPy multiplies in one call, for which its BLAS starts no thread; large ones are gemm's.
    """
    if a.shape[-2] * a.shape[-1] * b.shape[-1] > SMALL:
        for i in np.ndindex(out.shape[:-2]):
            gemm(a[i], b[i], out[i], 1.0, beta)
    elif beta:
        out += a @ b
    else:
        np.matmul(a, b, out=out)


def gemm_stored(a: HostArray, b: HostArray, out: HostArray, alpha: float = 1.0, beta: float = 0.0) -> bool:
    """As gemm, by the processor's matrix unit for bfloat16, whose products are exact and summed in float32.

    a : (m, k) bfloat16, or float32, as the sum of three;  b : (k, n) bfloat16;  out : (m, n) float32
    Returns whether it could: False, with nothing written, for other dtypes, where no matrix unit is, and for
    float32 where something is not finite or out is too narrow.
    """
    multiply, given = engine().stored, dtype_name(a)
    if multiply is None or dtype_name(b) != "bfloat16" or out.dtype != np.float32:
        return False
    if given not in ("bfloat16", "float32"):
        return False
    if given == "float32" and out.size:
        return mixed(multiply, a, b, out, alpha, beta)
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

    name : "mkl" (the extra), "openblas" (the library that NumPy itself loaded), "scipy", or "numpy" (matmul);
           or "mkl-split3", which nothing else chooses: large products of float32 by three of bfloat16, each sum
           off by up to 5e-5 of its terms, as no profile of float32 allows

    Raises BackendError for another name, and where the engine does not work here, with what does.

    >>> with blas("numpy") as engine:
    ...     engine.name
    'numpy'
    """
    if name not in MAKERS and name not in COARSE:
        raise BackendError(f"blas: expected one of {', '.join([*MAKERS, *COARSE])}, got {name!r}")
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
    """Names of the engines that compute in float32 and work here, the preferred first. Loads each to see."""
    return tuple(name for name in MAKERS if isinstance(_tried(name), Engine))


def describe() -> str:
    """The engine in use, and why none before it is."""
    found = engine()
    before = list(MAKERS)[: list(MAKERS).index(found.name)] if _asked.get() is None else []
    return "; ".join([f"{found.name}: {found.what}", *(f"no {name}: {_tried(name)}" for name in before)])


@cache
def _first() -> Engine:
    return next(found for name in MAKERS if isinstance(found := _tried(name), Engine))


@cache
def _tried(name: str) -> Engine | str:
    return proved((MAKERS | COARSE)[name])


add_fact("gemm", describe)
