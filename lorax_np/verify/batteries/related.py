"""Related forms of the update: VeRA's shared factors, AdaLoRA's three, and trained rows of an embedding.

The first two are LoRA of factors that are products: λ_d∘A and λ_b∘B, E∘A and B. So their truth is the engine's
linear layer in float64 and the chain rule through these products. Each is held to laws besides, which ask the
subject about itself: related_laws.py. Equations: specs/vera.md, specs/adalora.md, specs/tokens.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ... import Adapter, Linear, lora_linear_backward, lora_linear_forward
from ..bounds.worst import FEW
from ..cases import PROFILES, UNIT
from ..report import Check
from .related_case import SHAPES, Named, RelatedCase, RelatedReference, draw, factor
from .tensors import Absent, Crash, ask, by_name, chosen, judge, refusal

WIDE = np.float64
COLUMNS = "y", "x", "A", "B"  # of a report's table
GRADIENTS = {
    "vera": ("x", "lambda_d", "lambda_b"),
    "adalora": ("x", "A", "B", "E"),
    "tokens": ("T",),
}


def truth(case: RelatedCase) -> Named:
    """In float64: LoRA of the products with its gradients taken through them, or the table written out."""
    v = {name: value.astype(WIDE) if value.dtype.kind == "f" else value for name, value in case.at.items()}
    gy = case.gy.astype(WIDE)
    if case.form == "tokens":
        right = RelatedReference()
        wide = replace(case, at=v)
        return {"y": right.tokens_forward(wide), **right.tokens_backward(wide, gy)}
    vera = case.form == "vera"
    A = (v["lambda_d"] if vera else v["E"])[:, None] * v["A"]
    B, s = (v["lambda_b"][:, None] * v["B"], 1.0) if vera else (v["B"], factor(case))
    base, adapter, mask = Linear(v["W"]), Adapter(A, B), v.get("mask")
    y, saved = lora_linear_forward(v["x"], base, adapter, scaling=s, mask=mask)
    gx, g = lora_linear_backward(gy, saved, base, adapter, scaling=s)
    gA, gB = np.asarray(g.A), np.asarray(g.B)
    found: dict[str, Any] = {"y": y, "x": gx}
    if vera:
        found |= {"lambda_d": (gA * v["A"]).sum(axis=1), "lambda_b": (gB * v["B"]).sum(axis=1)}
    else:
        found |= {"A": v["E"][:, None] * gA, "B": gB, "E": (gA * v["A"]).sum(axis=1)}
    return {name: np.asarray(value) for name, value in found.items()}


def related_bounds(case: RelatedCase, u: float) -> Named:
    """The most that roundings of size u explain: γ of the terms.  (vera.16), (adalora.22), (tokens.10)"""
    absolute = replace(case, at={k: np.abs(v) if v.dtype.kind == "f" else v for k, v in case.at.items()})
    absolute = replace(
        absolute, at={k: v.astype(WIDE) if v.dtype.kind == "f" else v for k, v in absolute.at.items()}
    )
    size = truth(replace(absolute, gy=np.abs(case.gy), alpha=abs(case.alpha)))
    N = case.gy.size // case.gy.shape[-1]
    if case.form == "tokens":
        count = {"y": 0, "T": N}
    else:
        (d_out, d_in), r = case.at["W"].shape, len(case.at["A"])
        count = {"y": d_in + r, "x": d_out + r, "A": d_out + N, "B": d_in + N, "E": d_out + d_in + N}
        count |= {"lambda_d": d_out + d_in + N, "lambda_b": d_in + r + N}
    return {name: gamma(count[name] + FEW, u) * value for name, value in size.items()}


def gamma(count: int, u: float) -> float:
    """γ of some roundings of size u."""
    return count * u / (1 - count * u)


def cases(subject: Any, battery: str, profile: str, seed: int, level: str, only: str) -> Iterator[RelatedCase]:
    """The cases of the forms that a subject offers."""
    for i, form in enumerate(GRADIENTS):
        if hasattr(subject, f"{form}_forward"):
            for j in range(len(SHAPES)):
                for k in range(1 if level == "quick" else 3):
                    id = f"{battery.replace(' ', '-')}/{form}/{j}" + (f"-{k}" if k else "")
                    if chosen(id, only):
                        yield draw(id, form, j, PROFILES[profile], (seed, 71, i, j, k))


def battery_related(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """y and every gradient of each form that a subject offers, against the truth."""
    dtype = PROFILES[profile]
    for case in cases(subject, "related", profile, seed, level, only):
        try:
            got = answer(subject, case)
        except (Absent, Crash) as error:
            yield [Check(f"{case.id}/y", "related", case.kind, "y", refusal(error), note=str(error))]
            continue
        want, bound = truth(case), related_bounds(case, UNIT[dtype])
        for name, more in related_bounds(case, UNIT["float64"]).items():
            bound[name] = bound[name] + more
        yield [
            _shown(judge(case.id, "related", case.kind, name, got.get(name), want[name], bound[name], dtype))
            for name in want
        ]


def _shown(check: Check) -> Check:
    """A gradient that has no column of its own in a report stands among the laws."""
    if check.tensor in COLUMNS:
        return check
    return replace(check, tensor=f"the gradient by {check.tensor}", ratio=None)


def answer(subject: Any, case: RelatedCase) -> Named:
    """y and the gradients that a subject gives."""
    y = by_name(f"{case.form}_forward", {"y": ask(subject, f"{case.form}_forward", case.copy())}, ("y",))
    again = case.copy()
    found = ask(subject, f"{case.form}_backward", again, again.gy)
    return y | by_name(f"{case.form}_backward", found, GRADIENTS[case.form])
