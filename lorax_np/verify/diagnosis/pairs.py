"""Two faults at once: which pairs of known faults explain what no single one does."""

from functools import lru_cache
from itertools import combinations

import numpy as np

from ..report import RIGHT
from .dictionary import LIMIT, Comparison, Match, distances, faults, replay
from .probe_layers import Key, Seen, probe

CLEAR = 2 * LIMIT  # an effect this far from the truth is seen through the roundings of an answer


def pairs(compared: Comparison) -> list[Match]:
    """Pairs that change no step in common and whose joint replay is accepted on every probe, in classes.

    Together they must touch all that is wrong, and at first neither may touch what is right; where that finds
    nothing, one may undo what the other does. Of those left most fall at the first probe.
    """
    return _accepted(compared, _candidates(compared)) or _accepted(compared, _candidates(compared, undone=True))


def _accepted(compared: Comparison, left: list[tuple[int, int]]) -> list[Match]:
    joint: dict[tuple[int, int], list[Seen]] = {pair: [] for pair in left}
    worst = dict.fromkeys(left, 0.0)
    order = sorted(range(len(compared.probes)), key=lambda i: -_told_apart(compared, i))
    for i in order:
        layer, got = compared.probes[i], compared.answers[i]
        rows = [_both(layer.key, *(compared.ids[f] for f in pair)) for pair in left]
        if not rows:
            return []
        z = distances(layer, got, np.stack([row.values for row in rows]), [row.forms for row in rows]).max(
            axis=1
        )
        for pair, row, away in zip(left, rows, z, strict=True):
            joint[pair].append(row)
            worst[pair] = max(worst[pair], float(away))
        left = [pair for pair, away in zip(left, z, strict=True) if away <= LIMIT]
    return _classes(compared, sorted(left, key=lambda pair: worst[pair]), joint, worst, order)


@lru_cache(maxsize=4096)  # at most some 30 MB; the same pairs come up at fault after fault
def _both(key: Key, one: str, other: str) -> Seen:
    """The replay of two faults at once on one probe."""
    first, second = (faults()[id].steps for id in (one, other))
    with np.errstate(all="ignore"):
        return replay(probe(*key), {**first, **second})


def _told_apart(compared: Comparison, i: int) -> int:
    """How many faults one probe shows at all, where the answer is wrong there."""
    shown = int((compared.effects()[i] > LIMIT).any(axis=1).sum())
    return shown if (compared.wrong[i] > LIMIT).any() else -shown


def _candidates(compared: Comparison, undone: bool = False) -> list[tuple[int, int]]:
    """Pairs whose own effects, tensor by tensor, are where the answer is wrong; unless undone, nowhere else."""
    effects = np.concatenate(compared.effects(), axis=1)  # (F, tensors of all probes)
    wrong = np.concatenate(compared.wrong)
    asked = np.array([form != "-" for got in compared.answers for form in got.forms])
    within = (
        np.full(len(effects), True) if undone else ~((effects > CLEAR) & (wrong <= LIMIT) & asked).any(axis=1)
    )
    some = [
        f
        for f, id in enumerate(compared.ids)
        if id != RIGHT
        and within[f]
        and compared.in_use[f]
        and faults()[id].steps is not None
        and (effects[f] > LIMIT).any()
    ]
    must = wrong > CLEAR
    found = []
    for one, other in combinations(some, 2):
        if not ((effects[one] > LIMIT / 2) | (effects[other] > LIMIT / 2))[must].all():
            continue
        if not faults()[compared.ids[one]].steps.keys() & faults()[compared.ids[other]].steps.keys():
            found.append((one, other))
    return found


def _classes(
    compared: Comparison,
    found: list[tuple[int, int]],
    joint: dict[tuple[int, int], list[Seen]],
    worst: dict[tuple[int, int], float],
    order: list[int],
) -> list[Match]:
    classes: list[list[tuple[int, int]]] = []
    for pair in found:
        for group in classes:
            if all(
                distances(compared.probes[i], first, mine.values[None], [mine.forms]).max() <= LIMIT
                for i, first, mine in zip(order, joint[group[0]], joint[pair], strict=True)
            ):
                group.append(pair)
                break
        else:
            classes.append([pair])
    return [
        Match(tuple(f"{compared.ids[a]} + {compared.ids[b]}" for a, b in group), worst[group[0]])
        for group in classes
    ]
