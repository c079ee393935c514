"""A convolution as a case of the harness: windows and groups by NumPy alone, its truth, what roundings explain.

As rows, windows make it the linear layer. Derivation: specs/conv.md, specs/subjects.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import numpy as np

from ... import (
    Adapter,
    Linear,
    LoraConfig,
    lora_linear_backward,
    lora_linear_backward_base,
    lora_linear_forward,
)
from ..bounds.worst import FEW, bounds
from ..cases import Case, HostArray

Sizes = tuple[int, ...]
PADS: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
NAMES = ("x", "W", "b", "A", "B", "m", "bB")
ARRAYS = (*NAMES, "mask", "gy")


@dataclass(frozen=True, eq=False)
class ConvCase:
    """N items at one point. All NumPy arrays of the profile's dtype.

    x, mask : (N, d_in, *L), W : (d_out, d_in/groups, *κ), b, m, bB : (d_out,), gy : (N, d_out, *P)
    A : (r, d_in, *κ), B : (d_out, r/groups, *1);  stride, padding, dilation : one number an axis
    norm_gradient : under DoRA, whether the gradient runs through the norm
    """

    id: str
    kind: str
    config: LoraConfig
    x: HostArray
    W: HostArray
    A: HostArray
    B: HostArray
    gy: HostArray
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    mode: str = "zeros"
    b: HostArray | None = None
    m: HostArray | None = None
    bB: HostArray | None = None
    mask: HostArray | None = None
    norm_gradient: bool = False

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.config.scaling

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's sizes."""
        return tuple(self.W.shape[2:])

    def plain(self) -> "ConvCase":
        """The same layer without a magnitude, by its config too, from which some subjects are made."""
        return replace(self, config=replace(self.config, use_dora=False), m=None, norm_gradient=False)

    def arrays(self) -> dict[str, HostArray]:
        """Every array that the case has, by name."""
        return {name: value for name in ARRAYS if (value := getattr(self, name)) is not None}

    def copy(self) -> "ConvCase":
        """The same case in arrays of its own."""
        return replace(self, **{name: value.copy() for name, value in self.arrays().items()})  # type: ignore[arg-type]

    @property
    def places(self) -> HostArray:
        """For each window and entry of the kernel, (*P, ∏κ), the entry of a flat item from 1; 0 for padding."""
        return _places(self.x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, self.mode)


@lru_cache(maxsize=256)
def _places(L: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, mode: str) -> HostArray:
    numbers = np.arange(1, prod(L) + 1).reshape(L)
    wide = np.pad(numbers, [(p, p) for p in padding], mode=PADS[mode])
    parts = []
    for t in product(*map(range, kernel)):
        cuts = []
        for a, size in enumerate(wide.shape):
            P = (size - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
            first = t[a] * dilation[a]
            cuts.append(slice(first, first + (P - 1) * stride[a] + 1, stride[a]))
        parts.append(wide[tuple(cuts)])
    return np.stack(parts, axis=-1)


# ---- windows and blocks, by NumPy alone --------------------------------------------------------------------


def windows(case: ConvCase, x: HostArray) -> HostArray:
    """x : (N, d_in, *L) as rows : (N, *P, d_in·∏κ)."""
    flat = x.reshape(*x.shape[:2], prod(x.shape[2:]))
    padded = np.concatenate([np.zeros_like(flat[:, :, :1]), flat], axis=2)
    rows = np.moveaxis(padded[:, :, case.places], 1, -2)  # (N, *P, d_in, ∏κ)
    return np.ascontiguousarray(rows).reshape(*rows.shape[:-2], prod(rows.shape[-2:]))


def unwindowed(case: ConvCase, rows: HostArray) -> HostArray:
    """The adjoint of windows: every entry of x gets the sum over the windows that hold it."""
    N, d_in, *L = case.x.shape
    parts = np.moveaxis(rows.reshape(*rows.shape[:-1], d_in, prod(case.kernel)), -2, 1)
    found = np.zeros((N, d_in, prod(L) + 1), rows.dtype)
    everywhere: Any = (slice(None), slice(None), case.places)
    np.add.at(found, everywhere, parts)
    return found[:, :, 1:].reshape(case.x.shape)


def whole(W: HostArray, groups: int) -> HostArray:
    """(d_out, d, ...) of groups as (d_out, groups·d·...), zero outside of the blocks."""
    flat = W.reshape(len(W), -1)
    rows, width = len(W) // groups, flat.shape[1]
    found = np.zeros((len(W), groups * width), W.dtype)
    for g in range(groups):
        found[g * rows : (g + 1) * rows, g * width : (g + 1) * width] = flat[g * rows : (g + 1) * rows]
    return found


def blocks(dense: HostArray, like: HostArray, groups: int) -> HostArray:
    """The blocks of whole again, in the shape of like."""
    rows, width = len(like) // groups, dense.shape[1] // groups
    own = [dense[g * rows : (g + 1) * rows, g * width : (g + 1) * width] for g in range(groups)]
    return np.concatenate(own).reshape(like.shape)


def as_linear(case: ConvCase) -> Case:
    """The linear layer that the case is: windows for tokens, whole matrices for groups.  (conv.11)"""
    return Case(
        case.id,
        "dora full norm" if case.norm_gradient else "dora" if case.m is not None else "lora",
        case.config,
        x=windows(case, case.x),
        W=whole(case.W, case.groups),
        A=case.A.reshape(len(case.A), -1),
        B=whole(case.B, case.groups),
        gy=np.moveaxis(case.gy, 1, -1),
        mask=None if case.mask is None else windows(case, case.mask),
        norm_gradient=case.norm_gradient,
        **{name: getattr(case, name) for name in ("b", "m", "bB")},
    )


def as_conv(case: ConvCase, found: dict[str, HostArray]) -> dict[str, HostArray]:
    """Tensors of the linear layer in the shapes of the convolution's."""
    shaped: dict[str, Callable[[HostArray], HostArray]] = {
        "y": lambda v: np.moveaxis(v, -1, 1),
        "x": lambda v: unwindowed(case, v),
        "A": lambda v: v.reshape(case.A.shape),
        "B": lambda v: blocks(v, case.B, case.groups),
        "W": lambda v: blocks(v, case.W, case.groups),
    }
    return {name: shaped[name](value) if name in shaped else value for name, value in found.items()}


# ---- truth and bounds --------------------------------------------------------------------------------------


def truth(case: ConvCase, *, y_alone: bool = False) -> dict[str, HostArray]:
    """y and all gradients by the engine's linear layer on windows, in the dtype of the case."""
    flat = as_linear(case)
    base, adapter = Linear(flat.W, flat.b), Adapter(flat.A, flat.B, flat.m, None, flat.bB)
    y, saved = lora_linear_forward(flat.x, base, adapter, scaling=case.scaling, mask=flat.mask)
    if y_alone:
        return as_conv(case, {"y": np.asarray(y)})
    how: Any = {"scaling": case.scaling, "norm_gradient": case.norm_gradient}
    gx, g = lora_linear_backward(flat.gy, saved, base, adapter, **how)
    gbase = lora_linear_backward_base(flat.gy, saved, base, adapter, **how)
    engine: Any = {"y": y, "x": gx, "W": gbase.W, "b": gbase.b, "A": g.A, "B": g.B, "m": g.m, "bB": g.bB}
    return as_conv(case, {name: value for name, value in engine.items() if value is not None})


def wide(case: ConvCase) -> ConvCase:
    """The case in float64."""
    return replace(case, **{name: value.astype(np.float64) for name, value in case.arrays().items()})  # type: ignore[arg-type]


def merged(case: ConvCase) -> dict[str, HostArray]:
    """W' and b' in float64."""
    v = as_linear(wide(case))
    V, b = v.W + case.scaling * v.B @ v.A, np.zeros(len(v.W)) if v.b is None else v.b
    if v.m is not None:
        V = (v.m / np.linalg.norm(V, axis=1))[:, None] * V
    return {"W": V.reshape(case.W.shape), "b": b if v.bB is None else b + case.scaling * v.bB}


def conv_bounds(case: ConvCase, u: float, *, y_alone: bool = False) -> dict[str, HostArray]:
    """The most that roundings of size u explain: the linear layer's on windows, and gx's sums over them.

    y_alone : nothing but y, in a third of the time
    """
    found = bounds(as_linear(case), u, y_alone=y_alone)
    if not y_alone:
        overlaps = np.bincount(case.places.ravel(), minlength=2)[1:].max()
        found["x"] = found["x"] * (1 + overlaps / (len(case.W) + len(case.A) + FEW))  # (subjects.19)
    kept = {name: value for name, value in found.items() if name == "y" or getattr(case, name) is not None}
    return as_conv(case, kept)
