"""Faults of arithmetic on whole adapters: PiSSA turned into a plain one, and several combined into one."""

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np

from ... import LoraConfig
from ..cases import Case, HostArray
from .fault import Fault, Faulty, Kind

Pair = tuple[HostArray, HostArray]


def doubled(config: LoraConfig, alpha: float | None = None) -> LoraConfig:
    """The configuration of twice the rank and the same s; alpha : what alpha is multiplied by instead."""
    times = (sqrt(2.0) if config.use_rslora else 2.0) if alpha is None else alpha
    return replace(config, r=2 * config.r, lora_alpha=times * config.lora_alpha, init_lora_weights=True)


class Arithmetic(Faulty):
    """Converts and combines right.  (faults.4), (faults.5)"""

    def convert(
        self, start: Pair, trained: Pair, config: LoraConfig
    ) -> tuple[HostArray, HostArray, LoraConfig]:
        """A', B' of rank 2r and their configuration, which on W do what the trained did on the residual."""
        (A0, B0), (A, B) = start, trained
        return np.concatenate([A, A0]), np.concatenate([B, -B0], axis=1), doubled(config)

    def combine(self, cases: list[Case], weights: list[float]) -> tuple[HostArray, HostArray, float]:
        """A, B and s of the one adapter whose update is the weighted sum of theirs."""
        A = np.concatenate([w * c.scaling * c.A for c, w in zip(cases, weights, strict=True)])
        return A.astype(cases[0].A.dtype), np.concatenate([c.B for c in cases], axis=1), 1.0


class Converts(Arithmetic):
    """Converts in a way of its own."""

    def __init__(
        self, how: Callable[[Pair, Pair, LoraConfig], tuple[HostArray, HostArray, LoraConfig]]
    ) -> None:
        """how : the pair at the start, the trained one and the configuration, to A', B' and theirs."""
        super().__init__()
        self.how = how

    def convert(
        self, start: Pair, trained: Pair, config: LoraConfig
    ) -> tuple[HostArray, HostArray, LoraConfig]:
        """A', B' and their configuration."""
        return self.how(start, trained, config)


class Combines(Arithmetic):
    """Combines in a way of its own."""

    def __init__(self, how: Callable[[list[Case], list[float]], tuple[Any, Any, float]]) -> None:
        """how : the adapters and their weights, to A, B and s."""
        super().__init__()
        self.how = how

    def combine(self, cases: list[Case], weights: list[float]) -> tuple[HostArray, HostArray, float]:
        """A, B and s."""
        A, B, s = self.how(cases, weights)
        return np.asarray(A, dtype=cases[0].A.dtype), np.asarray(B, dtype=cases[0].B.dtype), s


RIGHT = Arithmetic()


def _same_alpha(start: Pair, trained: Pair, config: LoraConfig) -> tuple[HostArray, HostArray, LoraConfig]:
    A, B, _ = RIGHT.convert(start, trained, config)
    return A, B, doubled(config, 1.0)


def _alpha_doubled(start: Pair, trained: Pair, config: LoraConfig) -> tuple[HostArray, HostArray, LoraConfig]:
    A, B, _ = RIGHT.convert(start, trained, config)
    return A, B, doubled(config, 2.0)


def _plus(start: Pair, trained: Pair, config: LoraConfig) -> tuple[HostArray, HostArray, LoraConfig]:
    return (
        np.concatenate([trained[0], start[0]]),
        np.concatenate([trained[1], start[1]], axis=1),
        doubled(config),
    )


def _difference(start: Pair, trained: Pair, config: LoraConfig) -> tuple[HostArray, HostArray, LoraConfig]:
    """A − A₀ and B − B₀ in rank r: not the difference of the products."""
    return trained[0] - start[0], trained[1] - start[1], replace(config, init_lora_weights=True)


def _off_by_root(cases: list[Case], weights: list[float]) -> tuple[Any, Any, float]:
    """rsLoRA inherited from the first adapter: α = r over √r."""
    A, B, _ = RIGHT.combine(cases, weights)
    return A, B, sqrt(A.shape[0])


def _twice_scaled(cases: list[Case], weights: list[float]) -> tuple[Any, Any, float]:
    A = np.concatenate([w * c.scaling**2 * c.A for c, w in zip(cases, weights, strict=True)])
    return A, np.concatenate([c.B for c in cases], axis=1), 1.0


def _first_scale(cases: list[Case], weights: list[float]) -> tuple[Any, Any, float]:
    A = np.concatenate([w * cases[0].scaling * c.A for c, w in zip(cases, weights, strict=True)])
    return A, np.concatenate([c.B for c in cases], axis=1), 1.0


def _weights_on_both(cases: list[Case], weights: list[float]) -> tuple[Any, Any, float]:
    A = np.concatenate([w * c.scaling * c.A for c, w in zip(cases, weights, strict=True)])
    return A, np.concatenate([w * c.B for c, w in zip(cases, weights, strict=True)], axis=1), 1.0


def _unweighted(cases: list[Case], weights: list[float]) -> tuple[Any, Any, float]:
    return RIGHT.combine(cases, [1.0] * len(weights))


def _fault(id: str, title: str, kind: Kind, line: str, make: Any, sources: tuple[str, ...] = ()) -> Fault:
    return Fault(id, title, kind, sources, line, make=make)


CONVERT, COMBINE = "faults.4", "faults.5"
FAULTS = (
    _fault(
        "P8",
        "PiSSA made plain: the rank doubled, alpha not",
        "pissa",
        CONVERT,
        lambda: Converts(_same_alpha),
        ("peft#1930",),
    ),
    _fault(
        "P9",
        "PiSSA made plain under rsLoRA: alpha doubled, not times √2",
        "pissa",
        CONVERT,
        lambda: Converts(_alpha_doubled),
        ("peft#1930",),
    ),
    _fault(
        "P10", "PiSSA made plain: the start added, not taken away", "pissa", CONVERT, lambda: Converts(_plus)
    ),
    _fault(
        "P11",
        "PiSSA made plain: differences of factors for the difference of products",
        "pissa",
        CONVERT,
        lambda: Converts(_difference),
    ),
    _fault(
        "L1",
        "adapters combined: off by √r, rsLoRA inherited",
        "merge",
        COMBINE,
        lambda: Combines(_off_by_root),
        ("peft#3761", "peft#3449", "peft#2733"),
    ),
    _fault("L2", "adapters combined: s applied twice", "merge", COMBINE, lambda: Combines(_twice_scaled)),
    _fault(
        "L3", "adapters combined: the first one's s for all", "merge", COMBINE, lambda: Combines(_first_scale)
    ),
    _fault(
        "L4", "adapters combined: weights on both factors", "merge", COMBINE, lambda: Combines(_weights_on_both)
    ),
    _fault("L5", "adapters combined: weights ignored", "merge", COMBINE, lambda: Combines(_unweighted)),
)
