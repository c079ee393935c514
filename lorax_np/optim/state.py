"""What the optimisers share: a state of arrays and integers, rates by name, and one rounding of ab + c."""

from collections.abc import Mapping
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np

from ..backend import Array, cast, dtype_name, namespace_of
from ..errors import ConfigError, DtypeError, FormatError, ShapeError

State = dict[str, Any]  # arrays as "m.NAME", integers as "t"
Rate = float | Mapping[str, float]  # one for all, or one for each name

PART = 1 << 18  # numbers of one array in float64 at once: a whole head would be large


def single(c: float) -> float:
    """Return the float32 nearest to a number."""
    return float(np.float32(c))


def fma(a: Array, b: Array | float, c: Array) -> Array:
    """Return a·b + c with one rounding where a is float32, and with two where it is float64.

    The product of two float32 is exact in float64. b, where a number, is rounded to a's dtype first.

    >>> a, c = np.full(1, 1 + 2.0**-12, "float32"), np.full(1, -1, "float32")
    >>> float(fma(a, a, c)[0]) == 2.0**-11 + 2.0**-24, float((a * a + c)[0]) == 2.0**-11 + 2.0**-24
    (True, False)
    """
    if dtype_name(a) != "float32":
        return a * b + c
    wide = cast(a, "float64") * (single(b) if isinstance(b, (int, float)) else cast(b, "float64"))
    return cast(wide + cast(c, "float64"), "float32")  # (optim.1)


def rate(given: Rate, name: str, what: str) -> float:
    """Return the rate at a name, as a finite float that is not negative."""
    if isinstance(given, Mapping) and name not in given:
        raise ConfigError(f"{what}: expected a rate for {name}, got none")
    value = given[name] if isinstance(given, Mapping) else given
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value) or value < 0:
        raise ConfigError(f"{what}: expected a finite number from 0, got {value!r} for {name}")
    return float(value)


def zeros(params: Mapping[str, Array], *letters: str) -> State:
    """Return a state of zeros like the parameters, under each letter, at step 0."""
    state: State = {"t": 0}
    for name, value in params.items():
        if dtype_name(value) not in ("float32", "float64"):
            raise DtypeError(f"{name}: expected float32 or float64 to train, got {dtype_name(value)}")
    for letter in letters:
        for name, value in params.items():
            state[f"{letter}.{name}"] = namespace_of(value=value).zeros_like(value)
    return state


def check_gradients(params: Mapping[str, Array], grads: Mapping[str, Array], state: State, letter: str) -> None:
    """Raise unless every gradient has a parameter of its name, shape and dtype, and a state."""
    for name, g in grads.items():
        if name not in params:
            raise ConfigError(f"{name}: expected a parameter for this gradient, got none")
        if f"{letter}.{name}" not in state:
            raise ConfigError(f"state: expected {letter}.{name} for this gradient, got none")
        p = params[name]
        if tuple(g.shape) != tuple(p.shape):
            raise ShapeError(f"{name}: expected a gradient of {tuple(p.shape)}, got {tuple(g.shape)}")
        if dtype_name(g) != dtype_name(p):
            raise DtypeError(f"{name}: expected a gradient in {dtype_name(p)}, got {dtype_name(g)}")


def check_state(state: Mapping[str, Any], fresh: Mapping[str, Any]) -> None:
    """Raise FormatError unless a state read from a file has the names, shapes and dtypes of a fresh one.

    >>> check_state({"t": 3, "m.A": np.ones(2)}, {"t": 0, "m.A": np.zeros(3)})
    Traceback (most recent call last):
    lorax_np.errors.FormatError: m.A: expected float64 (3,), set by the parameters, got float64 (2,)
    """
    for name in fresh:
        if name not in state:
            raise FormatError(f"{name}: expected it in the optimiser's state, got none")
    for name, value in state.items():
        if name not in fresh:
            raise FormatError(f"{name}: expected no such array in the optimiser's state, got one")
        want, got = _kind(fresh[name]), _kind(value)
        if want != got:
            raise FormatError(f"{name}: expected {want}, set by the parameters, got {got}")
    if "t" in state and state["t"] < 0:
        raise FormatError(f"t: expected a step from 0, got {state['t']}")


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return "an integer"
    if not hasattr(value, "shape"):
        return type(value).__name__
    return f"{dtype_name(value)} {tuple(value.shape)}"
