"""Faults of convolutions: of windows, groups, the norm over channels and kernel, merging and starts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ... import Adapter, Linear, lora_linear_backward, lora_linear_forward
from ..batteries.conv import ConvReference
from ..batteries.conv_case import ConvCase, as_linear, blocks, merged, truth, unwindowed, windows
from ..cases import HostArray
from .departing import Departing, Grads, departure


class Convolving(Departing):
    """Convolves right, but for what is replaced."""

    kind, reference = "conv", ConvReference()
    conv_forward, conv_backward = Departing.layer_forward, Departing.layer_backward
    conv_merge, conv_init = Departing.layer_merge, Departing.layer_init


# ---- windows -----------------------------------------------------------------------------------------------


def _flipped(W: HostArray) -> HostArray:
    return np.ascontiguousarray(np.flip(W, axis=tuple(range(2, W.ndim))))


def _turned(case: ConvCase) -> ConvCase:
    """The kernel turned round, as a convolution in the books has it; and what is learnt of it too."""
    return replace(case, W=_flipped(case.W), A=_flipped(case.A))


def _turned_back(case: ConvCase, g: Grads) -> Grads:
    return g | {name: _flipped(g[name]) for name in ("W", "A")}


def _gx_turned(case: ConvCase, g: Grads) -> Grads:
    return g | {"x": truth(_turned(case))["x"]}


def _cut(case: ConvCase, rows: HostArray) -> HostArray:
    """The first of other windows, as many as the case has."""
    return rows[(slice(None), *(slice(0, P) for P in case.places.shape[:-1]))]


def _gA_undilated(case: ConvCase, g: Grads) -> Grads:
    other = replace(case, dilation=tuple(1 for _ in case.kernel))
    flat = as_linear(case)
    x = _cut(case, windows(other, case.x if case.mask is None else case.x * case.mask))
    return g | {"A": (_gz(case).T @ x.reshape(-1, x.shape[-1])).reshape(flat.A.shape).reshape(case.A.shape)}


def _gz(case: ConvCase) -> HostArray:
    """The gradient by z, a row a window."""
    flat = as_linear(case)
    k = 1.0
    if flat.m is not None:
        k = flat.m / np.linalg.norm(flat.W + case.scaling * flat.B @ flat.A, axis=1)
    return np.asarray(case.scaling * (flat.gy.reshape(-1, len(flat.W)) * k) @ flat.B)


def _gx_unstrided(case: ConvCase, g: Grads) -> Grads:
    """The windows' gradients laid side by side, as if the kernel moved by one."""
    one = replace(case, stride=tuple(1 for _ in case.kernel))
    gcols = _gcols(case)
    wide = np.zeros((len(case.x), *one.places.shape[:-1], gcols.shape[-1]), gcols.dtype)
    wide[(slice(None), *(slice(0, P) for P in case.places.shape[:-1]))] = gcols
    return g | {"x": unwindowed(one, wide)}


def _gcols(case: ConvCase) -> HostArray:
    """The gradient by the windows: the layer's on windows of their own, which do not overlap."""
    flat = as_linear(case)
    base, adapter = Linear(flat.W, flat.b), Adapter(flat.A, flat.B, flat.m, None, flat.bB)
    _, saved = lora_linear_forward(flat.x, base, adapter, scaling=case.scaling, mask=flat.mask)
    return np.asarray(lora_linear_backward(flat.gy, saved, base, adapter, scaling=case.scaling)[0])


def _gx_last_window(case: ConvCase, g: Grads) -> Grads:
    """Of the windows that hold an entry the last one alone: written, not added."""
    gcols, (N, d_in, *L) = _gcols(case), case.x.shape
    parts = np.moveaxis(gcols.reshape(*gcols.shape[:-1], d_in, prod(case.kernel)), -2, 1)
    found = np.zeros((N, d_in, prod(L) + 1), gcols.dtype)
    found[:, :, case.places] = parts
    return g | {"x": found[:, :, 1:].reshape(case.x.shape)}


def _gx_in_zeros(case: ConvCase, g: Grads) -> Grads:
    return g | {"x": unwindowed(replace(case, mode="zeros"), _gcols(case))}


def _update(case: ConvCase) -> HostArray:
    """What the adapter adds, without a magnitude and without biases."""
    zero = replace(case, W=0 * case.W, b=None, bB=None, m=None, norm_gradient=False)
    return truth(zero, y_alone=True)["y"]


def _update_in_zeros(case: ConvCase, y: HostArray) -> HostArray:
    return y if case.m is not None else y - _update(case) + _update(replace(case, mode="zeros"))


def _late(case: ConvCase) -> ConvCase:
    """Windows that begin one entry late."""
    return replace(
        case, x=np.roll(case.x, -1, axis=2), mask=None if case.mask is None else np.roll(case.mask, -1, 2)
    )


def _late_back(case: ConvCase, g: Grads) -> Grads:
    return g | {"x": np.roll(g["x"], 1, axis=2)}


# ---- groups, magnitudes, biases ----------------------------------------------------------------------------


def _first_ranks(case: ConvCase) -> ConvCase:
    """B read as if every group had the first one's ranks."""
    if case.groups == 1:
        return case
    r = len(case.A) // case.groups
    return replace(case, A=np.concatenate([case.A[:r]] * case.groups))


def _interleaved(case: ConvCase) -> ConvCase:
    """Channel c taken to be of group c mod groups."""
    d_in = case.x.shape[1]
    order = np.arange(d_in).reshape(-1, case.groups).T.reshape(-1)
    return replace(case, x=case.x[:, order], A=case.A[:, order])


def _interleaved_back(case: ConvCase, g: Grads) -> Grads:
    back = np.argsort(np.arange(case.x.shape[1]).reshape(-1, case.groups).T.reshape(-1))
    return g | {"x": g["x"][:, back], "A": g["A"][:, back]}


def _renormed(norm: Callable[[ConvCase], HostArray]) -> Callable[[ConvCase], ConvCase]:
    """m as if n were another norm of V."""

    def given(case: ConvCase) -> ConvCase:
        if case.m is None:
            return case
        flat = as_linear(case)
        n = np.linalg.norm(flat.W + case.scaling * flat.B @ flat.A, axis=1)
        return replace(case, m=(case.m * n / norm(case)).astype(case.m.dtype))

    return given


def _by_entry(case: ConvCase) -> HostArray:
    """A norm for each entry of the kernel, over channels, and their sum."""
    flat = as_linear(case)
    V = (flat.W + case.scaling * flat.B @ flat.A).reshape(len(flat.W), -1, prod(case.kernel))
    return np.asarray(np.linalg.norm(V, axis=1).sum(axis=1))


def _of_W(case: ConvCase) -> HostArray:
    return np.asarray(np.linalg.norm(case.W.reshape(len(case.W), -1), axis=1))


def _bB_bare(case: ConvCase, y: HostArray) -> HostArray:
    if case.bB is None:
        return y
    return y + ((1 - case.scaling) * case.bB).reshape(-1, *(1,) * len(case.kernel))


def _gb_of_items(case: ConvCase, g: Grads) -> Grads:
    """Biases summed over items at the first place of each."""
    place: Any = (slice(None), slice(None), *(0,) * len(case.kernel))
    first = case.gy[place].sum(axis=0)
    found = {"b": first} | ({} if case.bB is None else {"bB": case.scaling * first})
    return g | {name: value for name, value in found.items() if name in g}


def _gA_last_item(case: ConvCase, g: Grads) -> Grads:
    if len(case.x) < 2:
        return g
    cut = {name: getattr(case, name)[-1:] for name in ("x", "gy", "mask") if getattr(case, name) is not None}
    return g | {"A": truth(replace(case, **cut))["A"]}


def _gx_undropped(case: ConvCase, g: Grads) -> Grads:
    """The adapter's part of gx past the mask."""
    if case.mask is None or case.m is not None:
        return g
    zero = replace(case, W=0 * case.W, b=None, bB=None)
    return g | {"x": g["x"] - truth(zero)["x"] + truth(replace(zero, mask=None))["x"]}


def _gB_whole(case: ConvCase, g: Grads) -> Grads:
    """gB of groups, of the wrong corner of the whole matrix."""
    if case.groups == 1:
        return g
    flat = as_linear(case)
    dense = (
        case.scaling * flat.gy.reshape(-1, len(flat.W)).T @ (flat.x.reshape(-1, flat.x.shape[-1]) @ flat.A.T)
    )
    return g | {"B": blocks(np.roll(dense, len(case.A) // case.groups, axis=1), case.B, case.groups)}


# ---- merging, starting -------------------------------------------------------------------------------------


def _exchanged(case: ConvCase) -> HostArray:
    """delta with channels and kernel in the other's place."""
    A = np.moveaxis(case.A.reshape(*case.A.shape[:2], -1), 1, 2).reshape(case.A.shape)
    return merged(replace(case, A=A))["W"]


def _merged_flipped(case: ConvCase) -> HostArray:
    return merged(replace(case, A=_flipped(case.A)))["W"]


def _merged_bare(case: ConvCase) -> HostArray:
    return merged(replace(case, B=case.B / case.scaling))["W"]


def _by_channels(found: Grads, seed: int) -> Grads:
    """fan_in without the kernel."""
    return found | {"A": found["A"] * np.asarray(prod(found["A"].shape[2:]) ** 0.5, found["A"].dtype)}


def _B_drawn(found: Grads, seed: int) -> Grads:
    B: Any = np.random.default_rng(seed + 1).uniform(-0.3, 0.3, found["B"].shape)
    return found | {"B": B.astype(found["B"].dtype)}


_fault = partial(departure, Convolving)
FAULTS = (
    _fault("X1", "the kernel turned round, all through", "conv.2", given=_turned, backward=_turned_back),
    _fault("X2", "the kernel turned round for gx alone", "conv.7", backward=_gx_turned),
    _fault("X3", "dilation ignored in gA", "conv.2", backward=_gA_undilated),
    _fault("X4", "stride ignored on the way from windows back to gx", "conv.7", backward=_gx_unstrided),
    _fault(
        "X5",
        "gx of the last window that holds an entry: written, not added",
        "conv.7",
        backward=_gx_last_window,
    ),
    _fault("X6", "the mode of padding ignored in gx", "conv.3", backward=_gx_in_zeros),
    _fault("X7", "A pads with zeros whatever the base's mode", "conv.3", forward=_update_in_zeros),
    _fault("X8", "windows that begin one entry late", "conv.2", given=_late, backward=_late_back),
    _fault("X9", "B of groups not grouped: all by the first group's ranks", "conv.8", given=_first_ranks),
    _fault(
        "X10", "channels dealt out to groups in turn", "conv.8", given=_interleaved, backward=_interleaved_back
    ),
    _fault("X11", "gB of groups from another group's ranks", "conv.9", backward=_gB_whole),
    _fault("X12", "norms over channels alone, summed over the kernel", "conv.11", given=_renormed(_by_entry)),
    _fault("X13", "the norm of a convolution's W alone", "dora.3", given=_renormed(_of_W)),
    _fault("X14", "bB of a convolution without s", "lora.4", forward=_bB_bare),
    _fault("X15", "biases' gradients from each item's first place alone", "linear.5", backward=_gb_of_items),
    _fault("X16", "gA of a convolution's last item alone", "lora.8", backward=_gA_last_item),
    _fault("X17", "the adapter's part of a convolution's gx not masked", "dropout.2", backward=_gx_undropped),
    _fault("X18", "delta merged with channels and kernel exchanged", "conv.17", merge=_exchanged),
    _fault("X19", "delta merged with the kernel turned round", "conv.17", merge=_merged_flipped),
    _fault("X20", "a convolution merged without s", "conv.17", merge=_merged_bare),
    _fault(
        "X21",
        "A of a convolution scaled by its channels, not by channels times kernel",
        "conv.18",
        start=_by_channels,
    ),
    _fault("X22", "B of a convolution drawn at random", "conv.18", start=_B_drawn),
)
