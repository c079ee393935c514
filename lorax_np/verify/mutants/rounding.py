"""Faults of precision: the right formula, with one operand narrower than the subject claims."""

from typing import Any

import numpy as np

from ..cases import Case, HostArray
from .fault import Fault, Faulty, to_bits

BF16, TF32 = 8, 11  # significant bits


def _bf16(value: Any) -> Any:
    return to_bits(value, BF16)


def _mm(a: HostArray, b: HostArray) -> HostArray:
    """A product whose operands are rounded to TF32 first."""
    return np.asarray(to_bits(a, TF32) @ to_bits(b, TF32))


class WrongDtype(Faulty):
    """Gives gA back in another dtype than A's."""

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients."""
        y, g = super().run(case, gy)
        other = "float64" if case.A.dtype != np.float64 else "float32"
        return y, g | {"A": g["A"].astype(other)}


FAULTS = (
    Fault("N1", "z stored in bfloat16", "precision", (), "linear.7", {"z": lambda t: _bf16(t.xd @ t.A.T)}),
    Fault(
        "N2",
        "operands rounded to TF32 under a claim of float32",
        "precision",
        (),
        "linear.6",
        {
            "z": lambda t: _mm(t.xd, t.A.T),
            "u": lambda t: _mm(t.z, t.B.T),
            "y0": lambda t: _mm(t.xb, t.W.T),
            "P": lambda t: _mm(t.xd, t.W.T),
            "gz": lambda t: _mm(t.gu, t.B),
            "gB": lambda t: _mm(t.gu.T, t.z),
            "gA": lambda t: _mm(t.gz.T, t.xd),
            "gx_lora": lambda t: _mm(t.gz, t.A) * t.back,
            "gx_base": lambda t: _mm(t.G, t.W),
        },
    ),
    Fault(
        "N4", "1/(1 − p) rounded to bfloat16", "precision", (), "dropout.6", {"keep": lambda t: _bf16(t.mask)}
    ),
    Fault("N5", "s rounded to bfloat16", "precision", (), "linear.7", {"s": lambda t: _bf16(t.c.scaling)}),
    Fault(
        "N6",
        "gB from a z rounded to bfloat16",
        "precision",
        (),
        "linear.9",
        {"gB": lambda t: t.gu.T @ _bf16(t.z)},
    ),
    Fault(
        "N7",
        "gy cast to bfloat16 for gA only",
        "precision",
        (),
        "linear.9",
        {"gA": lambda t: (t.s * (_bf16(t.Gk) @ t.B)).T @ t.xd},
    ),
    Fault("N8", "gA in another dtype than A", "precision", (), "linear.9", make=WrongDtype),
    Fault(
        "N9",
        "the update rounded to bfloat16 before it is added",
        "precision",
        ("DiffSynth-Studio#1647",),
        "linear.7",
        {"y": lambda t: t.y0 + t.bias + (_bf16(t.Q) if t.m is None else (t.k - 1) * t.P + _bf16(t.k * t.Q))},
    ),
    Fault(
        "N10",
        "A and B cast to the base's bfloat16 first",
        "precision",
        (),
        "linear.7",
        {"z": lambda t: t.xd @ _bf16(t.A).T, "u": lambda t: t.z @ _bf16(t.B).T},
    ),
    Fault(
        "N11",
        "gx rounded twice: the adapter's term to bfloat16 first",
        "precision",
        (),
        "linear.8",
        {"gx_lora": lambda t: _bf16((t.gz @ t.A) * t.back)},
    ),
    Fault(
        "R13",
        "1e-5 added to n² under the root",
        "precision",
        (),
        "dora.3",
        {"n": lambda t: np.sqrt(np.sum(t.V * t.V, axis=1) + t.V.dtype.type(1e-5))},
    ),
    Fault(
        "R14",
        "the norm rounded to bfloat16",
        "precision",
        (),
        "dora.3",
        {"n": lambda t: _bf16(np.sqrt(np.sum(t.V * t.V, axis=1)))},
    ),
)
