"""Faults of what an adapter holds before its first step: the distribution of A, B = 0, PiSSA's factors, m."""

from collections.abc import Callable, Mapping
from math import sqrt
from types import MappingProxyType
from typing import Any

import numpy as np

from ... import LoraConfig
from ..cases import HostArray
from .fault import Fault, Faulty, Kind, row_norms

Found = dict[str, HostArray]
Change = Callable[[Any, HostArray, LoraConfig, np.random.Generator], Mapping[str, Any]]


class Started(Faulty):
    """The engine's start, with something of it changed."""

    def __init__(self, change: Change, starts: tuple[str, ...]) -> None:
        """change : what it found, W, the configuration and a generator to the arrays that differ

        starts : the starts that the change applies to, by their first letters
        """
        super().__init__()
        self.change, self.starts = change, starts

    def init(self, W: HostArray, config: LoraConfig, seed: int) -> Found:
        """The start of an adapter at W; m, if any, is that of the changed factors."""
        found = {name: np.asarray(value) for name, value in super().init(W, config, seed).items()}
        if not str(config.init_lora_weights).startswith(self.starts):
            return found
        changed = dict(self.change(found, W, config, np.random.default_rng(seed)))
        found |= {name: np.asarray(value, dtype=W.dtype) for name, value in changed.items()}
        if "m" in found and "m" not in changed:
            found["m"] = row_norms(found["W"] + config.scaling * found["B"] @ found["A"])
        return found


def _start(
    id: str,
    title: str,
    line: str,
    change: Change,
    sources: tuple[str, ...] = (),
    starts: tuple[str, ...] = ("True",),
    kind: Kind = "start",
) -> Fault:
    return Fault(id, title, kind, sources, line, make=lambda: Started(change, starts))


def _pissa(id: str, title: str, line: str, change: Change) -> Fault:
    return _start(id, title, line, change, starts=("pissa",), kind="pissa")


def _triples(W: HostArray, r: int, last: bool = False) -> tuple[HostArray, HostArray, HostArray]:
    """r singular triples of W, the largest, or the smallest."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    chosen = slice(S.size - r, None) if last else slice(r)
    return U[:, chosen], S[chosen], Vh[chosen]


def _split(W: HostArray, config: LoraConfig, over: float, power: float = 0.5, last: bool = False) -> Found:
    """PiSSA's factors (S/over)**power on either side, and the residual that they leave."""
    U, S, Vh = _triples(W, config.r, last)
    root = (S / over) ** power
    A, B = root[:, None] * Vh, U * root
    return {"A": A, "B": B, "W": W - config.scaling * B @ A}


def _sideways(W: HostArray, config: LoraConfig) -> Found:
    """V's first rows, where its first columns are meant."""
    U, S, Vh = np.linalg.svd(W)
    root, r = np.sqrt(S[: config.r] / config.scaling), config.r
    A, B = root[:, None] * Vh.T[:r], U[:, :r] * root
    return {"A": A, "B": B, "W": W - config.scaling * B @ A}


STARTS: Mapping[str, Change] = MappingProxyType(
    {
        "I1": lambda f, W, c, rng: {"A": f["A"] * sqrt(6.0)},
        "I2": lambda f, W, c, rng: {"A": f["A"] * sqrt(W.shape[1] / c.r)},
        "I3": lambda f, W, c, rng: {"A": rng.normal(size=f["A"].shape) / sqrt(3 * W.shape[1])},
        "I4": lambda f, W, c, rng: {"B": rng.uniform(-1, 1, f["B"].shape) / sqrt(c.r)},
        "I5": lambda f, W, c, rng: {"A": 0 * f["A"]},
        "I6": lambda f, W, c, rng: {"A": f["A"] / sqrt(W.shape[1])},
        "I7": lambda f, W, c, rng: {"A": np.abs(f["A"])},
        "I8": lambda f, W, c, rng: {"m": row_norms(np.asarray(rng.uniform(-1, 1, W.shape))) / sqrt(W.shape[1])},
        "I9": lambda f, W, c, rng: {"m": row_norms(f["W"])},
        "I10": lambda f, W, c, rng: {"A": f["A"] * c.r},
        "I11": lambda f, W, c, rng: {"A": np.broadcast_to(f["A"][:1], f["A"].shape)},
        "I12": lambda f, W, c, rng: {"m": np.ones(W.shape[0])},
        "P1": lambda f, W, c, rng: {"W": W + c.scaling * f["B"] @ f["A"]},
        "P2": lambda f, W, c, rng: _split(W, c, 1.0),
        "P3": lambda f, W, c, rng: {"W": W},
        "P4": lambda f, W, c, rng: _split(W, c, c.scaling, last=True),
        "P5": lambda f, W, c, rng: _split(W, c, c.scaling, power=1.0),
        "P6": lambda f, W, c, rng: _sideways(W, c),
        "P7": lambda f, W, c, rng: {"W": W - f["B"] @ f["A"]},
    }
)

FAULTS = (
    _start("I1", "A within √(6/d_in): the gain of a = √5 left out", "init.1", STARTS["I1"]),
    _start("I2", "A scaled by the rank, not by d_in", "init.1", STARTS["I2"]),
    _start("I3", "A normal, of the variance of the uniform one", "init.1", STARTS["I3"]),
    _start("I4", "B drawn at random", "init.1", STARTS["I4"], ("FastVideo#781",), ("True", "gaussian")),
    _start("I5", "A = 0 as well as B", "init.1", STARTS["I5"], ("cosmos-predict2.5#15",), ("True", "gaussian")),
    _start("I6", "A within 1/d_in, the root forgotten", "init.1", STARTS["I6"]),
    _start("I7", "A of one sign", "init.1", STARTS["I7"]),
    _start("I8", "m of a fresh linear layer", "init.10", STARTS["I8"], ("mlx-examples#832",), ("",)),
    _start(
        "I9",
        "m of the base alone: right only where the update starts at 0",
        "init.10",
        STARTS["I9"],
        ("gromo#255",),
        ("",),
    ),
    _start("I10", "A standard normal, not divided by the rank", "init.3", STARTS["I10"], starts=("gaussian",)),
    _start("I11", "the rows of A all alike", "init.1", STARTS["I11"]),
    _start("I12", "m = 1", "init.10", STARTS["I12"], starts=("",)),
    _pissa("P1", "the update added to the residual", "init.9", STARTS["P1"]),
    _pissa("P2", "singular values not divided by s", "init.4", STARTS["P2"]),
    _pissa("P3", "no residual: the base as it was", "init.9", STARTS["P3"]),
    _pissa("P4", "the smallest singular values for the largest", "init.4", STARTS["P4"]),
    _pissa("P5", "the square root of S/s forgotten", "init.5", STARTS["P5"]),
    _pissa("P6", "V where its transpose is meant", "init.4", STARTS["P6"]),
    _pissa("P7", "the residual of BA, without s", "init.9", STARTS["P7"]),
)
