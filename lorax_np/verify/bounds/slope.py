"""An error that all entries of a tensor share, found below the noise of each.  Derivation: specs/bounds.md."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..cases import Case, HostArray
from ..layers.plain import Step, run
from ..layers.rounding import to_bits
from ..precision import Precision
from .sigma import replay

STEP = 2.0**-24  # of s, relative: what float32 rounds it by, at most


def slope(got: HostArray, want: HostArray, sigma: HostArray, shared: float = 0.0) -> tuple[float, float]:
    """The relative error that all entries have in common, by weighted least squares, and its z.

    got, want, sigma : arrays of one shape, and the standard deviation of each entry, 0 where none counts
    shared : a relative deviation that honest entries have in common, as of a constant that is rounded once

    Returns the slope, 0.001 where everything is a thousandth too large, and how many deviations that is from 0.

    >>> import numpy as np
    >>> want = np.arange(1.0, 5.0)
    >>> [round(v, 6) for v in slope(1.01 * want, want, 0.1 * want)]
    [0.01, 0.4]
    """
    use = (sigma > 0) & (want != 0)
    deviation, reference = sigma[use], np.asarray(want[use], dtype=np.float64)
    error, scaled = (np.asarray(got[use], dtype=np.float64) - reference) / deviation, reference / deviation
    size = float(scaled @ scaled)
    if size == 0.0:
        return 0.0, 0.0
    found = float(error @ scaled) / size  # (bounds.36)
    left = error - found * scaled
    noise = min(1.0, (1 + float(left @ left)) / len(left))  # (bounds.37), of σ² used up
    gone = float(np.square(scaled[np.abs(scaled) < 2]).sum()) / size  # (bounds.58)
    return found, float(found / np.sqrt(noise / size + shared**2 + gone**2))


def slopes(
    case: Case, precision: Precision, got: Mapping[str, HostArray], want: Mapping[str, HostArray]
) -> dict[str, tuple[float, float]]:
    """The slope of each tensor and its z, what honest entries share being allowed for.

    got, want : y and gradients by name, as the subject gave them and as they are, in wider arithmetic
    """
    t, variances = replay(case, precision)
    by_s, by_mask, found = _by_scale(case), _by_mask(case, t), {}
    for name, value in got.items():
        sigma = np.sqrt(variances[name]).reshape(value.shape)
        truth = np.asarray(want[name], dtype=np.float64)
        weight = np.divide(truth, sigma * sigma, out=np.zeros(truth.shape), where=sigma > 0)
        size = float(np.sum(weight * truth))
        shared = 0.0 if size == 0.0 else _shared(t, name, weight.reshape(variances[name].shape)) / size**2
        shared += (
            _rounds_back(t)
            + 2 * t.u.sum
            + (precision.accumulate * _lengths(t, name)) ** 2 / 4 * (t.u.drift > 0)
        )
        if size:
            shared += t.u.sum * float(np.sum(weight * by_s[name]) / size) ** 2  # (bounds.55)
            shared += float(np.sum(weight * by_mask.get(name, 0.0)) / size) ** 2  # (bounds.60)
        found[name] = slope(value, truth, sigma, float(np.sqrt(shared)))
    return found


def redrawn(case: Case, seed: int = 0) -> Case:
    """The same layer at other numbers: entries of each array in another order, times 1/2 to 1, and k as it was.

    What all entries of a tensor share by an accident of roundings is not found there again; a wrong scale is.
    """
    rng = np.random.default_rng((seed, 62))
    other: dict[str, Any] = {}
    for name in ("x", "gy", "W", "A", "B", "b", "bB"):
        value = getattr(case, name)
        if value is not None:
            moved = rng.permutation(value.astype(np.float64).ravel()) * rng.uniform(0.5, 1.0, value.size)
            other[name] = moved.reshape(value.shape).astype(value.dtype)
    if case.m is not None:
        n, now = (_norms(one) for one in (case, replace(case, **other)))
        other["m"] = (case.m.astype(np.float64) * now / n).astype(case.m.dtype)
    return replace(case, **other)


def counted(z: float, again: float) -> float:
    """What counts of a slope's z: all of it where half as many deviations are found again, to the same side."""
    return max(min(abs(z), 2 * again * float(np.sign(z))), 0.0)  # (bounds.61)


def _norms(case: Case) -> HostArray:
    W, A, B = (value.astype(np.float64) for value in (case.W, case.A, case.B))
    return np.asarray(np.linalg.norm(W + case.scaling * B @ A, axis=1))


def _by_scale(case: Case) -> dict[str, HostArray]:
    """The derivative of every tensor by ln s, from the equations at either side of s."""
    wide: Any = {name: value.astype(np.float64) for name, value in case.arrays().items()}
    ends = []
    for step in (STEP, -STEP):
        config = replace(case.config, lora_alpha=case.config.lora_alpha * (1 + step))
        y, found = run(replace(case, config=config, **wide), wide["gy"])
        ends.append({"y": y, **found})
    return {name: (ends[0][name] - ends[1][name]) / (2 * STEP) for name in ends[0]}


def _by_mask(case: Case, t: Any) -> dict[str, HostArray]:
    """What every tensor changes by where each product with the mask is rounded, as all who store it do."""
    if case.mask is None:
        return {}
    bits = round(-np.log2(np.sqrt(3 * t.u.store)))
    wide: Any = {name: value.astype(np.float64) for name, value in case.arrays().items()}
    steps: Mapping[str, Step] = {
        "xd": lambda t: to_bits(t.x * t.keep, bits),
        "Q": lambda t: to_bits(t.L * t.out, bits),
        "gu": lambda t: t.s * to_bits(t.Gk * t.out, bits),
    }
    ends = [run(replace(case, **wide), wide["gy"], changed) for changed in (steps, None)]
    rounded, plain = ({"y": y, **found} for y, found in ends)
    return {name: rounded[name] - plain[name] for name in plain}


def _single(t: Any, name: str, weight: HostArray) -> float:
    """What Σ weight∘error is in entries that are one product, all others being 0: no draw, but known."""
    factors = {"y": (t.x, t.W.T), "x": (t.G, t.W)} | ({} if t.dora else {"W": (t.G.T, t.x)})
    if name not in factors:
        return 0.0
    X, Y = factors[name]
    value, alone = X @ Y, (X != 0).astype(float) @ (Y != 0) == 1
    bits = round(-np.log2(np.sqrt(3 * t.u.store)))
    return float((weight * alone * (to_bits(value, bits) - value)).sum())  # (bounds.57)


def _rounds_back(t: Any) -> float:
    """Square of what all entries share where s is so near a power of two that it is rounded away."""
    distance = abs(t.s) / 2.0 ** round(np.log2(abs(t.s))) - 1 if t.s else 0.0
    return float(distance**2 if abs(distance) < 2 * np.sqrt(3 * t.u.store) else 0.0)  # (bounds.45)


def _lengths(t: Any, name: str) -> int:
    """How many additions a term of a tensor meets."""
    by_tensor = {"y": t.d_in + t.r, "x": t.d_out + t.r, "A": t.d_out + t.N, "B": t.d_in + t.N, "W": t.N}
    norm = t.d_in + t.r if t.dora else 0
    return int(by_tensor.get(name, t.N) + norm + (t.d_in + t.N if t.full else 0) + 4)


def _shared(t: Any, name: str, weight: HostArray) -> float:
    """Variance of Σ weight∘error by arrays that are rounded once and used for many entries."""
    u, s = t.u, t.s
    both, mask = u.store + u.operand, 1.0 if t.mask is None else t.mask
    other, out = (1.0 if m is None else m for m in (t.other, t.out))
    c = t.k - 1

    def pair(w: HostArray, X: HostArray, Y: HostArray) -> float:  # (bounds.41)
        return float(np.square((w @ Y.T) * X).sum() + np.square((X.T @ w) * Y).sum())

    def triple(w: HostArray, X: HostArray, Y: HostArray, Z: HostArray) -> float:  # (bounds.42)
        XY, YZ = X @ Y, Y @ Z
        return pair(w, XY, Z) + pair(w, X, YZ) + float(np.square((X.T @ w @ Z.T) * Y).sum())

    rows = near = np.zeros(t.d_out)  # what a relative error of each k, or k − 1, does to Σ weight∘value
    row = t.Mk + 3 * t.gV
    variance = _single(t, name, weight) ** 2
    direct: HostArray | float = 0.0  # what A does to gk, in gm
    if t.scaled and name == "b":
        rows = weight * t.Gk.sum(axis=0)
    small = {"y": [t.k * t.L, *([c * t.P] if t.dora else [])], "x": t.gx_terms[1:]}
    if name in small:
        variance += _swallowed(t, weight, t.y0 if name == "y" else t.gx_terms[0], small[name])
    if name == "y":
        variance += both * triple(s * weight * t.k * out, t.xd, t.A.T, t.B.T)
        variance += u.operand * pair(weight, t.x, t.W.T)
        variance += _alike(t, weight, u)
        if t.dora:
            variance += both * pair(weight * c, t.xp, t.W.T)
            rows = (weight * t.k * (t.P + t.L)).sum(axis=0)
            near = (weight * c * t.P).sum(axis=0)
    elif name == "x":
        variance += both * triple(s * weight * mask, t.Go, t.B, t.A) + u.operand * pair(weight, t.G, t.W)
        if t.dora:
            variance += both * pair(weight * other, t.G * c, t.W)
            back, update = t.G.T @ (weight * other), (t.G * out).T @ (weight * mask)
            rows = t.k * (back * t.W + update * (t.V - t.W)).sum(axis=1)
            near = c * (back * t.W).sum(axis=1)
    elif name == "A":
        variance += both * triple(s * weight, t.B.T, t.Go.T, t.xd)
        rows = s * ((t.B @ weight) * row).sum(axis=1)
    elif name == "B":
        variance += both * triple(s * weight, t.Go.T, t.xd, t.A.T)
        rows = s * ((weight @ t.A) * row).sum(axis=1)
    elif name == "W":
        variance += u.operand * pair(weight, t.G.T, t.x)
        if t.dora:
            variance += both * pair(c[:, None] * weight, t.G.T, t.xp)
            rows, near = (weight * (t.Mp + 3 * t.gV)).sum(axis=1), c * (weight * t.M).sum(axis=1)
    elif name == "m":
        G = t.G * (weight / t.n)
        if t.alike:
            variance += both * pair(G, t.xd, t.V.T)
        else:
            variance += both * (pair(G, t.xp, t.W.T) + pair(G * out, t.xd, (t.V - t.W).T))
        variance += float(weight @ (_lost(t) / t.n)) ** 2
        rows = weight * t.gm
        direct = s * t.B.T @ ((weight / t.n)[:, None] * ((t.G * out).T @ t.xd))
    if t.dora:  # A, rounded, in every row's norm
        through = s * t.B.T @ ((rows / t.n**2)[:, None] * t.V)
        variance += both * float(np.square((direct - through) * t.A).sum())  # (bounds.59)
    if t.full and name in ("A", "B", "W"):
        onto = weight if name == "W" else s * (t.B @ weight if name == "A" else weight @ t.A)
        by_row = (onto * t.V).sum(axis=1)
        variance += float((t.c_var * np.square(by_row)).sum() + (by_row @ (_lost(t) * t.m / t.n**3)) ** 2)
        variance += float((t.gV_own * np.square(onto)).sum()) + both * float(np.square(onto * t.gV).sum())
    return variance + float((t.rho * rows * rows + 2 * u.store * near * near).sum())  # (bounds.43)


def _swallowed(t: Any, weight: HostArray, first: HostArray, others: list[HostArray]) -> float:
    """Σ weight∘error, squared, of terms that are below half of the last place of what they are added to."""
    total = 0.0
    for term in others:
        gone = np.abs(term) < np.sqrt(3 * t.u.store) * np.abs(first)
        total += abs(float((weight * gone * term).sum()))
    return total**2  # (bounds.62)


def _lost(t: Any) -> HostArray:
    """What of gk is gone where P is the base's output less b, and b so large that P is rounded away."""
    if not t.reused:
        return np.zeros(t.d_out)
    gone = np.abs(t.P) < 2 * np.sqrt(3 * t.u.store) * np.abs(t.P + t.b)
    return np.asarray((t.G * t.P * gone).sum(axis=0))  # (bounds.54)


def _alike(t: Any, weight: HostArray, u: Any) -> float:
    """What a column of y shares: s·bB, the last rounding of entries that are alike, and that of a bias."""
    bias = np.zeros(t.d_out) if t.b is None else t.b
    fixed = np.zeros(t.d_out) if t.bB is None else t.s * t.bB
    columns = np.abs(weight.sum(axis=0))
    own = t.y0 + t.k * t.L + ((t.k - 1) * t.P if t.dora else 0.0)
    step = 4 * np.sqrt(3 * u.store) * np.abs(bias + fixed)
    steady = (own.std(axis=0) < step) * np.square(columns * (np.abs(bias) + np.abs(fixed)))
    unit, size = np.sqrt(3 * u.store), np.abs(own + bias + fixed)
    place = 2 * unit * 2.0 ** np.floor(np.log2(np.where(size > 0, size, 1.0)))  # of y's last digit
    lost = sum(abs(float((weight * (np.rint(part / place) * place - part)).sum())) for part in (bias, fixed))
    return float(
        u.store * (2 * np.square(columns * fixed) + steady).sum() + lost * lost
    )  # (bounds.44), (bounds.56)
