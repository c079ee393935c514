"""Faults in the mask: where it acts, what it is scaled by, and which mask backward applies."""

from dataclasses import replace
from typing import Any

import numpy as np

from ..cases import HostArray
from .fault import Fault, Faulty, moved


def _bare(t: Any) -> Any:
    """The mask as 0 and 1."""
    return (t.mask != 0).astype(t.x.dtype)


def _of_kept(t: Any) -> Any:
    """The mask scaled by 1/p."""
    p = t.c.config.lora_dropout
    return t.mask if p == 0 else _bare(t) / np.asarray(p, dtype=t.x.dtype)


def _across(t: Any, width: int) -> HostArray:
    """A mask of another width than x, made of the columns of x's."""
    return np.asarray(t.mask[:, np.arange(width) % t.mask.shape[1]])


class DropsInEval(Faulty):
    """Draws a mask of its own where none is given and the configuration has a rate."""

    def run(self, case: Any, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients, of a dropped input."""
        p = case.config.lora_dropout
        if case.mask is None and p > 0:
            kept = np.random.default_rng(7).random(case.x.shape) >= p
            case = replace(case, mask=np.where(kept, 1 / (1 - p), 0.0).astype(case.x.dtype))
        return super().run(case, gy)


POST_B = {  # dropout of the update, after B, instead of the input of A
    "xd": lambda t: t.x,
    "P": lambda t: t.x @ t.W.T,
    "Q": lambda t: (t.s * t.u + (0 if t.bB is None else t.s * t.bB)) * _across(t, t.W.shape[0]),
    "gu": lambda t: t.s * t.Gk * _across(t, t.W.shape[0]),
    "back": lambda t: np.ones_like(t.x),
}

FAULTS = (
    Fault("D1", "a mask of 0 and 1, both ways", "dropout", (), "dropout.6", {"keep": _bare}),
    Fault("D2", "the mask of gx without 1/(1 − p)", "dropout", (), "dropout.2", {"back": _bare}),
    Fault(
        "D3",
        "dropout on the base path too",
        "dropout",
        (),
        "linear.1",
        {
            "xb": lambda t: t.x * t.keep,
            "gx_base": lambda t: (t.G @ t.W) * t.back,
            "gW": lambda t: t.G.T @ t.xd + (0 if t.m is None else (t.G * (t.k - 1)).T @ t.xd) + t.gV,
        },
    ),
    Fault(
        "D4",
        "another mask drawn for backward",
        "dropout",
        (),
        "dropout.2",
        {"back": lambda t: moved(t.mask), "gA": lambda t: t.gz.T @ (t.x * moved(t.mask))},
    ),
    Fault(
        "D5",
        "gx ignores the mask",
        "dropout",
        ("fms-acceleration#97",),
        "dropout.2",
        {"back": lambda t: np.ones_like(t.x)},
    ),
    Fault("D6", "gA from the undropped x", "dropout", (), "lora.8", {"gA": lambda t: t.gz.T @ t.x}),
    Fault("D7", "gB from the undropped x", "dropout", (), "lora.6", {"gB": lambda t: t.gu.T @ (t.x @ t.A.T)}),
    Fault(
        "D8",
        "the rate taken for the probability of keeping: 1/p",
        "dropout",
        (),
        "dropout.6",
        {"keep": _of_kept},
    ),
    Fault("D9", "dropout active in evaluation", "conduct", (), "dropout.1", make=DropsInEval),
    Fault(
        "D10",
        "dropout on z, not on x",
        "dropout",
        (),
        "dropout.1",
        {
            "xd": lambda t: t.x,
            "z": lambda t: (t.x @ t.A.T) * _across(t, t.A.shape[0]),
            "gz": lambda t: (t.gu @ t.B) * _across(t, t.A.shape[0]),
            "back": lambda t: np.ones_like(t.x),
        },
    ),
    Fault(
        "D11",
        "dropout ignored",
        "dropout",
        ("fsdp_qlora#68", "peft#1806", "aprender#2170"),
        "dropout.1",
        {"keep": lambda t: np.ones_like(t.x)},
    ),
    Fault("D12", "dropout of the update, after B", "dropout", (), "dropout.1", POST_B),
    Fault(
        "D13",
        "a checkpoint's recomputation draws the mask again: z and xd of another mask",
        "dropout",
        ("OLMo-core#828", "unsloth#10744"),
        "dropout.1",
        {
            "back": lambda t: moved(t.mask),
            "gA": lambda t: t.gz.T @ (t.x * moved(t.mask)),
            "gB": lambda t: t.gu.T @ ((t.x * moved(t.mask)) @ t.A.T),
        },
    ),
    Fault(
        "D14",
        "one mask over features for all tokens",
        "dropout",
        (),
        "dropout.1",
        {"keep": lambda t: np.broadcast_to(t.mask[:1], t.mask.shape)},
    ),
    Fault(
        "D15",
        "the mask applied twice: 1/(1 − p)²",
        "dropout",
        (),
        "dropout.1",
        {"xd": lambda t: t.x * t.keep * t.keep, "back": lambda t: t.keep * t.keep},
    ),
    Fault(
        "D16",
        "gx of the base path masked too",
        "dropout",
        (),
        "linear.8",
        {"gx_base": lambda t: (t.G @ t.W) * t.back},
    ),
)
