"""An adapter folded into the base weight where it lies.  What it computes: specs/merge.md; how: specs/speed.md.

The only function of the library that writes to its input.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..backend import (
    Array,
    HostArray,
    all_finite,
    cast,
    compute_dtype,
    dtype_name,
    namespace_of,
    on_device,
    quiet,
    to_host,
)
from ..errors import ConfigError, DtypeError
from ..params import Adapter, Linear, check_direction, check_pair
from . import gpu_merging
from .gemm import engine, gemm
from .norms import row_norms
from .weights import product, row_blocks, to

RANGE = {"float16": 65504.0, "bfloat16": 3e38}
NOT_FINITE = "expected finite numbers once merged, got NaN or infinity"


def merge_into(base: Linear, adapter: Adapter, *, scaling: float) -> Linear:
    """Write W + s·BA over base.W, with DoRA k∘(W + s·BA), and return the Linear that then serves.

    base : Linear     of a W, NumPy's or CuPy's, that may be written to; its b is not written to
    adapter, scaling : as in lorax_np.merge

    Returns a Linear of the same W, and of b' = b + s·bB as lorax_np.merge gives it.
    Sums are in W's own dtype, 16-bit ones in float32, or in float64 beside a float64 adapter, and rounded once.
    Beside W there is memory for some of its rows at most.
    Raises as lorax_np.merge, and ConfigError for a W that is read-only or shares memory with the adapter. What
    is refused is refused before the first entry is written.
    Source: specs/speed.md, (speed.14) to (speed.16).

    >>> W = np.eye(2)
    >>> merged = merge_into(Linear(W), Adapter(np.ones((1, 2)), np.ones((2, 1))), scaling=0.5)
    >>> merged.W is W, W.tolist()
    (True, [[1.5, 0.5], [0.5, 1.5]])
    """
    if on_device(base.W):
        return gpu_merging.merge_into(base, adapter, scaling=scaling)
    s = check_pair(base, adapter, scaling)
    W, b = _writable(base, adapter), _bias(base, adapter, s)
    if adapter.A is None or adapter.B is None:
        return Linear(base.W, b)
    dtype = dtype_name(W) if not _stored(W) else np.result_type(compute_dtype(W), compute_dtype(adapter.A)).name
    A, B = to(to_host(adapter.A), dtype), to(to_host(adapter.B), dtype)
    with quiet():
        most = _at_most(W) + A.shape[0] * abs(s) * _largest(A) * _largest(B)  # (speed.15)
        k = None if adapter.m is None or not np.isfinite(most) else _ratio(W, A, B, to_host(adapter.m), s)
        if not most * (1.0 if k is None else _largest(k[:, None])) < 0.5 * _range(W):
            _rehearse(W, A, B, s, k)
        if _stored(W) or k is not None:
            for part, V in _sums(W, A, B, s, k):
                W[part] = cast(V, dtype_name(W))  # one rounding
        else:
            gemm(B, A, W, s, 1.0)  # (speed.14)
    return Linear(base.W, b)


def _sums(W: HostArray, A: HostArray, B: HostArray, s: float, k: Any) -> Iterator[tuple[slice, HostArray]]:
    """Rows of what will be W, in the dtype of A and B."""
    for part in row_blocks(W):
        V = np.array(W[part], dtype=A.dtype, order="C")
        gemm(B[part], A, V, s, 1.0)  # (merge.1)
        if k is not None:
            V *= k[part, None]  # (merge.2)
        yield part, V


def _ratio(W: HostArray, A: HostArray, B: HostArray, m: HostArray, s: float) -> HostArray:
    """k = m/n by rows; ConfigError where a row has no direction."""
    n = row_norms(W, A, B, s).n
    if np.isnan(n).any():
        check_direction(to(W, "float64") + product(to(B, "float64"), to(A, "float64"), s))
    return (to(m, "float64") / n).astype(A.dtype)


# ---- what must hold before the first entry is written -----------------------------------------------------


def _at_most(W: HostArray) -> float:
    """No less than the largest magnitude: ‖W‖ where BLAS sums the squares, in half the time.

    But for roundings, to which the caller leaves a factor of 2, and numbers so small that their squares vanish.
    """
    flat, squares = W.T if W.flags.f_contiguous else W, engine().squares
    whole = flat.flags.c_contiguous and flat.flags.aligned and not _stored(W) and W.size < 1 << 31
    return float(np.sqrt(squares(flat))) if whole and squares is not None else _largest(W)


def _largest(x: HostArray) -> float:
    """The largest magnitude; NaN or infinity where there is one."""
    parts = (to(x[part], compute_dtype(x)) for part in row_blocks(x))
    return float(np.max([max(part.max(), -part.min()) if part.size else 0.0 for part in parts]))


def _range(W: HostArray) -> float:
    """The largest number of W's dtype."""
    return RANGE.get(dtype_name(W)) or float(np.finfo(W.dtype).max)


def _rehearse(W: HostArray, A: HostArray, B: HostArray, s: float, k: Any) -> None:
    """Compute everything and keep nothing; ConfigError where an entry would not be finite."""
    if not all(all_finite(cast(V, dtype_name(W))) for _, V in _sums(W, A, B, s, k)):
        raise ConfigError(f"W: {NOT_FINITE}")


def _writable(base: Linear, adapter: Adapter) -> HostArray:
    if namespace_of(W=base.W) is not np:
        raise TypeError(
            f"W: expected a NumPy or CuPy array in the fast engine, got {namespace_of(W=base.W).__name__}"
        )
    W = base.W if isinstance(base.W, np.ndarray) else to_host(base.W)
    if dtype_name(W) == "complex128":
        raise DtypeError("W: expected real arrays in the fast engine, got complex128")
    if not W.flags.writeable:
        raise ConfigError(
            "W: expected an array that may be written to, got a read-only one; merge makes a new one"
        )
    for name in ("A", "B", "m"):
        value = getattr(adapter, name)
        if value is not None and np.may_share_memory(W, value):
            raise ConfigError(f"W: expected memory of its own to write to, got some shared with {name}")
    return np.asarray(W)


def _stored(W: HostArray) -> bool:
    """Whether W's entries are not what the processor adds: 16 bits, or another byte order."""
    return compute_dtype(W) != dtype_name(W) or not W.dtype.isnative


def _bias(base: Linear, adapter: Adapter, s: float) -> Any:
    """b' = b + s·bB in float64, rounded once: (merge.3)."""
    b: Array | None = base.b if adapter.b is None else adapter.b
    if adapter.bB is None and (b is None or b is base.b):
        return b
    wide = 0.0 if b is None else to(to_host(b), "float64")
    total = wide if adapter.bB is None else wide + s * to(to_host(adapter.bB), "float64")
    with quiet():
        found = cast(np.asarray(total), dtype_name(base.W if base.b is None else base.b))
    if not all_finite(found):
        raise ConfigError(f"b: {NOT_FINITE}")
    return found
