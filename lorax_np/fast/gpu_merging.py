"""An update folded into its base on a device, in place."""

from typing import Any

from ..backend import all_finite, cast, copy, dtype_name, namespace_of, on_device
from ..errors import ConfigError, DtypeError
from ..params import Adapter, Linear, check_direction, check_pair
from .gpu import added, row_norms
from .gpu_arrays import contiguous
from .gpu_products import product


def merge_into(base: Linear, adapter: Adapter, *, scaling: float) -> Linear:
    """fast.merge_into for arrays on a device; arguments, results and errors as there.

    The sum is formed beside W, in float32 or float64, looked at by the host, and only then written.
    """
    s = check_pair(base, adapter, scaling)
    if not on_device(base.W):
        raise TypeError(f"W: expected an array on a device, got one of {namespace_of(W=base.W).__name__}")
    for name, value in (("W", base.W), ("A", adapter.A), ("m", adapter.m), ("b", base.b)):
        if value is not None and dtype_name(value) == "complex128":
            raise DtypeError(f"{name}: expected real arrays in the fast engine, got complex128")
    W: Any = base.W
    V, b = None, base.b if adapter.b is None else adapter.b
    if adapter.A is not None and adapter.B is not None:
        both = "float64" if "float64" in (dtype_name(W), dtype_name(adapter.A)) else "float32"
        V = copy(contiguous(cast(W, both)))
        product(cast(adapter.B, both), cast(adapter.A, both), V, s, 1.0)  # (merge.1)
        if adapter.m is not None:
            check_direction(V)
            n = row_norms(W, adapter.A, adapter.B, s)
            V *= cast(cast(adapter.m, "float64") / n, both)[:, None]  # (merge.2)
        V = cast(V, dtype_name(W))
    if adapter.bB is not None:
        b = cast(
            added(b, s * cast(adapter.bB, "float64")), dtype_name(W if base.b is None else base.b)
        )  # (merge.3)
    elif b is not None and base.b is not None:
        b = cast(b, dtype_name(base.b))
    for name, value in (("W", V), ("b", b)):
        if value is not None and not all_finite(value):
            raise ConfigError(f"{name}: expected finite numbers once merged, got NaN or infinity")
    if V is not None:
        W[...] = V
    return Linear(W, b)
