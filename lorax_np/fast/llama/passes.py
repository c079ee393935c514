"""The pass of one worker over a run of sequences: forward, loss, backward.  specs/training_speed.md."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...backend import HostArray
from . import attention, branches, elementwise
from .attention import Angles, Kept
from .branches import Back, Place, Sums
from .groups import Group
from .head import Head, loss_rows
from .room import Room, Run
from .shape import GROUPS, LlamaShape
from .weights import Frozen

Buffers = dict[str, HostArray]
AGAIN = "again"  # the slot of a layer whose activations are not kept beyond it


class Model(NamedTuple):
    """What all workers read in one step."""

    shape: LlamaShape
    groups: list[dict[str, Group]]  # of each layer
    frozen: Callable[[int, Buffers], dict[str, Frozen]]  # of a layer, with this step's s·B in place
    E: HostArray  # (V, d) embeddings
    head: Head
    first: int  # the first layer with an adapter; as many as there are layers, where none has
    checkpoint: bool


class Saved(NamedTuple):
    """What the backward of a layer reads, in the room's arrays."""

    h: HostArray  # (N, d)  residual stream before the layer
    h2: HostArray  # (N, d)  and before its MLP
    rho: HostArray  # (2, N, 1)
    kept: Kept
    oz: HostArray  # (N, d_q + R)  output of attention, and z of o_proj beside it
    gu: HostArray  # (N, 2 ff)
    z: dict[str, HostArray]  # (N, R) of the other products


class Worker:
    """One thread's arrays, and the pass over them."""

    def __init__(self, dtype: str) -> None:
        """dtype : computed in."""
        self.room, self.buffers = Room(dtype), Buffers()

    def loss(self, model: Model, ids: HostArray, labels: HostArray, run: Run, n: int) -> float:
        """The loss of a run alone."""
        h = self._forward(model, ids, run, self._angles(model, run), keep=False)
        return loss_rows(h, labels, model.head, n, self.room, None)

    def loss_and_gradients(
        self,
        model: Model,
        ids: HostArray,
        labels: HostArray,
        run: Run,
        n: int,
        sums: list[dict[str, Sums]],
        *,
        fresh: bool,
    ) -> float:
        """The loss of a run; its gradients go into sums, added to what is there unless fresh."""
        turn, g = self._angles(model, run), self.room.take("g", run.N, model.shape.d)
        h = self._forward(model, ids, run, turn, keep=True)
        loss = loss_rows(h, labels, model.head, n, self.room, g)
        for i in range(model.shape.layers - 1, model.first - 1, -1):
            layer = Layer(model, i, self, run, turn, AGAIN if model.checkpoint else str(i))
            saved = layer.saved(self._stream(i, run, model, kept=True))
            if model.checkpoint:
                layer.forward(saved, self.room.take("next", run.N, model.shape.d))
            layer.backward(saved, g, sums[i], fresh=fresh)
        return loss

    def _forward(self, model: Model, ids: HostArray, run: Run, turn: Angles, *, keep: bool) -> HostArray:
        """The residual stream after the last layer."""
        h = self._stream(0, run, model, kept=keep)
        np.take(model.E, ids, axis=0, out=h)
        for i in range(model.shape.layers):
            kept = keep and i >= model.first and not model.checkpoint
            layer = Layer(model, i, self, run, turn, str(i) if kept else "")
            out = self._stream(i + 1, run, model, kept=keep)
            layer.forward(layer.saved(h), out)
            h = out
        return h

    def _stream(self, i: int, run: Run, model: Model, *, kept: bool) -> HostArray:
        """Where the residual stream before layer i goes: two arrays in turn where nobody keeps it."""
        kept = kept and model.first <= i < model.shape.layers
        return self.room.take(f"h {i}" if kept else f"h {('even', 'odd')[i % 2]}", run.N, model.shape.d)

    def _angles(self, model: Model, run: Run) -> Angles:
        positions = np.concatenate([np.arange(end - a) for a, end, _ in run.sequences()])
        return attention.angles(positions, model.shape, self.room.dtype)


class Layer:
    """One layer of one pass."""

    def __init__(self, model: Model, i: int, worker: Worker, run: Run, turn: Angles, slot: str) -> None:
        """slot : the name under which what the backward reads is kept, "" for nowhere."""
        self.s, self.groups, self.turn = model.shape, model.groups[i], turn
        self.frozen, self.window = model.frozen(i, worker.buffers), model.shape.windows[i]
        self.run, self.room, self.place = run, worker.room, Place(run, worker.room, slot)
        adapted = [name for name in GROUPS if self.groups[name].branches]
        self.last = adapted[0] if i == model.first else ""  # where the backward ends, without gx

    def saved(self, h: HostArray) -> Saved:
        """Room for what the backward reads, h being there already."""
        s, N, slot, take = self.s, self.run.N, self.place.slot or AGAIN, self.room.take
        q, L = take(f"q {slot}", N * s.d_q), take(f"L {slot}", N * s.H)
        k, v = take(f"k {slot}", s.K, N, s.D), take(f"v {slot}", s.K, N, s.D)
        R = {name: group.product.R for name, group in self.groups.items()}
        z = {name: take(f"z {name} {slot}", N, R[name]) for name in ("qkv", "gate_up", "down")}
        h2, rho = take(f"h2 {slot}", N, s.d), take(f"rho {slot}", 2, N, 1)
        oz, gu = take(f"oz {slot}", N, s.d_q + R["o"]), take(f"gu {slot}", N, 2 * s.ff)
        return Saved(h, h2, rho, Kept(q, k, v, L), oz, gu, z)

    # ---- forward -------------------------------------------------------------------------------------------

    def forward(self, saved: Saved, out: HostArray) -> None:
        """out : (N, d), the residual stream after the layer."""
        s, d_q = self.s, self.s.d_q
        y = self.room.take("wide", self.run.N, s.d_q + 2 * s.d_kv)
        self._of_norm("qkv", saved.h, saved.rho[0], y, saved)
        attention.rotate(y, s, self.turn, saved.kept, self.run)
        attention.forward(saved.kept, saved.oz[:, :d_q], s, self.window, self.run, self.room)
        saved.h2[...] = saved.h
        self._product("o", saved.oz, saved.h2, 1.0)

        self._of_norm("gate_up", saved.h2, saved.rho[1], saved.gu, saved)
        yz = self._beside("wide", "down")
        elementwise.swiglu(saved.gu, yz[:, : s.ff], self.room)
        out[...] = saved.h2
        self._product("down", yz, out, 1.0)
        saved.z["down"][...] = yz[:, s.ff :]

    def _of_norm(self, name: str, h: HostArray, rho: HostArray, y: HostArray, saved: Saved) -> None:
        """y of a product that reads a norm of h."""
        xz = self._beside("xz", name)
        elementwise.rms(h, self.s.eps, xz[:, : self.s.d], rho)
        self._product(name, xz, y)
        saved.z[name][...] = xz[:, self.s.d :]

    def _product(self, name: str, xz: HostArray, y: HostArray, beta: float = 0.0) -> None:
        branches.forward(self.groups[name], self.frozen[name], xz, y, self.place, beta)

    def _beside(self, word: str, name: str) -> HostArray:
        """(N, k + R) for the input of a product, or its gradient, with z beside it."""
        product = self.groups[name].product
        return self.room.take(word, self.run.N, product.k + product.R)

    # ---- backward ------------------------------------------------------------------------------------------

    def backward(self, saved: Saved, g: HostArray, sums: dict[str, Sums], *, fresh: bool) -> None:
        """g : (N, d), the gradient by the stream after the layer, becomes that by the stream before it."""
        self.sums, self.fresh = sums, fresh
        ggu = self._mlp_back(saved, g)
        if self.last == "down":
            return
        self._of_norm_back("gate_up", saved.h2, saved.rho[1], ggu, saved, g)
        if self.last == "gate_up":
            return
        goz = self._o_back(saved, g)
        if self.last == "o":
            return
        gy = self.room.take("wide", self.run.N, self.s.d_q + 2 * self.s.d_kv)
        go, o = goz[:, : self.s.d_q], saved.oz[:, : self.s.d_q]
        where = (self.s, self.window, self.turn, self.run, self.room)
        attention.backward(go, o, saved.kept, gy, *where)
        self._of_norm_back("qkv", saved.h, saved.rho[0], gy, saved, g)

    def _mlp_back(self, saved: Saved, g: HostArray) -> HostArray:
        """The gradient by [gate up]."""
        ff, N = self.s.ff, self.run.N
        gyz, ggu, y = self._beside("wide", "down"), self.room.take("ggu", N, 2 * ff), self.room.take("y", N, ff)
        back = self._back("down", g, saved.z["down"], gyz)
        for part in self.run.blocks(elementwise.GATE_HEIGHT):
            sigma, a = elementwise.swiglu_again(saved.gu[part], y[part], self.room)
            back.rows(part, y[part])
            if self.last != "down":
                elementwise.swiglu_back(gyz[part, :ff], saved.gu[part], sigma, a, ggu[part])
        back.end(y)
        return ggu

    def _o_back(self, saved: Saved, g: HostArray) -> HostArray:
        """The gradient by the output of attention, and gz beside it."""
        d_q, goz = self.s.d_q, self._beside("goz", "o")
        back, o = self._back("o", g, saved.oz[:, d_q:], goz), saved.oz[:, :d_q]
        for part in self.run.blocks(branches.HEIGHT):
            back.rows(part, o[part])
        back.end(o)
        return goz

    def _of_norm_back(
        self, name: str, h: HostArray, rho: HostArray, gy: HostArray, saved: Saved, g: HostArray
    ) -> None:
        """Through a product that read a norm of h; what comes out at h is added to g."""
        gxz, d = self._beside("xz", name), self.s.d
        back = self._back(name, gy, saved.z[name], gxz, rho)
        for part in self.run.blocks(branches.HEIGHT):
            back.rows(part, h[part])
        back.end(h)
        if name != self.last:
            elementwise.rms_back(gxz[:, :d], h, rho, g, self.room)

    def _back(
        self, name: str, gy: HostArray, z: HostArray, gxz: HostArray, rho: HostArray | None = None
    ) -> Back:
        group, frozen, sums = self.groups[name], self.frozen[name], self.sums[name]
        how = (group, frozen, gy, z, gxz, self.place, sums)
        return Back(*how, fresh=self.fresh, need_gx=name != self.last, rho=rho)
