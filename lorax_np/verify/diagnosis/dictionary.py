"""The fault dictionary: every known fault replayed in float64, and compared with what a subject answered.

A name is accepted where its replay lies within LIMIT deviations of the answer in every entry of every tensor of
every layer. Names whose replays lie within that of each other are one class: nothing here can tell them apart.
Derivation: specs/diagnosis.md.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from math import inf, sqrt
from typing import Any, NamedTuple

import numpy as np

from ..cases import HostArray
from ..layers.plain import Step
from ..report import RIGHT
from .probe_layers import Key, Probe, Seen, probe, seen

LIMIT = 12.0
"""Deviations between a replay and an answer: 8 for the answer, and half as much for a fault's own roundings."""
LAYER_KINDS = ("forward", "gradient", "dora", "dropout", "precision", "shape")
REFUSALS = (ValueError, TypeError, ArithmeticError, IndexError)  # what arrays that do not fit raise


class Match(NamedTuple):
    """Names that one class of replays has, and how far the nearest of them is from the answer.

    ids : of one fault each, or of two that act together, joined by " + "
    z : the largest distance in deviations;  share : of the wrong entries, how many lie within LIMIT
    """

    ids: tuple[str, ...]
    z: float
    share: float = 1.0


class Replays(NamedTuple):
    """All replays on one probe: values (F, L), and for each fault a form for each tensor."""

    values: HostArray
    forms: tuple[tuple[str, ...], ...]


@cache
def faults() -> dict[str, Any]:
    """The catalogue's faults of a layer's own arithmetic, by id."""
    from ..mutants import CATALOGUE

    return {id: fault for id, fault in CATALOGUE.items() if fault.kind in LAYER_KINDS}


@cache
def replays(key: Key) -> Replays:
    """Every fault on one probe, once; the first row is the right layer."""
    layer = probe(*key)
    rows = [seen(layer, layer.truth, "float64")]
    with np.errstate(all="ignore"):
        for fault in faults().values():
            rows.append(replay(layer, fault.steps) if fault.make is None else _replay_subject(layer, fault))
    return Replays(np.stack([row.values for row in rows]), tuple(row.forms for row in rows))


def replay(layer: Probe, steps: Mapping[str, Step] | None) -> Seen:
    """The plain layer with some steps changed, on one probe."""
    try:
        return seen(layer, layer.replayer.run(steps), "float64")
    except REFUSALS:
        return seen(layer, None, "float64")


def _replay_subject(layer: Probe, fault: Any) -> Seen:
    case = layer.case.copy()
    try:
        y, gradients = fault.subject().run(case, case.gy)
    except REFUSALS:
        return seen(layer, None, "float64")
    return seen(layer, {"y": y, **gradients}, "float64")


# ---- distances ---------------------------------------------------------------------------------------------


@cache
def _scales(key: Key) -> tuple[HostArray, HostArray, HostArray]:
    """Where each tensor begins; a deviation for each entry, none below its tensor's; rms of each truth."""
    layer = probe(*key)
    sizes = [value.size for value in layer.truth.values()]
    sigma = [np.maximum(s, _rms(s)).ravel() for s in (layer.sigma[name] for name in layer.names)]
    rms = np.array([_rms(value) for value in layer.truth.values()])
    return np.cumsum([0, *sizes[:-1]]), np.concatenate(sigma), rms


def _rms(value: HostArray) -> float:
    return float(np.sqrt(np.mean(np.square(value)))) or np.finfo(float).tiny


def entries(layer: Probe, got: HostArray, values: HostArray) -> HostArray:
    """Distance of an answer (L,) from replays (F, L) in deviations, entry by entry.

    A replay that is larger than the truth rounds by as much more: its deviation grows in proportion.
    """
    starts, sigma, truth = _scales(layer.key)
    sizes = np.diff([*starts, len(sigma)])
    with np.errstate(all="ignore"):
        squares = np.add.reduceat(np.nan_to_num(values * values), starts, axis=-1)
        grown = np.maximum(1.0, np.sqrt(squares / sizes) / truth)  # (diagnosis.1)
        away = np.abs(got - values) / (sigma * np.repeat(grown, sizes, axis=-1))  # (diagnosis.2)
    both = ~np.isfinite(got) & ~np.isfinite(values)
    return np.where(both, 0.0, np.where(np.isfinite(away), away, np.inf))


def distances(layer: Probe, got: Seen, values: HostArray, forms: Sequence[tuple[str, ...]]) -> HostArray:
    """The largest distance for each replay and tensor, (F, tensors); infinite where the forms differ."""
    starts, _, _ = _scales(layer.key)
    z: HostArray = np.maximum.reduceat(entries(layer, got.values, values), starts, axis=-1)
    for f, form in enumerate(forms):
        for i, (mine, theirs) in enumerate(zip(got.forms, form, strict=True)):
            if mine == "-" or theirs == "-":
                z[f, i] = 0.0
            elif mine != theirs:
                z[f, i] = np.inf
    return z


class Comparison:
    """A subject's answers beside every replay."""

    def __init__(self, probes: list[Probe], answers: list[Seen], without: frozenset[str] = frozenset()) -> None:
        """without : faults taken out of the catalogue."""
        self.probes, self.answers = probes, answers
        self.ids = (RIGHT, *faults())
        self.in_use = np.array([id not in without for id in self.ids])
        self.all = [replays(layer.key) for layer in probes]
        both = list(zip(probes, answers, self.all, strict=True))
        self.z = [distances(layer, got, r.values, r.forms) for layer, got, r in both]  # (F, tensors) each
        self.worst = (
            np.max([z.max(axis=1) for z in self.z], axis=0) if probes else np.full(len(self.ids), np.inf)
        )
        self.wrong = [z[0] for z in self.z]  # the right layer's row: what is wrong, (tensors,) each

    @property
    def is_right(self) -> bool:
        """Whether no answer is further than LIMIT from the truth."""
        return bool(self.worst[0] <= LIMIT)

    def effect(self, index: int) -> float:
        """How far a replay is from the truth, at most, on the probes that were answered."""
        return max(float(z[index].max()) for z in self.effects())

    def effects(self) -> list[HostArray]:
        """How far every replay is from the truth, (F, tensors) for each probe."""
        return [_effects(layer.key) for layer in self.probes]

    def single(self) -> list[Match]:
        """The accepted names, in classes, nearest first; the right layer counts as one."""
        found = np.flatnonzero((self.worst <= LIMIT) & self.in_use)
        hidden = [int(i) for i in found] if self.is_right else []
        return self._leaning(hidden) or self._classes([int(i) for i in found])

    def _leaning(self, hidden: list[int]) -> list[Match]:
        """Faults below the noise of every entry towards which all entries together lean; none of precision."""
        found = []
        for index in hidden:
            if not index or faults()[self.ids[index]].kind == "precision":
                continue
            along = size = 0.0
            for layer, got, r in zip(self.probes, self.answers, self.all, strict=True):
                _, sigma, _ = _scales(layer.key)
                effect, error = (r.values[index] - r.values[0]) / sigma, (got.values - r.values[0]) / sigma
                use = np.isfinite(effect) & np.isfinite(error)
                along += float(effect[use] @ error[use])
                size += float(effect[use] @ effect[use])
            spread = 1 / sqrt(size) if size else inf
            share = along * spread * spread  # (diagnosis.4)
            if share > LIMIT * spread and abs(share - 1) <= LIMIT / 3 * spread:
                found.append(index)
        return self._classes(found)

    def _classes(self, found: list[int]) -> list[Match]:
        classes: list[list[int]] = []
        for i in sorted(found, key=lambda i: float(self.worst[i])):
            home = next((group for group in classes if self._alike(group[0], i)), None)
            if home is None:
                classes.append([i])
            else:
                home.append(i)
        return [Match(tuple(self.ids[i] for i in sorted(g)), float(self.worst[g[0]])) for g in classes]

    def _alike(self, one: int, other: int) -> bool:
        for layer, r, got in zip(self.probes, self.all, self.answers, strict=True):
            first = Seen(
                r.values[one],
                tuple("-" if a == "-" else b for a, b in zip(got.forms, r.forms[one], strict=True)),
            )
            if distances(layer, first, r.values[[other]], [r.forms[other]]).max() > LIMIT:
                return False
        return True

    def rounded(self) -> list[Match]:
        """The fault of precision that explains nearly all entries; a few may round the other way."""
        found = []
        for index, id in enumerate(self.ids):
            if index and self.in_use[index] and faults()[id].kind == "precision":
                share = self._explained(index)
                if share >= 0.9:
                    found.append(Match((id,), float(self.worst[index]), share))
        return sorted(found, key=lambda match: -match.share)[:1]

    def _explained(self, index: int) -> float:
        """The share of the entries that are wrong, or should be, on which replay and answer agree.

        0 where it is less than a third in some tensor, or where forms differ.
        """
        hit = total = 0
        for layer, got, r, z in zip(self.probes, self.answers, self.all, self.z, strict=True):
            if np.isinf(z[index]).any():
                return 0.0
            starts, _, _ = _scales(layer.key)
            wrong = entries(layer, got.values, r.values[0]) > LIMIT
            wrong |= entries(layer, r.values[0], r.values[index]) > LIMIT
            near = wrong & (entries(layer, got.values, r.values[index]) <= LIMIT)
            hits, asked = np.add.reduceat(near, starts, dtype=int), np.add.reduceat(wrong, starts, dtype=int)
            if (3 * hits < asked).any():
                return 0.0
            hit, total = hit + int(hits.sum()), total + int(asked.sum())
        return hit / total if total else 0.0

    def nearest(self) -> Match | None:
        """The fault that explains most of the wrong entries, where it explains more than half of them."""
        best: Match | None = None
        indices = np.flatnonzero(self.in_use)[1:]
        hits, total = np.zeros(len(indices), int), 0
        for layer, got, r in zip(self.probes, self.answers, self.all, strict=True):
            wrong = entries(layer, got.values, r.values[0]) > LIMIT
            ours = entries(layer, got.values, r.values[indices]) <= LIMIT  # (F, L)
            hits += ours[:, wrong].sum(axis=1) - (~ours[:, ~wrong]).sum(axis=1)
            total += int(wrong.sum())
        for index, hit in zip(indices, hits.tolist(), strict=True):
            if total and hit > max(total / 2, best.share * total if best else 0):
                best = Match((self.ids[index],), float(self.worst[index]), hit / total)
        return best


@cache
def _effects(key: Key) -> HostArray:
    layer, r = probe(*key), replays(key)
    return distances(layer, Seen(r.values[0], r.forms[0]), r.values, r.forms)
