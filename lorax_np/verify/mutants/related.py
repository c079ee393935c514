"""Faults of related forms: VeRA, AdaLoRA, and trained rows of an embedding."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..batteries.related_case import RelatedCase, RelatedReference
from ..cases import HostArray
from .fault import Fault, Faulty

Named = dict[str, HostArray]


class Related(Faulty, RelatedReference):
    """The three forms right."""


class Changed(Related):
    """Computes another case than it is given, or spoils y or the gradients."""

    def __init__(
        self,
        form: str,
        given: Callable[[RelatedCase], RelatedCase] | None = None,
        forward: Callable[[RelatedCase, HostArray], HostArray] | None = None,
        backward: Callable[[RelatedCase, HostArray, Named], Named] | None = None,
        returned: Callable[[RelatedCase, Named], Named] | None = None,
    ) -> None:
        """given : changes the case of both;  forward, backward : change what comes of it;

        returned : the gradients by what was given, from those by what given made of it.
        """
        super().__init__()
        self.form, self.given, self.forwards, self.backwards, self.returned = (
            form,
            given,
            forward,
            backward,
            returned,
        )

    def _forward(self, form: str, case: RelatedCase) -> HostArray:
        mine = self.given(case) if self.given is not None and form == self.form else case
        y: HostArray = getattr(RelatedReference, f"{form}_forward")(self, mine)
        return self.forwards(case, y) if self.forwards is not None and form == self.form else y

    def _backward(self, form: str, case: RelatedCase, gy: HostArray) -> Named:
        mine = self.given(case) if self.given is not None and form == self.form else case
        g: Named = getattr(RelatedReference, f"{form}_backward")(self, mine, gy)
        if form != self.form:
            return g
        g = g if self.returned is None else self.returned(case, g)
        return g if self.backwards is None else self.backwards(case, gy, g)

    def vera_forward(self, case: RelatedCase) -> HostArray:
        """y of VeRA."""
        return self._forward("vera", case)

    def vera_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """Its gradients."""
        return self._backward("vera", case, gy)

    def adalora_forward(self, case: RelatedCase) -> HostArray:
        """y of AdaLoRA."""
        return self._forward("adalora", case)

    def adalora_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """Its gradients."""
        return self._backward("adalora", case, gy)

    def tokens_forward(self, case: RelatedCase) -> HostArray:
        """y of trained rows."""
        return self._forward("tokens", case)

    def tokens_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """Their gradient."""
        return self._backward("tokens", case, gy)


# ---- the faults --------------------------------------------------------------------------------------------


def _branch(case: RelatedCase) -> tuple[HostArray, HostArray]:
    """The dropped input, and h = xdAᵀ, of VeRA and AdaLoRA."""
    v = case.at
    xd = v["x"] * v.get("mask", np.ones((), v["x"].dtype))
    return xd, xd @ v["A"].T


def _rows(x: HostArray) -> HostArray:
    return x.reshape(-1, x.shape[-1])


def _after_B(case: RelatedCase) -> RelatedCase:
    """λ_d on the outputs of B, repeated or cut to their number."""
    v = case.at
    d = np.resize(v["lambda_d"], len(v["B"]))
    return case.moved(lambda_d=np.ones_like(v["lambda_d"]), lambda_b=v["lambda_b"] * d)


def _no_lambda_d(case: RelatedCase) -> RelatedCase:
    return case.moved(lambda_d=np.ones_like(case.at["lambda_d"]))


def _without_z(case: RelatedCase, gy: HostArray, g: Named) -> Named:
    _, h = _branch(case)
    return g | {"lambda_b": _rows(gy * (h @ case.at["B"].T)).sum(axis=0)}


def _scaled_u(case: RelatedCase, gy: HostArray, g: Named) -> Named:
    return g | {"lambda_b": case.at["lambda_b"] * g["lambda_b"]}


def _straight_gx(case: RelatedCase, gy: HostArray, g: Named) -> Named:
    """gx of the adapter without λ_d on the way back."""
    v = case.at
    gx = gy @ v["W"] + (((v["lambda_b"] * gy) @ v["B"]) @ v["A"]) * v.get("mask", np.ones((), gy.dtype))
    return g | {"x": gx}


def _alpha_alone(case: RelatedCase) -> RelatedCase:
    return replace(case, rank=1)


def _rank_now(case: RelatedCase) -> RelatedCase:
    """The number of ranks that are not pruned, in place of the one at the start."""
    return replace(case, rank=int(np.count_nonzero(case.at["E"])))


def _squared(case: RelatedCase) -> RelatedCase:
    return case.moved(E=case.at["E"] ** 2)


def _through_square(case: RelatedCase, g: Named) -> Named:
    return g | {"E": 2 * case.at["E"] * g["E"]}


def _of_z(case: RelatedCase, gy: HostArray, g: Named) -> Named:
    return g | {"E": case.at["E"] * g["E"]}


def _gA_straight(case: RelatedCase, gy: HostArray, g: Named) -> Named:
    xd, _ = _branch(case)
    gz = (case.alpha / (case.rank + 1e-5) * gy) @ case.at["B"]
    return g | {"A": _rows(gz).T @ _rows(xd)}


def _sorted_rows(case: RelatedCase, gy: HostArray, g: Named) -> Named:
    """Gradients in the order of the ids, beside rows in the order that was given."""
    return {"T": g["T"][np.argsort(case.at["index"])]}


def _difference(case: RelatedCase) -> RelatedCase:
    v = case.at
    return case.moved(T=v["W"][v["index"]] + v["T"])


def _last_position(case: RelatedCase, gy: HostArray, g: Named) -> Named:
    """Written, not added: of an id that comes twice the last position counts."""
    table = np.zeros_like(case.at["W"])
    table[case.at["ids"].reshape(-1)] = _rows(gy)
    if case.padding is not None:
        table[case.padding] = 0
    return {"T": table[case.at["index"]]}


def _padding_trained(case: RelatedCase, gy: HostArray, g: Named) -> Named:
    table = np.zeros_like(case.at["W"])
    np.add.at(table, case.at["ids"], gy)
    return {"T": table[case.at["index"]]}


def _fault(id: str, title: str, line: str, make: Callable[[], Changed]) -> Fault:
    return Fault(id, title, "related", (), line, make=make)


FAULTS = (
    _fault("H1", "VeRA: λ_d on the outputs of B", "vera.2", lambda: Changed("vera", given=_after_B)),
    _fault("H2", "VeRA: λ_d left out", "vera.2", lambda: Changed("vera", given=_no_lambda_d)),
    _fault(
        "H3",
        "VeRA: gλ_b of an output that λ_d did not scale",
        "vera.5",
        lambda: Changed("vera", backward=_without_z),
    ),
    _fault("H4", "VeRA: gλ_b of the output after λ_b", "vera.5", lambda: Changed("vera", backward=_scaled_u)),
    _fault("H5", "VeRA: gx without λ_d", "vera.9", lambda: Changed("vera", backward=_straight_gx)),
    _fault(
        "H6", "AdaLoRA: α, not divided by the rank", "adalora.4", lambda: Changed("adalora", given=_alpha_alone)
    ),
    _fault(
        "H7",
        "AdaLoRA: α divided by the ranks that are left",
        "adalora.4",
        lambda: Changed("adalora", given=_rank_now),
    ),
    _fault(
        "H8",
        "AdaLoRA: E squared",
        "adalora.2",
        lambda: Changed("adalora", given=_squared, returned=_through_square),
    ),
    _fault(
        "H9", "AdaLoRA: gE of z, which holds E already", "adalora.9", lambda: Changed("adalora", backward=_of_z)
    ),
    _fault("H10", "AdaLoRA: gA without E", "adalora.10", lambda: Changed("adalora", backward=_gA_straight)),
    _fault(
        "H11",
        "token rows: gradients in another order than the rows",
        "tokens.4",
        lambda: Changed("tokens", backward=_sorted_rows),
    ),
    _fault(
        "H12",
        "token rows: taken for differences from the table",
        "tokens.3",
        lambda: Changed("tokens", given=_difference),
    ),
    _fault(
        "H13",
        "token rows: of a token that comes twice, the last alone",
        "tokens.4",
        lambda: Changed("tokens", backward=_last_position),
    ),
    _fault(
        "H14",
        "token rows: the padding row trained",
        "tokens.7",
        lambda: Changed("tokens", backward=_padding_trained),
    ),
)
