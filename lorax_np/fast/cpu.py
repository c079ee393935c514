"""The layer on the CPU, planned for speed: specs/speed.md.  What it computes: specs/lora.md, specs/dora.md.

Products accumulate into what is there already, s and 1/(1 − p) ride on products of r columns, a dropout mask is
made again by blocks of rows in either direction, and nothing as large as y is kept, but under DoRA.
dtypes and roundings are those of layer.py, (linear.6) to (linear.9).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, HostArray, compute_dtype, dtype_name, namespace_of, on_device, to_host
from ..params import Adapter, Linear
from ..random import DropoutKey
from ..shapes import rows
from . import gpu
from .buffers import empty
from .checks import Dropout, checked, checked_backward
from .gemm import gemm
from .norms import Norms, row_norms
from .weights import add_product, back_through, product, row_blocks, through, to


class DoraSaved(NamedTuple):
    """What DoRA's backward reads besides."""

    PQ: HostArray  # (N, d_out)  P + Q of (dora.7), in the dtype the adapter computes in
    norms: Norms


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
    X, W, b = _rows(x), to_host(base.W), adapter.b if adapter.b is not None else base.b
    if adapter.A is None or adapter.B is None:
        y = _base(X, W, b, narrow)
        return _shaped(y, narrow, lead), FastSaved(x, None, None, None)

    low = compute_dtype(adapter.A)
    A, B, m, bB = (_host(value, low) for value in (adapter.A, adapter.B, adapter.m, adapter.bB))
    both = _wider(wide, low)
    if m is None:
        y = to(_base(X, W, _bias(b, bB, s, wide, narrow), narrow), both)
        z = _down(X, A, drop)
        add_product(z, B.T, y, s)  # (lora.2) to (lora.4)
        if bB is not None and narrow != both:
            y += s * bB
        dora = None
    else:
        y, z, dora = _magnified(X, W, b, A, B, m, s, drop, narrow)
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
    X, G, W = _rows(saved.x), _rows(gy), to_host(base.W)
    gb = None if adapter.b is None else to(np.sum(to(G, wide), axis=0), dtype_name(adapter.b))
    if adapter.A is None or adapter.B is None or saved.z is None:
        gx = _base_back(G, W, wide) if need_gx else None
        return _shaped(gx, narrow, lead), Adapter(None, None, b=gb)

    low = compute_dtype(adapter.A)
    A, B, m = (_host(value, low) for value in (adapter.A, adapter.B, adapter.m))
    Gl, both = to(G, low), _wider(wide, low)
    gm, back = None, None
    if m is None or saved.dora is None:
        gz, gB = _up(Gl, saved.z, B, s)
        gx = _base_back(G, W, both) if need_gx else None
    else:
        n = saved.dora.norms.n
        k, c = (m / n).astype(low), ((m - n) / n).astype(low)  # (dora.5), (dora.6)
        gz, gB = _up(Gl, saved.z, k[:, None] * B, s)
        gB *= k[:, None]  # (dora.9)
        gm = np.asarray(_total(Gl, saved.dora.PQ) / n)  # (dora.10), (dora.11)
        gx, back = _magnified_back(G, W, k, c, saved.dropout, wide, low, both) if need_gx else (None, None)
    gA = _down_back(X, gz, A, saved.dropout, gx, back)
    if norm_gradient and gm is not None and saved.dora is not None:
        _add_norm_gradient(gA, gB, gm, m, W, A, B, s, saved.dora.norms)
    gbB = None if adapter.bB is None else s * np.sum(Gl, axis=0)  # (lora.10)
    return _shaped(gx, narrow, lead), Adapter(  # (linear.9)
        A=to(gA, dtype_name(adapter.A)),
        B=to(gB, dtype_name(adapter.B)),
        m=None if gm is None else to(gm.astype(low), dtype_name(adapter.A)),
        b=gb,
        bB=None if gbB is None else to(gbB, dtype_name(adapter.A)),
    )


# ---- the base ---------------------------------------------------------------------------------------------


def _base(X: HostArray, W: HostArray, b: Any, narrow: str) -> HostArray:
    """xWᵀ + b in the dtype X computes in, rounded to `narrow`: (linear.1), (linear.2), (linear.6)."""
    y = empty((len(X), len(W)), compute_dtype(X))
    if b is not None:
        y[...] = to_host(b)
    through(X, W, y, 0.0 if b is None else 1.0)
    _round(y, narrow)
    return y


def _bias(b: Any, bB: HostArray | None, s: float, wide: str, narrow: str) -> Any:
    """b, and s·bB with it where nothing is rounded in between."""
    if bB is None or narrow != _wider(wide, dtype_name(bB)):
        return b
    return s * bB if b is None else b + s * bB


def _round(y: HostArray, narrow: str) -> None:
    """Round y to a storage dtype in place, a few rows at a time.  (linear.6)"""
    if y.dtype != narrow:
        for part in row_blocks(y):
            y[part] = to(y[part], narrow)


def _base_back(G: HostArray, W: HostArray, both: str) -> HostArray:
    """gy W in the wider dtype: (linear.3)."""
    gx = empty((len(G), W.shape[1]), compute_dtype(G))
    back_through(G, W, gx)
    return to(gx, both)


# ---- the update -------------------------------------------------------------------------------------------


def _dropped(X: HostArray, drop: Any, low: str) -> Iterator[tuple[slice, HostArray, HostArray, float]]:
    """Blocks of rows: which, what of the mask stands there, x times that, and the factor left to apply."""
    fill = drop.blocks() if isinstance(drop, DropoutKey) else None
    mask = X if fill else _rows(drop)
    factor = _factor(drop, low)
    parts = list(row_blocks(X))
    height = max((part.stop - part.start for part in parts), default=0)
    keeps, dropped = (empty((height, X.shape[1]), low) for _ in range(2))
    for part in parts:
        keep, xd = keeps[: part.stop - part.start], dropped[: part.stop - part.start]
        if fill is not None:
            fill(keep)
        else:
            keep[...] = mask[part]
        np.multiply(keep, to(X[part], low), out=xd)
        yield part, keep, xd, factor


def _factor(drop: Any, low: str) -> float:
    """What the blocks of _dropped lack: 1/(1 − p) as a mask of that dtype holds it, or 1 for a mask given."""
    return float(np.dtype(low).type(drop.scale)) if isinstance(drop, DropoutKey) else 1.0


def _down(X: HostArray, A: HostArray, drop: Any) -> HostArray:
    """z = xd Aᵀ: (dropout.1), (lora.1)."""
    z = empty((len(X), len(A)), dtype_name(A))
    if drop is None:
        gemm(to(X, dtype_name(A)), A.T, z)
        return z
    for part, _, xd, factor in _dropped(X, drop, dtype_name(A)):
        gemm(xd, A.T, z[part], factor)
    return z


def _up(G: HostArray, z: HostArray, B: HostArray, s: float) -> tuple[HostArray, HostArray]:
    """gz = s·gy B and gB = s·gyᵀz: (lora.5) to (lora.7)."""
    gz, gB = empty(z.shape, dtype_name(z)), empty(B.shape, dtype_name(B))
    gemm(G, B, gz, s)
    gemm(G.T, z, gB, s)
    return gz, gB


def _down_back(
    X: HostArray, gz: HostArray, A: HostArray, drop: Any, gx: HostArray | None, back: HostArray | None
) -> HostArray:
    """gA = gzᵀ xd; adds (gz A)∘mask to gx, and what DoRA has to add under the mask: (lora.8), (lora.9)."""
    gA, low = empty(A.shape, dtype_name(A)), dtype_name(A)
    if drop is None:
        gemm(gz.T, to(X, low), gA)
        if gx is not None:
            add_product(gz, A, gx)
        return gA
    if not len(X):
        gA[...] = 0
    for part, keep, xd, factor in _dropped(X, drop, low):
        gemm(gz[part].T, xd, gA, factor, float(part.start > 0))
        if gx is not None:
            under = xd  # no longer needed
            if back is not None:
                under[...] = back[part]
            gemm(gz[part], A, under, factor, 0.0 if back is None else factor)
            under *= keep  # (dropout.2)
            gx[part] += under  # (linear.8)
    return gA


# ---- DoRA -------------------------------------------------------------------------------------------------


def _magnified(
    X: HostArray,
    W: HostArray,
    b: Any,
    A: HostArray,
    B: HostArray,
    m: HostArray,
    s: float,
    drop: Any,
    narrow: str,
) -> tuple[HostArray, HostArray, DoraSaved]:
    """y, z, and what the backward reads: (dora.5) to (dora.7)."""
    low, wide = dtype_name(A), compute_dtype(X)
    norms = row_norms(W, A, B, s)
    k, c = (m / norms.n).astype(low), ((m - norms.n) / norms.n).astype(low)
    PQ = empty((len(X), len(W)), low)
    if drop is None:
        xd, factor = to(X, low), 1.0
    else:
        xd, factor = empty(X.shape, low), _factor(drop, low)
        for part, _, block, _ in _dropped(X, drop, low):
            xd[part] = block * factor
    z = _down(xd, A, None)
    through(xd, W, PQ)
    if drop is None and narrow == wide == low:
        gemm(z, B.T, PQ, s, 1.0)
        y = empty(PQ.shape, low)
        for part in row_blocks(PQ):  # k∘(P + Q) + b
            np.multiply(PQ[part], k, out=y[part])
            if b is not None:
                y[part] += b
    else:
        y = to(_base(X, W, b, narrow), _wider(wide, low))
        for part in row_blocks(PQ):
            y[part] += c * PQ[part]
        add_product(z, (k[:, None] * B).T, y, s)
        gemm(z, B.T, PQ, s, 1.0)
    return y, z, DoraSaved(PQ, norms)


def _total(G: HostArray, PQ: HostArray) -> HostArray:
    """gk = Σ gy∘(P + Q), the sums of blocks in float64: (dora.10)."""
    gk = np.zeros(G.shape[1])
    for part in row_blocks(G):
        gk += np.einsum("ij,ij->j", G[part], PQ[part])
    return gk


def _magnified_back(
    G: HostArray, W: HostArray, k: HostArray, c: HostArray, drop: Any, wide: str, low: str, both: str
) -> tuple[HostArray, HostArray | None]:
    """What of gx comes through W: all of it, or what the mask leaves alone and what it does not, (dora.14)."""
    Gl = to(G, low)
    if drop is None and wide == low:
        gx = empty((len(G), W.shape[1]), low)
        back_through(_times(Gl, k), W, gx)
        return gx, None
    gx, under = _base_back(G, W, both), empty((len(G), W.shape[1]), low)
    back_through(_times(Gl, c), W, under)
    if drop is None:
        gx += under
        return gx, None
    return gx, under


def _times(G: HostArray, v: HostArray) -> HostArray:
    """gy∘v, in an array of its own."""
    return np.multiply(G, v, out=empty(G.shape, dtype_name(G)))


def _add_norm_gradient(
    gA: HostArray,
    gB: HostArray,
    gm: HostArray,
    m: Any,
    W: HostArray,
    A: HostArray,
    B: HostArray,
    s: float,
    norms: Norms,
) -> None:
    """Add what comes through the norm: (lora.13), (lora.14) of gV = e∘V, (dora.4); no V is formed."""
    e = (-(gm * m) / norms.n / norms.n).astype(A.dtype)[:, None]  # (dora.12), gn/n
    eB = e * B
    back_through(eB.T, W, gA, s, 1.0)  # (speed.12)
    gemm(product(eB.T, B), A, gA, s * s, 1.0)
    gB += s * e * norms.T  # (speed.13)
    gemm(eB, product(A, A.T), gB, s * s, 1.0)


# ---- shapes, dtypes and checks ----------------------------------------------------------------------------


def _rows(x: Any) -> HostArray:
    return to_host(rows(x))


def _wider(one: str, other: str) -> str:
    """Of float32 and float64, the one that holds both."""
    return "float64" if "float64" in (one, other) else one


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
