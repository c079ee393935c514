"""What both plans check of their arguments, before anything is computed."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..backend import Array, dtype_name
from ..errors import ConfigError, DtypeError
from ..params import Adapter, Linear, Parts, check_backward, check_forward
from ..random import DropoutKey

Dropout = Array | tuple[float, int, int, int]


def checked(
    x: Array, base: Linear, adapter: Adapter, scaling: float, dropout: Any, at_home: Callable[[Array], None]
) -> tuple[float, Any]:
    """Check all arguments together; return the scaling, and a mask or its key or nothing.

    at_home : raises TypeError where x is in no library of the plan's
    """
    drop = dropout
    if isinstance(dropout, tuple):
        if not 1 <= len(dropout) <= len(DropoutKey._fields):
            raise ConfigError(f"dropout: expected (p, seed, step, site), got {len(dropout)} numbers")
        drop = DropoutKey(*dropout).checked()
    keyed = isinstance(drop, DropoutKey)
    s = check_forward(x, base, adapter, scaling, None if keyed else drop)
    at_home(x)
    parts = ((f.name, getattr(record, f.name)) for record in (base, adapter) for f in fields(record))
    for name, value in (("x", x), *parts):
        if value is not None and dtype_name(value) == "complex128":
            raise DtypeError(f"{name}: expected real arrays in the fast engine, got complex128")
    if keyed and adapter.A is None:
        raise ConfigError("dropout: expected None beside an adapter without A, which drops nothing, got one")
    return s, None if keyed and drop.scale == 1 else drop


def checked_backward(
    gy: Array, saved: Any, kind: type[Any], base: Linear, adapter: Adapter, scaling: float
) -> float:
    """Check the backward's arguments against what the forward saved, of that kind; return the scaling."""
    if not isinstance(saved, kind):
        raise TypeError(f"saved: expected what fast.lora_linear_forward returned, got {type(saved).__name__}")
    mask = None if isinstance(saved.dropout, DropoutKey) else saved.dropout
    z = None if saved.z is None else saved.z.reshape(*saved.x.shape[:-1], saved.z.shape[1])
    return check_backward(gy, Parts(saved.x, mask, z, saved.dora is not None), base, adapter, scaling)
