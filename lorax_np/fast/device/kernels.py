"""The kernels as functions of arrays, for one library, dtype and size of a head. Nothing waits for a device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...backend import from_host
from ...random import LANES, DropoutKey, kept_lanes
from ..gpu_arrays import Device, column_sums, contiguous, functions_of, u32
from ..gpu_kernels import ENTRIES, name_of
from ..gpu_kernels import THREADS as BLOCK
from ..gpu_products import ANY_ALGORITHM, IN_FLOAT32, IN_FLOAT64, TYPES
from . import source

NOTHING = np.uint64(0)  # a pointer to nothing


class Places(NamedTuple):
    """Where a step's tokens lie, on the device."""

    lengths: tuple[int, ...]
    starts: Device  # (S + 1,) uint32
    index: Device  # (S,) uint64
    place: Device  # (N,) uint32, of each token in its sequence
    ids: Device  # (N,) uint32
    chosen: Device  # (M,) uint32, the rows that carry a label
    labels: Device  # (M,) uint32, their labels
    cosine: Device  # (longest, D/2)
    sine: Device

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)


def words(lib: Any, *arrays: Any) -> list[Device]:
    """Integers of the host as uint32 on the device, all in one copy."""
    flat = from_host(np.concatenate([np.asarray(x, "uint32") for x in arrays]), lib)
    ends = np.cumsum([len(x) for x in arrays]).tolist()
    return [flat[end - len(x) : end] for x, end in zip(arrays, ends, strict=True)]


class Kernels:
    """Functions of arrays without gaps, of one dtype."""

    def __init__(self, lib: Any, dtype: str, shape: Any) -> None:
        """shape : a LlamaShape."""
        self.lib, self.dtype, self.type = lib, dtype, np.dtype(dtype).type
        self.H, self.K, self.D, self.eps = shape.H, shape.K, shape.D, self.type(shape.eps)
        self.rows = functions_of(lib, source.SOURCE, tuple(name_of(name, dtype) for name in source.NAMES))
        self._scale = np.empty(2, dtype)  # α and β, which cuBLAS reads while it is called
        self._at, self._size, self._kind = self._scale.ctypes.data, self._scale.itemsize, TYPES[dtype]
        self._sum = IN_FLOAT64 if dtype == "float64" else IN_FLOAT32

    def empty(self, *shape: int) -> Device:
        """An array of arbitrary content."""
        return self.lib.empty(shape, dtype=self.type)

    # ---- products of arrays by rows, which may lie apart: gpu_products.gemm, with less to find out ----------

    def times(self, a: Device, b: Device, out: Device, alpha: float = 1.0, beta: float = 0.0) -> None:
        """out ← α·ab + β·out, β = 0 or 1."""
        self._gemm((a.shape[0], b.shape[1], a.shape[1]), a, 0, b, 0, out, alpha, beta)

    def times_t(self, a: Device, b: Device, out: Device, alpha: float = 1.0, beta: float = 0.0) -> None:
        """out ← α·abᵀ + β·out."""
        self._gemm((a.shape[0], b.shape[0], a.shape[1]), a, 0, b, 1, out, alpha, beta)

    def t_times(self, a: Device, b: Device, out: Device, alpha: float = 1.0, beta: float = 0.0) -> None:
        """out ← α·aᵀb + β·out."""
        self._gemm((a.shape[1], b.shape[1], a.shape[0]), a, 1, b, 0, out, alpha, beta)

    def _gemm(
        self,
        sizes: tuple[int, int, int],
        a: Device,
        across_a: int,
        b: Device,
        across_b: int,
        out: Device,
        alpha: float,
        beta: float,
    ) -> None:
        m, n, k = sizes
        if not m * n * k:
            if m * n and not beta:  # a sum over nothing
                out[...] = 0
            return
        self._scale[:] = alpha, beta
        size, kind, cuda = self._size, self._kind, self.lib.cuda
        cuda.cublas.gemmEx(
            *(cuda.get_cublas_handle(), across_b, across_a, n, m, k, self._at),
            *(b.data.ptr, kind, b.strides[0] // size, a.data.ptr, kind, a.strides[0] // size),
            *(self._at + size, out.data.ptr, kind, out.strides[0] // size, self._sum, ANY_ALGORITHM),
        )

    # ---- rows ----------------------------------------------------------------------------------------------

    def _by_row(self, name: str, count: int, *arguments: Any) -> None:
        if count:
            self.rows[name]((count,), (BLOCK,), arguments)

    def _by_entry(self, name: str, count: int, *arguments: Any) -> None:
        if count:
            self.rows[name]((-(-count // BLOCK),), (BLOCK,), arguments)

    def take(self, table: Device, rows: Device) -> Device:
        """table[rows] : (M, d)."""
        out = self.empty(rows.shape[0], table.shape[1])
        self._by_row("take_rows", out.shape[0], out, table, rows, u32(table.shape[1]))
        return out

    def put(self, out: Device, x: Device, rows: Device) -> None:
        """out[rows] = x."""
        self._by_row("put_rows", x.shape[0], out, x, rows, u32(x.shape[1]))

    def add_rms(self, h: Device, y: Device | None, w: Device) -> tuple[Device, Device]:
        """h + y, or h itself where there is no y, and its norm times w."""
        N, d = h.shape
        x, total = self.empty(N, d), h if y is None else self.empty(N, d)
        more = NOTHING if y is None else y
        self._by_row("add_rms", N, x, total, h, more, w, u32(d), self.eps)
        return total, x

    def rms_back(self, g: Device, gx: Device, h: Device, w: Device) -> None:
        """g += the gradient by h of its norm times w, whose gradient is gx."""
        N, d = h.shape
        self._by_row("rms_back", N, g, gx, h, w, u32(d), self.eps)

    def cross_entropy(self, z: Device, labels: Device, n: int, *, gradient: bool) -> Device:
        """Σ nll of rows of logits in float64, (1,); z becomes its gradient where that is wanted."""
        M, V = z.shape
        nll = self.lib.empty((M, 1), dtype=np.float64)
        self._by_row("cross_entropy", M, nll, z, labels, u32(V), np.float64(n), u32(gradient))
        return column_sums(nll)

    # ---- entries -------------------------------------------------------------------------------------------

    def turn(self, qkv: Device, where: Places, *, back: bool = False) -> None:
        """Queries and keys turned by their places, or back, where they lie."""
        heads, N, sign = self.H + self.K, qkv.shape[0], self.type(-1 if back else 1)
        count, angles = N * heads * self.D // 2, (where.cosine, where.sine, where.place)
        sizes = u32(heads), u32(self.D), u32(qkv.shape[1]), np.uint64(count)
        self._by_entry("turn", count, qkv, *angles, *sizes, sign)

    def swiglu(self, gu: Device) -> Device:
        """silu(u)∘w of [u w] : (N, 2 ff)."""
        N, ff = gu.shape[0], gu.shape[1] // 2
        y = self.empty(N, ff)
        self._by_entry("swiglu", N * ff, y, gu, u32(ff), np.uint64(N * ff))
        return y

    def swiglu_back(self, gu: Device, gy: Device) -> None:
        """gu becomes the gradient by it."""
        N, ff = gy.shape
        self._by_entry("swiglu_back", N * ff, gu, gy, u32(ff), np.uint64(N * ff))

    # ---- masks ---------------------------------------------------------------------------------------------

    def keep(self, x: Device, where: Places, drop: DropoutKey) -> Device:
        """x∘mask without the factor 1/(1 − p), each sequence by its number."""
        out = self.empty(*x.shape)
        self._by_sequence("keep_rows", where, x.shape[1], drop, out, x)
        return out

    def keep_back(self, gx: Device, t: Device, x: Device, where: Places, drop: DropoutKey) -> Device:
        """gx += t∘mask; returns x∘mask."""
        out = self.empty(*x.shape)
        self._by_sequence("keep_back", where, x.shape[1], drop, gx, t, out, x)
        return out

    def _by_sequence(self, name: str, where: Places, k: int, drop: DropoutKey, *arrays: Device) -> None:
        blocks = -(-where.longest * k // (ENTRIES * BLOCK))
        if blocks:
            key = (np.uint64(drop.seed), np.uint64(drop.site), np.uint64(drop.step))
            about = where.starts, where.index, u32(k), u32(blocks), *key, u32(LANES - kept_lanes(drop.p))
            self.rows[name]((blocks * len(where.lengths),), (BLOCK,), (*arrays, *about))


def angles(lib: Any, longest: int, turns: Sequence[float], factor: float, dtype: str) -> tuple[Device, Device]:
    """Cosines and sines of each place, (longest, D/2), computed in float64."""
    angle = np.arange(longest)[:, None] * np.asarray(turns)
    both = factor * np.stack([np.cos(angle), np.sin(angle)])
    found = from_host(both.astype(dtype), lib)
    return contiguous(found[0]), contiguous(found[1])
