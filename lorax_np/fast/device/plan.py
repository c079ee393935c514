"""The plan of a Llama's training pass on a device, and its two functions.  specs/training_speed.md."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...backend import dtype_name, namespace_of
from ...config import Site
from ...errors import ConfigError, DtypeError, ShapeError
from ...params import Adapter
from ...random import DropoutKey
from ..gpu_arrays import Device, contiguous
from ..llama.batch import batch_of
from ..llama.checks import PARTS, check_parts, check_places, checked, nothing_beside
from ..llama.head import IGNORED
from ..llama.shape import NORMS, SITES, LlamaShape, refuse
from .attention_source import chunks_of
from .kernels import Kernels, Places, angles, words
from .layer import Layer, Step

EMBEDDINGS, LAST, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
CHUNK = 256  # rows whose logits are there at a time


class DeviceLlama:
    """A model's planned pass on a device; made by llama_plan. It reads weights and adapters where they lie.

    One step at a time, as LlamaPlan.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        config: Mapping[str, Any],
        adapters: Mapping[str, Adapter],
        sites: Mapping[str, Site],
        saved: Mapping[str, Any],
        *,
        checkpoint: bool,
    ) -> None:
        """As llama_plan."""
        shape, _, self._parts, dtype = checked(weights, config, adapters, sites, saved)
        self.shape, self.dtype, self.checkpoint = shape, dtype, checkpoint
        if chunks_of(shape.D, np.dtype(dtype).itemsize) is None:
            refuse("head_dim", f"a head that fits the kernels for {dtype}", shape.D)
        names = [name for name in weights if name.startswith("model.layers.")]
        held = {name: _plain(name, weights[name], dtype) for name in (*names, EMBEDDINGS, LAST)}
        _check_shapes(held, shape)
        self.E, self.last = held[EMBEDDINGS], held[LAST]
        if HEAD not in weights and not shape.tied:
            raise ConfigError(f"weights: expected {HEAD}, got none")
        self.head = _plain(HEAD, weights[HEAD], dtype) if HEAD in weights else self.E
        self.lib = namespace_of(E=self.E)
        self.k = Kernels(self.lib, dtype, shape)
        self.layers = [Layer(i, held, sites, shape, self.k) for i in range(shape.layers)]
        adapted = {int(site.split(".")[2]) for site in adapters}
        self.first = min(adapted, default=shape.layers)
        self._angles: tuple[Device, Device] | None = None

    def loss_and_gradients(
        self,
        adapters: Mapping[str, Adapter],
        saved: Mapping[str, Any] | None,
        ids: Any,
        starts: Sequence[int],
        index: Sequence[int],
        labels: Any,
        *,
        n: int,
        dropout: tuple[int, int] | None = None,
    ) -> tuple[Device, dict[str, Adapter], dict[str, Any]]:
        """As LlamaPlan's, but the loss is a number on the device, which nothing here waits for."""
        step = self._step(adapters, saved, (ids, starts, index, labels, n), dropout)
        kept: list[Any] = []
        h, x = self._forward(step, kept)
        loss, gx = self._loss(x, step.where, n, gradient=True)
        g, found = self.lib.zeros(h.shape, dtype=self.k.type), dict[str, Adapter]()
        self.k.rms_back(g, gx, h, self.last)
        del x, gx, h
        for i in reversed(range(self.first, self.shape.layers)):
            entry = kept.pop()
            if self.checkpoint:
                entry = self.layers[i].forward(*self.k.add_rms(entry, None, self.layers[i].before), step)[1]
            self.layers[i].backward(g, entry, step, found, below=i > self.first)
            del entry
        return loss, {site: found[site] for site in adapters}, {}

    def loss(
        self,
        adapters: Mapping[str, Adapter],
        saved: Mapping[str, Any] | None,
        ids: Any,
        starts: Sequence[int],
        index: Sequence[int],
        labels: Any,
        *,
        n: int,
    ) -> Device:
        """The loss alone, without dropout; arguments as loss_and_gradients."""
        step = self._step(adapters, saved, (ids, starts, index, labels, n), None)
        return self._loss(self._forward(step, None)[1], step.where, n, gradient=False)[0]

    # ---- parts of a step -------------------------------------------------------------------------------------

    def _step(self, adapters: Mapping[str, Adapter], saved: Any, batch: Any, dropout: Any) -> Step:
        """What layers read, checked."""
        nothing_beside(saved or {})
        check_parts(adapters, self._parts)
        check_places(adapters, True)
        for number in batch[2] if dropout else ():
            DropoutKey(0.0, dropout[0], dropout[1], c3=number).checked()
        there = {site: _there(site, adapter, self.dtype) for site, adapter in adapters.items()}
        return Step(self._places(*batch), there, dropout)

    def _places(self, ids: Any, starts: Any, index: Any, labels: Any, n: int) -> Places:
        """The batch, checked on the host, on the device."""
        batch = batch_of(ids, starts, index, labels, n, self.shape.V)
        lengths = tuple(b - a for a, b in pairwise(batch.bounds))
        place = np.concatenate([np.arange(0), *map(np.arange, lengths)])
        chosen = np.flatnonzero(batch.labels != IGNORED)
        integers = batch.bounds, place, batch.ids, chosen, batch.labels[chosen]
        first, place, tokens, chosen, labels = words(self.lib, *integers)
        numbers = self.lib.asarray(np.asarray(batch.numbers).astype("uint64"))
        longest = max(lengths, default=0)
        if self._angles is None or self._angles[0].shape[0] < longest:
            room = 1 << max(longest - 1, 0).bit_length()
            self._angles = angles(self.lib, room, self.shape.turns, self.shape.factor, self.dtype)
        return Places(lengths, first, numbers, place, tokens, chosen, labels, *self._angles)

    def _forward(self, step: Step, kept: list[Any] | None) -> tuple[Device, Device]:
        """The stream after the last layer and its norm; what the backward reads goes into kept."""
        h = self.k.take(self.E, step.where.ids)
        h, x = self.k.add_rms(h, None, self.layers[0].before if self.layers else self.last)
        for i, layer in enumerate(self.layers):
            before = h
            y, saved = layer.forward(h, x, step)
            following = self.layers[i + 1].before if i + 1 < len(self.layers) else self.last
            h, x = self.k.add_rms(saved.h2, y, following)
            if kept is not None and i >= self.first:
                kept.append(before if self.checkpoint else saved)
            del saved  # what is not kept makes room for the next layer's
        return h, x

    def _loss(self, x: Device, where: Places, n: int, *, gradient: bool) -> tuple[Device, Device]:
        """Σ nll/n over rows with a label, and the gradient by x : (N, d).  (training_speed.19)"""
        total = self.lib.zeros((1,), dtype=np.float64)
        gx = self.lib.zeros(x.shape, dtype=self.k.type)
        for at in range(0, where.chosen.shape[0], CHUNK):
            part = slice(at, min(at + CHUNK, where.chosen.shape[0]))
            rows = where.chosen[part]
            some = self.k.take(x, rows)
            z = self.k.empty(some.shape[0], self.head.shape[0])
            self.k.times_t(some, self.head, z)
            total += self.k.cross_entropy(z, where.labels[part], n, gradient=gradient)
            if gradient:
                self.k.times(z, self.head, some)
                self.k.put(gx, some, rows)
        return (total / n).reshape(()), gx


def _plain(name: str, value: Any, dtype: str) -> Device:
    """A weight where it lies. The kernels read one dtype, and nothing is copied here."""
    if dtype_name(value) != dtype:
        refuse(name, f"{dtype}, set by the adapters", dtype_name(value))
    return contiguous(value)


def _there(site: str, adapter: Adapter, dtype: str) -> Adapter:
    """An adapter as the kernels read it: of the plan's dtype, and without gaps, copied where it has some."""
    found = {part: value for part in PARTS if (value := getattr(adapter, part)) is not None}
    for part, value in found.items():
        if dtype_name(value) != dtype:
            raise DtypeError(f"{site}: {part}: expected {dtype}, set by the plan, got {dtype_name(value)}")
    return Adapter(**{"A": None, "B": None, **{part: contiguous(value) for part, value in found.items()}})


def _check_shapes(weights: Mapping[str, Any], shape: LlamaShape) -> None:
    """ShapeError where a weight does not fit the config."""
    wanted = {EMBEDDINGS: (shape.V, shape.d), LAST: (shape.d,)}
    for i in range(shape.layers):
        wanted |= {f"model.layers.{i}.{norm}.weight": (shape.d,) for norm in NORMS}
        for site, group in SITES.items():
            wanted[f"model.layers.{i}.{site}.weight"] = shape.rows_of(site), shape.columns_of(group)
    for name, size in wanted.items():
        if name not in weights or tuple(weights[name].shape) != size:
            came = tuple(weights[name].shape) if name in weights else "nothing"
            raise ShapeError(f"{name}: expected {size}, set by the config, got {came}")
