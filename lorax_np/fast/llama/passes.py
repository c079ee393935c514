"""The pass of one worker over a run of sequences: forward, loss, backward.  specs/training_speed.md."""

from typing import Any, NamedTuple

import numpy as np

from ...backend import HostArray
from . import attention, branches, elementwise
from .branches import Back, Gradients
from .groups import Group
from .head import loss_rows
from .room import Room, Run, even_blocks
from .shape import GROUPS, LlamaShape
from .weights import Frozen


class Layers(NamedTuple):
    """What all workers read in one step."""

    shape: LlamaShape
    groups: list[dict[str, Group]]  # of each layer
    frozen: Any  # frozen(i, buffers) -> {name: Frozen}, with this step's s·B in place
    E: HostArray  # (V, d) embeddings
    head: HostArray  # (V, d)
    norm: HostArray  # (d,) before the head
    first: int  # the first layer with an adapter; as many as there are layers, where none has
    checkpoint: bool


class Saved(NamedTuple):
    """What the backward of a layer reads, in the room's arrays."""

    h: HostArray  # (N, d)  residual stream before the layer
    h2: HostArray  # (N, d)  and before its MLP
    rho: HostArray  # (2, N, 1)
    kept: attention.Kept
    oz: HostArray  # (N, d_q + R)  output of attention, and z of o_proj beside it
    gu: HostArray  # (N, 2 ff)
    z: dict[str, HostArray]  # (N, R) of the other products


class Worker:
    """One thread's arrays, and the pass over them."""

    def __init__(self, dtype: str) -> None:
        """dtype : computed in."""
        self.room, self.buffers = Room(dtype), dict[str, HostArray]()

    # ---- one run -------------------------------------------------------------------------------------------

    def loss(self, at: Layers, ids: HostArray, labels: HostArray, run: Run, n: int) -> float:
        """The loss of a run alone."""
        h = self._forward(at, ids, run, keep=False)
        return loss_rows(h, labels, at.norm, at.head, at.shape.eps, n, self.room, None)

    def loss_and_gradients(
        self, at: Layers, ids: HostArray, labels: HostArray, run: Run, n: int, sums: list[Any], fresh: bool
    ) -> float:
        """The loss of a run; its gradients go into sums, added to what is there unless fresh."""
        shape, room = at.shape, self.room
        h = self._forward(at, ids, run, keep=True)
        g = room.take("g", run.N, shape.d)
        loss = loss_rows(h, labels, at.norm, at.head, shape.eps, n, room, g)
        turn = self._angles(at, run)
        for i in range(shape.layers - 1, at.first - 1, -1):
            frozen, slot = at.frozen(i, self.buffers), str(i)
            if at.checkpoint:
                slot = "again"
                saved = self._saved(at, i, run, slot)
                self._layer(at, i, frozen, saved, room.take("next", run.N, shape.d), turn, run, slot)
            else:
                saved = self._saved(at, i, run, slot)
            self._layer_back(at, i, frozen, saved, g, turn, run, slot, sums[i], fresh)
        return loss

    def _forward(self, at: Layers, ids: HostArray, run: Run, *, keep: bool) -> HostArray:
        """The residual stream after the last layer."""
        shape, room, turn = at.shape, self.room, self._angles(at, run)
        kept = [keep and i >= at.first for i in range(shape.layers)]
        h = self._stream(0, kept, run, shape)
        np.take(at.E, ids, axis=0, out=h)
        for i in range(shape.layers):
            slot = str(i) if kept[i] and not at.checkpoint else ""
            saved = self._saved(at, i, run, slot)._replace(h=h)
            out = self._stream(i + 1, [*kept, False], run, shape)
            self._layer(at, i, at.frozen(i, self.buffers), saved, out, turn, run, slot)
            h = out
        return h

    def _stream(self, i: int, kept: list[bool], run: Run, shape: LlamaShape) -> HostArray:
        """Where the residual stream before layer i goes: two arrays in turn where nobody keeps it."""
        return self.room.take(f"h {i}" if kept[i] else f"h {'odd' if i % 2 else 'even'}", run.N, shape.d)

    def _angles(self, at: Layers, run: Run) -> attention.Angles:
        positions = np.concatenate([np.arange(end - a) for a, end, _ in run.sequences()])
        return attention.angles(positions, at.shape, self.room.dtype)

    def _saved(self, at: Layers, i: int, run: Run, slot: str) -> Saved:
        s, N, take = at.shape, run.N, self.room.take
        kept = attention.Kept(
            take(f"q {slot}", N * s.d_q),
            take(f"k {slot}", s.K, N, s.D),
            take(f"v {slot}", s.K, N, s.D),
            take(f"L {slot}", N * s.H),
        )
        R = {name: at.groups[i][name].product.R for name in GROUPS}
        return Saved(
            take(f"h {i}", N, s.d) if slot else take("h even", N, s.d),
            take(f"h2 {slot}", N, s.d),
            take(f"rho {slot}", 2, N, 1),
            kept,
            take(f"oz {slot}", N, s.d_q + R["o"]),
            take(f"gu {slot}", N, 2 * s.ff),
            {name: take(f"z {name} {slot}", N, R[name]) for name in ("qkv", "gate_up", "down")},
        )

    # ---- one layer -----------------------------------------------------------------------------------------

    def _layer(
        self,
        at: Layers,
        i: int,
        frozen: dict[str, Frozen],
        saved: Saved,
        out: HostArray,
        turn: attention.Angles,
        run: Run,
        slot: str,
    ) -> None:
        """out : (N, d), the residual stream after layer i."""
        s, room, groups = at.shape, self.room, at.groups[i]

        def product(name: str, xz: HostArray, y: HostArray, beta: float = 0.0) -> None:
            branches.forward(groups[name], frozen[name], xz, y, run, room, slot, beta)

        xz = room.take("xz", run.N, s.d + groups["qkv"].product.R)
        y = room.take("wide", run.N, s.d_q + 2 * s.d_kv)
        elementwise.rms(saved.h, s.eps, xz[:, : s.d], saved.rho[0])
        product("qkv", xz, y)
        saved.z["qkv"][...] = xz[:, s.d :]
        attention.rotate(y, s, turn, saved.kept, run)
        attention.forward(saved.kept, saved.oz[:, : s.d_q], s, run, room)
        saved.h2[...] = saved.h
        product("o", saved.oz, saved.h2, 1.0)

        xz = room.take("xz", run.N, s.d + groups["gate_up"].product.R)
        elementwise.rms(saved.h2, s.eps, xz[:, : s.d], saved.rho[1])
        product("gate_up", xz, saved.gu)
        saved.z["gate_up"][...] = xz[:, s.d :]
        yz = room.take("wide", run.N, s.ff + groups["down"].product.R)
        elementwise.swiglu(saved.gu, yz[:, : s.ff], room)
        out[...] = saved.h2
        product("down", yz, out, 1.0)
        saved.z["down"][...] = yz[:, s.ff :]

    def _layer_back(
        self,
        at: Layers,
        i: int,
        frozen: dict[str, Frozen],
        saved: Saved,
        g: HostArray,
        turn: attention.Angles,
        run: Run,
        slot: str,
        sums: dict[str, Gradients],
        fresh: bool,
    ) -> None:
        """g : (N, d), the gradient by the stream after layer i, becomes that by the stream before it."""
        s, room, groups, N = at.shape, self.room, at.groups[i], run.N
        adapted = [name for name in GROUPS if groups[name].branches]
        last = adapted[0] if i == at.first else ""  # the backward ends here, without gx

        def back(name: str, gy: HostArray, z: HostArray, gxz: HostArray) -> Back:
            how = (gxz, sums[name], run, room, slot, fresh, name != last)
            return Back(groups[name], frozen[name], gy, z, *how)

        def norm_back(name: str, h: HostArray, rho: HostArray, gy: HostArray) -> None:
            gxz = room.take("gxz", N, s.d + groups[name].product.R)
            x = room.take("xz", N, s.d)
            stroke = back(name, gy, saved.z[name], gxz)
            elementwise.rms_rows(h, rho, x)
            for part in run.blocks(branches.HEIGHT):
                stroke.rows(part, x[part])
            stroke.end(x)
            if name != last:
                for part in even_blocks(N, elementwise.NORM_HEIGHT):
                    elementwise.rms_back(gxz[part, : s.d], x[part], rho[part], g[part])

        # the MLP
        gyz, ggu = room.take("wide", N, s.ff + groups["down"].product.R), room.take("wider", N, 2 * s.ff)
        stroke = back("down", g, saved.z["down"], gyz)
        y = room.take("y", N, s.ff)
        for part in run.blocks(elementwise.GATE_HEIGHT):
            sigma, a = elementwise.swiglu_rows(saved.gu[part], y[part], room)
            stroke.rows(part, y[part])
            if last != "down":
                elementwise.swiglu_back(gyz[part, : s.ff], saved.gu[part], sigma, a, ggu[part])
        stroke.end(y)
        if last == "down":
            return
        norm_back("gate_up", saved.h2, saved.rho[1], ggu)
        if last == "gate_up":
            return

        # attention
        goz = room.take("goz", N, s.d_q + groups["o"].product.R)
        o, z = saved.oz[:, : s.d_q], saved.oz[:, s.d_q :]
        stroke = back("o", g, z, goz)
        for part in run.blocks(branches.HEIGHT):
            stroke.rows(part, o[part])
        stroke.end(o)
        if last == "o":
            return
        gy = room.take("wide", N, s.d_q + 2 * s.d_kv)
        attention.backward(goz[:, : s.d_q], o, saved.kept, gy, s, turn, run, room)
        norm_back("qkv", saved.h, saved.rho[0], gy)
