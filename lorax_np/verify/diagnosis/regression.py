"""What a wrong tensor is made of, where no known fault matches: terms of the layer, and factors before them.

Each tensor is a sum of terms whose factor is 1, and of candidates whose factor is 0. Weighted least squares
give the change of one factor, or of two, that explains the answer on every probe; a factor is then looked up
among the constants of each probe. Where nothing explains it, the error is located: rows, columns, rank.
Derivation: specs/diagnosis.md.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..batteries.lattice import places
from ..bounds.worst import masks
from ..cases import Case, HostArray
from ..layers.plain import rows
from .dictionary import LIMIT, Comparison, entries
from .probe_layers import Probe

Terms = dict[str, dict[str, tuple[float, HostArray]]]  # tensor -> term -> (its right factor, its value)


class Factor(NamedTuple):
    """A term, the factor found before it, the right one, and what constants it equals on every probe."""

    term: str
    value: float
    right: float
    names: tuple[str, ...]


class Finding(NamedTuple):
    """One wrong tensor: how far it is off, and either changed factors or where the error lies."""

    tensor: str
    z: float
    factors: tuple[Factor, ...]
    place: str

    def __str__(self) -> str:
        """The finding in a line."""
        name = "y" if self.tensor == "y" else f"g{self.tensor}"
        if not self.factors:
            return f"{name}: {self.place}, z = {short(self.z)}"
        said = ", ".join(_said(factor) for factor in self.factors)
        return f"{name}: {said}, z = {short(self.z)}"


def _said(factor: Factor) -> str:
    if not factor.names:
        return f"ratio {factor.value:.4f} before {factor.term}"
    name = " or ".join(factor.names)
    if name == "0":
        return f"lacks {factor.term}"
    if name == "1":
        return f"holds {factor.term}"
    return f"ratio {factor.value:.4f} = {name} before {factor.term}"


def short(z: float) -> str:
    """A distance in deviations, in a few letters: 11, 4e5.

    >>> short(11.2), short(412345.0)
    ('11', '4e5')
    """
    return f"{z:.0f}" if z < 1000 or not np.isfinite(z) else f"{z:.0e}".replace("e+0", "e").replace("e+", "e")


def explain(compared: Comparison) -> list[Finding]:
    """A finding for each tensor that is wrong on some probe."""
    found = []
    for tensor in ("y", "x", "A", "B", "m", "b", "bB", "W"):
        z = [_wrong(compared, i, tensor) for i in range(len(compared.probes))]
        if max(z, default=0.0) <= LIMIT:
            continue
        wrong = [i for i in range(len(z)) if z[i] > LIMIT]
        infinite = [i for i in wrong if not np.isfinite(z[i])]
        factors = () if infinite else _fit(compared, tensor)
        narrow = infinite[0] if infinite else min(wrong, key=lambda i: _share(compared, i, tensor))
        place = "" if factors else _place(compared, tensor, narrow)
        found.append(Finding(tensor, max(z), factors, place))
    return found


def _wrong(compared: Comparison, i: int, tensor: str) -> float:
    names = compared.probes[i].names
    return float(compared.wrong[i][names.index(tensor)]) if tensor in names else 0.0


def _share(compared: Comparison, i: int, tensor: str) -> float:
    """How much of a tensor is wrong on one probe."""
    layer, got = compared.probes[i], compared.answers[i]
    return float(np.mean(_part(layer, entries(layer, got.values, compared.all[i].values[0]), tensor) > LIMIT))


def _part(layer: Probe, values: HostArray, tensor: str) -> HostArray:
    """One tensor's entries of a vector made of a probe."""
    start = 0
    for name, truth in layer.truth.items():
        if name == tensor:
            return values[start : start + truth.size]
        start += truth.size
    raise KeyError(tensor)


# ---- factors -------------------------------------------------------------------------------------------------


def _fit(compared: Comparison, tensor: str) -> tuple[Factor, ...]:
    """The fewest changed factors that explain a tensor on every probe; none where two do not."""
    layers = []
    for layer, got in zip(compared.probes, compared.answers, strict=True):
        if tensor in layer.truth and got.forms[layer.names.index(tensor)] == "":
            layers.append((layer, _part(layer, got.values, tensor), terms(layer.case)[tensor]))
    names = list(dict.fromkeys(name for _, _, known in layers for name in known))
    for count in (1, 2):
        best: tuple[Factor, ...] = ()
        for some in combinations(names, count):
            factors = _explains(tensor, layers, some)
            if factors and (not best or _named(factors) > _named(best)):
                best = factors
        if best:
            return best
    return ()


def _named(factors: Sequence[Factor]) -> int:
    return sum(bool(factor.names) for factor in factors)


def _explains(tensor: str, layers: list[Any], some: tuple[str, ...]) -> tuple[Factor, ...]:
    """The factors of some terms, where changing those alone gives every answer."""
    values: dict[str, list[tuple[float, float, Probe]]] = {name: [] for name in some}
    right: dict[str, float] = {}
    for layer, got, known in layers:
        here = [name for name in some if name in known]
        sigma = layer.sigma[tensor].ravel()
        sigma = np.maximum(sigma, np.sqrt(np.mean(sigma**2)))
        truth = layer.truth[tensor].ravel()
        grown = max(1.0, float(np.sqrt(np.mean(got**2) / (np.mean(truth**2) or 1.0))))
        sigma = sigma * grown
        error = (got - truth) / sigma
        if not here:
            if np.abs(error).max(initial=0.0) > LIMIT:
                return ()
            continue
        M = np.stack([known[name][1].ravel() / sigma for name in here], axis=1)  # (diagnosis.3)
        size = np.sqrt((M * M).sum(axis=0))
        size[size == 0] = 1.0
        U, S, Vh = np.linalg.svd(M / size, full_matrices=False)
        distinct = S / (S[0] or 1.0) > 1e-6  # terms may coincide, as x and xd without dropout
        sound = bool(distinct.all())
        inverse = np.where(distinct, 1 / np.where(distinct, S, 1.0), 0.0)
        change = Vh.T @ (inverse * (U.T @ error))
        if np.abs(error - (M / size) @ change).max(initial=0.0) > LIMIT:
            return ()
        spread = np.sqrt(((Vh.T * inverse) ** 2).sum(axis=1)) / size
        for j, name in enumerate(here):
            right[name] = known[name][0]
            if sound and np.any(known[name][1]):
                values[name].append((right[name] + change[j] / size[j], float(spread[j]), layer))
    return (
        tuple(_look_up(name, values[name], right[name]) for name in some if values[name])
        if all(values.values())
        else ()
    )


def _look_up(term: str, values: list[tuple[float, float, Probe]], right: float) -> Factor:
    """The constants that a factor equals on all probes where it is not what it should be."""
    changed = [found for found in values if abs(found[0] - right) > LIMIT * found[1]]
    names: list[str] | None = None
    for value, spread, layer in changed:
        near = [name for name, c in layer.constants.items() if abs(value - c) <= LIMIT * spread]
        names = near if names is None else [name for name in names if name in near]
    return Factor(term, (changed or values)[0][0], right, tuple((names or [])[:2]))


def terms(case: Case) -> Terms:
    """The terms that each tensor is, or could wrongly be, made of; the adapter's hold k under DoRA."""
    W, A, B, s, dora = case.W, case.A, case.B, case.scaling, case.m is not None
    x, G = rows(case.x), rows(case.gy)
    mask, other, out = masks(case)
    xd, xp, full = x * mask, x * other, float(dora and case.norm_gradient)
    V = W + s * B @ A
    n = np.sqrt((V * V).sum(axis=1))
    k = np.ones_like(n) if case.m is None else case.m / n
    z, u, plain_u = xd @ A.T, (xd @ A.T) @ B.T * out, (x @ A.T) @ B.T
    P, Q, Gk, G1 = xp @ W.T, s * u, G * k * out, G * out
    b = np.broadcast_to(np.zeros_like(n) if case.b is None else case.b, P.shape)
    inside = float(case.scales_bias)
    gk = (G * (P + Q + inside * b)).sum(axis=0)
    gV = np.zeros_like(W) if case.m is None else -(gk * case.m / n**3)[:, None] * V
    found: Terms = {
        "y": {"xWᵀ": (1, x @ W.T), "sxdAᵀBᵀ": (1, k * Q), "b": (1 - inside, b), "xdWᵀ": (0, P)},
        "x": {"gyW": (1, G @ W), "s·gyBA∘mask": (1, s * (Gk @ B) @ A * mask)},
        "A": {"s(gyB)ᵀxd": (1, s * (Gk @ B).T @ xd)},
        "B": {"s·gyᵀz": (1, s * Gk.T @ z)},
        "b": {"Σgy": (1 - inside, G.sum(axis=0))},
        "bB": {"sΣgy": (1, s * G1.sum(axis=0))},
        "W": {"gyᵀx": (1, G.T @ x), "gyᵀxd": (0, G.T @ xd)},
    }
    found["y"] |= {"sxAᵀBᵀ of undropped x": (0, k * s * plain_u)}
    found["x"] |= {"s·gyBA, unmasked": (0, s * (Gk @ B) @ A), "gyW∘mask": (0, G @ W * mask)}
    found["A"] |= {"its product with undropped x": (0, s * (Gk @ B).T @ x)}
    found["B"] |= {"its product with undropped x": (0, s * Gk.T @ (x @ A.T))}
    if case.bB is not None:
        found["y"]["s·bB"] = (1, np.broadcast_to(s * case.bB, P.shape) * out)
    if dora:
        found["y"] |= {
            "(k − 1)∘xdWᵀ": (1, (k - 1) * P),
            "sxdAᵀBᵀ without k": (0, Q),
            "k∘xWᵀ": (0, k * (x @ W.T)),
            "k∘b": (inside, k * b),
        }
        found["x"] |= {
            "(gy∘(k − 1))W∘mask": (1, (G * (k - 1)) @ W * other),
            "s·gyBA∘mask without k": (0, s * (G1 @ B) @ A * mask),
        }
        found["A"] |= {
            "sBᵀgV of the norm": (full, s * B.T @ gV),
            "s(gyB)ᵀxd without k": (0, s * (G1 @ B).T @ xd),
        }
        found["B"] |= {"s·gV·Aᵀ of the norm": (full, s * gV @ A.T), "s·gyᵀz without k": (0, s * G1.T @ z)}
        found["m"] = {
            "Σgy∘xdWᵀ/n": (1, (G * P).sum(axis=0) / n),
            "Σgy∘sxdAᵀBᵀ/n": (1, (G * Q).sum(axis=0) / n),
            "gk, not divided by n": (0, gk),
            "Σgy∘b/n": (inside, (G * b).sum(axis=0) / n),
        }
        found["b"] |= {"Σgy∘k": (inside, (G * k).sum(axis=0))}
        found["W"] |= {"(gy∘(k − 1))ᵀxd": (1, (G * (k - 1)).T @ xp), "gV of the norm": (full, gV)}
    return found


# ---- where -------------------------------------------------------------------------------------------------


def _place(compared: Comparison, tensor: str, i: int) -> str:
    """Where on a probe a tensor is wrong, and what its error looks like."""
    layer, got = compared.probes[i], compared.answers[i]
    form = got.forms[layer.names.index(tensor)]
    want = layer.truth[tensor]
    if form == "crash":
        return "the subject raised"
    if form:
        return {"none": "not given", "dtype": "of another dtype"}.get(
            form, f"expected shape {want.shape}, got {form}"
        )
    values = _part(layer, got.values, tensor).reshape(want.shape)
    truth = compared.all[i].values[0]
    bad = _part(layer, entries(layer, got.values, truth) > LIMIT, tensor).reshape(want.shape)
    if not np.isfinite(values).all():
        return f"not finite, {places(~np.isfinite(values), tensor)}"
    text = places(bad, tensor)
    return text + _shape_of_error(values, want, layer.sigma[tensor])


def _shape_of_error(got: HostArray, want: HostArray, sigma: HostArray) -> str:
    """Transposed, reordered, or an error of low rank."""
    if want.ndim < 2:
        return ", reordered" if np.allclose(np.sort(got.ravel()), np.sort(want.ravel()), rtol=1e-3) else ""
    G, T = (value.reshape(-1, value.shape[-1]) for value in (got, want))
    near = LIMIT * float(np.sqrt(np.mean(sigma**2)))
    if np.abs(G - T.T.reshape(G.shape)).max() <= near:
        return ", its transpose read in its shape"
    for axis, name in ((0, "rows"), (1, "columns")):
        A, B = (M if axis == 0 else M.T for M in (G, T))
        apart = np.abs(A[:, None, :] - B[None]).max(axis=2) <= near
        if apart.any(axis=1).all():
            return f", right {name} in another order" if apart.any(axis=0).all() else f", {name} repeated"
    S = np.linalg.svd(G - T, compute_uv=False)
    noise = near / LIMIT * (np.sqrt(G.shape[0]) + np.sqrt(G.shape[1])) * 3
    rank = int(np.count_nonzero(np.maximum(noise, 1e-6 * S[0]) < S))
    return f", an error of rank {rank}" if rank < min(G.shape) else ""
