"""Numbers that carry how far roundings may have moved them: equations run on them give their own bounds.

Each operation adds one rounding of its own, to first order in the unit roundoff u, and a sum of n terms n, in
whatever order: (modelops.2).  Derivation: specs/modelops.md.
"""

from collections.abc import Callable
from math import erf as erf_of_one
from typing import Any

import numpy as np

from ..cases import HostArray

LIBRARY = 4  # roundings of exp, log, tanh and erf, as libraries have them
SLOPE = 1.1283791670955126  # 2/√π, erf's steepest


class Rounded:
    """An array in float64, and beside each entry the most that it may be off.

    value, slack : arrays of one shape;  u : unit roundoff of what is bounded
    """

    __array_priority__ = 1000

    def __init__(self, value: HostArray, slack: HostArray, u: float) -> None:
        """value : in float64;  slack : at least 0, of its shape."""
        self.value, self.u = value, u
        self.slack = slack if slack.shape == value.shape else np.broadcast_to(slack, value.shape)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **named: Any) -> Any:
        if method != "__call__" or named or ufunc not in RULES:
            return NotImplemented
        return RULES[ufunc](*(x if isinstance(x, Rounded) else self._exact(x) for x in inputs))

    def _exact(self, value: Any) -> "Rounded":
        wide = np.asarray(value, np.float64)
        return Rounded(wide, np.zeros(wide.shape), self.u)

    def __add__(self, other: Any) -> "Rounded":
        return np.add(self, other)  # type: ignore[no-any-return, call-overload]

    def __radd__(self, other: Any) -> "Rounded":
        return np.add(other, self)  # type: ignore[no-any-return, call-overload]

    def __sub__(self, other: Any) -> "Rounded":
        return np.subtract(self, other)  # type: ignore[no-any-return, call-overload]

    def __rsub__(self, other: Any) -> "Rounded":
        return np.subtract(other, self)  # type: ignore[no-any-return, call-overload]

    def __mul__(self, other: Any) -> "Rounded":
        return np.multiply(self, other)  # type: ignore[no-any-return, call-overload]

    def __rmul__(self, other: Any) -> "Rounded":
        return np.multiply(other, self)  # type: ignore[no-any-return, call-overload]

    def __truediv__(self, other: Any) -> "Rounded":
        return np.divide(self, other)  # type: ignore[no-any-return, call-overload]

    def __rtruediv__(self, other: Any) -> "Rounded":
        return np.divide(other, self)  # type: ignore[no-any-return, call-overload]

    def __matmul__(self, other: Any) -> "Rounded":
        return np.matmul(self, other)  # type: ignore[no-any-return, call-overload]

    def __rmatmul__(self, other: Any) -> "Rounded":
        return np.matmul(other, self)  # type: ignore[no-any-return, call-overload]

    def __neg__(self) -> "Rounded":
        return Rounded(-self.value, self.slack, self.u)

    def __getitem__(self, at: Any) -> "Rounded":
        return Rounded(self.value[at], self.slack[at], self.u)

    def reshape(self, *shape: int) -> "Rounded":
        """The same numbers in another shape."""
        return Rounded(self.value.reshape(*shape), self.slack.reshape(*shape), self.u)

    def transpose(self, *axes: int) -> "Rounded":
        """The same numbers with their axes in another order."""
        return Rounded(self.value.transpose(*axes), self.slack.transpose(*axes), self.u)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> "Rounded":
        """The sum of n terms: γ(n) of their sizes."""
        how: Any = {"axis": axis, "keepdims": keepdims}
        n = self.value.size if axis is None else self.value.shape[axis]
        own = n * self.u * np.sum(np.abs(self.value), **how)
        value, slack = np.asarray(np.sum(self.value, **how)), np.asarray(np.sum(self.slack, **how) + own)
        return Rounded(value, slack, self.u)


Rule = Callable[..., Rounded]


def _done(value: HostArray, slack: Any, x: Rounded, times: int = 1) -> Rounded:
    value = np.asarray(value)
    return Rounded(value, np.asarray(slack + times * x.u * np.abs(value)), x.u)


def _add(a: Rounded, b: Rounded) -> Rounded:
    return _done(a.value + b.value, a.slack + b.slack, a)


def _subtract(a: Rounded, b: Rounded) -> Rounded:
    return _done(a.value - b.value, a.slack + b.slack, a)


def _multiply(a: Rounded, b: Rounded) -> Rounded:
    slack = np.abs(a.value) * b.slack + np.abs(b.value) * a.slack + a.slack * b.slack
    return _done(a.value * b.value, slack, a)


def _divide(a: Rounded, b: Rounded) -> Rounded:
    value, room = a.value / b.value, np.abs(b.value) - b.slack
    return _done(value, np.where(room > 0, (a.slack + np.abs(value) * b.slack) / room, np.inf), a)


def _matmul(a: Rounded, b: Rounded) -> Rounded:
    A, B = np.abs(a.value), np.abs(b.value)
    slack = A @ b.slack + a.slack @ (B + b.slack) + a.value.shape[-1] * a.u * (A @ B)
    return Rounded(a.value @ b.value, slack, a.u)


def _sqrt(a: Rounded) -> Rounded:
    value = np.sqrt(a.value)
    return _done(value, a.slack / (value + np.sqrt(np.maximum(a.value - a.slack, 0))), a)


def _exp(a: Rounded) -> Rounded:
    value = np.exp(a.value)
    return _done(value, value * np.expm1(a.slack), a, LIBRARY)


def _log(a: Rounded) -> Rounded:
    room = a.value - a.slack
    return _done(np.log(a.value), np.where(room > 0, a.slack / np.where(room > 0, room, 1), np.inf), a, LIBRARY)


def _tanh(a: Rounded) -> Rounded:
    value = np.tanh(a.value)
    return _done(value, np.minimum(a.slack, 2.0), a, LIBRARY)


RULES: dict[Any, Rule] = {
    np.add: _add,
    np.subtract: _subtract,
    np.multiply: _multiply,
    np.divide: _divide,
    np.matmul: _matmul,
    np.sqrt: _sqrt,
    np.exp: _exp,
    np.log: _log,
    np.tanh: _tanh,
    np.negative: lambda a: -a,
}


# ---- functions of arrays, and of such numbers --------------------------------------------------------------


def erf(x: Any) -> Any:
    """erf of an array in its dtype, or of a Rounded."""
    if isinstance(x, Rounded):
        return _done(_erf(x.value), SLOPE * x.slack, x, LIBRARY)
    return _erf(x).astype(x.dtype)


def _erf(x: HostArray) -> HostArray:
    return np.array([erf_of_one(value) for value in x.ravel().tolist()]).reshape(x.shape)


def mean(x: Any) -> Any:
    """Over the last axis, which stays."""
    total = x.sum(axis=-1, keepdims=True)
    return total / x.value.shape[-1] if isinstance(x, Rounded) else np.asarray(total / x.shape[-1])


def largest(x: Any, among: Any = True) -> Any:
    """The largest of each row, as a number that is exact: it cancels."""
    plain = x.value if isinstance(x, Rounded) else x
    return np.max(np.where(among, plain, -1e30).astype(plain.dtype), axis=-1, keepdims=True, initial=-1e30)


def joined(halves: tuple[Any, Any]) -> Any:
    """Two halves of the last axis as one."""
    if not isinstance(halves[0], Rounded):
        return np.concatenate(halves, axis=-1)
    value, slack = (np.concatenate([getattr(h, name) for h in halves], axis=-1) for name in ("value", "slack"))
    return Rounded(value, slack, halves[0].u)
