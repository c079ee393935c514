"""The layer on the CPU, planned for speed: specs/speed.md.  What it computes: specs/lora.md, specs/dora.md.

Products accumulate into what is there already, s and 1/(1 − p) ride on products of r columns, a dropout mask is
made again by blocks of rows in either direction, and nothing as large as y is kept, but under DoRA.
dtypes and roundings are those of layer.py, (linear.6) to (linear.9).
"""

from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, HostArray, compute_dtype, dtype_name, namespace_of, on_device, to_host
from ..params import Adapter, Linear
from ..random import DropoutKey
from . import gpu
from .checks import Dropout, checked, checked_backward
from .cpu_branch import base_back, base_product, biases, down, down_back, token_rows, up, wider
from .cpu_dora import DoraSaved, add_norm_gradient, magnified, magnified_back, total
from .weights import add_product, to


class FastSaved(NamedTuple):
    """What the backward pass reads; x and a mask are the caller's own arrays."""

    x: Array  # (..., d_in)
    dropout: Array | DropoutKey | None
    z: HostArray | None  # (N, r)  xd Aᵀ, where the adapter has A and B
    dora: DoraSaved | None


def lora_linear_forward(
    x: Array, base: Linear, adapter: Adapter, *, scaling: float, dropout: Dropout | None = None
) -> tuple[Any, FastSaved | gpu.GpuSaved]:
    """Linear layer with its low-rank update: lorax_np.lora_linear_forward, faster, on NumPy or CuPy arrays.

    x, base, adapter, scaling : as there, of any real dtype and strides
    dropout : (..., d_in)  a mask, as there
              or (p, seed, step, site), which stands for dropout_mask(x.shape, p, seed, step, site) in the dtype
              that the adapter computes in; it is made by blocks of rows, twice, and never kept

    Returns y : (..., d_out) in x's dtype, and what the backward reads. No argument is written to.
    Raises as there; DtypeError for complex arrays, TypeError for arrays of other libraries.
    Source: specs/speed.md, (speed.1) to (speed.4).

    >>> base, adapter = Linear(np.eye(2)), Adapter(np.ones((1, 2)), np.array([[1.0], [2.0]]))
    >>> lora_linear_forward(np.array([3.0, 4.0]), base, adapter, scaling=0.5)[0].tolist()
    [6.5, 11.0]
    """
    if on_device(x):
        return gpu.forward(x, base, adapter, scaling=scaling, dropout=dropout)
    s, drop = checked(x, base, adapter, scaling, dropout, _check_numpy)
    lead, narrow, wide = x.shape[:-1], dtype_name(x), compute_dtype(x)
    X, W, b = token_rows(x), to_host(base.W), adapter.b if adapter.b is not None else base.b
    if adapter.A is None or adapter.B is None:
        y = base_product(X, W, b, narrow)
        return _shaped(y, narrow, lead), FastSaved(x, None, None, None)

    low = compute_dtype(adapter.A)
    A, B, m, bB = (_host(value, low) for value in (adapter.A, adapter.B, adapter.m, adapter.bB))
    both = wider(wide, low)
    if m is None:
        y = to(base_product(X, W, biases(b, bB, s, wide, narrow), narrow), both)
        z = down(X, A, drop)
        add_product(z, B.T, y, s)  # (lora.2) to (lora.4)
        if bB is not None and narrow != both:
            y += s * bB
        dora = None
    else:
        y, z, dora = magnified(X, W, b, A, B, m, s, drop, narrow)
    return _shaped(y, narrow, lead), FastSaved(x, drop, z, dora)


def lora_linear_backward(
    gy: Array,
    saved: FastSaved | gpu.GpuSaved,
    base: Linear,
    adapter: Adapter,
    *,
    scaling: float,
    norm_gradient: bool = False,
    need_gx: bool = True,
) -> tuple[Any, Adapter]:
    """Adjoint of lora_linear_forward: lorax_np.lora_linear_backward, faster.

    gy, base, adapter, scaling, norm_gradient : as there;  saved : what lora_linear_forward of this module gave
    need_gx : False where nobody asks for gx, as in a model's first layer: it is None then, and W is not read
              (but for DoRA's norm with norm_gradient)

    Raises as there. Source: specs/speed.md, (speed.5) and (speed.6).
    """
    if isinstance(saved, gpu.GpuSaved):
        how: Any = {"scaling": scaling, "norm_gradient": norm_gradient, "need_gx": need_gx}
        return gpu.backward(gy, saved, base, adapter, **how)
    s = checked_backward(gy, saved, FastSaved, base, adapter, scaling)
    lead, narrow, wide = saved.x.shape[:-1], dtype_name(gy), compute_dtype(gy)
    X, G, W = token_rows(saved.x), token_rows(gy), to_host(base.W)
    gb = None if adapter.b is None else to(np.sum(to(G, wide), axis=0), dtype_name(adapter.b))
    if adapter.A is None or adapter.B is None or saved.z is None:
        gx = base_back(G, W, wide) if need_gx else None
        return _shaped(gx, narrow, lead), Adapter(None, None, b=gb)

    low = compute_dtype(adapter.A)
    A, B, m = (_host(value, low) for value in (adapter.A, adapter.B, adapter.m))
    Gl, both = to(G, low), wider(wide, low)
    gm, back = None, None
    if m is None or saved.dora is None:
        gz, gB = up(Gl, saved.z, B, s)
        gx = base_back(G, W, both) if need_gx else None
    else:
        n = saved.dora.norms.n
        k, c = (m / n).astype(low), ((m - n) / n).astype(low)  # (dora.5), (dora.6)
        gz, gB = up(Gl, saved.z, k[:, None] * B, s)
        gB *= k[:, None]  # (dora.9)
        gm = np.asarray(total(Gl, saved.dora.PQ) / n)  # (dora.10), (dora.11)
        gx, back = magnified_back(G, W, k, c, saved.dropout, wide, low, both) if need_gx else (None, None)
    gA = down_back(X, gz, A, saved.dropout, gx, back)
    if norm_gradient and gm is not None and saved.dora is not None:
        add_norm_gradient(gA, gB, gm, m, W, A, B, s, saved.dora.norms)
    gbB = None if adapter.bB is None else s * np.sum(Gl, axis=0)  # (lora.10)
    return _shaped(gx, narrow, lead), Adapter(  # (linear.9)
        A=to(gA, dtype_name(adapter.A)),
        B=to(gB, dtype_name(adapter.B)),
        m=None if gm is None else to(gm.astype(low), dtype_name(adapter.A)),
        b=gb,
        bB=None if gbB is None else to(gbB, dtype_name(adapter.A)),
    )


# ---- shapes, dtypes and checks ----------------------------------------------------------------------------


def _host(value: Array | None, dtype: str) -> Any:
    return None if value is None else to(to_host(value), dtype)


def _shaped(value: HostArray | None, narrow: str, lead: tuple[int, ...]) -> Any:
    """Rows of tokens as their caller knows them: rounded once, and with the leading axes again."""
    return None if value is None else to(value, narrow).reshape(*lead, value.shape[1])


def _check_numpy(x: Array) -> None:
    if namespace_of(x=x) is not np:
        raise TypeError(
            f"x: expected a NumPy or CuPy array in the fast engine, got {namespace_of(x=x).__name__}"
        )
