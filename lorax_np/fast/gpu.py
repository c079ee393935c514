"""The layer on a device, planned for speed, by CuPy: cuBLAS that accumulates, and the kernels beside.

Not run on a GPU: the tests run this plan on the CPU over a stand-in for CuPy, kernels included, and compile the
kernels with NVRTC. What it computes: specs/lora.md, specs/dora.md; dtypes as in layer.py, but that products add
into what is stored: with float16 or bfloat16 a sum of two products is rounded twice.
Nothing in a step waits for the device; `capture` makes one graph of it.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, all_finite, cast, compute_dtype, copy, dtype_name, namespace_of, on_device
from ..errors import ConfigError, DtypeError
from ..params import Adapter, Linear, check_direction, check_pair
from ..random import LANES, DropoutKey, kept_lanes
from ..shapes import rows
from .checks import Dropout, checked, checked_backward
from .gpu_kernels import COLUMNS, SOURCE, THREADS, name_of
from .gpu_kernels import LANES as OF_A_BLOCK

Device = Any  # an array on the device

# cuBLAS's own numbers: element types, and in which arithmetic products of them are added up
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
IN_FLOAT32, IN_FLOAT64, ANY_ALGORITHM = 68, 70, -1


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
    A, B, m, bB = (_as(v, stored) for v in (adapter.A, adapter.B, adapter.m, adapter.bB))
    keyed = isinstance(drop, DropoutKey)
    factor = float(np.dtype(low).type(drop.scale)) if keyed else 1.0
    z = _empty(X, (X.shape[0], A.shape[0]), stored)
    if m is None:
        xd = _dropped(X, drop, stored, low, at)
        product(xd, A.T, z, factor)  # (dropout.1), (lora.1)
        del xd
        y = _base(X, base.W, b if bB is None else _sum(b, s * cast(bB, low)), narrow)
        product(z, B.T, y, s, 1.0)  # (lora.2) to (linear.7)
        return _shaped(y, lead), GpuSaved(x, drop, z, None, at if keyed else None)

    n = row_norms(base.W, adapter.A, adapter.B, s)
    k, c = _quotients(cast(m, "float64"), n, low)
    xd = _dropped(X, drop, narrow if keyed or drop is None else low, low, at)
    product(xd, A.T, z, factor)
    PQ = _empty(X, (X.shape[0], base.W.shape[0]), low)
    product(xd, base.W.T, PQ, factor)
    del xd
    if drop is None:
        product(z, B.T, PQ, s, 1.0)
        y = _empty(X, PQ.shape, narrow)
        bias = 0 if b is None else _contiguous(cast(b, low))
        _run("by_columns", PQ.size, (y, PQ, k, bias, _count(PQ), _u32(PQ.shape[1])), PQ, y, k)
    else:
        y, Q = _base(X, base.W, b, narrow), _empty(X, PQ.shape, low)
        product(z, B.T, Q, s)
        _run("magnify", PQ.size, (y, PQ, Q, c, k, _count(PQ), _u32(PQ.shape[1])), y, k)  # (dora.7)
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
    gb = None if adapter.b is None else cast(_column_sums(G), dtype_name(adapter.b))
    if adapter.A is None or adapter.B is None or saved.z is None:
        gx = _shaped(_base_back(G, W, narrow), lead) if need_gx else None
        return gx, Adapter(None, None, b=gb)

    low, theirs = compute_dtype(adapter.A), dtype_name(adapter.A)
    stored = dtype_name(saved.z)
    A, B = cast(adapter.A, stored), cast(adapter.B, stored)
    gz = _empty(G, saved.z.shape, stored)
    gA, gB = _empty(G, A.shape, low), _empty(G, B.shape, low)
    gm = k = c = None
    if adapter.m is None or saved.dora is None:
        product(G, B, gz, s)  # (lora.5), (lora.7)
        product(G.T, saved.z, gB, s)  # (lora.6)
    else:
        m, n = cast(adapter.m, "float64"), saved.dora.n
        k, c = _quotients(m, n, low)
        gm = _column_sums(G, saved.dora.PQ) / n  # (dora.10), (dora.11)
        product(G, cast(k[:, None] * cast(B, low), stored), gz, s)
        product(G.T, saved.z, gB, s)
        gB *= k[:, None]  # (dora.9)

    gx, under = (None, None) if not need_gx else _through_base(G, W, k, c, saved.dropout, narrow, low)
    keyed = isinstance(saved.dropout, DropoutKey)
    factor = float(np.dtype(low).type(saved.dropout.scale)) if keyed else 1.0  # type: ignore[union-attr]
    xd = _dropped(X, saved.dropout, stored, low, saved.at)
    product(gz.T, xd, gA, factor)  # (lora.8)
    if gx is not None and saved.dropout is None:
        product(gz, A, gx, 1.0, 1.0)  # (lora.9), (linear.8)
    elif gx is not None:
        t = _empty(G, gx.shape, stored) if under is None else under
        if under is not None and factor != 1.0:
            product(gz, A, t, factor, factor)
        else:
            product(gz, A, t, factor, 0.0 if under is None else 1.0)
        _add_dropped(gx, t, saved.dropout, saved.at)  # (dropout.2), (linear.8)
    del xd
    if norm_gradient and gm is not None and saved.dora is not None:
        e = cast(-(gm * cast(adapter.m, "float64")) / saved.dora.n / saved.dora.n, low)[:, None]  # (dora.12)
        _add_norm_gradient(gA, gB, e, W, cast(adapter.A, low), cast(adapter.B, low), s)
    gbB = None if adapter.bB is None else s * _column_sums(G)  # (lora.10)
    return None if gx is None else _shaped(gx, lead), Adapter(  # (linear.9)
        A=cast(gA, theirs),
        B=cast(gB, theirs),
        m=None if gm is None else cast(gm, theirs),
        b=gb,
        bB=None if gbB is None else cast(gbB, theirs),
    )


def merge_into(base: Linear, adapter: Adapter, *, scaling: float) -> Linear:
    """fast.merge_into for arrays on a device; arguments, results and errors as there.

    The sum is formed beside W, in float32 or float64, looked at by the host, and only then written.
    """
    s = check_pair(base, adapter, scaling)
    if not on_device(base.W):
        raise TypeError(f"W: expected an array on a device, got one of {namespace_of(W=base.W).__name__}")
    for name, value in (("W", base.W), ("A", adapter.A), ("m", adapter.m), ("b", base.b)):
        if value is not None and dtype_name(value) == "complex128":
            raise DtypeError(f"{name}: expected real arrays in the fast engine, got complex128")
    W: Any = base.W
    V, b = None, base.b if adapter.b is None else adapter.b
    if adapter.A is not None and adapter.B is not None:
        both = "float64" if "float64" in (dtype_name(W), dtype_name(adapter.A)) else "float32"
        V = copy(_contiguous(cast(W, both)))
        product(cast(adapter.B, both), cast(adapter.A, both), V, s, 1.0)  # (merge.1)
        if adapter.m is not None:
            check_direction(V)
            n = row_norms(W, adapter.A, adapter.B, s)
            V *= cast(cast(adapter.m, "float64") / n, both)[:, None]  # (merge.2)
        V = cast(V, dtype_name(W))
    if adapter.bB is not None:
        b = cast(
            _sum(b, s * cast(adapter.bB, "float64")), dtype_name(W if base.b is None else base.b)
        )  # (merge.3)
    elif b is not None and base.b is not None:
        b = cast(b, dtype_name(base.b))
    for name, value in (("W", V), ("b", b)):
        if value is not None and not all_finite(value):
            raise ConfigError(f"{name}: expected finite numbers once merged, got NaN or infinity")
    if V is not None:
        W[...] = V
    return Linear(W, b)


def row_norms(W: Array, A: Array, B: Array, scaling: float) -> Any:
    """Return n : (d_out,) in float64, the row norms of W + s·BA, never formed in memory.  (dora.1) to (dora.3)

    Sums in float64 of squares of entries in the dtype that the adapter computes in: no terms cancel.
    """
    low = compute_dtype(A)
    W, A = _contiguous(W), _contiguous(cast(A, low))
    sB = _contiguous(scaling * cast(B, low))
    if dtype_name(W) == "float64" and low == "float32":
        A, sB, low = cast(A, "float64"), cast(sB, "float64"), "float64"
    n = _empty(W, (W.shape[0],), "float64")
    kernel = _kernel(namespace_of(W=W), name_of("row_norms", dtype_name(W), low))
    kernel((W.shape[0],), (THREADS,), (n, W, A, sB, _u32(W.shape[1]), _u32(A.shape[0])))
    return n


# ---- products ---------------------------------------------------------------------------------------------


def product(a: Device, b: Device, out: Device, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out ← α·ab + β·out, added up in float32, or in float64 where out is; where β is 0, out is not read.

    a : (m, k), b : (k, n), out : (m, n)   of any real dtypes; a and b as they lie, transposed views too
    Factors of one dtype are read as they are, float16 and bfloat16 by the device's matrix units; others cast.
    """
    if not out.size:
        return
    if not a.shape[1]:  # a sum over no tokens
        if beta:
            out *= beta
        else:
            out.fill(0)
        return
    kinds, to = {dtype_name(a), dtype_name(b)}, dtype_name(out)
    if len(kinds) == 1 and to in (*kinds, compute_dtype(a)):
        _gemm(a, b, out, alpha, beta)
        return
    wide = "float64" if "float64" in (*kinds, to) else "float32"
    a, b = cast(a, wide), cast(b, wide)
    if to == wide:
        _gemm(a, b, out, alpha, beta)
        return
    t = _empty(out, out.shape, wide)
    _gemm(a, b, t, alpha, 0.0)
    if beta not in (0.0, 1.0):
        out *= beta
    if beta:
        _run("add", out.size, (out, t, _count(out)), out, t)
    else:
        out[...] = cast(t, to)


def _gemm(a: Device, b: Device, out: Device, alpha: float, beta: float) -> None:
    """One call of cuBLAS. It counts along columns, where out and both factors are the transposes of ours."""
    (m, k), n, lib = a.shape, b.shape[1], namespace_of(out=out)
    a, across_a, step_a = _laid(a)
    b, across_b, step_b = _laid(b)
    wide = dtype_name(out) == "float64"
    scale = np.array([alpha, beta], dtype=np.float64 if wide else np.float32)
    at = scale.ctypes.data
    lib.cuda.cublas.gemmEx(
        *(lib.cuda.get_cublas_handle(), across_b, across_a, n, m, k),
        *(at, b.data.ptr, TYPES[dtype_name(b)], step_b, a.data.ptr, TYPES[dtype_name(a)], step_a),
        *(at + scale.itemsize, out.data.ptr, TYPES[dtype_name(out)], n),
        *(IN_FLOAT64 if wide else IN_FLOAT32, ANY_ALGORITHM),
    )


def _laid(x: Device) -> tuple[Device, int, int]:
    """A factor as cuBLAS can read it: itself or a copy, whether as its transpose, and the step of its lines."""
    (count, length), (down, along), size = x.shape, x.strides, x.itemsize
    if (along == size or length == 1) and (down >= length * size or count == 1) and down % size == 0:
        return x, 0, max(down // size if count > 1 else length, length)
    if (down == size or count == 1) and (along >= count * size or length == 1) and along % size == 0:
        return x, 1, max(along // size if length > 1 else count, count)
    return _contiguous(x), 0, length


def _base(X: Device, W: Array, b: Any, narrow: str) -> Device:
    """xWᵀ + b: (linear.1), (linear.2), (linear.6)."""
    y = _empty(X, (X.shape[0], W.shape[0]), narrow)
    if b is not None:
        y[...] = cast(b, narrow)
    product(X, W.T, y, 1.0, 0.0 if b is None else 1.0)
    return y


def _base_back(G: Device, W: Array, narrow: str) -> Device:
    gx = _empty(G, (G.shape[0], W.shape[1]), narrow)
    product(G, W, gx)  # (linear.3)
    return gx


def _through_base(
    G: Device, W: Array, k: Any, c: Any, drop: Any, narrow: str, low: str
) -> tuple[Device, Device | None]:
    """What of gx comes through W: all of it, or what the mask leaves alone and what it does not, (dora.14)."""
    if k is None:
        return _base_back(G, W, narrow), None
    if drop is None:
        return _base_back(_times(G, k), W, narrow), None
    under = _empty(G, (G.shape[0], W.shape[1]), low)
    product(_times(G, c), W, under)
    return _base_back(G, W, narrow), under


def _times(G: Device, k: Device) -> Device:
    """gy∘k by columns, in gy's dtype."""
    out = _empty(G, G.shape, dtype_name(G))
    _run("by_columns", G.size, (out, G, k, 0, _count(G), _u32(G.shape[1])), G, out, k)
    return out


def _add_norm_gradient(gA: Device, gB: Device, e: Any, W: Array, A: Any, B: Any, s: float) -> None:
    """Add what comes through the norm: (lora.13), (lora.14) of gV = e∘V, (dora.4); no V is formed."""
    eB = e * B
    product(eB.T, W, gA, s, 1.0)
    product(eB.T @ B, A, gA, s * s, 1.0)
    T = _empty(gB, gB.shape, dtype_name(gB))
    product(W, A.T, T)
    gB += s * e * T + (s * s) * (eB @ (A @ A.T))


def _quotients(m: Any, n: Device, low: str) -> tuple[Device, Device]:
    """k = m/n and k − 1 = (m − n)/n, by rows of W: (dora.5), (dora.6)."""
    return cast(m / n, low), cast((m - n) / n, low)


def _sum(b: Any, more: Any) -> Any:
    return more if b is None else cast(b, dtype_name(more)) + more


# ---- dropout ----------------------------------------------------------------------------------------------


def _dropped(X: Device, drop: Any, dtype: str, low: str, at: Any) -> Device:
    """x∘mask without the factor 1/(1 − p) of a key, in a dtype; x itself where nothing changes."""
    if drop is None:
        return cast(X, dtype)
    if not isinstance(drop, DropoutKey):
        return cast(cast(X, low) * cast(_rows(drop), low), dtype)
    X, out = _contiguous(X), _empty(X, X.shape, dtype)
    _run("keep", -(-X.size // OF_A_BLOCK), (out, X, _count(X), *_key(drop, at)), X, out)
    return out


def _add_dropped(gx: Device, t: Device, drop: Any, at: Any) -> None:
    """gx += t∘mask, without the factor of a key."""
    if isinstance(drop, DropoutKey):
        _run("add_kept", -(-gx.size // OF_A_BLOCK), (gx, t, _count(gx), *_key(drop, at)), gx, t)
    else:
        t = t * cast(_rows(drop), dtype_name(t))
        _run("add", gx.size, (gx, t, _count(gx)), gx, t)


def _key(drop: DropoutKey, at: Any) -> tuple[Any, ...]:
    """A mask's words as the kernels take them, and T of (dropout.3)."""
    words = tuple(np.uint64(w) for w in (drop.seed, drop.site, drop.step, drop.c2, drop.c3))
    return *words, _u32(LANES - kept_lanes(drop.p)), 0 if at is None else at


# ---- kernels ----------------------------------------------------------------------------------------------


@cache
def _kernel(lib: Any, name: str) -> Any:
    """A compiled kernel. CuPy keeps it on disk, so that only the first process waits for NVRTC."""
    module = lib.RawModule(code=SOURCE, options=("--std=c++17",), name_expressions=(name,))
    return module.get_function(name)


def _run(kernel: str, threads: int, arguments: tuple[Any, ...], *typed: Device) -> None:
    """Start a kernel for the dtypes of the arrays `typed`, with one thread for each of so many things."""
    if threads:
        found = _kernel(namespace_of(x=typed[0]), name_of(kernel, *map(dtype_name, typed)))
        found((-(-threads // THREADS),), (THREADS,), tuple(map(_argument, arguments)))


def _argument(value: Any) -> Any:
    """A Python 0 stands for a pointer to nothing."""
    return np.uint64(0) if isinstance(value, int) else value


def _column_sums(G: Device, P: Device | None = None) -> Device:
    """Σ gy or Σ gy∘P over tokens, in float64."""
    G, (tokens, width) = _contiguous(G), G.shape
    out = _empty(G, (width,), "float64")
    kernel = _kernel(namespace_of(G=G), name_of("column_sums", *map(dtype_name, (G, G if P is None else P))))
    arguments = (out, G, 0 if P is None else P, _u32(tokens), _u32(width))
    kernel((-(-width // COLUMNS),), (THREADS,), tuple(map(_argument, arguments)))
    return out


def _count(x: Device) -> Any:
    return np.uint64(x.size)


def _u32(value: int) -> Any:
    return np.uint32(value)


# ---- arrays and checks ------------------------------------------------------------------------------------


def _empty(like: Any, shape: tuple[int, ...], dtype: str) -> Device:
    lib = namespace_of(like=like)
    kind = dtype_of(dtype)
    return lib.empty(shape, dtype=kind)


@cache
def dtype_of(name: str) -> Any:
    """The dtype of a name; bfloat16 is ml_dtypes', by way of a cast, which says how to install it.

    >>> dtype_of("float16").itemsize
    2
    """
    return cast(np.zeros(1, np.float32), name).dtype


def _as(value: Array | None, dtype: str) -> Any:
    return cast(value, dtype)


def _contiguous(x: Any) -> Device:
    lib = namespace_of(x=x)
    return lib.ascontiguousarray(x)


def _shaped(x: Device, lead: tuple[int, ...]) -> Device:
    """Rows of tokens with the leading axes that their caller knows."""
    return x.reshape(*lead, x.shape[1])


def _rows(x: Any) -> Device:
    return _contiguous(rows(x))


def _check_device(x: Array) -> None:
    if not on_device(x):
        raise TypeError(f"x: expected an array on a device, got one of {namespace_of(x=x).__name__}")


# ---- one step as a graph ----------------------------------------------------------------------------------


class Captured:
    """A step as one CUDA graph: called with new x and gy of the same shapes, it launches all kernels at once.

    The arrays that it returns are its own, and the next call writes into them. base and adapter are read where
    they lie at each call, so that an optimiser may update them in place. Its memory is from a pool of its own.
    """

    def __init__(
        self,
        x: Array,
        gy: Array,
        base: Linear,
        adapter: Adapter,
        *,
        scaling: float,
        dropout: Dropout | None = None,
        norm_gradient: bool = False,
        need_gx: bool = True,
    ) -> None:
        """Run the step twice, so that kernels are compiled and memory is there, then capture it."""
        lib = namespace_of(x=x, gy=gy)
        self.lib, self.stream = lib, lib.cuda.Stream(non_blocking=True)
        self.pool = lib.cuda.MemoryPool()
        self.keyed = isinstance(dropout, tuple)
        lib.cuda.get_current_stream().synchronize()  # once, for what the arguments still wait for
        with self.stream, lib.cuda.using_allocator(self.pool.malloc):
            self.x, self.gy = lib.array(x), lib.array(gy)
            self.at = lib.zeros((1,), dtype=np.uint64)

            def step() -> Any:
                y, saved = forward(
                    self.x, base, adapter, scaling=scaling, dropout=dropout, at=self.at if self.keyed else None
                )
                how: dict[str, Any] = {"scaling": scaling, "norm_gradient": norm_gradient, "need_gx": need_gx}
                return y, *backward(self.gy, saved, base, adapter, **how), saved

            for _ in range(2):
                step()
            self.stream.begin_capture()
            self.kept = step()  # results and what is saved stay where the graph writes them
            self.graph = self.stream.end_capture()

    def __call__(self, x: Array, gy: Array, *, step: int = 0) -> tuple[Any, Any, Adapter]:
        """Return y, gx and the gradients of the adapter, of this x and gy and, with dropout, of this step.

        Runs on the graph's own stream; the current stream waits for it, the host does not.
        """
        for name, given, own in (("x", x, self.x), ("gy", gy, self.gy)):
            if given.shape != own.shape or dtype_name(given) != dtype_name(own):
                raise ConfigError(
                    f"{name}: expected {own.shape} {dtype_name(own)}, set by the capture, "
                    f"got {given.shape} {dtype_name(given)}"
                )
        here = self.lib.cuda.get_current_stream()
        self.stream.wait_event(here.record())
        with self.stream:
            self.x[...] = x
            self.gy[...] = gy
            if self.keyed:
                self.at.fill(np.uint64(step))
            self.graph.launch(self.stream)
        here.wait_event(self.stream.record())
        y, gx, g, _ = self.kept
        return y, gx, g
