"""A LoRA layer fused by hand in Triton, as a peer: the branch in the epilogue of the frozen product, each way.

The tests run its kernels on the CPU by Triton's interpreter, where Triton is installed. Dropout is by the
generator that Triton has, drawn once for each entry and pass, as its authors would.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from ..cases import SCALING, SEED, STEP, Arrays, Case
from . import BURST, Unavailable

VERSIONS = {"torch": torch.__version__, "triton": triton.__version__}
GROUP = tl.constexpr(8)  # rows of tiles that go together, so that what they read of W is still in the cache


@triton.jit
def _dropped(x, row, column, width, seed, p):
    """A tile of x where the mask keeps it, else 0. By a factor: Triton 3.6 cannot compile tl.where here."""
    kept = tl.rand(seed, row[:, None] * width + column[None, :]) >= p
    return (x.to(tl.float32) * kept.to(tl.float32)).to(x.dtype)


@triton.jit
def _tile(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of this program's tile, in an order that goes down a group before it goes right."""
    down, right = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    program, group = tl.program_id(0), GROUP * right
    first = program // group * GROUP
    height = tl.minimum(down - first, GROUP)
    row = first + program % group % height
    return row * BM + tl.arange(0, BM), program % group // height * BN + tl.arange(0, BN)


@triton.jit(do_not_specialize=["seed"])
def _down(
    x_ptr, A_ptr, z_ptr, N, K, seed, p, scale,
    R: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z = xd Aᵀ: some rows of it."""
    row, rank = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, R)
    z = tl.zeros((BM, R), tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        inside = (row[:, None] < N) & (inner[None, :] < K)
        x = tl.load(x_ptr + row[:, None] * K + inner[None, :], mask=inside, other=0.0)
        A = tl.load(A_ptr + rank[:, None] * K + inner[None, :], mask=inner[None, :] < K, other=0.0)
        if DROP:
            x = _dropped(x, row, inner, K, seed, p)
        z = tl.dot(x, tl.trans(A), z, input_precision="ieee")
    z = (z * scale).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + row[:, None] * R + rank[None, :], z, mask=row[:, None] < N)


@triton.jit
def _forward(
    x_ptr, W_ptr, z_ptr, B_ptr, y_ptr, N, K, M, s,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of y = xWᵀ + s·zBᵀ."""
    row, column = _tile(N, M, BM, BN)
    rank, total = tl.arange(0, R), tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        inside = (row[:, None] < N) & (inner[None, :] < K)
        x = tl.load(x_ptr + row[:, None] * K + inner[None, :], mask=inside, other=0.0)
        inside = (column[:, None] < M) & (inner[None, :] < K)
        W = tl.load(W_ptr + column[:, None] * K + inner[None, :], mask=inside, other=0.0)
        total = tl.dot(x, tl.trans(W), total, input_precision="ieee")
    z = tl.load(z_ptr + row[:, None] * R + rank[None, :], mask=row[:, None] < N, other=0.0)
    B = tl.load(B_ptr + column[:, None] * R + rank[None, :], mask=column[:, None] < M, other=0.0)
    total += s * tl.dot(z, tl.trans(B), input_precision="ieee")
    good = (row[:, None] < N) & (column[None, :] < M)
    tl.store(y_ptr + row[:, None] * M + column[None, :], total.to(y_ptr.dtype.element_ty), mask=good)


@triton.jit(do_not_specialize=["seed"])
def _backward_x(
    gy_ptr, W_ptr, gz_ptr, A_ptr, gx_ptr, N, K, M, seed, p, scale,
    R: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of gx = gy W + (gz A)∘mask, the mask made again where it is used."""
    row, column = _tile(N, K, BM, BN)
    rank, total = tl.arange(0, R), tl.zeros((BM, BN), tl.float32)
    for start in range(0, M, BK):
        inner = start + tl.arange(0, BK)
        inside = (row[:, None] < N) & (inner[None, :] < M)
        gy = tl.load(gy_ptr + row[:, None] * M + inner[None, :], mask=inside, other=0.0)
        inside = (inner[:, None] < M) & (column[None, :] < K)
        W = tl.load(W_ptr + inner[:, None] * K + column[None, :], mask=inside, other=0.0)
        total = tl.dot(gy, W, total, input_precision="ieee")
    gz = tl.load(gz_ptr + row[:, None] * R + rank[None, :], mask=row[:, None] < N, other=0.0)
    A = tl.load(A_ptr + rank[:, None] * K + column[None, :], mask=column[None, :] < K, other=0.0)
    branch = scale * tl.dot(gz, A, input_precision="ieee")
    if DROP:
        branch = _dropped(branch, row, column, K, seed, p)
    good = (row[:, None] < N) & (column[None, :] < K)
    total += branch
    tl.store(gx_ptr + row[:, None] * K + column[None, :], total.to(gx_ptr.dtype.element_ty), mask=good)


@triton.jit(do_not_specialize=["seed"])
def _backward_A(
    gz_ptr, x_ptr, gA_ptr, N, K, seed, p, scale,
    R: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Columns of gA = gzᵀ xd, from every so many blocks of tokens, added to what the others have."""
    column, rank = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, R)
    total = tl.zeros((R, BN), tl.float32)
    for start in range(tl.program_id(1) * BM, N, tl.num_programs(1) * BM):
        row = start + tl.arange(0, BM)
        gz = tl.load(gz_ptr + row[:, None] * R + rank[None, :], mask=row[:, None] < N, other=0.0)
        inside = (row[:, None] < N) & (column[None, :] < K)
        x = tl.load(x_ptr + row[:, None] * K + column[None, :], mask=inside, other=0.0)
        if DROP:
            x = _dropped(x, row, column, K, seed, p)
        total = tl.dot(tl.trans(gz), x, total, input_precision="ieee")
    tl.atomic_add(gA_ptr + rank[:, None] * K + column[None, :], total * scale, mask=column[None, :] < K)


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
        self.dropout = {"R": case.r, "DROP": bool(case.p)}

    def _words(self) -> tuple[int, float, float]:
        return SEED + self.at, self.case.p, 1 / (1 - self.case.p)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        v, case, tiles = self.v, self.case, self.tiles
        N, K, M = case.tokens, case.d_in, case.d_out
        y, z = v["gy"].new_empty(N, M), v["x"].new_empty(N, case.r)
        lines = 64 if N >= 4096 else 16
        _down[(triton.cdiv(N, lines),)](
            v["x"], v["A"], z, N, K, *self._words(), **self.dropout, BM=lines, BK=tiles["BK"]
        )
        grid = (triton.cdiv(N, tiles["BM"]) * triton.cdiv(M, tiles["BN"]),)
        parts = v["x"], v["W"], z, v["B"], y
        _forward[grid](*parts, N, K, M, SCALING, R=case.r, **tiles, **self.launch)
        return y, z

    def backward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        v, case, tiles = self.v, self.case, self.tiles
        N, K, M = case.tokens, case.d_in, case.d_out
        gz, gB = SCALING * (v["gy"] @ v["B"]), SCALING * (v["gy"].T @ z)
        gx, gA = torch.empty_like(v["x"]), torch.zeros_like(v["A"], dtype=torch.float32)
        grid = (triton.cdiv(N, tiles["BM"]) * triton.cdiv(K, tiles["BN"]),)
        parts = v["gy"], v["W"], gz, v["A"], gx
        _backward_x[grid](*parts, N, K, M, *self._words(), **self.dropout, **tiles, **self.launch)
        columns = min(tiles["BN"], 128)
        _backward_A[triton.cdiv(K, columns), 8](
            gz, v["x"], gA, N, K, *self._words(), **self.dropout, BM=tiles["BM"], BN=columns
        )
        return gx, gA.to(v["A"].dtype), gB

    def step(self) -> None:
        _, z = self.forward()
        self.backward(z)
        self.at += 1

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def results(self) -> Arrays:
        """With dropout also the entries it kept: those that reach gx with W = 0 and the same step."""
        self.at = STEP
        y, z = self.forward()
        gx, gA, gB = self.backward(z)
        found = {"y": y, "gx": gx, "gA": gA, "gB": gB}
        results = {name: np.asarray(t.detach().float().cpu().numpy()) for name, t in found.items()}
        if self.case.p:
            W, self.v["W"] = self.v["W"], torch.zeros_like(self.v["W"])
            results["kept"] = (self.backward(z)[0] != 0).cpu().numpy()
            self.v["W"] = W
        return results

    def saved(self) -> int:
        return self.case.tokens * self.case.r * self.v["x"].element_size()
