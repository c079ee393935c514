"""Laws of attention: means, heads, sequences alone, what the softmax does not see, buckets as a table."""

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from .edges import off
from .op_case import OpCase
from .op_pairs import Laws, grid, nothing, paired, pairing
from .ops import both_bounds, fitting

BUCKETS = {  # of s − t, of the two tables that are drawn, for distances up to 7
    True: {
        0: 0,
        **{-d: b for d, b in enumerate((1, 2, 2, 2, 2, 3, 3), 1)},
        **{1: 5, 2: 6, 3: 6, 4: 6, 5: 6, 6: 7, 7: 7},
    },
    False: {0: 0, **{-d: b for d, b in enumerate((1, 2, 3, 3, 4, 4, 5), 1)}, **dict.fromkeys(range(1, 8), 0)},
}


def _seen(case: OpCase) -> list[tuple[int, list[int]]]:
    """Each query and the keys that it sees, by counting."""
    found = []
    for (a, b), (c, d) in zip(pairwise(case.starts), pairwise(case.key_starts), strict=True):
        for t in range(a, b):
            last = d - (b - 1 - t) if case.causal else d  # one past the last key
            first = c if case.window is None else max(c, d - (b - 1 - t) - case.window)
            found.append((t, list(range(first, last))))
    return found


def _mean(subject: Any, case: OpCase) -> str | None:
    """Where all scores are alike o is the mean of the v that are seen."""
    alike = case.moved(q=0 * case.q)
    group = case.q.shape[1] // case.k.shape[1]
    v = np.repeat(case.v.astype(np.float64), group, axis=1)
    want = np.array([v[keys].mean(axis=0) for _, keys in _seen(case)])
    return off("y", fitting(subject, alike)["y"], want, both_bounds(alike)["y"])


def _scale(subject: Any, case: OpCase) -> str | None:
    """q doubled under half the scale: the same y, and half the gradient by q."""
    other = case.moved(q=2 * case.q).under(scale=case.scale / 2)
    got, want, bound = fitting(subject, other), fitting(subject, case), both_bounds(case)
    for name, factor in (("y", 1), ("q", 2), ("k", 1)):
        if name in got and name in want:
            wrong = off(name, factor * got[name], want[name], 2 * bound[name])
            if wrong:
                return wrong
    return None


def _copies(subject: Any, case: OpCase) -> str | None:
    """A key head is as good as copies of it, one for each of its query heads; gradients of copies add up."""
    (M, K, D), group = case.k.shape, case.q.shape[1] // case.k.shape[1]
    many = OpCase("", case.kind, case.op, case.at | _repeated(case, group), case.gy, case.options)
    got, want, one, two = fitting(subject, many), fitting(subject, case), both_bounds(many), both_bounds(case)
    wrong = off("y", got["y"], want["y"], one["y"] + two["y"])
    for name in ("k", "v") if wrong is None else ():
        if name in got and name in want:
            added, limit = (x[name].reshape(M, K, group, D).sum(axis=2) for x in (got, one))
            wrong = wrong or off(f"g{name}", added, want[name], limit + two[name])
    return wrong


def _repeated(case: OpCase, group: int) -> dict[str, Any]:
    return {name: np.repeat(case.at[name], group, axis=1) for name in ("k", "v")}


def _alone(subject: Any, case: OpCase) -> str | None:
    """Each sequence by itself gives what it gave beside the others."""
    whole, bound = fitting(subject, case), both_bounds(case)
    for (a, b), (c, d) in zip(pairwise(case.starts), pairwise(case.key_starts), strict=True):
        if a == b:
            continue
        parts = {"q": slice(a, b), "k": slice(c, d), "v": slice(c, d), "y": slice(a, b)}
        at = {name: v[parts[name]] for name, v in case.at.items() if name in parts}
        options = case.options | {"starts": (0, b - a), "key_starts": (0, d - c)}
        one = OpCase("", case.kind, case.op, case.at | at, case.gy[a:b], options)
        got = fitting(subject, one)
        for name, rows in parts.items():
            if name in got and name in whole:
                wrong = off(name, got[name], whole[name][rows], 2 * bound[name][rows])
                if wrong:
                    return f"sequence at {a}: {wrong}"
    return None


def _blind(subject: Any, case: OpCase) -> str | None:
    """The same number on all scores changes nothing: Σ gk = 0 over keys, Σ gR = 0 over buckets."""
    q = np.array(case.q)
    q[:, :, 0] = 1
    case = case.moved(q=q, k=grid(case.k))
    lifted = np.array(case.k)
    lifted[:, :, 0] += 4096
    other = case.moved(k=lifted)
    got, want, one, two = fitting(subject, other), fitting(subject, case), both_bounds(other), both_bounds(case)
    wrong = off("y", got["y"], want["y"], one["y"] + two["y"])
    for name in ("k", "R"):
        if wrong is None and name in want:
            wrong = nothing(f"Σ g{name}", want[name].sum(axis=0), two[name].sum(axis=0))
    return wrong


def _turns(subject: Any, case: OpCase) -> str | None:
    """Scores know q and k through their product alone: ⟨gq, q⟩ = ⟨gk, k⟩."""
    got, bound = fitting(subject, case), both_bounds(case)
    if "q" not in got or "k" not in got:
        return None
    limit = sum(pairing(np.abs(case.at[name]), bound[name]) for name in ("q", "k"))
    return off("⟨gq, q⟩", pairing(got["q"], case.q), pairing(got["k"], case.k), limit)


def _table(subject: Any, case: OpCase) -> str | None:
    """With q = 0 the bias alone weighs keys, each distance by its bucket; the buckets are listed."""
    alone, R = case.moved(q=0 * case.q), case.R.astype(np.float64)
    want, group = np.empty(case.q.shape), case.q.shape[1] // case.k.shape[1]
    v = np.repeat(case.v.astype(np.float64), group, axis=1)
    first = {t: a for a, b in pairwise(case.starts) for t in range(a, b)}
    for t, keys in _seen(case):
        numbers = [BUCKETS[case.bidirectional][s - t] for s in keys]
        e = np.exp(R[numbers])  # (keys, H)
        want[t] = np.sum(e[:, :, None] * v[keys], axis=0) / e.sum(axis=0)[:, None]
        if first[t] != keys[0]:
            return "a sequence that sees another's keys"
    return off("y", fitting(subject, alone)["y"], want, both_bounds(alone)["y"])


ATTENTION_LAWS: Laws = (
    ("grouped", "scores that are alike give the mean of what is seen", _mean),
    ("whole", "scores that are alike give the mean of all", _mean),
    ("window", "scores that are alike give the mean of the window", _mean),
    ("cross", "scores that are alike give the mean of the other sequence", _mean),
    ("cached", "queries stand beside the last keys", _mean),
    ("grouped", "q doubled under half the scale", _scale),
    ("grouped", "a key head is as good as its copies", _copies),
    ("grouped", "sequences do not see each other", _alone),
    ("bias", "a bias does not cross sequences", _alone),
    ("grouped", "one number on all scores changes nothing", _blind),
    ("bias", "one number on all scores and biases changes nothing", _blind),
    ("grouped", "⟨gq, q⟩ = ⟨gk, k⟩", _turns),
    ("grouped", "y is linear in v", partial(paired, ("v",))),
    ("bias", "buckets as they are listed, both ways", _table),
    ("causal bias", "buckets as they are listed, backwards", _table),
)
