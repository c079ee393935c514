"""Faults of starts that take more than a draw: factors, bits, inputs, gradients, and what is left of W."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ... import LoraConfig, dequantise_nf4, quantise_nf4
from ..cases import HostArray
from .fault import Fault, Faulty, row_norms

Found = dict[str, HostArray]


class Asked(NamedTuple):
    """What a start was asked for, and what the engine's makes of it."""

    found: Found
    W: HostArray  # in float64, as the rest
    config: LoraConfig
    inputs: HostArray
    gradient: HostArray
    rng: np.random.Generator


Change = Callable[[Asked], Mapping[str, Any]]


class Begun(Faulty):
    """The engine's start, with something of it changed; the base is W less the update, unless it is said."""

    def __init__(self, change: Change, start: str, setting: Any = None) -> None:
        """change : what differs;  start : the one that it applies to;  setting : of a config with that value"""
        super().__init__()
        self.change, self.start, self.setting = change, start, setting

    def init_from(self, W: HostArray, config: LoraConfig, seed: int, given: dict[str, Any]) -> dict[str, Any]:
        """The start of an adapter at W; m, if any, is that of the changed factors."""
        found = super().init_from(W, config, seed, given)
        settings = getattr(config, f"{self.start}_config", None) or {}
        if config.init_lora_weights != self.start or self.setting not in (None, *settings.values()):
            return found
        empty, wide = np.zeros((0, 0)), {name: np.asarray(v, np.float64) for name, v in (found | given).items()}
        inputs, gradient = wide.pop("inputs", empty), wide.pop("gradient", empty)
        rng = np.random.default_rng(seed)
        changed = dict(self.change(Asked(wide, W.astype(np.float64), config, inputs, gradient, rng)))
        wide |= changed
        if "W" not in changed and self.start in ("olora", "corda", "lora_ga"):
            wide["W"] = W - config.scaling * wide["B"] @ wide["A"]
        if "m" in wide:
            wide["m"] = row_norms(wide["W"] + config.scaling * wide["B"] @ wide["A"])
        return {name: value.astype(W.dtype) for name, value in wide.items()}


def _svd(M: HostArray, part: slice, split: float) -> Found:
    """Singular triples of a matrix as A and B, their values over split shared evenly."""
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    root = np.sqrt(S[part] / split)
    return {"A": root[:, None] * Vh[part], "B": U[:, part] * root}


def _fit(t: Asked, base: HostArray, target: HostArray | None = None, over: float | None = None) -> Found:
    """LoftQ's factors of what a base lacks of W, or of another target."""
    rest = t.W - (base if target is None else target)
    return _svd(rest, np.s_[: t.config.r], t.config.scaling if over is None else over) | {"W": base}


def _lower(t: Asked) -> Found:
    """Each entry to the level below it, where the nearest is meant."""
    q = quantise_nf4(t.W)
    blocks = dequantise_nf4(q, dtype="float64").reshape(-1, 64)
    levels = np.unique(np.append(blocks / np.abs(blocks).max(axis=1, keepdims=True), [-1.0, 1.0]).round(6))
    W = t.W.reshape(-1, 64)
    top = np.abs(W).max(axis=1, keepdims=True)
    below = levels[np.searchsorted(levels, np.clip(W / top, -1, 1), side="right") - 1] * top
    return _fit(t, below.reshape(t.W.shape))


def _by_rows(t: Asked) -> Found:
    """One absmax for a row, where each 64 entries have one."""
    top = np.abs(t.W).max(axis=1, keepdims=True)
    d_in = t.W.shape[1]
    padded = np.pad(t.W / top, ((0, 0), (0, -d_in % 64)))
    marked = np.concatenate(
        [np.ones((*padded.shape[:1], padded.shape[1] // 64, 1)), padded.reshape(len(padded), -1, 64)], 2
    )
    flat = np.pad(marked.reshape(-1, 65), ((0, 0), (0, 63)))  # a 1 in front of each block: absmax is the row's
    bits = dequantise_nf4(quantise_nf4(flat, block=128), dtype="float64")[:, 1:65]
    return _fit(t, (bits.reshape(padded.shape)[:, :d_in]) * top)


def _iterate_before(t: Asked) -> Found:
    """The factors that fit the base of the turn before."""
    rest = t.W
    for _ in range(2):
        base = dequantise_nf4(quantise_nf4(rest), dtype="float64")
        U, S, Vh = np.linalg.svd(t.W - base, full_matrices=False)
        r = t.config.r
        rest = t.W - (U[:, :r] * S[:r]) @ Vh[:r]
    return _fit(t, dequantise_nf4(quantise_nf4(rest), dtype="float64"), target=base)


def _corda(t: Asked, part: slice, *, back: bool = True) -> Found:
    C = t.inputs.T @ t.inputs
    C /= np.mean(np.diagonal(C))
    C += 0.01 * np.eye(len(C))
    found = _svd(t.W @ C, part, t.config.scaling)
    return {**found, "A": np.linalg.solve(C, found["A"].T).T} if back else found


def _one_half(t: Asked) -> Found:
    """A and B from the same half of the orthogonal matrix."""
    r, (d_out, d_in) = t.config.r, t.W.shape
    half = np.linalg.qr(t.rng.standard_normal((r, r)))[0][0::2]
    A, B = (t.rng.standard_normal((d, r // 2)) @ half / 10 for d in (d_in, d_out))
    return {"A": A.T, "B": B}


def _directions(X: HostArray, part: slice) -> HostArray:
    return np.asarray(np.linalg.svd(X, full_matrices=False)[2][part])


def _same_triples(t: Asked) -> Found:
    """A's triples for B as well."""
    U, S, _ = np.linalg.svd(t.gradient, full_matrices=False)
    r = t.config.r
    return {"B": U[:, :r] * S[:r] * t.W.shape[0] ** 0.25 / 4}


CHANGES: Mapping[str, Change] = {
    "J1": _lower,
    "J2": _by_rows,
    "J3": lambda t: {"A": t.found["A"] / t.config.scaling},
    "J4": _one_half,
    "J5": lambda t: _corda(t, np.s_[: t.config.r], back=False),
    "J6": _iterate_before,
    "J7": lambda t: _fit(t, t.found["W"], over=1.0),
    "J8": lambda t: {"A": _directions(t.inputs, np.s_[: t.config.r])},
    "J9": lambda t: {"A": _directions(t.inputs - t.inputs.mean(axis=0), np.s_[-t.config.r :])},
    "J10": lambda t: _corda(t, np.s_[: t.config.r]),
    "J11": _same_triples,
    "J12": lambda t: {"W": t.W},
    "J13": lambda t: {"W": t.W - t.found["B"] @ t.found["A"]},
    "J14": lambda t: {"W": t.W + t.config.scaling * t.found["B"] @ t.found["A"]},
}


def _fault(id: str, title: str, line: str, start: str, setting: Any = None) -> Fault:
    change = CHANGES[id]
    return Fault(id, title, "family", (), f"starts.{line}", make=lambda: Begun(change, start, setting))


FAULTS = (
    _fault("J1", "LoftQ in NF4: the level below an entry, where the nearest is meant", "7", "loftq", 4),
    _fault("J2", "LoftQ in NF4: one absmax for a row, where each block of 64 has one", "7", "loftq", 4),
    _fault("J3", "OLoRA: A divided by s", "6", "olora"),
    _fault("J4", "orthogonal: A and B from one half of the basis", "4", "orthogonal"),
    _fault("J5", "CorDA: not taken back through the inverse covariance", "15", "corda", "ipm"),
    _fault("J6", "LoftQ: factors that fit the base of the turn before", "8", "loftq", 3),
    _fault("J7", "LoftQ: singular values not divided by s", "9", "loftq"),
    _fault("J8", "EVA: the inputs' mean left in", "21", "eva"),
    _fault("J9", "EVA: the last principal components for the first", "22", "eva"),
    _fault("J10", "CorDA: the first triples where knowledge is to be kept", "14", "corda", "kpm"),
    _fault("J11", "LoRA-GA: B of the triples that A has", "17", "lora_ga", "ArB2r"),
    _fault("J12", "LoRA-GA: no residual, the base as it was", "26", "lora_ga"),
    _fault("J13", "OLoRA: the residual of BA, without s", "26", "olora"),
    _fault("J14", "CorDA: the update added to the residual", "26", "corda"),
)
