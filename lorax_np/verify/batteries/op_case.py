"""The ops of a model besides linear maps as cases of the harness: arrays, options, and what is drawn.

Names and shapes: specs/subjects.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..cases import HostArray

Named = dict[str, HostArray]
OPS: dict[str, tuple[str, ...]] = {  # the method of each op, and by which of its arrays it has gradients
    "rms_norm": ("x", "w"),
    "layer_norm": ("x", "w", "b"),
    "rope": ("x",),
    "attention": ("q", "k", "v", "R"),
    "swiglu": ("u", "w"),
    "gelu": ("u",),
    "gelu_tanh": ("u",),
    "cross_entropy": ("z",),
    "lookup": ("W",),
    "router": ("z",),
}
FROZEN = {("rms_norm", "w"), ("layer_norm", "w"), ("layer_norm", "b"), ("attention", "R")}  # may be left out
IGNORED = -100  # the label of a row that has none


@dataclass(frozen=True, eq=False)
class OpCase:
    """One op at one point: every array and every option of it is an attribute, as in case.x and case.eps.

    op : its name in OPS;  at : NumPy arrays by name, in the profile's dtype, or int64
    gy : gradient by what the op returns;  options : numbers, and bounds of sequences as tuples
    """

    id: str
    kind: str
    op: str
    at: Named
    gy: HostArray
    options: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        for place in ("at", "options"):
            found = self.__dict__.get(place, {})
            if name in found:
                return found[name]
        raise AttributeError(f"a case of {self.__dict__.get('op')} has no {name}")

    def arrays(self) -> Named:
        """Every array, by name."""
        return self.at | {"gy": self.gy}

    def copy(self) -> "OpCase":
        """The same case in arrays of its own."""
        return replace(self, at={name: value.copy() for name, value in self.at.items()}, gy=self.gy.copy())

    def moved(self, **arrays: Any) -> "OpCase":
        """The case with other arrays, in the dtype of those that they stand in for."""
        new = {name: np.asarray(value, self.at[name].dtype) for name, value in arrays.items()}
        return replace(self, at=self.at | new)

    def under(self, **options: Any) -> "OpCase":
        """The case with other options."""
        return replace(self, options=self.options | options)

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays by which there are gradients."""
        return tuple(name for name in OPS[self.op] if name in self.at)

    @property
    def dtype(self) -> str:
        """Of the floating arrays."""
        return self.gy.dtype.name


def bounds_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Where sequences of these lengths begin, and where the last one ends."""
    return tuple(int(n) for n in np.cumsum((0, *lengths)))


# ---- what is drawn -----------------------------------------------------------------------------------------

Draw = tuple[Named, tuple[int, ...], dict[str, Any]]  # arrays in float64, the shape of gy, options
Rng = np.random.Generator


def _normed(op: str, N: int, d: int, size: float, eps: float) -> Callable[[Rng], Draw]:
    def draw(rng: Rng) -> Draw:
        rows = size * np.exp(rng.uniform(-1, 1, (N, 1)))
        at = {"x": rows * (rng.standard_normal((N, d)) + 0.7), "w": rng.uniform(0.3, 2, d)}
        at["w"] *= rng.choice((-1, 1), d)
        if op == "layer_norm":
            at["b"] = rng.standard_normal(d)
        return at, (N, d), {"eps": eps}

    return draw


def _turned(positions: tuple[int, ...], H: int, D: int, theta: float) -> Callable[[Rng], Draw]:
    def draw(rng: Rng) -> Draw:
        x, t = rng.standard_normal((len(positions), H, D)), np.asarray(positions, np.int64)
        angle = t[:, None] * theta ** (-2 * np.arange(D // 2) / D)
        at = {"x": x, "positions": t, "cos": np.cos(angle), "sin": np.sin(angle)}
        return at, x.shape, {"theta": theta}

    return draw


def _attended(
    lengths: tuple[int, ...],
    sizes: tuple[int, int, int],
    *,
    keys: tuple[int, ...] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    bias: tuple[int, bool, int] | None = None,
    shift: float = 0.0,
) -> Callable[[Rng], Draw]:
    """sizes : heads of q, heads of k and v, channels;  bias : buckets, bidirectional, max_distance."""

    def draw(rng: Rng) -> Draw:
        (H, K, D), N, M = sizes, sum(lengths), sum(keys or lengths)
        at = {
            name: rng.standard_normal(s) for name, s in (("q", (N, H, D)), ("k", (M, K, D)), ("v", (M, K, D)))
        }
        if shift:
            at["q"][:, :, 0], at["k"][:, :, 0] = 1.0, shift  # the same number on all scores
        options: dict[str, Any] = {"starts": bounds_of(lengths), "key_starts": bounds_of(keys or lengths)}
        options |= {"scale": D**-0.5 if scale is None else scale, "causal": causal, "window": window}
        options |= {"bidirectional": False, "max_distance": 0}
        if bias is not None:
            at["R"] = rng.standard_normal((bias[0], H))
            options |= {"bidirectional": bias[1], "max_distance": bias[2]}
        return at, (N, H, D), options

    return draw


def _activated(op: str, N: int, f: int, far: tuple[float, ...] = ()) -> Callable[[Rng], Draw]:
    def draw(rng: Rng) -> Draw:
        u = 1.5 * rng.standard_normal((N, f))
        u.reshape(-1)[: len(far)] = far
        return {"u": u} | ({"w": rng.standard_normal((N, f))} if op == "swiglu" else {}), (N, f), {}

    return draw


def _scored(labels: tuple[int, ...], V: int, n: int, smoothing: float, shift: float) -> Callable[[Rng], Draw]:
    def draw(rng: Rng) -> Draw:
        z = 1.5 * rng.standard_normal((len(labels), V)) + shift
        return {"z": z, "labels": np.asarray(labels, np.int64)}, (), {"n": n, "smoothing": smoothing}

    return draw


def _looked_up(ids: tuple[int, ...], vocab: int, d: int, padding: int | None) -> Callable[[Rng], Draw]:
    def draw(rng: Rng) -> Draw:
        at = {"W": rng.standard_normal((vocab, d)), "ids": np.asarray(ids, np.int64)}
        return at, (len(ids), d), {"padding": padding}

    return draw


def _routed(N: int, E: int, k: int, normalised: bool, ties: bool = False) -> Callable[[Rng], Draw]:
    def draw(rng: Rng) -> Draw:
        z = rng.integers(0, 3, (N, E)).astype(np.float64) if ties else 1.5 * rng.standard_normal((N, E))
        return {"z": z}, (N, E), {"k": k, "normalised": normalised}

    return draw


NONE = IGNORED
LAYOUTS: dict[str, dict[str, Callable[[Rng], Draw]]] = {
    "rms_norm": {
        "odd": _normed("rms_norm", 5, 7, 1.0, 0.03),
        "small": _normed("rms_norm", 3, 5, 1e-3, 1e-6),
        "one row": _normed("rms_norm", 1, 9, 1.0, 1e-5),
        "no row": _normed("rms_norm", 0, 6, 1.0, 1e-5),
    },
    "layer_norm": {
        "odd": _normed("layer_norm", 5, 7, 1.0, 0.03),
        "small": _normed("layer_norm", 3, 5, 1e-3, 1e-6),
        "no row": _normed("layer_norm", 0, 6, 1.0, 1e-5),
    },
    "rope": {
        "odd": _turned((0, 1, 7, 2, 41), 3, 6, 100.0),
        "sequences": _turned((0, 1, 2, 0, 1), 1, 10, 10000.0),
        "no token": _turned((), 2, 4, 10000.0),
    },
    "attention": {
        "grouped": _attended((3, 0, 2), (6, 2, 3), causal=True),
        "whole": _attended((1, 4), (3, 3, 3)),
        "window": _attended((5, 2), (4, 2, 2), causal=True, window=3),
        "cross": _attended((3, 2, 0), (4, 2, 2), keys=(4, 1, 2), scale=0.41),
        "cached": _attended((2, 1), (2, 1, 3), keys=(4, 3), causal=True),
        "bias": _attended((8, 2), (2, 2, 1), scale=1.0, bias=(8, True, 16)),
        "causal bias": _attended((8, 2), (2, 1, 2), causal=True, scale=0.7, bias=(6, False, 10)),
        "shifted": _attended((3, 2), (2, 1, 4), causal=True, shift=2000.0),
        "no token": _attended((0,), (2, 1, 4), causal=True),
    },
    "swiglu": {
        "odd": _activated("swiglu", 5, 7),
        "far": _activated("swiglu", 2, 3, (-60.0, 60.0, -9.0, 9.0)),
        "no row": _activated("swiglu", 0, 3),
    },
    "gelu": {"odd": _activated("gelu", 5, 7), "far": _activated("gelu", 2, 3, (-6.0, 6.0, -3.0, 3.0))},
    "gelu_tanh": {
        "odd": _activated("gelu_tanh", 5, 7),
        "far": _activated("gelu_tanh", 2, 3, (-6.0, 6.0, -3.0, 3.0)),
    },
    "cross_entropy": {
        "odd": _scored((3, NONE, 0, 4, NONE, 1, 1), 5, 11, 0.0, 0.0),
        "smooth": _scored((NONE, 2, 6, 0), 7, 3, 0.15, 0.0),
        "shifted": _scored((2, NONE, 1), 4, 2, 0.0, 1000.0),
        "no label": _scored((NONE, NONE), 3, 4, 0.1, 0.0),
        "no row": _scored((), 3, 4, 0.0, 0.0),
    },
    "lookup": {
        "repeated": _looked_up((4, 1, 4, 8, 1, 4, 0), 9, 5, None),
        "padding": _looked_up((2, 5, 2, 0, 5), 6, 3, 2),
        "no id": _looked_up((), 4, 3, 0),
    },
    "router": {
        "odd": _routed(6, 5, 2, True),
        "ties": _routed(7, 6, 3, True, ties=True),
        "all": _routed(3, 4, 4, True),
        "of all": _routed(5, 7, 3, False),
        "no token": _routed(0, 4, 2, True),
    },
}


def draw(op: str, layout: str, dtype: str, seed: tuple[int, ...], battery: str = "ops") -> OpCase:
    """One case: rows unlike each other, sequences of unequal length, nothing 0 or 1 that need not be."""
    rng = np.random.default_rng((*seed, list(OPS).index(op), list(LAYOUTS[op]).index(layout)))
    at, shape, options = LAYOUTS[op][layout](rng)
    arrays = {name: value if value.dtype.kind == "i" else value.astype(dtype) for name, value in at.items()}
    gy = np.asarray(rng.standard_normal(shape), dtype)
    id = f"{battery}/{op.replace('_', '-')}/{layout.replace(' ', '-')}"
    return OpCase(id, f"{op}, {layout}", op, arrays, gy, options)


def offered(subject: Any) -> Iterator[str]:
    """The ops that a subject has a method for."""
    return (op for op in OPS if hasattr(subject, op))
