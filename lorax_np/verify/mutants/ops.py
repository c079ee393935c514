"""Faults of a model's ops of one row at a time: norms, rope, activations."""

from collections.abc import Callable
from functools import partial
from math import pi, sqrt
from typing import Any

import numpy as np

from ..batteries.op_case import OpCase
from ..bounds.running import erf, joined, mean
from ..cases import HostArray
from ..layers.op_steps import Table, run_op
from .fault import Fault, Faulty

Answer = tuple[HostArray, dict[str, HostArray]]


class FaultyOp(Faulty):
    """A right layer, and one op of a model, some of its steps changed."""

    def __init__(self, op: str, changed: Table, swapped: tuple[str, str] | None = None) -> None:
        """changed : step name to what stands in for it;  swapped : two arrays that are taken for each other."""
        super().__init__()
        self.op, self.replaced, self.swapped = op, changed, swapped

    def __getattr__(self, name: str) -> Any:
        if name == self.__dict__.get("op"):
            return self._answer
        raise AttributeError(f"the subject has no {name}")

    def _answer(self, case: OpCase, gy: HostArray) -> Answer:
        turn = dict([self.swapped, self.swapped[::-1]]) if self.swapped else {}
        given = case.moved(**{name: case.at[other] for name, other in turn.items()})
        found = run_op(given, gy, self.replaced)
        return np.asarray(found.pop("y")), {turn.get(name, name): value for name, value in found.items()}


def op_fault(op: str, id: str, title: str, line: str, /, **changed: Any) -> Fault:
    """A fault of one op, by the steps that it changes."""
    return Fault(id, title, "op", (), line, make=partial(FaultyOp, op, changed))


# ---- norms -------------------------------------------------------------------------------------------------


def _size(t: Any) -> HostArray:
    return np.asarray(mean(t.c * t.c))


def _over(shift: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """1/√ of what a function makes of the steps."""
    return lambda t: (1 / np.sqrt(shift(t))).astype(t.x.dtype)


def _last_row(t: Any) -> HostArray:
    both = t.gy * t.h
    return np.asarray(both[-1] if len(both) else both.sum(axis=0))


_rms = partial(op_fault, "rms_norm")
_layer = partial(op_fault, "layer_norm")
NORMS = (
    _rms(
        "O1",
        "RMSNorm: ε added to the root, not under it",
        "norm.1",
        rho=lambda t: 1 / (np.sqrt(_size(t)) + t.eps),
    ),
    _rms("O2", "RMSNorm: ε left out", "norm.1", rho=_over(_size)),
    _rms(
        "O3",
        "RMSNorm: the sum of squares for their mean",
        "norm.1",
        rho=_over(lambda t: len(t.w) * _size(t) + t.eps),
    ),
    _rms("O4", "RMSNorm: gx without its part along the row", "norm.5", along=lambda t: 0),
    _rms(
        "O5",
        "RMSNorm: the part along the row not divided by d",
        "norm.5",
        along=lambda t: (t.g * t.h).sum(-1)[:, None],
    ),
    _rms("O6", "RMSNorm: gx without w", "norm.4", g=lambda t: t.gy),
    _rms("O7", "RMSNorm: gw of x, not of the divided row", "norm.6", gw=lambda t: (t.gy * t.x).sum(axis=0)),
    _rms(
        "O8", "RMSNorm: w counted from 1", "norm.3", y=lambda t: t.h * (1 + t.w), g=lambda t: t.gy * (1 + t.w)
    ),
    _rms("O9", "RMSNorm: gw of the last row alone", "norm.6", gw=_last_row),
    _layer("O10", "LayerNorm: gx without the mean", "norm.12", level=lambda t: 0),
    _layer(
        "O11",
        "LayerNorm: the variance over d − 1",
        "norm.8",
        rho=_over(lambda t: _size(t) * len(t.w) / (len(t.w) - 1) + t.eps),
    ),
    _layer("O12", "LayerNorm: the mean left in the row", "norm.7", c=lambda t: t.x, level=lambda t: 0),
    _layer("O13", "LayerNorm: gb through w", "norm.10", gb=lambda t: (t.gy * t.w).sum(axis=0)),
    _layer("O14", "LayerNorm: gx without its part along the row", "norm.12", along=lambda t: 0),
    _layer("O15", "LayerNorm: the mean taken of gy, not of gy∘w", "norm.12", level=lambda t: mean(t.gy)),
)

# ---- rope --------------------------------------------------------------------------------------------------


def _turn(x: HostArray, t: Any, sign: float) -> HostArray:
    s, half = sign * t.sines, t.half
    one, two = x[..., :half], x[..., half:]
    return np.asarray(joined((one * t.cosines - two * s, two * t.cosines + one * s)), x.dtype)


def _neighbours(x: HostArray, t: Any, sign: float) -> HostArray:
    """Channel 2i with 2i + 1."""
    found, s = np.empty_like(x), sign * t.sines
    found[..., 0::2] = x[..., 0::2] * t.cosines - x[..., 1::2] * s
    found[..., 1::2] = x[..., 1::2] * t.cosines + x[..., 0::2] * s
    return found


_rope = partial(op_fault, "rope")
ROPE = (
    _rope("O16", "rope: the backward turns forward again", "rope.12", gx=lambda t: _turn(t.gy, t, 1.0)),
    _rope(
        "O17",
        "rope: neighbouring channels turned together",
        "rope.11",
        y=lambda t: _neighbours(t.x, t, 1.0),
        gx=lambda t: _neighbours(t.gy, t, -1.0),
    ),
    _rope("O18", "rope: positions counted from 1", "rope.2", at=lambda t: t.positions + 1),
    _rope(
        "O19",
        "rope: rates of θ to the i/D, not 2i/D",
        "rope.1",
        rates=lambda t: [t.theta ** (-i / (2 * t.half)) for i in range(t.half)],
    ),
    _rope(
        "O20",
        "rope: turned the other way, and back",
        "rope.11",
        y=lambda t: _turn(t.x, t, -1.0),
        gx=lambda t: _turn(t.gy, t, 1.0),
    ),
    _rope("O21", "rope: the gradient not turned", "rope.12", gx=lambda t: t.gy),
)

# ---- activations -------------------------------------------------------------------------------------------

ROOT = sqrt(2 / pi)
_swiglu, _gelu, _tanh = (partial(op_fault, op) for op in ("swiglu", "gelu", "gelu_tanh"))
ACTIVATIONS = (
    _swiglu("O22", "SwiGLU: σ for the slope of the gate", "activation.5", slope=lambda t: t.s),
    _swiglu(
        "O23", "SwiGLU: σ(1 − σ) for the slope of the gate", "activation.5", slope=lambda t: t.s * (1 - t.s)
    ),
    _swiglu("O24", "SwiGLU: gu without w", "activation.8", gu=lambda t: t.gy * t.slope),
    _swiglu("O25", "SwiGLU: gw of the gate before its activation", "activation.7", gw=lambda t: t.gy * t.u),
    Fault(
        "O26",
        "SwiGLU: the gate and what it multiplies exchanged",
        "op",
        (),
        "activation.6",
        make=partial(FaultyOp, "swiglu", {}, ("u", "w")),
    ),
    _gelu(
        "O27",
        "GELU: by tanh where erf is meant",
        "activation.9",
        normal=lambda t: 0.5 * (1 + np.tanh(ROOT * (t.u + 0.044715 * t.u**3))),
    ),
    _gelu("O28", "GELU: the slope without the density", "activation.12", gu=lambda t: t.gy * t.normal),
    _gelu("O29", "GELU: erf of u, not of u/√2", "activation.9", normal=lambda t: 0.5 * (1 + erf(t.u))),
    _gelu(
        "O30", "GELU: a density of 1/√π", "activation.11", density=lambda t: np.exp(-0.5 * t.u * t.u) / sqrt(pi)
    ),
    _tanh("O31", "GELU by tanh: 0.044715 mistyped as 0.44715", "activation.13", cube=lambda t: 0.44715),
    _tanh(
        "O32",
        "GELU by tanh: the cube's slope without 3",
        "activation.15",
        steep=lambda t: ROOT * (1 + t.cube * t.u * t.u),
    ),
    _tanh(
        "O33",
        "GELU by tanh: √2/π for √(2/π)",
        "activation.13",
        inner=lambda t: sqrt(2) / pi * (t.u + t.cube * t.u**3),
        steep=lambda t: sqrt(2) / pi * (1 + 3 * t.cube * t.u * t.u),
    ),
)

FAULTS = (*NORMS, *ROPE, *ACTIVATIONS)
