"""Faults of the magnitude, the norm and their gradients; and the conventions that others chose here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from ..layers.plain import Step
from .dropout import POST_B
from .fault import Fault, Faulty, moved, row_norms


def _of_norm(t: Any) -> HostArray:
    """The gradient that reaches V through its norm, always taken."""
    if t.m is None:
        return np.zeros_like(t.W)
    return np.asarray(-(t.gk * t.m / t.n**3)[:, None] * t.V)


def _bias_times_k(t: Any) -> Any:
    return t.y0 + t.bias + t.Q if t.m is None else t.y0 + t.k * t.bias + (t.k - 1) * t.P + t.k * t.Q


BIAS_TIMES_K: Mapping[str, Step] = {
    "y": _bias_times_k,
    "gb": lambda t: t.Gk.sum(axis=0),
    "gk": lambda t: (t.G * (t.P + t.Q + t.bias)).sum(axis=0),
}
UNDROPPED_BASE: Mapping[str, Step] = {  # k∘(xWᵀ + Q) + b: mlx-lm, axolotl
    "P": lambda t: t.x @ t.W.T,
    "gx_dora": lambda t: 0 if t.m is None else (t.G * (t.k - 1)) @ t.W,
    "gW": lambda t: t.G.T @ t.x + (0 if t.m is None else (t.G * (t.k - 1)).T @ t.x) + t.gV,
}
SCALED_BIAS: Mapping[str, Step] = {**UNDROPPED_BASE, **BIAS_TIMES_K}  # k∘(xWᵀ + b + Q): torchtune
TWO_MASKS: Mapping[str, Step] = {  # the base product under k drops with a mask of its own
    "P": lambda t: (t.x * moved(t.mask)) @ t.W.T,
    "gx_dora": lambda t: 0 if t.m is None else ((t.G * (t.k - 1)) @ t.W) * moved(t.mask),
    "gW": lambda t: t.G.T @ t.x + (0 if t.m is None else (t.G * (t.k - 1)).T @ (t.x * moved(t.mask))) + t.gV,
}


def _per_token(t: Any) -> Any:
    """m over the norm of each token's own output: what takes the place of k there. 0 without DoRA."""
    if t.m is None:
        return 0.0
    out = t.P + t.Q
    return t.m / np.sqrt(np.sum(out * out, axis=1, keepdims=True))


ACTIVATION_NORM: Mapping[str, Step] = {  # y of LoRA, and m∘h/‖h‖ on top, h = xd Wᵀ + Q, ‖h‖ a constant
    "y": lambda t: t.y0 + t.bias + t.Q + _per_token(t) * (t.P + t.Q),
    "Gk": lambda t: t.G + t.G * _per_token(t),
    "gx_dora": lambda t: 0 if t.m is None else ((t.G * _per_token(t)) @ t.W) * t.back,
    "gm": lambda t: t.gk if t.m is None else (t.G * (t.P + t.Q) * (_per_token(t) / t.m)).sum(axis=0),
    "gV": lambda t: np.zeros_like(t.W),
    "gW": lambda t: t.G.T @ t.x + (0 if t.m is None else (t.G * _per_token(t)).T @ t.xd),
}
CONVENTIONS: dict[str, Mapping[str, Step]] = {  # right by their own formula, wrong by ours
    "undropped_base": UNDROPPED_BASE,
    "scaled_bias": SCALED_BIAS,
    "two_masks": TWO_MASKS,
    "activation_norm": ACTIVATION_NORM,
    "post_b_dropout": POST_B,
    "norm_detached": {"gV": lambda t: np.zeros_like(t.W)},
    "norm_full": {"gV": _of_norm},
}


class NormCached(Faulty):
    """Computes the norms once for each base weight, and keeps them while A and B are trained."""

    def __init__(self) -> None:
        """Nothing is cached at first."""
        super().__init__({"n": self._norm})
        self.cache: dict[bytes, HostArray] = {}

    def _norm(self, t: Any) -> HostArray:
        return self.cache.setdefault(t.W.tobytes(), row_norms(t.V))


class SquaredNorm(Faulty):
    """Forgets the square root in the layer and in its start, which therefore agree."""

    def __init__(self) -> None:
        """n is its own square."""
        super().__init__({"n": lambda t: np.sum(t.V * t.V, axis=1)})

    def init(self, W: Any, config: Any, seed: int) -> dict[str, Any]:
        """The engine's start, with m squared."""
        found = super().init(W, config, seed)
        return found | ({"m": found["m"] ** 2} if "m" in found else {})


class AxisOfMagnitude(Faulty):
    """Declares the same layer with the magnitude along the input, where both sides have one size."""

    def run(self, case: Case, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients; columns are normalised if the weight is square."""
        if case.m is not None and case.W.shape[0] == case.W.shape[1]:
            self.changed = {"n": lambda t: np.sqrt(np.sum(t.V * t.V, axis=0))}
        else:
            self.changed = None
        return super().run(case, gy)


FAULTS = (
    Fault(
        "R1",
        "the norm along the wrong axis: runs on square layers only",
        "dora",
        (),
        "dora.3",
        {"n": lambda t: np.sqrt(np.sum(t.V * t.V, axis=0))},
    ),
    Fault("R2", "gm without 1/n", "dora", (), "dora.11", {"gm": lambda t: t.gk}),
    Fault(
        "R3",
        "the norm held constant where it should be differentiated",
        "dora",
        (),
        "dora.4",
        CONVENTIONS["norm_detached"],
    ),
    Fault(
        "R4",
        "the norm differentiated where it should be held constant",
        "dora",
        ("peft#2348",),
        "dora.4",
        CONVENTIONS["norm_full"],
    ),
    Fault("R5", "the bias multiplied by m/n, both ways", "dora", (), "dora.7", BIAS_TIMES_K),
    Fault(
        "R6",
        "the norm of W alone",
        "dora",
        ("ComfyUI#15458",),
        "dora.3",
        {"n": lambda t: row_norms(t.W), "gA_norm": lambda t: 0 * t.A, "gB_norm": lambda t: 0 * t.B},
    ),
    Fault("R7", "the norm of W + BA, without s", "dora", (), "dora.3", {"V": lambda t: t.W + t.B @ t.A}),
    Fault(
        "R8",
        "the gradient through the norm added with the wrong sign",
        "dora",
        (),
        "dora.12",
        {"gV": lambda t: -_of_norm(t) if t.full else np.zeros_like(t.W)},
    ),
    Fault(
        "R9",
        "gm of the base product alone",
        "dora",
        (),
        "dora.10",
        {"gm": lambda t: (t.G * t.P).sum(axis=0) / t.n},
    ),
    Fault("R10", "the square root forgotten, in layer and start alike", "dora", (), "dora.3", make=SquaredNorm),
    Fault("R11", "the norm cached while A and B are trained", "conduct", (), "dora.3", make=NormCached),
    Fault(
        "R12",
        "k for k − 1: the base counted twice",
        "dora",
        (),
        "dora.5",
        {
            "y": lambda t: t.y0 + t.bias + (t.Q if t.m is None else t.k * (t.P + t.Q)),
            "gx_dora": lambda t: 0 if t.m is None else ((t.G * t.k) @ t.W) * t.back,
        },
    ),
    Fault(
        "R15",
        "DoRA's forward with the backward of LoRA",
        "dora",
        ("AiDotNet#256",),
        "dora.9",
        {"Gk": lambda t: t.G, "gx_dora": lambda t: 0},
    ),
    Fault(
        "R16",
        "gm from the output after k has scaled it",
        "dora",
        ("axolotl#3528",),
        "dora.10",
        {"gm": lambda t: (t.G * (t.P + t.Q) * t.k).sum(axis=0) / t.n},
    ),
    Fault(
        "R17",
        "the magnitude applied to the update, not to the base",
        "dora",
        (),
        "dora.7",
        {
            "y": lambda t: t.y0 + t.bias + (t.Q if t.m is None else t.k * t.Q),
            "gx_dora": lambda t: 0,
            "gk": lambda t: (t.G * t.Q).sum(axis=0),
        },
    ),
    Fault(
        "R18",
        "gm as gk·k/m, which is not a number at m = 0",
        "dora",
        (),
        "dora.11",
        {"gm": lambda t: t.gk if t.m is None else t.gk * t.k / t.m},
    ),
    Fault("R19", "columns normalised where the weight is square", "shape", (), "dora.3", make=AxisOfMagnitude),
    Fault("V1", "the base product under k sees the undropped x", "dora", (), "dora.7", UNDROPPED_BASE),
    Fault("V2", "the bias and an undropped base product under k", "dora", (), "dora.7", SCALED_BIAS),
    Fault("V3", "the base product under k has a mask of its own", "dora", (), "dora.7", TWO_MASKS),
    Fault("V4", "the output's norm for the weight's, on top of LoRA", "dora", (), "dora.7", ACTIVATION_NORM),
)
