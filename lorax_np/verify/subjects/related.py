"""The engine's related forms as subjects: VeRA, AdaLoRA, trained rows, and combinations of adapters."""

from typing import Any

import numpy as np

from ... import (
    AdaLoraAdapter,
    Adapter,
    Embedding,
    Linear,
    TokenRows,
    VeraAdapter,
    VeraShared,
    adalora_linear_backward,
    adalora_linear_forward,
    combine,
    token_rows_backward,
    token_rows_forward,
    vera_linear_backward,
    vera_linear_forward,
)
from ..batteries.blended_case import METHODS, BlendCase
from ..batteries.related_case import RelatedCase


class Related:
    """The engine's related forms, and its combination of adapters, on NumPy."""

    def vera_forward(self, case: RelatedCase) -> Any:
        """y of VeRA."""
        return vera_linear_forward(case.at["x"], *_vera(case), mask=case.at.get("mask"))[0]

    def vera_backward(self, case: RelatedCase, gy: Any) -> dict[str, Any]:
        """The gradients by x and by both vectors."""
        _, saved = vera_linear_forward(case.at["x"], *_vera(case), mask=case.at.get("mask"))
        gx, g = vera_linear_backward(gy, saved, *_vera(case))
        return {"x": gx, "lambda_d": g.lambda_d, "lambda_b": g.lambda_b}

    def adalora_forward(self, case: RelatedCase) -> Any:
        """y of AdaLoRA."""
        how: Any = {"alpha": case.alpha, "rank": case.rank}
        return adalora_linear_forward(case.at["x"], *_adalora(case), **how, mask=case.at.get("mask"))[0]

    def adalora_backward(self, case: RelatedCase, gy: Any) -> dict[str, Any]:
        """The gradients by x, A, B and E."""
        how: Any = {"alpha": case.alpha, "rank": case.rank}
        _, saved = adalora_linear_forward(case.at["x"], *_adalora(case), **how, mask=case.at.get("mask"))
        gx, g = adalora_linear_backward(gy, saved, *_adalora(case), **how)
        return {"x": gx, "A": g.A, "B": g.B, "E": g.E}

    def tokens_forward(self, case: RelatedCase) -> Any:
        """y of trained rows."""
        return token_rows_forward(case.at["ids"], *_tokens(case))[0]

    def tokens_backward(self, case: RelatedCase, gy: Any) -> dict[str, Any]:
        """The gradient by the rows."""
        _, saved = token_rows_forward(case.at["ids"], *_tokens(case))
        return {"T": token_rows_backward(gy, saved, *_tokens(case)).rows}

    def blend(self, case: BlendCase) -> dict[str, Any]:
        """A and B of the combination, whose scaling is 1."""
        of, keeps, elects = METHODS[case.method]
        told: dict[str, Any] = {} if keeps == "all" else {"density": case.density}
        told |= {"majority_sign_method": case.majority} if elects else {}
        told |= {"rank": case.rank} if of == "update" else {}
        told |= {} if case.masks is None else {"rng": _Told(case)}
        names = [str(i) for i in range(len(case.pairs))]
        adapters = {name: Adapter(A, B) for name, (A, B) in zip(names, case.pairs, strict=True)}
        numbers = (dict(zip(names, v, strict=True)) for v in (case.weights, case.scalings))
        found, _ = combine(adapters, *numbers, method=case.method, **told)
        return {"A": found.A, "B": found.B}


class _Told(np.random.Generator):
    """Draws what a case's masks say: below every density where they keep, and above where they drop."""

    def __init__(self, case: BlendCase) -> None:
        super().__init__(np.random.PCG64(0))
        masks = case.masks or ()
        self._left = [mask[i] for i in range(len(masks[0])) for mask in masks]  # every A's, then every B's

    def random(self, *shape: Any) -> Any:  # type: ignore[override]
        return np.where(self._left.pop(0), 0.0, 2.0)


def _vera(case: RelatedCase) -> tuple[Linear, VeraShared, VeraAdapter]:
    v = case.at
    return Linear(v["W"]), VeraShared(v["A"], v["B"]), VeraAdapter(v["lambda_d"], v["lambda_b"])


def _adalora(case: RelatedCase) -> tuple[Linear, AdaLoraAdapter]:
    return Linear(case.at["W"]), AdaLoraAdapter(case.at["A"], case.at["B"], case.at["E"])


def _tokens(case: RelatedCase) -> tuple[Embedding, TokenRows]:
    return Embedding(case.at["W"], case.padding), TokenRows(case.at["index"], case.at["T"])
