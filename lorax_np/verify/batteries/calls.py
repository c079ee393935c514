"""Checks of calls that follow one another: parameters that change, evaluation in between, sums of gradients."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ... import LoraConfig
from ..bounds.worst import bounds
from ..cases import PROFILES, UNIT, Case, HostArray, draw, under
from ..conventions import spec_of
from ..truths import truth
from .edges import Checks, law, off
from .laws import OF_TOKENS
from .tensors import GRADIENTS, NOT_OFFERED, Absent, Crash, answer, ask, by_name, chosen, offers, with_truth

WIDE = np.float64


def _arrays(method: str, found: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(found, tuple | list) or len(found) != count:
        raise Crash(f"{method}: expected {count} values, got {type(found).__name__}")
    return tuple(found)


def kinds_of(subject: Any) -> list[str]:
    """Plain LoRA, and DoRA as the subject differentiates it; detached where it does both."""
    norms = spec_of(subject).norm_gradient
    return ["lora", *(["dora"] if False in norms else ["dora full norm"] if True in norms else [])]


# ---- calls in sequence -----------------------------------------------------------------------------------


def battery_sequence(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Parameters that change between calls, evaluation after training, the same bits, gradients summed."""
    for kind in kinds_of(subject):
        case = draw(
            "", f"{kind}, dropout", (6, 8, 3, (5,)), PROFILES[profile], (seed, 41), p=0.4, bias="trained"
        )
        case = under(case, spec_of(subject))
        u = UNIT[case.x.dtype.name]
        quiet = case.undropped(0.4)
        later = replace(
            case, A=case.A[::-1].copy(), B=-case.B, x=case.x[::-1].copy(), config=_other(case.config)
        )

        def after_update(case: Case = case, later: Case = later, u: float = u) -> str | None:
            answer(subject, case)
            return _against(later, answer(subject, later), u)

        def evaluation(case: Case = case, quiet: Case = quiet, u: float = u) -> str | None:
            answer(subject, case)
            return off("y", answer(subject, quiet)["y"], truth.dense(quiet), 2 * bounds(quiet, u)["y"])

        def bits(case: Case = case) -> str | None:
            first = answer(subject, case)
            for _ in range(3):
                again = answer(subject, case)
                wrong = [name for name in first if first[name].tobytes() != again[name].tobytes()]
                if wrong:
                    return f"other bits: {', '.join(wrong)}"
            return None

        def summed(case: Case = case, later: Case = later, u: float = u) -> str | None:
            pair = (case, replace(case, gy=later.gy[::-1].copy()))
            into: dict[str, HostArray] = {}
            for one in pair:
                into = ask(subject, "accumulate", one.copy(), one.gy.copy(), into)
            want = truth.of(replace(truth.widened(case), gy=pair[0].gy.astype(WIDE) + pair[1].gy))
            limits = [with_truth(one, u) for one in pair]
            for name in ("A", "B"):  # each gradient's bound, and the rounding of their sum, which is less
                wrong = off(name, into.get(name, 0), want[name], 2 * (limits[0][name] + limits[1][name]))
                if wrong:
                    return wrong
            return None

        def complete(case: Case = case) -> str | None:
            missing = [n for n in case.wanted if offers(subject, n) and n not in answer(subject, case)]
            return f"no gradient by {', '.join(missing)}" if missing else None

        runs = {
            "after an update, the new parameters count": after_update,
            "evaluation drops nothing": evaluation,
            "the same bits again": bits,
            "every trained array has a gradient": complete,
        }
        if hasattr(subject, "accumulate"):
            runs["gradients of two calls add up"] = summed
        for i, (name, run) in enumerate(runs.items()):
            id = f"sequence/{kind.replace(' ', '-')}/{i}"
            if chosen(id, only):
                yield law(id, "sequence", kind, name, run)


def _other(config: LoraConfig) -> LoraConfig:
    """The same with another α."""
    return replace(config, lora_alpha=config.lora_alpha * 1.7)


def _against(case: Case, got: dict[str, HostArray], u: float) -> str | None:
    want = truth.of(case)
    limit = with_truth(case, u)
    wrong = (off(name, got[name], want[name], 2 * limit[name]) for name in want if name in got)
    return next((line for line in wrong if line), None)


def battery_training(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Ten steps of plain gradient descent by the subject, against the same steps by complex steps in float64.

    A layer that keeps anything from one step to the next, or writes into what it was given, walks elsewhere.
    """
    for kind in ("lora, dropout", *kinds_of(subject)[1:]):
        id = f"training/{kind.replace(', ', '-').replace(' ', '-')}/0"
        if chosen(id, only):
            case = draw(id, kind, (4, 5, 2, (6,)), PROFILES[profile], (seed, 42), p=0.4)
            case = under(case, spec_of(subject))
            yield law(id, "training", kind, "ten steps of descent", partial(_walked, subject, case))


RATE, STEPS = 0.005, 10


def _walked(subject: Any, case: Case) -> str | None:
    """Where the subject's parameters end, against the truth's. The subject keeps its arrays, as training does.

    A step adds at most RATE times its gradient's bound, and the rounding of the parameters which the
    gradient was taken at; what is there already grows by RATE times the curvature, together less than twofold.
    """
    u = UNIT[case.x.dtype.name]
    trained = [name for name in ("A", "B", "m") if getattr(case, name) is not None]
    mine = {name: getattr(case, name).astype(WIDE) for name in trained}
    right, given = dict(mine), case.copy()
    limit = {name: np.zeros(mine[name].shape) for name in trained}
    for i in range(STEPS):
        for name in trained:
            getattr(given, name)[...] = mine[name]
        if i % 3 == 2 and case.mask is not None:  # an evaluation comes in between
            _of(subject, given.undropped())
        g = _of(subject, given)
        at = replace(case, **{name: value.astype(WIDE) for name, value in right.items()})
        want = truth.gradients(at) if case.x.dtype == WIDE else truth.derived(at)
        allowed = bounds(at, u)
        for name in trained:
            if not offers(subject, name):
                raise Absent(NOT_OFFERED)
            if name not in g or g[name].dtype.kind != "f":
                return f"no gradient by {name}" if name not in g else f"{name}: got {g[name].dtype}"
            mine[name] = mine[name] - RATE * g[name].astype(WIDE)
            right[name] = right[name] - RATE * want[name]
            limit[name] = limit[name] + RATE * allowed[name] + u * np.abs(right[name]).max()
    return next((w for name in trained if (w := off(name, mine[name], right[name], 2 * limit[name]))), None)


def _of(subject: Any, case: Case) -> dict[str, HostArray]:
    """The gradients of a call that is handed the case's own arrays; of its halves, where they add up."""
    if hasattr(subject, "accumulate"):
        into: dict[str, Any] = {}
        for part in (slice(0, 3), slice(3, None)):
            tokens: Any = {name: value[part] for name, value in case.arrays().items() if name in OF_TOKENS}
            half = replace(case, **tokens)
            into = ask(subject, "accumulate", half, half.gy, into)
        found: Any = {name: value for name, value in into.items() if name != "x"}
    elif hasattr(subject, "run"):
        found = _arrays("run", ask(subject, "run", case, case.gy), 2)[1]
    else:
        ask(subject, "forward", case)
        found = ask(subject, "backward", case, case.gy)
    return by_name("backward", found, GRADIENTS)
