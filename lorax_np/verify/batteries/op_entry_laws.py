"""Laws of norms, rope and activations: lengths, turns, odd parts.  Which they are: specs/modelops.md."""

from functools import partial
from typing import Any

import numpy as np

from ..cases import HostArray
from .edges import off
from .op_case import OpCase
from .op_pairs import Laws, grid, nothing, paired
from .ops import both_bounds, fitting

# ---- norms -------------------------------------------------------------------------------------------------


def _root(row: tuple[float, ...], subject: Any, case: OpCase) -> str | None:
    """Of mean square, or variance, 9 under ε = 16: divided by 5."""
    x = np.tile(np.asarray(row), (5, 2))[:, : case.x.shape[1] // len(row) * len(row)]
    level = np.mean(x, axis=1, keepdims=True) if case.op == "layer_norm" else 0.0
    d = x.shape[1]
    new = {name: value[:d] for name, value in case.at.items() if name != "x"}
    known = OpCase(
        "", case.kind, case.op, case.at | new | {"x": x.astype(case.dtype)}, case.gy[:, :d], {"eps": 16.0}
    )
    want = (x - level) / 5 * known.w.astype(np.float64)
    want = want + known.b.astype(np.float64) if case.op == "layer_norm" else want
    return off("y", fitting(subject, known)["y"], want, both_bounds(known)["y"])


def _scaled(subject: Any, case: OpCase) -> str | None:
    """Rows times 4 under ε times 16."""
    other = case.moved(x=4 * case.x).under(eps=16 * case.eps)
    got, want, bound = fitting(subject, other), fitting(subject, case), both_bounds(case)
    wrong = off("y", got["y"], want["y"], 2 * bound["y"])
    if wrong or "x" not in got or "x" not in want:
        return wrong
    return off("gx", 4 * got["x"], want["x"], 2 * bound["x"])


def _radial(subject: Any, case: OpCase) -> str | None:
    """⟨gx, x⟩ = Σ gy∘y·ε/(⟨x²⟩ + ε) in each row: a norm forgets lengths but for ε.  (modelops.10)"""
    got, bound = fitting(subject, case), both_bounds(case)
    if "x" not in got:
        return None
    x, gy = case.x.astype(np.float64), case.gy.astype(np.float64)
    share = case.eps / (np.mean(x * x, axis=1) + case.eps)
    limit = np.sum(np.abs(x) * bound["x"] + np.abs(gy) * bound["y"], axis=1)
    return off("⟨gx, x⟩", np.sum(got["x"] * x, axis=1), share * np.sum(gy * got["y"], axis=1), limit)


def _level(subject: Any, case: OpCase) -> str | None:
    """A constant added to a row is taken off again, so that gx adds up to 0 in each."""
    case = case.moved(x=grid(case.x))
    other = case.moved(x=case.x + 2)
    got, want = fitting(subject, other), fitting(subject, case)
    one, two = both_bounds(other), both_bounds(case)
    wrong = off("y", got["y"], want["y"], one["y"] + two["y"])
    if wrong or "x" not in got:
        return wrong
    return nothing("Σ gx", got["x"].sum(axis=1), one["x"].sum(axis=1))


# ---- rope --------------------------------------------------------------------------------------------------


def placed(case: OpCase, positions: list[int], x: HostArray, theta: float | None = None) -> OpCase:
    """The case of these tokens at other positions, its tables with them."""
    theta, D = case.theta if theta is None else theta, x.shape[2]
    angle = np.asarray(positions)[:, None] * theta ** (-2 * np.arange(D // 2) / D)
    at = {"x": x, "cos": np.cos(angle), "sin": np.sin(angle)}
    new = {name: value.astype(case.dtype) for name, value in at.items()}
    new["positions"] = np.asarray(positions, np.int64)
    gy = np.resize(case.gy, x.shape).astype(case.dtype)
    return OpCase("", case.kind, "rope", new, gy, {"theta": theta})


def _length(subject: Any, case: OpCase) -> str | None:
    """The square of each head's length is what it was."""
    x, y, bound = case.x.astype(np.float64), fitting(subject, case)["y"], both_bounds(case)["y"]
    limit = np.sum((2 * np.abs(x) + np.abs(y - x) + bound) * bound, axis=2) + np.sum(
        2 * np.abs(y) * bound, axis=2
    )
    return off("‖y‖²", np.sum(y * y, axis=2), np.sum(x * x, axis=2), limit)


def _back(subject: Any, case: OpCase) -> str | None:
    """The gradient of a turned gradient is the gradient: gx of gy = y is x."""
    first = fitting(subject, case)
    if "x" not in first:
        return None
    y = first["y"].astype(case.dtype)
    again = OpCase("", case.kind, "rope", case.at, y, case.options)
    bound = both_bounds(again)
    limit = bound["x"] + joined_halves(bound["y"])
    return off("gx of y", fitting(subject, again)["x"], case.x.astype(np.float64), limit)


def joined_halves(bound: HostArray) -> HostArray:
    """What errors of y come to after another turn: those of both channels of a pair."""
    half = bound.shape[2] // 2
    both = bound[..., :half] + bound[..., half:]
    return np.concatenate([both, both], axis=2)


def _still(subject: Any, case: OpCase) -> str | None:
    """At position 0 nothing turns."""
    still = placed(case, [0] * len(case.x), case.x)
    return off("y", fitting(subject, still)["y"], case.x.astype(np.float64), both_bounds(still)["y"])


def _pairs(subject: Any, case: OpCase) -> str | None:
    """A channel alone comes out in itself and in its partner half a head on, which rises first."""
    D = case.x.shape[2]
    x = np.eye(D)[:, None, :].astype(case.dtype)
    y = fitting(subject, placed(case, [1] * D, x))["y"][:, 0]
    half = D // 2
    for i in range(D):
        others = [j for j in range(D) if j % half != i % half]
        partner = (i + half) % D
        if y[i, others].any():
            return f"channel {i} reaches channel {others[int(np.argmax(np.abs(y[i, others])))]}"
        if not y[i, partner] * (1 if i < half else -1) > 0:
            return f"channel {i} turns its partner {partner} to {y[i, partner]:.4g}"
    return None


def _distance(subject: Any, case: OpCase) -> str | None:
    """Products of two heads know how far apart they stand, and not where."""
    x = np.repeat(case.x[:1], 2, axis=0) * np.asarray([1.0, -0.5]).reshape(2, 1, 1).astype(case.dtype)
    found, limit = [], 0.0
    for first in (0, 5):
        pair = placed(case, [first, first + 3], x)
        y, bound = fitting(subject, pair)["y"], both_bounds(pair)["y"]
        found.append(np.sum(y[0] * y[1], axis=1))
        limit = limit + np.sum(np.abs(y[0]) * bound[1] + np.abs(y[1]) * bound[0] + bound[0] * bound[1], axis=1)
    return off("⟨y₀, y₁⟩", found[0], found[1], limit)


def _rates(subject: Any, case: OpCase) -> str | None:
    """For θ = 16 and four channels the second pair turns at a quarter of the first one's rate."""
    x = np.ones((1, 1, 4), case.dtype)
    slow, quick = (placed(case, [t], x, 16.0) for t in (12, 3))
    y, z = (fitting(subject, one)["y"] for one in (slow, quick))
    limit = both_bounds(slow)["y"][..., 1::2] + both_bounds(quick)["y"][..., 0::2]
    return off("pair 1 at position 12", y[..., 1::2], z[..., 0::2], limit)


# ---- activations -------------------------------------------------------------------------------------------

KNOWN = {  # y at u = 1 and u = −½, by tables
    "swiglu": (0.7310585786300049, -0.1887703343990727),
    "gelu": (0.8413447460685429, -0.15426876936299344),
    "gelu_tanh": (0.8411919906082768, -0.15428599017485606),
}


def _odd_part(subject: Any, case: OpCase) -> str | None:
    """y(u) − y(−u) = u, and so the slopes at u and −u add up to 1; times w where there is one."""
    other = case.moved(u=-case.u)
    got, back, bound = fitting(subject, case), fitting(subject, other), both_bounds(case)
    more = both_bounds(other)
    w = case.at.get("w", np.ones((), case.dtype)).astype(np.float64)
    wrong = off("y(u) − y(−u)", got["y"] - back["y"], case.u * w, bound["y"] + more["y"])
    if wrong or "u" not in got or "u" not in back:
        return wrong
    return off("gu + gu(−u)", got["u"] + back["u"], case.gy * w, bound["u"] + more["u"])


def _known(subject: Any, case: OpCase) -> str | None:
    """At 1 and −½ it is what tables say."""
    u = np.asarray([[1.0, -0.5]], case.dtype)
    at = {"u": u} | ({"w": np.ones_like(u)} if case.op == "swiglu" else {})
    known = OpCase("", case.kind, case.op, at, np.ones_like(u))
    return off("y", fitting(subject, known)["y"], np.asarray([KNOWN[case.op]]), both_bounds(known)["y"])


def _far(subject: Any, case: OpCase) -> str | None:
    """Far out it is u or nothing, its slope 1 or 0."""
    u = np.asarray([[-200.0, 200.0, -1000.0, 1000.0]], case.dtype)
    at = {"u": u} | ({"w": np.ones_like(u)} if case.op == "swiglu" else {})
    got = fitting(subject, OpCase("", case.kind, case.op, at, np.ones_like(u)))
    wrong = off("y", got["y"], np.maximum(u, 0), 1e-30)
    return wrong or (off("gu", got["u"], (u > 0).astype(np.float64), 1e-5) if "u" in got else None)


ENTRY_LAWS: dict[str, Laws] = {
    "rms_norm": (
        ("odd", "a row of mean square 9 under ε = 16 is divided by 5", partial(_root, (5.0, 1.0, -3.0, 1.0))),
        ("odd", "rows scaled with √ε stay as they are", _scaled),
        ("odd", "ε alone lets y know a row's length", _radial),
        ("odd", "y is linear in w", partial(paired, ("w",))),
    ),
    "layer_norm": (
        ("odd", "a row of variance 9 under ε = 16 is divided by 5", partial(_root, (5.0, -1.0, 5.0, -1.0))),
        ("odd", "rows scaled with √ε stay as they are", _scaled),
        ("odd", "a constant added to a row is lost", _level),
        ("odd", "y is linear in w and b", partial(paired, ("w", "b"))),
    ),
    "rope": (
        ("odd", "lengths stay", _length),
        ("odd", "backward turns back", _back),
        ("odd", "position 0 turns nothing", _still),
        ("odd", "channels turn in pairs half a head apart", _pairs),
        ("odd", "products know distances alone", _distance),
        ("odd", "rates fall as powers of θ", _rates),
    ),
    "swiglu": (
        ("odd", "its odd part is half of u", _odd_part),
        ("odd", "it is what tables say", _known),
        ("odd", "far out it is u or nothing", _far),
        ("odd", "y is linear in w", partial(paired, ("w",))),
    ),
    "gelu": (
        ("odd", "its odd part is half of u", _odd_part),
        ("odd", "it is what tables say", _known),
        ("odd", "far out it is u or nothing", _far),
    ),
    "gelu_tanh": (
        ("odd", "its odd part is half of u", _odd_part),
        ("odd", "it is what tables say", _known),
        ("odd", "far out it is u or nothing", _far),
    ),
}
