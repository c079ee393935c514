"""One layer of a related form at one point, and the forms by their equations: VeRA, AdaLoRA, trained rows.

Equations: specs/vera.md, specs/adalora.md, specs/tokens.md.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..cases import HostArray

Named = dict[str, HostArray]
SMALL = 1e-5  # (adalora.4)
SHAPES = ((5, 7, 3, (2, 4)), (6, 4, 5, (3,)), (3, 3, 3, (5,)), (1, 8, 2, (2, 2, 2)), (7, 5, 1, ()))


@dataclass(frozen=True, eq=False)
class RelatedCase:
    """One layer of a related form at one point. NumPy arrays in the profile's dtype; ids and index are int64.

    form : vera, of x (*lead, d_in), W (d_out, d_in), A (r, d_in), B (d_out, r), lambda_d (r,),
           lambda_b (d_out,), and mask (*lead, d_in) or none; adalora, of E (r,) in place of the two vectors, 0
           where pruned; tokens, of ids (*lead), W (vocab, dim), T (n, dim) and index (n,)
    gy : (*lead, d_out) or (*lead, dim);  alpha, rank : of AdaLoRA's factor;  padding : an id, or None
    """

    id: str
    kind: str
    form: str
    at: Named
    gy: HostArray
    alpha: float = 1.0
    rank: int = 1
    padding: int | None = None

    def copy(self) -> "RelatedCase":
        """The same case in arrays of its own."""
        return replace(self, at={name: value.copy() for name, value in self.at.items()}, gy=self.gy.copy())

    def moved(self, **arrays: HostArray) -> "RelatedCase":
        """The case with other arrays, in the dtype of those that they stand in for."""
        new = {name: np.asarray(value, self.at[name].dtype) for name, value in arrays.items()}
        return replace(self, at=self.at | new)


def draw(id: str, form: str, layout: int, dtype: str, seed: tuple[int, ...]) -> RelatedCase:
    """One case: nothing is 0 or 1 that need not be, ids repeat, and trained rows are listed in no order."""
    rng = np.random.default_rng(seed)
    d_out, d_in, r, lead = SHAPES[layout]

    def normal(*size: int) -> HostArray:
        return np.asarray(rng.standard_normal(size), dtype)

    if form == "tokens":
        vocab, n = d_in + 6, r + 1
        index = np.roll(np.sort(rng.permutation(vocab)[:n]), 1)  # ascending but for one: neither order is right
        ids = np.where(rng.random(lead) < 0.6, rng.choice(index, lead), rng.integers(0, vocab, lead))
        ids = np.asarray(ids, np.int64)
        ids.reshape(-1)[:1] = index[-1]  # some row is trained, and is not padding's
        at = {"ids": ids, "W": normal(vocab, d_out), "T": normal(n, d_out)}
        padding = int(index[0]) if layout % 2 else None
        at["index"] = np.asarray(index, np.int64)
        return RelatedCase(
            id, "tokens, padding" if layout % 2 else "tokens", form, at, normal(*lead, d_out), padding=padding
        )
    at = {"x": normal(*lead, d_in), "W": normal(d_out, d_in), "A": normal(r, d_in), "B": normal(d_out, r)}
    if form == "vera":
        at |= {"lambda_d": normal(r), "lambda_b": normal(d_out)}
    else:
        at["E"] = normal(r) * (np.arange(r) != 1)  # one rank is pruned, where there are two
    if layout in (0, 2):  # of more tokens than one, so that not all of it is dropped
        at["mask"] = np.asarray((rng.random(at["x"].shape) < 0.55) / 0.55, dtype)
    kind = f"{form}, dropout" if "mask" in at else form
    return RelatedCase(id, kind, form, at, normal(*lead, d_out), alpha=5.3, rank=r)


class RelatedReference:
    """The three forms and their adjoints, by the equations."""

    def vera_forward(self, case: RelatedCase) -> HostArray:
        """y : (*lead, d_out).  (vera.1) to (vera.4)"""
        v, _, _, u = _vera(case)
        return np.asarray(v["x"] @ v["W"].T + v["lambda_b"] * u)

    def vera_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """The gradients by x, lambda_d and lambda_b.  (vera.5) to (vera.10)"""
        v, _, h, u = _vera(case)
        gz = (v["lambda_b"] * gy) @ v["B"]
        gx = gy @ v["W"] + ((v["lambda_d"] * gz) @ v["A"]) * v.get("mask", np.ones((), gy.dtype))
        return {"x": gx, "lambda_d": _summed(gz * h), "lambda_b": _summed(gy * u)}

    def adalora_forward(self, case: RelatedCase) -> HostArray:
        """y : (*lead, d_out).  (adalora.1) to (adalora.5)"""
        v, _, h = _adalora(case)
        return v["x"] @ v["W"].T + factor(case) * ((v["E"] * h) @ v["B"].T)

    def adalora_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """The gradients by x, A, B and E.  (adalora.6) to (adalora.12)"""
        v, xd, h = _adalora(case)
        gu = factor(case) * gy
        gz = gu @ v["B"]
        gh = v["E"] * gz
        gx = gy @ v["W"] + (gh @ v["A"]) * v.get("mask", np.ones((), gy.dtype))
        gA, gB = _rows(gh).T @ _rows(xd), _rows(gu).T @ _rows(v["E"] * h)
        return {"x": gx, "A": gA, "B": gB, "E": _summed(gz * h)}

    def tokens_forward(self, case: RelatedCase) -> HostArray:
        """y : (*lead, dim).  (tokens.1) to (tokens.3)"""
        table = case.at["W"].astype(case.at["T"].dtype)
        table[case.at["index"]] = case.at["T"]
        return np.asarray(table[case.at["ids"]])

    def tokens_backward(self, case: RelatedCase, gy: HostArray) -> Named:
        """The gradient by T.  (tokens.4), (tokens.7)"""
        g = np.zeros_like(case.at["W"])
        np.add.at(g, case.at["ids"], gy)
        if case.padding is not None:
            g[case.padding] = 0.0
        return {"T": g[case.at["index"]]}


def factor(case: RelatedCase) -> float:
    """What AdaLoRA's update is multiplied by: alpha over the rank, which is kept from 0.  (adalora.4)"""
    return case.alpha / (case.rank + SMALL)


def _vera(case: RelatedCase) -> tuple[Named, HostArray, HostArray, HostArray]:
    v = case.at
    xd = v["x"] * v.get("mask", np.ones((), v["x"].dtype))
    h = xd @ v["A"].T
    return v, xd, h, (v["lambda_d"] * h) @ v["B"].T


def _adalora(case: RelatedCase) -> tuple[Named, HostArray, HostArray]:
    v = case.at
    xd = v["x"] * v.get("mask", np.ones((), v["x"].dtype))
    return v, xd, xd @ v["A"].T


def _rows(x: HostArray) -> HostArray:
    return x.reshape(-1, x.shape[-1])


def _summed(x: HostArray) -> HostArray:
    return np.asarray(_rows(x).sum(axis=0))
