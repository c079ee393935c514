"""The layer on a device, planned for speed, by CuPy: cuBLAS that accumulates, and the kernels beside.

What it computes: specs/lora.md, specs/dora.md; dtypes as in layer.py, but products add into what is stored:
with float16 or bfloat16 a sum of two products is rounded twice. The branch comes first, so that the large
product reads it while it computes, and adds on. Nothing in a step waits for the device; gpu_graph.py makes one
graph of it. Where there is no device the tests run this plan over a stand-in for CuPy, kernels included.
"""

from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, cast, compute_dtype, dtype_name, namespace_of, on_device
from ..params import Adapter, Linear
from ..random import LANES, DropoutKey, kept_lanes
from ..shapes import rows
from .checks import Dropout, checked, checked_backward
from .gpu_arrays import Device, column_sums, contiguous, count_of, empty, norms_of_rows, run, u32
from .gpu_products import product


class DoraSaved(NamedTuple):
    """What DoRA's backward reads besides."""

    PQ: Device  # (N, d_out)  P + Q of (dora.7), in the dtype the adapter computes in
    n: Device  # (d_out,)  row norms, float64


class GpuSaved(NamedTuple):
    """What the backward pass reads; x and a mask are the caller's own arrays."""

    x: Array  # (..., d_in)
    dropout: Array | DropoutKey | None
    z: Device | None  # (N, r)  xd Aᵀ, where the adapter has A and B
    dora: DoraSaved | None
    at: Device | None = None  # the dropout's step, where a graph keeps it on the device


def forward(
    x: Array,
    base: Linear,
    adapter: Adapter,
    *,
    scaling: float,
    dropout: Dropout | None = None,
    at: Device | None = None,
) -> tuple[Any, GpuSaved]:
    """fast.lora_linear_forward for arrays on a device; arguments, results and errors as there.

    at : (1,) uint64 on the device, which stands in for the step of `dropout`; for whoever captures a graph
    """
    s, drop = checked(x, base, adapter, scaling, dropout, _check_device)
    X, lead, narrow = _rows(x), x.shape[:-1], dtype_name(x)
    b = adapter.b if adapter.b is not None else base.b
    if adapter.A is None or adapter.B is None:
        return _shaped(_base(X, base.W, b, narrow), lead), GpuSaved(x, None, None, None)

    low = compute_dtype(adapter.A)
    stored = narrow if dtype_name(adapter.A) == narrow else low  # of what the adapter's products read
    parts: Any = (cast(v, stored) for v in (adapter.A, adapter.B, adapter.m, adapter.bB))
    A, B, m, bB = parts
    keyed = isinstance(drop, DropoutKey)
    factor = float(np.dtype(low).type(drop.scale)) if keyed else 1.0
    z = empty(X, (X.shape[0], A.shape[0]), stored)
    if m is None:
        xd = _dropped(X, drop, stored, low, at)
        product(xd, A.T, z, factor)  # (dropout.1), (lora.1)
        del xd
        b = b if bB is None else added(b, s * cast(bB, low))
        y = _biased(X, base.W, b, narrow)
        product(z, B.T, y, s, 0.0 if b is None else 1.0)
        product(X, base.W.T, y, 1.0, 1.0)  # (lora.2) to (linear.7)
        return _shaped(y, lead), GpuSaved(x, drop, z, None, at if keyed else None)

    n = row_norms(base.W, adapter.A, adapter.B, s)
    k, c = _quotients(cast(m, "float64"), n, low)
    xd = _dropped(X, drop, narrow if keyed or drop is None else low, low, at)
    product(xd, A.T, z, factor)
    PQ = empty(X, (X.shape[0], base.W.shape[0]), low)
    if drop is None:
        product(z, B.T, PQ, s)
        product(xd, base.W.T, PQ, 1.0, 1.0)
        y = empty(X, PQ.shape, narrow)
        bias = 0 if b is None else contiguous(cast(b, low))
        run("by_columns", y, (y, PQ, k, bias, count_of(PQ), u32(PQ.shape[1])), PQ, y, k)
    else:
        product(xd, base.W.T, PQ, factor)
        y, Q = _base(X, base.W, b, narrow), empty(X, PQ.shape, low)
        product(z, B.T, Q, s)
        run("magnify", y, (y, PQ, Q, c, k, count_of(PQ), u32(PQ.shape[1])), y, k)  # (dora.7)
    del xd
    return _shaped(y, lead), GpuSaved(x, drop, z, DoraSaved(PQ, n), at if keyed else None)


def backward(
    gy: Array,
    saved: GpuSaved,
    base: Linear,
    adapter: Adapter,
    *,
    scaling: float,
    norm_gradient: bool = False,
    need_gx: bool = True,
) -> tuple[Any, Adapter]:
    """fast.lora_linear_backward for arrays on a device; arguments, results and errors as there."""
    s = checked_backward(gy, saved, GpuSaved, base, adapter, scaling)
    X, G, W, lead, narrow = _rows(saved.x), _rows(gy), base.W, saved.x.shape[:-1], dtype_name(gy)
    gb = None if adapter.b is None else cast(column_sums(G), dtype_name(adapter.b))
    if adapter.A is None or adapter.B is None or saved.z is None:
        gx = _shaped(_base_back(G, W, narrow), lead) if need_gx else None
        return gx, Adapter(None, None, b=gb)

    low, theirs = compute_dtype(adapter.A), dtype_name(adapter.A)
    stored = dtype_name(saved.z)
    A, B = cast(adapter.A, stored), cast(adapter.B, stored)
    gz = empty(G, saved.z.shape, stored)
    gA, gB = empty(G, A.shape, low), empty(G, B.shape, low)
    gm = k = c = None
    if adapter.m is None or saved.dora is None:
        product(G, B, gz, s)  # (lora.5), (lora.7)
        product(G.T, saved.z, gB, s)  # (lora.6)
    else:
        m, n = cast(adapter.m, "float64"), saved.dora.n
        k, c = _quotients(m, n, low)
        gm = column_sums(G, saved.dora.PQ) / n  # (dora.10), (dora.11)
        product(G, cast(k[:, None] * cast(B, low), stored), gz, s)
        product(G.T, saved.z, gB, s)
        gB *= k[:, None]  # (dora.9)

    drop, at = saved.dropout, saved.at
    factor = float(np.dtype(low).type(drop.scale)) if isinstance(drop, DropoutKey) else 1.0
    gx = None
    if not need_gx:
        xd = _dropped(X, drop, stored, low, at)
    elif drop is None:
        gx, xd = empty(G, X.shape, narrow), cast(X, stored)
        product(gz, A, gx)  # (lora.9)
        product(G if k is None else _times(G, k), W, gx, 1.0, 1.0)  # (linear.8)
    else:
        t = empty(G, X.shape, stored if c is None else low)
        if c is not None:
            product(_times(G, c), W, t, factor)  # (dora.14)
        product(gz, A, t, factor, 0.0 if c is None else 1.0)
        gx, xd = _both_dropped(t, X, drop, stored, low, at)  # (dropout.1), (dropout.2)
        del t
        product(G, W, gx, 1.0, 1.0)
    product(gz.T, xd, gA, factor)  # (lora.8)
    del xd
    if norm_gradient and gm is not None and saved.dora is not None:
        e = cast(-(gm * cast(adapter.m, "float64")) / saved.dora.n / saved.dora.n, low)[:, None]  # (dora.12)
        _add_norm_gradient(gA, gB, e, W, cast(adapter.A, low), cast(adapter.B, low), s)
    gbB = None if adapter.bB is None else s * column_sums(G)  # (lora.10)
    return None if gx is None else _shaped(gx, lead), Adapter(  # (linear.9)
        A=cast(gA, theirs),
        B=cast(gB, theirs),
        m=None if gm is None else cast(gm, theirs),
        b=gb,
        bB=None if gbB is None else cast(gbB, theirs),
    )


def row_norms(W: Array, A: Array, B: Array, scaling: float) -> Any:
    """Return n : (d_out,) in float64, the row norms of W + s·BA, never formed in memory.  (dora.1) to (dora.3)

    Sums in float64 of squares of entries in the dtype that the adapter computes in: no terms cancel.
    """
    low = compute_dtype(A)
    W, A = contiguous(W), contiguous(cast(A, low))
    sB = contiguous(scaling * cast(B, low))
    if dtype_name(W) == "float64" and low == "float32":
        A, sB, low = cast(A, "float64"), cast(sB, "float64"), "float64"
    return norms_of_rows(W, A, sB, low)


# ---- products ---------------------------------------------------------------------------------------------


def _base(X: Device, W: Array, b: Any, narrow: str) -> Device:
    """xWᵀ + b: (linear.1), (linear.2), (linear.6)."""
    y = _biased(X, W, b, narrow)
    product(X, W.T, y, 1.0, 0.0 if b is None else 1.0)
    return y


def _biased(X: Device, W: Array, b: Any, narrow: str) -> Device:
    """Room for y, with the bias in it where there is one."""
    y = empty(X, (X.shape[0], W.shape[0]), narrow)
    if b is not None:
        y[...] = cast(b, narrow)
    return y


def _base_back(G: Device, W: Array, narrow: str) -> Device:
    gx = empty(G, (G.shape[0], W.shape[1]), narrow)
    product(G, W, gx)  # (linear.3)
    return gx


def _times(G: Device, k: Device) -> Device:
    """gy∘k by columns, in gy's dtype."""
    out = empty(G, G.shape, dtype_name(G))
    run("by_columns", out, (out, G, k, 0, count_of(G), u32(G.shape[1])), G, out, k)
    return out


def _add_norm_gradient(gA: Device, gB: Device, e: Any, W: Array, A: Any, B: Any, s: float) -> None:
    """Add what comes through the norm: (lora.13), (lora.14) of gV = e∘V, (dora.4); no V is formed."""
    eB = e * B
    product(eB.T, W, gA, s, 1.0)
    product(_small(eB.T, B), A, gA, s * s, 1.0)
    T = empty(gB, gB.shape, dtype_name(gB))
    product(W, A.T, T)
    gB += s * e * T + (s * s) * _small(eB, _small(A, A.T))


def _small(a: Any, b: Any) -> Device:
    """ab, by the same library as every other product."""
    out = empty(a, (a.shape[0], b.shape[1]), dtype_name(a))
    product(a, b, out)
    return out


def _quotients(m: Any, n: Device, low: str) -> tuple[Device, Device]:
    """k = m/n and k − 1 = (m − n)/n, by rows of W: (dora.5), (dora.6)."""
    return cast(m / n, low), cast((m - n) / n, low)


def added(b: Any, more: Any) -> Any:
    """The sum of two biases, of which the first may be absent."""
    return more if b is None else cast(b, dtype_name(more)) + more


# ---- dropout ----------------------------------------------------------------------------------------------


def _dropped(X: Device, drop: Any, dtype: str, low: str, at: Any) -> Device:
    """x∘mask without the factor 1/(1 − p) of a key, in a dtype; x itself where nothing changes."""
    if drop is None:
        return cast(X, dtype)
    if not isinstance(drop, DropoutKey):
        return cast(cast(X, low) * cast(_rows(drop), low), dtype)
    out = empty(X, X.shape, dtype)
    run("keep", out, (out, X, count_of(X), *_key(drop, at)), X, out)
    return out


def _both_dropped(t: Device, X: Device, drop: Any, stored: str, low: str, at: Any) -> tuple[Device, Device]:
    """t∘mask in x's dtype, where t lies if it has that, and x∘mask in the dtype that products read."""
    narrow = dtype_name(X)
    if not isinstance(drop, DropoutKey):
        return _dropped(t, drop, narrow, low, at), _dropped(X, drop, stored, low, at)
    gx, xd = t if dtype_name(t) == narrow else empty(t, t.shape, narrow), empty(X, X.shape, stored)
    run("keep_both", gx, (gx, t, xd, X, count_of(X), *_key(drop, at)), t, X, xd)
    return gx, xd


def _key(drop: DropoutKey, at: Any) -> tuple[Any, ...]:
    """A mask's words as the kernels take them, and T of (dropout.3)."""
    words = tuple(np.uint64(w) for w in (drop.seed, drop.site, drop.step, drop.c2, drop.c3))
    return *words, u32(LANES - kept_lanes(drop.p)), 0 if at is None else at


# ---- arrays and checks ------------------------------------------------------------------------------------


def _shaped(x: Device, lead: tuple[int, ...]) -> Device:
    """Rows of tokens with the leading axes that their caller knows."""
    return x.reshape(*lead, x.shape[1])


def _rows(x: Any) -> Device:
    return contiguous(rows(x))


def _check_device(x: Array) -> None:
    if not on_device(x):
        raise TypeError(f"x: expected an array on a device, got one of {namespace_of(x=x).__name__}")
