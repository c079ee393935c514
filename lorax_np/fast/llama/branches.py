"""A product with its adapters, both ways.  Masks are made once, kept as bits, and read back in the backward."""

from typing import NamedTuple

import numpy as np

from ...backend import HostArray
from ..gemm import gemm
from .groups import Branch, Group
from .room import Room, Run
from .weights import Frozen

HEIGHT = 64  # rows of a block under a mask; a multiple of 8, so that the bits of a block begin with a byte


class Gradients(NamedTuple):
    """What one worker adds up for a group, over its runs; A folded, B in the product's row order."""

    A: HostArray  # (R, k)
    B: list[HostArray]  # (rows, r) of each branch
    b: HostArray | None  # (n,)


def forward(
    group: Group,
    frozen: Frozen,
    xz: HostArray,
    y: HostArray,
    run: Run,
    room: Room,
    slot: str,
    beta: float = 0.0,
) -> None:
    """y ← [x z][W sB]ᵀ + β·y, where z = (x∘mask)Aᵀ is written beside x.  (training_speed.4)

    xz : (N, k + R)  x in its first k columns;  slot : under which the mask's bits are kept, "" for nowhere
    """
    k = group.k
    for branch in group.branches:
        if branch.p and branch.r and run.dropout:
            _masked_down(group, branch, xz, run, room, slot)
        elif branch is group.branches[0] and not any(b.p and run.dropout for b in group.branches):
            gemm(xz[:, :k], group.A.T, xz[:, k:])
            break
        else:
            gemm(xz[:, :k], group.A[branch.ranks].T, xz[:, k + branch.ranks.start : k + branch.ranks.stop])
    gemm(xz, frozen.W.T, y, 1.0, beta)
    if frozen.b is not None:
        y += frozen.b


def _masked_down(group: Group, branch: Branch, xz: HostArray, run: Run, room: Room, slot: str) -> None:
    """z of one branch, a mask's block at a time; its bits are kept where there is a backward to come."""
    k, A = group.k, group.A[branch.ranks]
    z = xz[:, k + branch.ranks.start : k + branch.ranks.stop]
    kept, at = _bits(branch, k, run, room, slot), 0
    flags, floats, xd = _scratch(k, room)
    for a, end, index in run.sequences():
        drop = branch.dropout(*run.dropout, index)
        fill = drop.blocks()
        for start in range(a, end, HEIGHT):
            part = slice(start, min(start + HEIGHT, end))
            rows = part.stop - start
            flag, keep, under = flags[:rows], floats[:rows], xd[:rows]
            fill(flag)
            if slot:
                bits = np.packbits(flag)
                kept[at : at + len(bits)] = bits
                at += len(bits)
            keep[...] = flag
            np.multiply(xz[part, :k], keep, out=under)
            gemm(under, A.T, z[part], _factor(drop, xz))


def _factor(drop, like) -> float:
    """1/(1 − p) as a mask of this dtype holds it."""
    return float(like.dtype.type(drop.scale))


def _scratch(k: int, room: Room) -> tuple[HostArray, HostArray, HostArray]:
    return (
        room.take(f"flags {k}", HEIGHT, k, dtype="bool"),
        room.take(f"keep {k}", HEIGHT, k),
        room.take(f"dropped {k}", HEIGHT, k),
    )


def _bits(branch: Branch, k: int, run: Run, room: Room, slot: str) -> HostArray:
    """Room for the bits of a branch's mask."""
    size = sum(-(-(part.stop - part.start) * k // 8) for part in run.blocks(HEIGHT))
    return room.take(f"bits {slot} {branch.site}", size if slot else 0, dtype="uint8")


class Back:
    """The backward of a group, in three strokes: the products, then each block of rows, then what is left."""

    def __init__(
        self,
        group: Group,
        frozen: Frozen,
        gy: HostArray,
        z: HostArray,
        gxz: HostArray,
        sums: Gradients,
        run: Run,
        room: Room,
        slot: str,
        first: bool,
        need_gx: bool = True,
    ) -> None:
        """[gx gz] ← gy [W sB], and the gradients of B and of biases.  (training_speed.5), (training_speed.6)

        gy : (N, n);  z : (N, R) of the forward;  gxz : (N, k + R), written;  sums : added to, but for the first
        """
        self.group, self.gxz, self.sums, self.run, self.room, self.slot = group, gxz, sums, run, room, slot
        self.need_gx, self.beta, k = need_gx, 0.0 if first else 1.0, group.k
        self.gz, self.masks = gxz[:, k:], []
        if need_gx:
            gemm(gy, frozen.W, gxz)
        else:
            gemm(gy, frozen.W[:, k:], self.gz)
        for branch, gB in zip(group.branches, sums.B, strict=True):
            gemm(gy[:, branch.rows].T, z[:, branch.ranks], gB, branch.s, self.beta)
            if branch.p and branch.r and run.dropout:
                self.masks.append((branch, _bits(branch, k, run, room, slot)))
        if sums.b is not None:
            if first:
                sums.b[...] = 0
            np.add(sums.b, np.add.reduce(gy, axis=0), out=sums.b)
        if not self.masks and need_gx and group.product.R:
            gemm(self.gz, group.A, gxz[:, :k], 1.0, 1.0)  # (training_speed.7)
        self.plain = [b for b in group.branches if b not in [m for m, _ in self.masks]] if self.masks else []
        for branch in self.plain if need_gx else ():
            gemm(self.gz[:, branch.ranks], group.A[branch.ranks], gxz[:, :k], 1.0, 1.0)
        self.at = 0  # bytes of each mask that were read

    def rows(self, part: slice, x: HostArray) -> None:
        """Of one block, no higher than HEIGHT: gA += gzᵀ(x∘mask), gx += (gz A)∘mask.  (training_speed.8)"""
        if not self.masks:
            return
        k, rows = self.group.k, part.stop - part.start
        size = -(-rows * k // 8)
        _, floats, xd = _scratch(k, self.room)
        keep, under = floats[:rows], xd[:rows]
        for branch, bits in self.masks:
            flag = np.unpackbits(bits[self.at : self.at + size], count=rows * k)
            keep[...] = flag.reshape(rows, k)
            np.multiply(x, keep, out=under)
            gz, c = self.gz[part, branch.ranks], _factor(branch.dropout(0, 0, 0), keep)
            gemm(gz.T, under, self.sums.A[branch.ranks], c, 1.0 if self.at else self.beta)
            if self.need_gx:
                gemm(gz, self.group.A[branch.ranks], under, c)
                under *= keep
                self.gxz[part, :k] += under
        self.at += size

    def end(self, x: HostArray) -> None:
        """gA of branches without a mask: gzᵀx over all rows.  (training_speed.8)"""
        if not self.masks:
            gemm(self.gz.T, x, self.sums.A, 1.0, self.beta)
        for branch in self.plain:
            gemm(self.gz[:, branch.ranks].T, x, self.sums.A[branch.ranks], 1.0, self.beta)
