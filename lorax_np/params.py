"""The records: a linear layer, and the adapter beside it. Immutable, arrays only, None where absent."""

from dataclasses import dataclass, fields
from math import isfinite, prod
from typing import NamedTuple

from .backend import Array, dtype_name, namespace_of, one_dtype, real, to_host
from .errors import ConfigError, DtypeError, ShapeError
from .shapes import axes, bind


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """A linear layer y = xWᵀ + b. Never written to.

    W : (d_out, d_in)  weight
    b : (d_out,)       bias, or None; in W's dtype

    Raises ShapeError, DtypeError or TypeError when made of arrays that do not fit.
    """

    W: Array
    b: Array | None = None

    def __post_init__(self) -> None:
        bind(W=(self.W, "d_out d_in"), b=(self.b, "? d_out"))


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """What is trained at one linear layer, and equally the gradients by it.

    A : (r, d_in)   down-projection
    B : (d_out, r)  up-projection
    m : (d_out,)    DoRA's magnitude, or None
    b : (d_out,)    the base bias once it trains: present, it stands in for Linear.b
    bB : (d_out,)   bias of B, or None

    A, B, m and bB share one dtype; b may have the base's. A and B are both None where only the bias trains.
    Raises ShapeError, DtypeError, TypeError or ConfigError when made of parts that do not fit.
    """

    A: Array | None
    B: Array | None
    m: Array | None = None
    b: Array | None = None
    bB: Array | None = None

    def __post_init__(self) -> None:
        if (self.A is None) != (self.B is None):
            raise ConfigError(
                f"{'A' if self.A is None else 'B'}: expected an array beside the other factor, got None"
            )
        if self.A is None and (self.m is not None or self.bB is not None):
            raise ConfigError(
                f"{'bB' if self.m is None else 'm'}: expected None where A and B are None, got an array"
            )
        if self.m is not None and self.bB is not None:
            raise ConfigError("bB: expected None beside m, since DoRA has no bias of B, got an array")
        if self.A is None and self.b is None:
            raise ConfigError("Adapter: expected A and B, or b, got nothing")
        d_out = "? d_out"
        axes(
            A=(self.A, "? r d_in"),
            B=(self.B, "? d_out r"),
            m=(self.m, d_out),
            b=(self.b, d_out),
            bB=(self.bB, d_out),
        )
        if self.A is not None:
            one_dtype(A=self.A, B=self.B, m=self.m, bB=self.bB)
        if self.b is not None:
            one_dtype(b=self.b)


@dataclass(frozen=True, eq=False, slots=True)
class ConvAdapter:
    """What is trained at one convolution of 1, 2 or 3 axes κ, and equally the gradients by it.

    A : (r, d_in, *κ)             down-projection, a convolution with the base's kernel
    B : (d_out, r // groups, *1)  up-projection, a convolution with kernel 1 and the base's groups
    m, b, bB : (d_out,)           as in Adapter

    Raises ShapeError, DtypeError, TypeError or ConfigError when made of parts that do not fit.
    """

    A: Array
    B: Array
    m: Array | None = None
    b: Array | None = None
    bB: Array | None = None

    def __post_init__(self) -> None:
        k = len(self.A.shape) - 2 if self.A is not None else 0
        if k not in (1, 2, 3):
            raise ShapeError(f"A: expected (r, d_in, *kernel) with 1 to 3 kernel axes, got {self.A.shape}")
        if self.m is not None and self.bB is not None:
            raise ConfigError("bB: expected None beside m, since DoRA has no bias of B, got an array")
        kernel, ones = "k0 k1 k2"[: 3 * k], "o0 o1 o2"[: 3 * k]
        found = axes(
            A=(self.A, f"r d_in {kernel}"),
            B=(self.B, f"d_out r_group {ones}"),
            m=(self.m, "? d_out"),
            b=(self.b, "? d_out"),
            bB=(self.bB, "? d_out"),
        )
        if found["r"] % found["r_group"] or any(found[name] != 1 for name in ones.split()):
            wanted = f"(d_out, r // groups{', 1' * k}) with r={found['r']} set by A"
            raise ShapeError(f"B: expected {wanted}, got {self.B.shape}")
        one_dtype(A=self.A, B=self.B, m=self.m, bB=self.bB)
        if self.b is not None:
            one_dtype(b=self.b)


AnyAdapter = Adapter | ConvAdapter


def param_count(adapter: AnyAdapter) -> int:
    """Return how many numbers an adapter trains.

    >>> import numpy as np
    >>> param_count(Adapter(np.ones((2, 5)), np.ones((3, 2)), m=np.ones(3)))
    19
    """
    parts = (getattr(adapter, field.name) for field in fields(adapter))
    return sum(prod(part.shape) for part in parts if part is not None)


def linear_from_stored(W: Array, b: Array | None = None, *, fan_in_fan_out: bool) -> Linear:
    """Return a Linear over a stored weight, a view where it lies as (d_in, d_out), as in GPT-2's Conv1D.

    >>> import numpy as np
    >>> linear_from_stored(np.ones((5, 3)), fan_in_fan_out=True).W.shape
    (3, 5)
    """
    axes(W=(W, "d_in d_out" if fan_in_fan_out else "d_out d_in"))
    return Linear(W.T if fan_in_fan_out else W, b)


def linear_to_stored(linear: Linear, *, fan_in_fan_out: bool) -> tuple[Array, Array | None]:
    """Return weight and bias the way linear_from_stored took them."""
    return linear.W.T if fan_in_fan_out else linear.W, linear.b


def check_pair(base: Linear, adapter: Adapter, scaling: float) -> float:
    """Check that an adapter fits its base and that the scaling is a number; return it as a Python float."""
    for name, value, kind in (("base", base, Linear), ("adapter", adapter, Adapter)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    A, B, b = (adapter.A, "? r d_in"), (adapter.B, "? d_out r"), (adapter.b, "? d_out")
    axes(W=(base.W, "d_out d_in"), A=A, B=B, b=b)
    try:
        s = float(scaling)
    except (TypeError, ValueError, OverflowError):
        s = float("nan")
    if not isfinite(s) or isinstance(scaling, (bool, str, bytes)):
        raise ConfigError(f"scaling: expected a finite float, got {scaling!r}")
    return s


class Parts(NamedTuple):
    """What a forward saved, as far as a backward's arguments have to fit it."""

    x: Array  # (..., d_in)
    mask: Array | None
    z: Array | None  # (..., r), where the adapter has A and B
    dora: bool  # whether it saved what a magnitude needs


def check_forward(x: Array, base: Linear, adapter: Adapter, scaling: float, mask: Array | None) -> float:
    """Check all arguments together, before anything is computed; return the scaling as a Python float."""
    s = check_pair(base, adapter, scaling)
    axes(W=(base.W, "d_out d_in"), x=(x, "... d_in"), A=(adapter.A, "? r d_in"), mask=(mask, "? ... d_in"))
    one_dtype(W=base.W, x=x)
    if mask is not None:
        one_dtype(mask=mask)
        if adapter.A is None:
            raise ConfigError("mask: expected None beside an adapter without A, which drops nothing, got one")
    return s


def check_backward(gy: Array, saved: Parts, base: Linear, adapter: Adapter, scaling: float) -> float:
    """Check the backward's arguments against each other and against what the forward saved."""
    s = check_forward(saved.x, base, adapter, scaling, saved.mask)
    axes(x=(saved.x, "... d_in"), W=(base.W, "d_out d_in"), gy=(gy, "... d_out"))
    if saved.z is not None:
        axes(A=(adapter.A, "? r d_in"), z=(saved.z, "... r"))
    parts = (
        (field.name, getattr(record, field.name)) for record in (base, adapter) for field in fields(record)
    )
    for name, value in (("x", saved.x), ("mask", saved.mask), *parts, ("gy", gy)):
        if value is not None and dtype_name(value) == "complex128":
            raise DtypeError(f"{name}: expected real arrays in a backward pass, got complex128")
    if dtype_name(gy) != dtype_name(saved.x):
        raise DtypeError(f"gy: expected {dtype_name(saved.x)}, set by x, got {dtype_name(gy)}")
    if (saved.z is None) != (adapter.A is None) or saved.dora != (adapter.m is not None):
        raise ConfigError("saved: expected this adapter's activations, got those of one with other parts")
    return s


def check_direction(V: Array) -> None:
    """Raise ConfigError where a row of V : (d_out, d_in) is zero, since DoRA divides each row by its norm."""
    xp = namespace_of(V=V)
    zero = to_host(xp.max(xp.abs(real(V)), axis=1) == 0)
    if zero.any():
        first = ", ".join(str(i) for i in zero.nonzero()[0][:5])
        raise ConfigError(
            f"W + s·BA: expected a direction in every row under DoRA, got {zero.sum()} rows of zeros "
            f"(first: {first}); leave this layer out of DoRA with exclude_modules"
        )
