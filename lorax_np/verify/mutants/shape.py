"""Faults of layout: transposes, tails of tiles, leading axes, strides, sharding."""

from dataclasses import replace
from typing import Any

import numpy as np

from ..cases import HostArray
from .fault import Fault, Faulty

TILE = 4


def _first(t: Any, value: HostArray) -> HostArray:
    """Rows of tokens with every batch item replaced by the first."""
    lead = t.c.x.shape[:-1]
    if len(lead) < 2 or 0 in lead:
        return value
    shaped = value.reshape(*lead, -1)
    return np.broadcast_to(shaped[:1], shaped.shape).reshape(value.shape)


def _kept_ranks(t: Any, count: int) -> Any:
    """1 for the first ranks, 0 for the rest."""
    return (np.arange(t.A.shape[0]) < count).astype(t.A.dtype)


def _whole_tiles(t: Any) -> Any:
    r = t.A.shape[0]
    return _kept_ranks(t, r - r % TILE if r > TILE else r)


def _clipped(t: Any) -> Any:
    return _kept_ranks(t, min(t.W.shape))


def _fewer_ranks(kept: Any) -> dict[str, Any]:
    """A layer that uses some of its ranks only, forward and backward."""
    return {
        "z": lambda t: (t.xd @ t.A.T) * kept(t),
        "V": lambda t: t.W + t.s * ((t.B * kept(t)) @ t.A),
        "gz": lambda t: (t.gu @ t.B) * kept(t),
        "gA_norm": lambda t: kept(t)[:, None] * (t.s * t.B.T @ t.gV),
        "gB_norm": lambda t: (t.s * t.gV @ t.A.T) * kept(t),
    }


def _even(t: Any, value: HostArray) -> HostArray:
    """The tokens that fill whole tiles of two."""
    return value[: value.shape[0] - value.shape[0] % 2] if value.shape[0] > 2 else value


def _half(t: Any) -> Any:
    """1 on the first half of the input features, 0 on the rest."""
    d_in = t.W.shape[1]
    return (np.arange(d_in) < (d_in + 1) // 2).astype(t.W.dtype)


def _flat(value: Any) -> Any:
    """An array read as if its memory were contiguous, from where the memory that it is a view of begins."""
    if value is None or value.flags.c_contiguous:
        return value
    root = value
    while isinstance(root.base, np.ndarray):
        root = root.base
    return np.resize(root.ravel(order="K"), value.shape)


class IgnoresStrides(Faulty):
    """Reads x as a contiguous block of memory."""

    def run(self, case: Any, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients, of what lies in memory."""
        return super().run(replace(case, x=_flat(case.x)), gy)


class NanWhenEmpty(Faulty):
    """Divides by the number of tokens on its way."""

    def run(self, case: Any, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients, not a number where there is no token."""
        y, g = super().run(case, gy)
        if case.x.size == 0:
            g |= {name: np.full_like(g[name], np.nan) for name in ("A", "B")}
        return y, g


class OneAxisOnly(Faulty):
    """Gives gx back with its leading axes folded."""

    def run(self, case: Any, gy: Any) -> tuple[HostArray, dict[str, HostArray]]:
        """y and all gradients, gx as rows."""
        y, g = super().run(case, gy)
        return y, g | {"x": g["x"].reshape(-1, case.x.shape[-1])}


FAULTS = (
    Fault(
        "T1",
        "gA reshaped where it should be transposed",
        "shape",
        (),
        "lora.8",
        {"gA": lambda t: (t.xd.T @ t.gz).reshape(t.A.shape)},
    ),
    Fault(
        "T4",
        "gB reshaped where it should be transposed",
        "shape",
        (),
        "lora.6",
        {"gB": lambda t: (t.z.T @ t.gu).reshape(t.B.shape)},
    ),
    Fault(
        "T5", "x@W for x@Wᵀ: runs on square layers only", "shape", (), "linear.1", {"y0": lambda t: t.xb @ t.W}
    ),
    Fault(
        "T6",
        "A not transposed where it is square, r = d_in",
        "shape",
        ("vmlx-swift#320",),
        "lora.1",
        {
            "z": lambda t: t.xd @ (t.A if t.A.shape[0] == t.A.shape[1] else t.A.T),
            "gA": lambda t: t.xd.T @ t.gz if t.A.shape[0] == t.A.shape[1] else t.gz.T @ t.xd,
            "gx_lora": lambda t: (t.gz @ (t.A.T if t.A.shape[0] == t.A.shape[1] else t.A)) * t.back,
        },
    ),
    Fault(
        "T7",
        "gA = xᵀgz where gzᵀx is meant, and transposed back by its shape: right unless r = d_in",
        "shape",
        (),
        "lora.8",
        {"gA": lambda t: t.xd.T @ t.gz if t.A.shape[0] == t.A.shape[1] else t.gz.T @ t.xd},
    ),
    Fault("Z1", "not a number where there is no token", "conduct", (), "lora.8", make=NanWhenEmpty),
    Fault("Z2", "strides ignored", "conduct", ("unsloth#10712",), "linear.1", make=IgnoresStrides),
    Fault("Z3", "the rank clipped to min(d_in, d_out)", "shape", (), "lora.1", _fewer_ranks(_clipped)),
    Fault(
        "Z4",
        "the ranks past the last whole tile of 4 dropped",
        "shape",
        (),
        "lora.1",
        _fewer_ranks(_whole_tiles),
    ),
    Fault(
        "Z6",
        "the tokens past the last whole tile of 2 dropped in gA and gB",
        "shape",
        (),
        "lora.8",
        {
            "gA": lambda t: _even(t, t.gz).T @ _even(t, t.xd),
            "gB": lambda t: _even(t, t.gu).T @ _even(t, t.z),
        },
    ),
    Fault(
        "Z7",
        "input features split over two devices, z never summed over them",
        "shape",
        (),
        "lora.1",
        {
            "z": lambda t: (t.xd * _half(t)) @ t.A.T,
            "V": lambda t: t.W + t.s * (t.B @ (t.A * _half(t))),
            "gA": lambda t: t.gz.T @ (t.xd * _half(t)),
            "gx_lora": lambda t: (t.gz @ (t.A * _half(t))) * t.back,
            "gA_norm": lambda t: (t.s * t.B.T @ t.gV) * _half(t),
            "gB_norm": lambda t: t.s * (t.gV * _half(t)) @ t.A.T,
        },
    ),
    Fault(
        "Z8",
        "the output features past the last whole tile of 4 get no update",
        "shape",
        (),
        "lora.4",
        {
            "Q": lambda t: (t.s * t.u + (0 if t.bB is None else t.s * t.bB)) * _columns(t),
            "gu": lambda t: t.s * t.Gk * _columns(t),
        },
    ),
    Fault("Z9", "gx comes back with its leading axes folded", "shape", (), "lora.9", make=OneAxisOnly),
    Fault(
        "G10",
        "of an input with two leading axes, the first item stands for all",
        "shape",
        (),
        "lora.8",
        {"gA": lambda t: t.gz.T @ _first(t, t.xd)},
    ),
)


def _columns(t: Any) -> Any:
    """1 on the output features that fill whole tiles of four, 0 on the rest."""
    d_out = t.W.shape[0]
    return (np.arange(d_out) < (d_out - d_out % TILE if d_out > TILE else d_out)).astype(t.W.dtype)
