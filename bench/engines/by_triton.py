"""A LoRA layer fused by hand in Triton, as a peer: masks by counter, branch and base in one kernel each way.

Not run on a GPU. The tests run its kernels on the CPU by Triton's interpreter, where Triton is installed.
Philox4x64 in Triton's 64-bit integers, as in specs/dropout.md, so that all engines drop the same entries.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from ..cases import SCALING, SEED, SITE, STEP, Arrays, Case
from . import BURST, Unavailable

VERSIONS = {"torch": torch.__version__, "triton": triton.__version__}


@triton.jit
def _mulhi(a, b):
    """The upper 64 bits of a product, by halves."""
    a1, a0, b1, b0 = a >> 32, a & 0xFFFFFFFF, b >> 32, b & 0xFFFFFFFF
    cross, other = b0 * a1, b1 * a0
    carry = ((b0 * a0) >> 32) + (cross & 0xFFFFFFFF) + (other & 0xFFFFFFFF)
    return b1 * a1 + (cross >> 32) + (other >> 32) + (carry >> 32)


@triton.jit
def _words(block, key0, key1, step):
    """The four words of a Philox block.  (dropout.4)"""
    m0 = tl.full(block.shape, 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full(block.shape, 0xCA5A826395121157, tl.uint64)
    w0 = tl.full(block.shape, 0x9E3779B97F4A7C15, tl.uint64)
    w1 = tl.full(block.shape, 0xBB67AE8584CAA73B, tl.uint64)
    zero = tl.full(block.shape, 0, tl.uint64)
    c0, c1, c2, c3 = block, zero + step, zero, zero
    k0, k1 = zero + key0, zero + key1
    for _ in range(10):
        hi0, lo0, hi1, lo1 = _mulhi(m0, c0), m0 * c0, _mulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + w0, k1 + w1
    return c0, c1, c2, c3


@triton.jit
def _kept(rows, columns, width, key0, key1, step, dropped):
    """Which entries of a tile a mask keeps.  (dropout.5)"""
    at = (rows[:, None] * width + columns[None, :]).to(tl.uint64)
    c0, c1, c2, c3 = _words(at // 16, key0, key1, step)
    which = (at // 4) % 4
    word = tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))
    return ((word >> ((at % 4) * 16)) & 0xFFFF) >= dropped


@triton.jit
def _masked(x, kept):
    """By a factor in float32: Triton 3.6 cannot compile tl.where in a product's operand for compute 9.0."""
    return (x.to(tl.float32) * kept.to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize=["step"])
def _forward(
    x_ptr, W_ptr, A_ptr, B_ptr, y_ptr, z_ptr, N, K, M, key0, key1, step, dropped, scale, s,
    R: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of y = xWᵀ + s·(xd Aᵀ)Bᵀ, its z computed beside; x is read once for both."""
    row, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rank, total = tl.arange(0, R), tl.zeros((BM, BN), tl.float32)
    z = tl.zeros((BM, R), tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        inside = (row[:, None] < N) & (inner[None, :] < K)
        x = tl.load(x_ptr + row[:, None] * K + inner[None, :], mask=inside, other=0.0)
        W = tl.load(
            W_ptr + column[:, None] * K + inner[None, :],
            mask=(column[:, None] < M) & (inner[None, :] < K), other=0.0,
        )  # fmt: skip
        A = tl.load(A_ptr + rank[:, None] * K + inner[None, :], mask=inner[None, :] < K, other=0.0)
        total = tl.dot(x, tl.trans(W), total, input_precision="ieee")
        if DROP:
            x = _masked(x, _kept(row, inner, K, key0, key1, step, dropped))
        z = tl.dot(x, tl.trans(A), z, input_precision="ieee")
    z = (z * scale).to(x_ptr.dtype.element_ty)
    B = tl.load(B_ptr + column[:, None] * R + rank[None, :], mask=column[:, None] < M, other=0.0)
    total += s * tl.dot(z, tl.trans(B), input_precision="ieee")
    good = (row[:, None] < N) & (column[None, :] < M)
    tl.store(y_ptr + row[:, None] * M + column[None, :], total.to(y_ptr.dtype.element_ty), mask=good)
    if tl.program_id(1) == 0:
        tl.store(z_ptr + row[:, None] * R + rank[None, :], z, mask=row[:, None] < N)


@triton.jit(do_not_specialize=["step"])
def _backward_x(
    gy_ptr, W_ptr, A_ptr, gz_ptr, gx_ptr, N, K, M, key0, key1, step, dropped, scale,
    R: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of gx = gy W + (gz A)∘mask, the mask made again where it is used."""
    row, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rank, total = tl.arange(0, R), tl.zeros((BM, BN), tl.float32)
    for start in range(0, M, BK):
        inner = start + tl.arange(0, BK)
        inside = (row[:, None] < N) & (inner[None, :] < M)
        gy = tl.load(gy_ptr + row[:, None] * M + inner[None, :], mask=inside, other=0.0)
        W = tl.load(
            W_ptr + inner[:, None] * K + column[None, :],
            mask=(inner[:, None] < M) & (column[None, :] < K), other=0.0,
        )  # fmt: skip
        total = tl.dot(gy, W, total, input_precision="ieee")
    gz = tl.load(gz_ptr + row[:, None] * R + rank[None, :], mask=row[:, None] < N, other=0.0)
    A = tl.load(A_ptr + rank[:, None] * K + column[None, :], mask=column[None, :] < K, other=0.0)
    branch = scale * tl.dot(gz, A, input_precision="ieee")
    if DROP:
        branch = tl.where(_kept(row, column, K, key0, key1, step, dropped), branch, 0.0)
    good = (row[:, None] < N) & (column[None, :] < K)
    tl.store(
        gx_ptr + row[:, None] * K + column[None, :], (total + branch).to(gx_ptr.dtype.element_ty), mask=good
    )


@triton.jit(do_not_specialize=["step"])
def _backward_A(
    gz_ptr, x_ptr, gA_ptr, N, K, key0, key1, step, dropped, scale,
    R: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Columns of gA = gzᵀ xd."""
    column, rank = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, R)
    total = tl.zeros((R, BN), tl.float32)
    for start in range(0, N, BM):
        row = start + tl.arange(0, BM)
        gz = tl.load(gz_ptr + row[:, None] * R + rank[None, :], mask=row[:, None] < N, other=0.0)
        inside = (row[:, None] < N) & (column[None, :] < K)
        x = tl.load(x_ptr + row[:, None] * K + column[None, :], mask=inside, other=0.0)
        if DROP:
            x = _masked(x, _kept(row, column, K, key0, key1, step, dropped))
        total = tl.dot(tl.trans(gz), x, total, input_precision="ieee")
    good = column[None, :] < K
    tl.store(
        gA_ptr + rank[:, None] * K + column[None, :], (total * scale).to(gA_ptr.dtype.element_ty), mask=good
    )


class Triton:
    """The layer of these kernels; gz and gB, of r columns, are torch's products. Ranks: 16, 32, 64, ..."""

    burst = BURST

    def __init__(self, case: Case, arrays: Arrays, *, device: str = "cuda") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("not run on a GPU: torch finds no CUDA device")
        if case.dora or case.r < 16 or case.r & (case.r - 1):
            raise Unavailable("the layer in Triton has no DoRA, and ranks of 16, 32, 64, ... alone")
        self.case, self.at, self.device = case, STEP, device
        kind = getattr(torch, case.dtype)
        self.v = {name: torch.from_numpy(a).to(device, kind) for name, a in arrays.items()}
        large = device == "cuda" and case.dtype == "bfloat16"
        self.tiles = {"BM": 128, "BN": 128, "BK": 64} if large else {"BM": 32, "BN": 32, "BK": 32}
        self.launch = {"num_warps": 8, "num_stages": 3} if large else {}
        self.dropped = round(case.p * 65536)
        self.scale = 65536 / (65536 - self.dropped)

    def _words(self) -> tuple[int, int, int, int]:
        return SEED, SITE, self.at, self.dropped

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        v, case, tiles = self.v, self.case, self.tiles
        N, K, M = case.tokens, case.d_in, case.d_out
        y, z = v["gy"].new_empty(N, M), v["x"].new_empty(N, case.r)
        grid = triton.cdiv(N, tiles["BM"]), triton.cdiv(M, tiles["BN"])
        parts = v["x"], v["W"], v["A"], v["B"], y, z
        _forward[grid](
            *parts, N, K, M, *self._words(), self.scale, SCALING,
            R=case.r, DROP=bool(case.p), **tiles, **self.launch,
        )  # fmt: skip
        return y, z

    def backward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        v, case, tiles = self.v, self.case, self.tiles
        N, K, M = case.tokens, case.d_in, case.d_out
        gz, gB = SCALING * (v["gy"] @ v["B"]), SCALING * (v["gy"].T @ z)
        gx, gA = torch.empty_like(v["x"]), torch.empty_like(v["A"])
        how = {"R": case.r, "DROP": bool(case.p)}
        grid = triton.cdiv(N, tiles["BM"]), triton.cdiv(K, tiles["BN"])
        parts = v["gy"], v["W"], v["A"], gz, gx
        _backward_x[grid](*parts, N, K, M, *self._words(), self.scale, **how, **tiles, **self.launch)
        small = {"BM": tiles["BM"], "BN": tiles["BN"]}
        _backward_A[(triton.cdiv(K, tiles["BN"]),)](
            gz, v["x"], gA, N, K, *self._words(), self.scale, **how, **small
        )
        return gx, gA, gB

    def step(self) -> None:
        _, z = self.forward()
        self.backward(z)
        self.at += 1

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def results(self) -> Arrays:
        self.at = STEP
        y, z = self.forward()
        gx, gA, gB = self.backward(z)
        found = {"y": y, "gx": gx, "gA": gA, "gB": gB}
        return {name: np.asarray(t.detach().float().cpu().numpy()) for name, t in found.items()}

    def saved(self) -> int:
        return self.case.tokens * self.case.r * self.v["x"].element_size()
