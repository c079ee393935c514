"""Faults of backward alone: the forward is right, so a comparison of outputs sees nothing."""

from typing import Any

from ..cases import HostArray
from .fault import Fault, Faulty


class NoGradientOfA(Faulty):
    """Leaves A out of what it gives back."""

    def run(self, case: Any, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and the gradients but one."""
        y, g = super().run(case, gy)
        return y, {name: value for name, value in g.items() if name != "A"}


def _per_token(t: Any) -> int:
    return max(len(t.G), 1)


FAULTS = (
    Fault("G1", "gx without the adapter's term", "gradient", (), "lora.9", {"gx_lora": lambda t: 0 * t.x}),
    Fault("G2", "gx without the base's term", "gradient", (), "linear.3", {"gx_base": lambda t: 0 * t.x}),
    Fault("G3", "gA = 0: z cut off from A", "gradient", (), "lora.8", {"gA": lambda t: 0 * t.A}),
    Fault(
        "G5",
        "a mean over tokens where the sum is meant",
        "gradient",
        (),
        "lora.8",
        {
            "gA": lambda t: t.gz.T @ t.xd / _per_token(t),
            "gB": lambda t: t.gu.T @ t.z / _per_token(t),
            "gb": lambda t: t.G.sum(axis=0) / _per_token(t),
            "gbB": lambda t: t.gu.sum(axis=0) / _per_token(t),
        },
    ),
    Fault("G8", "gb = 0", "gradient", (), "linear.5", {"gb": lambda t: 0 * t.G.sum(axis=0)}),
    Fault("G9", "gA of the wrong sign", "gradient", (), "lora.8", {"gA": lambda t: -(t.gz.T @ t.xd)}),
    Fault(
        "G11",
        "no gradient for A at all",
        "gradient",
        ("unsloth-zoo#606", "unsloth#5039"),
        "lora.8",
        make=NoGradientOfA,
    ),
    Fault("G12", "gB = 0", "gradient", (), "lora.6", {"gB": lambda t: 0 * t.B}),
    Fault(
        "G13",
        "gx of the adapter's term doubled",
        "gradient",
        (),
        "lora.9",
        {"gx_lora": lambda t: 2 * (t.gz @ t.A) * t.back},
    ),
    Fault(
        "G14",
        "gA one per cent too large",
        "gradient",
        (),
        "lora.8",
        {"gA": lambda t: 1.01 * (t.gz.T @ t.xd)},
    ),
    Fault(
        "G15",
        "gW of the masked x, without the magnitude's term",
        "gradient",
        (),
        "dora.13",
        {"gW": lambda t: t.G.T @ t.xd},
    ),
)
