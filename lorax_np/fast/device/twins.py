"""Operations of ops/ on a device, each by one kernel: the reference's arguments and results, to rounding."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...backend import dtype_name, namespace_of
from ...ops import activation as of_entries
from ...ops import attention as of_sequences
from ...ops import norm as of_rows
from ...ops.norm import NormSaved
from ...shapes import bind
from ..gpu_arrays import Device, contiguous, empty, functions_of, u32
from ..gpu_kernels import THREADS, name_of
from . import source
from .attention import attention_backward, attention_forward

WIDE = "float32", "float64"


def layer_norm_forward(x: Any, w: Any, b: Any, *, eps: float) -> tuple[Any, NormSaved]:
    """ops.layer_norm_forward.  (norm.7) to (norm.10)"""
    return of_rows.layer_norm_forward(x, w, b, eps=eps) if _narrow(x) else _norm(x, w, b, eps)


def layer_norm_backward(gy: Any, saved: NormSaved, w: Any) -> Any:
    """ops.layer_norm_backward.  (norm.11), (norm.12)"""
    return of_rows.layer_norm_backward(gy, saved, w) if _narrow(gy) else _norm_back(gy, saved, w, centred=True)


def rms_norm_forward(x: Any, w: Any, *, eps: float) -> tuple[Any, NormSaved]:
    """ops.rms_norm_forward.  (norm.1) to (norm.3)"""
    return of_rows.rms_norm_forward(x, w, eps=eps) if _narrow(x) else _norm(x, w, None, eps)


def rms_norm_backward(gy: Any, saved: NormSaved, w: Any) -> Any:
    """ops.rms_norm_backward.  (norm.4), (norm.5)"""
    return of_rows.rms_norm_backward(gy, saved, w) if _narrow(gy) else _norm_back(gy, saved, w, centred=False)


def gelu_sloped(u: Any) -> tuple[Any, Any]:
    """ops.gelu_sloped.  (activation.9) to (activation.11)"""
    return of_entries.gelu_sloped(u) if _narrow(u) else _sloped("gelu", u)


def gelu_forward(u: Any) -> Any:
    """y of gelu_sloped, to the bit."""
    return gelu_sloped(u)[0]


def gelu_tanh_forward(u: Any) -> Any:
    """y of gelu_tanh_sloped, to the bit."""
    return gelu_tanh_sloped(u)[0]


def gelu_tanh_sloped(u: Any) -> tuple[Any, Any]:
    """ops.gelu_tanh_sloped.  (activation.14), (activation.26)"""
    return of_entries.gelu_tanh_sloped(u) if _narrow(u) else _sloped("gelu_tanh", u)


ON_DEVICE: Mapping[Callable[..., Any], Callable[..., Any]] = {
    of_sequences.attention_forward: attention_forward,
    of_sequences.attention_backward: attention_backward,
    of_rows.layer_norm_forward: layer_norm_forward,
    of_rows.layer_norm_backward: layer_norm_backward,
    of_rows.rms_norm_forward: rms_norm_forward,
    of_rows.rms_norm_backward: rms_norm_backward,
    of_entries.gelu_forward: gelu_forward,
    of_entries.gelu_sloped: gelu_sloped,
    of_entries.gelu_tanh_forward: gelu_tanh_forward,
    of_entries.gelu_tanh_sloped: gelu_tanh_sloped,
}


def _norm(x: Any, w: Any, b: Any, eps: float) -> tuple[Any, NormSaved]:
    centred = b is not None
    d = bind(x=(x, "... d"), w=(w, "d"), **({"b": (b, "d")} if centred else {}))["d"]
    x, w, kind = contiguous(x), contiguous(w), np.dtype(dtype_name(x)).type
    y, h, rho = (empty(x, shape, dtype_name(x)) for shape in (x.shape, x.shape, (*x.shape[:-1], 1)))
    more = contiguous(b) if centred else np.uint64(0)
    _start("norm", rho.size, 1, x, (y, h, rho, x, w, more, u32(d), kind(eps), u32(centred)))
    return y, NormSaved(h, rho)


def _norm_back(gy: Any, saved: NormSaved, w: Any, *, centred: bool) -> Any:
    d = bind(gy=(gy, "... d"), w=(w, "d"), h=(saved.h, "... d"))["d"]
    gy, h, rho, w = (contiguous(v) for v in (gy, saved.h, saved.rho, w))
    gx = empty(gy, gy.shape, dtype_name(gy))
    _start("norm_back", rho.size, 1, gy, (gx, gy, h, rho, w, u32(d), u32(centred)))
    return gx


def _sloped(name: str, u: Any) -> tuple[Any, Any]:
    u = contiguous(u)
    y, slope = (empty(u, u.shape, dtype_name(u)) for _ in range(2))
    _start(name, u.size, THREADS, u, (y, slope, u, np.uint64(u.size)))
    return y, slope


def _start(name: str, count: int, of_block: int, like: Device, arguments: tuple[Any, ...]) -> None:
    """Start a kernel over rows, a block each, or over entries."""
    if count:
        names = tuple(name_of(each, dtype_name(like)) for each in source.NAMES)
        found = functions_of(namespace_of(like=like), source.SOURCE, names)[name]
        found((-(-count // of_block),), (THREADS,), arguments)


def _narrow(x: Any) -> bool:
    """Whether the kernels leave it to ops: what is stored in 16 bits, or is complex."""
    return dtype_name(x) not in WIDE
