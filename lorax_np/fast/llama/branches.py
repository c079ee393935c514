"""A product with its adapters, both ways.  Masks are made once, kept as bits, and read back in the backward."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...backend import HostArray
from ...random import DropoutKey
from ..gemm import gemm
from .groups import Branch, Group
from .room import Room, Run
from .weights import Frozen

HEIGHT = 64  # rows of a block under a mask; a multiple of 8: the bits of a block begin with a byte


class Place(NamedTuple):
    """Where a pass is: its rows, its worker's arrays, and under which name a layer keeps what it keeps."""

    run: Run
    room: Room
    slot: str  # "" where nothing is kept


class Sums(NamedTuple):
    """What one worker adds up for a group, over its runs; A folded, B in the product's row order."""

    A: HostArray  # (R, k)
    B: list[HostArray]  # (rows, r) of each branch
    b: HostArray | None  # (n,)


def forward(group: Group, frozen: Frozen, xz: HostArray, y: HostArray, place: Place, beta: float = 0.0) -> None:
    """y ← [x z][W sB]ᵀ + β·y + b, where z = (x∘mask)Aᵀ is written beside x.  (training_speed.2)

    xz : (N, k + R)  x in its first k columns;  y : (N, n)
    """
    k, masked = group.k, _masked(group, place.run)
    if not masked and group.product.R:
        gemm(xz[:, :k], group.A.T, xz[:, k:])
    for branch in group.branches if masked else ():
        if branch in masked:
            _masked_down(group, branch, xz, place)
        else:
            gemm(xz[:, :k], group.A[branch.ranks].T, xz[:, branch.beside(k)])
    gemm(xz, frozen.W.T, y, 1.0, beta)
    if frozen.b is not None:
        y += frozen.b


def _masked(group: Group, run: Run) -> list[Branch]:
    """The branches whose input is dropped in this run."""
    return [branch for branch in group.branches if branch.p and branch.r and run.dropout]


def _masked_down(group: Group, branch: Branch, xz: HostArray, place: Place) -> None:
    """z of one branch, a mask's block at a time; its bits are kept where there is a backward to come."""
    k, A, z = group.k, group.A[branch.ranks], xz[:, branch.beside(group.k)]
    kept, at = _bits(group, branch, place), 0
    flags = place.room.take(f"flags {k}", HEIGHT, k, dtype="bool")
    unders = place.room.take(f"under {k}", HEIGHT, k)
    for drop, parts in _blocks(branch, place.run):
        fill, factor = drop.blocks(place.room.stream), factor_of(drop, xz)
        for part in parts:
            flag, under = flags[: part.stop - part.start], unders[: part.stop - part.start]
            fill(flag)
            if place.slot:
                bits = np.packbits(flag)
                kept[at : at + len(bits)] = bits
                at += len(bits)
            under[...] = flag.view(np.uint8)
            under *= xz[part, :k]
            gemm(under, A.T, z[part], factor)


def _blocks(branch: Branch, run: Run) -> Iterator[tuple[DropoutKey, list[slice]]]:
    """The mask's key on each sequence, and the blocks of its rows."""
    seed, step = run.dropout or (0, 0)
    for a, end, index in run.sequences():
        yield branch.dropout(seed, step, index), run.cut(a, end, HEIGHT)


def factor_of(drop: DropoutKey, like: HostArray) -> float:
    """1/(1 − p) as a mask of this dtype holds it."""
    return float(like.dtype.type(drop.scale))


def _bits(group: Group, branch: Branch, place: Place) -> HostArray:
    """Room for the bits of a branch's mask."""
    size = sum(-(-(part.stop - part.start) * group.k // 8) for part in place.run.blocks(HEIGHT))
    name = f"bits {place.slot} {group.product.name} {branch.ranks.start}"
    return place.room.take(name, size if place.slot else 0, dtype="uint8")


class Back:
    """The backward of a group: the products when it is made, then each block of rows, then what is left."""

    def __init__(
        self,
        group: Group,
        frozen: Frozen,
        gy: HostArray,
        z: HostArray,
        gxz: HostArray,
        place: Place,
        sums: Sums,
        *,
        fresh: bool,
        need_gx: bool,
        rho: HostArray | None = None,
    ) -> None:
        """[gx gz] ← gy [W sB], and the gradients of B and of biases.  (training_speed.4), (training_speed.5)

        gy : (N, n);  z : (N, R) of the forward;  gxz : (N, k + R), written
        sums : added to, or written where they are fresh
        rho : (N, 1), where the input was ρ∘h and h is what rows() and end() get  (training_speed.7)
        """
        self.group, self.gxz, self.place, self.sums, self.need_gx = group, gxz, place, sums, need_gx
        self.beta, k = 0.0 if fresh else 1.0, group.k
        if need_gx:
            gemm(gy, frozen.W, gxz)
        else:
            gemm(gy, frozen.W[:, k:], gxz[:, k:])
        for branch, gB in zip(group.branches, sums.B, strict=True):
            gemm(gy[:, branch.rows].T, z[:, branch.ranks], gB, branch.s, self.beta)
        if sums.b is not None:
            np.add(0 if fresh else sums.b, np.add.reduce(gy, axis=0), out=sums.b)
        masked = _masked(group, place.run)
        self.masks = [
            (branch, _bits(group, branch, place), factor_of(branch.dropout(0, 0, 0), gxz)) for branch in masked
        ]
        plain = [branch for branch in group.branches if branch not in masked]
        self.plain = [branch.ranks for branch in plain] if masked else [slice(0, group.product.R)]
        for ranks in self.plain if need_gx and group.product.R else ():
            gemm(gxz[:, k:][:, ranks], group.A[ranks], gxz[:, :k], 1.0, 1.0)  # (training_speed.6)
        self.gz = gxz[:, k:]
        if rho is not None:
            self.gz = np.multiply(self.gz, rho, out=place.room.take("rho gz", len(gy), group.product.R))
        self.at = 0  # bytes of each mask that were read

    def rows(self, part: slice, x: HostArray) -> None:
        """Of one block, no higher than HEIGHT: gA += gzᵀ(x∘mask), gx += (gz A)∘mask.  (training_speed.6)"""
        if not self.masks:
            return
        k, rows = self.group.k, part.stop - part.start
        size = -(-rows * k // 8)
        keep, under = self.place.room.take(f"keep {k}", 2, HEIGHT, k)[:, :rows]
        for branch, bits, c in self.masks:
            flag = np.unpackbits(bits[self.at : self.at + size], count=rows * k)
            keep[...] = flag.reshape(rows, k)
            if self.need_gx:
                gemm(self.gxz[part, branch.beside(k)], self.group.A[branch.ranks], under, c)
                under *= keep
                self.gxz[part, :k] += under
            keep *= x
            beta = 1.0 if self.at else self.beta
            gemm(self.gz[part, branch.ranks].T, keep, self.sums.A[branch.ranks], c, beta)
        self.at += size

    def end(self, x: HostArray) -> None:
        """gA of branches without a mask: gzᵀx over all rows.  (training_speed.6)"""
        for ranks in self.plain:
            gemm(self.gz[:, ranks].T, x, self.sums.A[ranks], 1.0, self.beta)
