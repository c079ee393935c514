"""The smallest layer of the lattice on which a subject is still wrong: a textbook case, to read by hand."""

from typing import Any

import numpy as np

from ..batteries.lattice import BITS, Lattice, cast, draw, judge_lattice
from ..cases import Case
from ..conventions import spec_of
from ..precision import PRECISIONS


def smallest(subject: Any, case: Case, profile: str = "fp32") -> tuple[Case, dict[str, Any]] | None:
    """The smallest lattice case on which the subject still fails, and what it is made of.

    Greedy: one parameter at a time goes to the least value that is still answered wrongly, until none moves.
    Returns None where no lattice case with this one's parameters fails.
    """
    dtype, c = PRECISIONS[profile].dtype, case.config
    now: dict[str, Any] = {
        "d_out": case.W.shape[0],
        "d_in": case.W.shape[1],
        "r": c.r,
        "lead": case.x.shape[:-1],
        "s": 1.5,
        "rslora": c.use_rslora and c.r in (1, 4, 16),
        "p": 0.0 if case.mask is None else 0.5,
        "bias": "absent" if case.b is None else "trained" if case.train_b else "frozen",
        "lora_bias": case.bB is not None,
    }
    mode = case.kind.partition(",")[0]

    def fails(parameters: dict[str, Any]) -> Lattice | None:
        p = dict(parameters)
        d_out, d_in, r, s, rslora = p.pop("d_out"), p.pop("d_in"), p.pop("r"), p.pop("s"), p.pop("rslora")
        alpha = s * (r**0.5 if rslora else r)
        shape = (d_out, d_in, r, p.pop("lead"))
        for seed in range(3):  # the first numbers may hide the fault
            item = draw(
                "lattice/smallest",
                mode,
                shape,
                alpha=alpha,
                rslora=rslora,
                bits=BITS[dtype],
                seed=(seed,),
                spec=spec_of(subject),
                **p,
            )
            if item is None:
                continue
            if any(check.verdict in ("fail", "crash") for check in judge_lattice(subject, item, profile)):
                return item
        return None

    best = fails(now)
    while best is not None:
        moved = False
        for name in now:
            for value in _lesser(name, now):
                found = fails({**now, name: value})
                if found is not None:
                    best, now, moved = found, {**now, name: value}, True
                    break
        if not moved:
            return cast(best.case, dtype), {**now, "alpha": best.case.config.lora_alpha}
    return None


def _lesser(name: str, now: dict[str, Any]) -> list[Any]:
    """Simpler values of one parameter, the simplest first."""
    value = now[name]
    if name in ("d_out", "d_in", "r"):
        steps = (1, 4, 16) if name == "r" and now["rslora"] else (1, 2, 3, value // 2, value - 1)
        return sorted({step for step in steps if 0 < step < value})
    if name == "lead":
        less: list[tuple[int, ...]] = [(0,), (1,), (2,), (3,), (4,), (5,), (int(np.prod(value)),)]
        return [
            lead for lead in less if lead != value and (np.prod(lead), len(lead)) < (np.prod(value), len(value))
        ]
    order: dict[str, tuple[Any, ...]] = {
        "s": (1.0, 0.5, 1.5),
        "rslora": (False, True),
        "p": (0.0, 0.5),
        "bias": ("absent", "frozen", "trained"),
        "lora_bias": (False, True),
    }
    return list(order[name][: order[name].index(value)])
