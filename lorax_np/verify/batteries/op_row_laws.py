"""Laws of losses, lookups and routers: rows, labels, shares.  Which they are: specs/modelops.md."""

from functools import partial
from math import log
from typing import Any

import numpy as np

from .edges import off
from .op_case import IGNORED, OpCase
from .op_pairs import Laws, grid, nothing, paired
from .ops import both_bounds, fitting

# ---- losses ------------------------------------------------------------------------------------------------


def _same(subject: Any, one: OpCase, other: OpCase, rows: Any = slice(None), factor: float = 1.0) -> str | None:
    """The loss and gz of one are those of another, times a factor, with gz's rows taken."""
    got, want, first, second = (
        fitting(subject, one),
        fitting(subject, other),
        both_bounds(one),
        both_bounds(other),
    )
    wrong = off("loss", got["y"], factor * want["y"], first["y"] + abs(factor) * second["y"])
    if wrong or "z" not in got or "z" not in want:
        return wrong
    limit = first["z"] + abs(factor) * second["z"][rows]
    return off("gz", got["z"], factor * want["z"][rows], limit)


def _shuffled(subject: Any, case: OpCase) -> str | None:
    """Rows in another order, each with its label."""
    order = np.random.default_rng(3).permutation(len(case.z))
    return _same(subject, case.moved(z=case.z[order], labels=case.labels[order]), case, order)


def _lifted(subject: Any, case: OpCase) -> str | None:
    """Logits of a row moved by one number."""
    case = case.moved(z=grid(case.z))
    return _same(subject, case.moved(z=case.z + 1024 * (1 + np.arange(len(case.z)))[:, None]), case)


def _halved(subject: Any, case: OpCase) -> str | None:
    """Twice the labels in the whole step, half of each loss and gradient."""
    return _same(subject, case.under(n=2 * case.n), case, factor=0.5)


def _unlabelled(subject: Any, case: OpCase) -> str | None:
    """Without the rows that have no label nothing changes, and those have no gradient, exactly."""
    has = case.labels != IGNORED
    some = case.moved(z=case.z[has], labels=case.labels[has])
    got = fitting(subject, case)
    if "z" in got and got["z"][~has].any():
        return "gz of a row without a label is not 0"
    limit = both_bounds(case)["y"] + both_bounds(some)["y"]
    return off("loss", got["y"], fitting(subject, some)["y"], limit)


def _balanced(subject: Any, case: OpCase) -> str | None:
    """Each row of gz adds up to 0, and is that of gy times as much."""
    got, bound = fitting(subject, case), both_bounds(case)
    if "z" not in got:
        return None
    wrong = nothing("Σ gz", got["z"].sum(axis=1), bound["z"].sum(axis=1))
    twice = OpCase("", case.kind, case.op, case.at, np.asarray(-2 * case.gy), case.options)
    return wrong or off("gz", fitting(subject, twice)["z"], -2 * got["z"], 4 * bound["z"])


def _even(subject: Any, case: OpCase) -> str | None:
    """Logits that are all alike cost log V a label, whatever the smoothing."""
    flat = case.moved(z=0 * case.z)
    want = np.sum(case.labels != IGNORED) * log(case.z.shape[1]) / case.n
    return off("loss", fitting(subject, flat)["y"], np.float64(want), both_bounds(flat)["y"])


def _spread(subject: Any, case: OpCase) -> str | None:
    """λ spreads a share of the label over all V: ℓ(λ) = (1 − λ)ℓ(0) + λ·the mean of ℓ(0) over all labels."""
    sharp, V, keep = case.under(smoothing=0.0), case.z.shape[1], case.labels != IGNORED
    cases = [sharp, *(sharp.moved(labels=np.where(keep, v, IGNORED)) for v in range(V))]
    own, *others = (fitting(subject, one)["y"] for one in cases)
    want = (1 - case.smoothing) * own + case.smoothing * np.mean(others, axis=0)
    limit = both_bounds(case)["y"] + np.max([both_bounds(one)["y"] for one in cases], axis=0)
    return off("loss", fitting(subject, case)["y"], want, limit)


# ---- lookup and router -------------------------------------------------------------------------------------


def _added_up(subject: Any, case: OpCase) -> str | None:
    """gW adds up to gy, what stands at padding left out; a row that nobody looked up, and padding's, is 0."""
    got, bound = fitting(subject, case), both_bounds(case)
    if "W" not in got:
        return None
    counted = case.ids != (-1 if case.padding is None else case.padding)
    idle = np.setdiff1d(np.arange(len(case.W)), case.ids[counted])
    if got["W"][idle].any():
        return "gW of a row that was not looked up, or of padding, is not 0"
    want = case.gy[counted].astype(np.float64).sum(axis=0)
    return off("Σ gW", got["W"].sum(axis=0), want, bound["W"].sum(axis=0))


def _twice(subject: Any, case: OpCase) -> str | None:
    """Ids that are given twice give twice the gradient."""
    both = case.at | {"ids": np.tile(case.ids, 2)}
    twice = OpCase("", case.kind, case.op, both, np.tile(case.gy, (2, 1)), case.options)
    got, want = fitting(subject, twice), fitting(subject, case)
    if "W" not in got or "W" not in want:
        return None
    return off("gW", got["W"], 2 * want["W"], both_bounds(twice)["W"] + 2 * both_bounds(case)["W"])


def _copied(subject: Any, case: OpCase) -> str | None:
    """y is W[ids], bit by bit."""
    return off("y", fitting(subject, case)["y"], case.W[case.ids].astype(np.float64), 0.0)


def _shares(subject: Any, case: OpCase) -> str | None:
    """Logits log 1, log 3, log 1, log 5: of two that are kept 5/8 and 3/8, or ½ and 3/10 of all."""
    z = np.log(np.asarray([[1.0, 3.0, 1.0, 5.0]])).astype(case.dtype)
    known = OpCase("", case.kind, case.op, {"z": z}, np.ones_like(z), case.options | {"k": 2})
    want = np.asarray([[0, 0.375, 0, 0.625]]) if case.normalised else np.asarray([[0, 0.3, 0, 0.5]])
    slack = both_bounds(known)["y"] + 4 * np.finfo(case.dtype).eps * want  # logarithms are rounded
    return off("y", fitting(subject, known)["y"], want, slack)


def _first(subject: Any, case: OpCase) -> str | None:
    """Of logits that are alike the first ones are kept."""
    y = fitting(subject, case.moved(z=0 * case.z + 1))["y"]
    wrong = y[:, : case.k].all() and not y[:, case.k :].any()
    return None if wrong else f"kept {np.flatnonzero(y[0]).tolist()} of {y.shape[1]} alike, wanted {case.k}"


def _raised(subject: Any, case: OpCase) -> str | None:
    """Logits of a token moved by one number: the same weights; and its gradient adds up to 0."""
    case = case.moved(z=grid(case.z))
    other = case.moved(z=case.z + 8)
    got, want, one, two = fitting(subject, other), fitting(subject, case), both_bounds(other), both_bounds(case)
    wrong = off("y", got["y"], want["y"], one["y"] + two["y"])
    if wrong or "z" not in got or "z" not in want:
        return wrong
    return nothing("Σ gz", got["z"].sum(axis=1), one["z"].sum(axis=1))


def _reordered(subject: Any, case: OpCase) -> str | None:
    """Experts in another order: the weights and gradients in that order."""
    order = np.roll(np.arange(case.z.shape[1]), 2)
    other = OpCase("", case.kind, case.op, {"z": case.z[:, order]}, case.gy[:, order], case.options)
    got, want, bound = fitting(subject, other), fitting(subject, case), both_bounds(case)
    for name in ("y", "z"):
        if name in got and name in want:
            wrong = off(name, got[name], want[name][:, order], 2 * bound[name][:, order])
            if wrong:
                return wrong
    return None


ROW_LAWS: dict[str, Laws] = {
    "cross_entropy": (
        ("odd", "rows in another order, each with its label", _shuffled),
        ("odd", "logits of a row moved by one number", _lifted),
        ("odd", "twice the labels in the step, half the loss", _halved),
        ("odd", "rows without a label count for nothing", _unlabelled),
        ("smooth", "gradients of a row add up to 0", _balanced),
        ("smooth", "logits that are alike cost log V", _even),
        ("smooth", "a share of the label spread over all", _spread),
    ),
    "lookup": (
        ("padding", "gradients add up, and none is where no id is", _added_up),
        ("repeated", "ids given twice give twice the gradient", _twice),
        ("repeated", "y is rows of W to the bit", _copied),
        ("repeated", "y is linear in W", partial(paired, ("W",))),
    ),
    "router": (
        ("odd", "shares of known logits", _shares),
        ("of all", "shares of known logits among all", _shares),
        ("ties", "of equal logits the first are kept", _first),
        ("odd", "logits of a token moved by one number", _raised),
        ("of all", "all logits of a token moved by one number", _raised),
        ("odd", "experts in another order", _reordered),
        ("of all", "all experts in another order", _reordered),
    ),
}
