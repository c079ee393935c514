"""The checkers: a gradient against the forward it belongs to, within bounds derived from the terms.

Every bound is a small constant, times eps, times the sum of the absolute terms; the terms are what the same
formula gives for absolute values. A sum of K terms has an error of at most K·eps/2 of them, so that STEP = 64
holds for any chain of 128 roundings, past the longest of these tests, and COMPLEX = 8 for one of 16.
"""

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from math import fsum, sqrt
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from lorax_np import layer
from lorax_np.params import Adapter, Linear

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
STEP = 64  # eps, for a pairing along a direction
COMPLEX = 8  # eps, for one element by a complex step
TINY = 1e-30  # the complex step: its square is lost beside anything


class Refused(AssertionError):
    """A checker's verdict: the tensor's name, the worst place, and both values there."""

    def __init__(self, name: str, index: tuple[int, ...], want: float, got: float, bound: float):
        self.name, self.index, self.want, self.got = name, index, want, got
        place = f"[{', '.join(map(str, index))}]" if index else ""
        super().__init__(f"{name}{place}: expected {want!r} within {bound:.3g}, got {got!r}")


def assert_close(name: str, got: Any, want: Any, bound: Any) -> None:
    """Refuse where |got − want| exceeds the bound anywhere, and anything that is not a number."""
    got, want, bound = (np.asarray(v, dtype="float64") for v in (got, want, bound))
    if got.shape != want.shape:
        raise AssertionError(f"{name}: expected shape {want.shape}, got {got.shape}")
    bound = np.broadcast_to(bound, got.shape)
    bad = ~(np.abs(got - want) <= bound)  # NaN is bad too
    if bad.any():
        excess = np.where(bad, np.nan_to_num(np.abs(got - want) / np.maximum(bound, 1e-300), nan=np.inf), -1)
        worst = np.unravel_index(np.argmax(excess), got.shape)
        raise Refused(name, tuple(map(int, worst)), float(want[worst]), float(got[worst]), float(bound[worst]))


def pairing(a: Any, b: Any) -> float:
    """Σ a∘b with one rounding for each product, and one for the sum."""
    return fsum((np.asarray(a, "float64") * np.asarray(b, "float64")).ravel().tolist())


def total(a: Any, b: Any) -> float:
    """Σ |a∘b|, the size of the terms of a pairing."""
    return float(np.sum(np.abs(np.asarray(a, "float64") * np.asarray(b, "float64"))))


def assert_adjoint(
    g: Any, v: Any, gy: Any, jv: Any, size: float, name: str = "g", eps: float = EPS["float64"]
) -> None:
    """Refuse unless <g, v> = <gy, J v>, where size is the sum of the absolute terms of either side."""
    assert_close(f"<{name}, v>", pairing(g, v), pairing(gy, jv), STEP * eps * size)


def by_complex_steps(f: Callable[[Any], Any], at: Any) -> np.ndarray:
    """Im f(at + ih·e)/h for every entry e, with f returning a number."""
    want = np.empty(at.shape)
    for i in np.ndindex(at.shape):
        stepped = np.array(at, "complex128")
        stepped[i] += 1j * TINY
        want[i] = np.imag(complex(f(stepped))) / TINY
    return want


PRECISION = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126), "float64": (53, -1022)}


def nearest(value: Fraction, dtype: str) -> float:
    """The number of the dtype that is nearest to a rational, ties to even; past its range the power goes on."""
    if not value:
        return 0.0
    bits, least = PRECISION[dtype]
    power = abs(value.numerator).bit_length() - value.denominator.bit_length()
    power -= abs(value) < Fraction(2) ** power  # 2^power <= |value| < 2^(power + 1)
    step = Fraction(2) ** (max(power, least) - bits + 1)
    return float(round(value / step) * step)


# ---- one layer, with all that a gradient is taken by --------------------------------------------------------


class Case(NamedTuple):
    """A layer and its cotangent, on the host; `at` holds x, W, A, B and, where present, b0, m, b, bB."""

    at: dict[str, np.ndarray]  # b0 is Linear.b, b is Adapter.b
    gy: np.ndarray
    mask: np.ndarray | None
    s: float
    full: bool = False  # whether the gradient runs through DoRA's norm

    def records(self, **changed: np.ndarray) -> tuple[Any, Linear, Adapter]:
        at = {**self.at, **changed}
        adapter = Adapter(*(at.get(k) for k in ("A", "B", "m", "b", "bB")))
        return at["x"], Linear(at["W"], at.get("b0")), adapter

    def y(self, **changed: np.ndarray) -> np.ndarray:
        x, base, adapter = self.records(**changed)
        return layer.lora_linear_forward(x, base, adapter, scaling=self.s, mask=self.mask)[0]

    def grads(self) -> dict[str, np.ndarray]:
        """The gradients by everything in `at`, from the product's backward passes."""
        x, base, adapter = self.records()
        _, saved = layer.lora_linear_forward(x, base, adapter, scaling=self.s, mask=self.mask)
        how = {"scaling": self.s, "norm_gradient": self.full}
        gx, g = layer.lora_linear_backward(self.gy, saved, base, adapter, **how)
        gbase = layer.lora_linear_backward_base(self.gy, saved, base, adapter, **how)
        found = {"x": gx, "W": gbase.W, "b0": gbase.b}
        found |= {k: getattr(g, k) for k in ("A", "B", "m", "b", "bB")}
        assert {k for k, v in found.items() if v is not None} == set(self.at)
        return {k: found[k] for k in self.at}

    def sizes(self, **changed: np.ndarray) -> dict[str, np.ndarray]:
        return sizes({**self.at, **changed}, self.gy, self.mask, self.s, self.full)

    @property
    def eps(self) -> float:
        return EPS[str(self.at["x"].dtype)]


def norms(at: dict[str, np.ndarray], s: float) -> np.ndarray:
    """The row norms of V = W + s·BA, in float64 and without the product's code: (dora.3)."""
    W, A, B = (np.asarray(at[k], "float64") for k in ("W", "A", "B"))
    return np.sqrt(np.sum((W + s * (B @ A)) ** 2, axis=1))


def sizes(
    at: dict[str, np.ndarray], gy: np.ndarray, mask: np.ndarray | None, s: float, full: bool
) -> dict[str, np.ndarray]:
    """The sizes of the terms of y and of every gradient: their formulas at absolute values.

    A cancellation inside V makes n less certain than its terms by κ = ‖|W| + s|B||A|‖/‖V‖, row by row; each
    factor that contains n carries κ.
    """
    a = {k: np.abs(np.asarray(v, "float64")) for k, v in at.items()}
    x, W, A, B = a["x"], a["W"], a["A"], a["B"]
    s, shape, G = abs(s), x.shape, np.abs(np.asarray(gy, "float64")).reshape(-1, W.shape[0])
    X = x.reshape(-1, W.shape[1])
    D = np.ones_like(X) if mask is None else np.asarray(mask, "float64").reshape(X.shape)
    Xd, zero = X * D, np.zeros(W.shape[0])
    bias = a.get("b", a.get("b0", zero))
    out: dict[str, np.ndarray] = {}
    if "m" in a:
        V, n = W + s * B @ A, norms(at, s)
        kappa = np.sqrt(np.sum(V * V, axis=1)) / n
        k, c = kappa * a["m"] / n, kappa * (a["m"] / n + 1)
        P, Q = Xd @ W.T, s * Xd @ A.T @ B.T
        y = X @ W.T + bias + c * P + k * Q
        Gk, Gc = G * k, G * c
        out["m"] = kappa * np.sum(G * (P + Q), axis=0) / n
        out["W"] = G.T @ X + Gc.T @ Xd
        gx = G @ W + (Gc @ W + s * Gk @ B @ A) * D
    else:
        y = X @ W.T + bias + s * (Xd @ A.T @ B.T + a.get("bB", zero))
        Gk = G
        out["bB"], out["W"] = s * np.sum(G, axis=0), G.T @ X
        gx = G @ W + (s * G @ B @ A) * D
    out["A"], out["B"] = s * (Gk @ B).T @ Xd, s * Gk.T @ (Xd @ A.T)
    if "m" in a and full:
        gV = (out["m"] * a["m"] / n**2)[:, None] * V
        out["A"], out["B"], out["W"] = out["A"] + s * B.T @ gV, out["B"] + s * gV @ A.T, out["W"] + gV
    out["x"], out["y"] = gx.reshape(shape), y.reshape(gy.shape)
    out["b"] = np.sum(G, axis=0)
    out["b0"] = zero if "b" in a else out["b"]
    return out


# ---- random layers ----------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Which parts a layer has."""

    masked: bool
    bias: str  # none, frozen, trained
    form: str  # lora, lora+bB, dora, dora full

    def __str__(self):
        return f"{'mask' if self.masked else 'no mask'}, bias {self.bias}, {self.form}"


KINDS = [
    Kind(*parts)
    for parts in product((False, True), ("none", "frozen", "trained"), ("lora", "lora+bB", "dora", "dora full"))
]


def layer_of(kind, seed, *, shape=None, lead=None, rslora=False, dtype="float64"):
    """A random layer: α ≠ r, B of order one, m ≠ n, every part generic."""
    rng = np.random.default_rng(seed)
    d_out, d_in, r = shape or rng.integers(1, 5, size=3)
    lead = tuple(rng.integers(1, 3, size=rng.integers(0, 3))) if lead is None else lead
    alpha = r * rng.choice([0.3, 0.7, 1.7])
    s = float(alpha / sqrt(r) if rslora else alpha / r)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    at = {"x": draw(*lead, d_in), "W": draw(d_out, d_in), "A": draw(r, d_in), "B": draw(d_out, r)}
    if kind.bias != "none":
        at["b0"] = draw(d_out)
    if kind.bias == "trained":
        at["b"] = draw(d_out)
    if kind.form == "lora+bB":
        at["bB"] = draw(d_out)
    if kind.form.startswith("dora"):
        m = norms(at, s) * rng.uniform(0.3, 3, d_out) * rng.choice([-1, 1], d_out)
        at["m"] = m.astype(dtype)
    p = rng.choice([0.25, 0.5])
    mask = np.where(rng.random((*lead, d_in)) < p, 0, 1 / (1 - p)).astype(dtype) if kind.masked else None
    for value in (*at.values(), *([] if mask is None else [mask])):
        value.flags.writeable = False
    return Case(at, draw(*lead, d_out), mask, s, full=kind.form == "dora full")


# ---- the families of checks --------------------------------------------------------------------------------


def complex_step(case: Case) -> None:
    """Every element of every gradient: Im φ(θ + 1e-30i)/1e-30. The detached norm is frozen: (dora.7)."""
    got, size = case.grads(), case.sizes()
    frozen = layer.row_norm_forward
    if "m" in case.at and not case.full:
        _, base, adapter = case.records()
        n = layer.row_norm_forward(base.W + layer.delta_forward(adapter.A, adapter.B, scaling=case.s))
        frozen = lambda V: n  # noqa: E731
    with mock.patch.object(layer, "row_norm_forward", frozen):
        for name, value in case.at.items():
            want = np.empty(value.shape)
            for i in np.ndindex(value.shape):
                stepped = value.astype("complex128")
                stepped[i] += TINY * 1j
                y = case.y(**{name: stepped})
                want[i] = pairing(case.gy, np.imag(y) / TINY) if np.iscomplexobj(y) else 0.0
            assert_close(f"g{name}", got[name], want, COMPLEX * case.eps * size[name])


def _ends(case: Case, name: str, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """θ ± v as the dtype of θ stores them, and their difference, exact in float64."""
    value = case.at[name]
    up, down = (value + v).astype(value.dtype), (value - v).astype(value.dtype)
    return up, down, up.astype("float64") - down.astype("float64")


def _pair(case: Case, up: dict[str, np.ndarray], down: dict[str, np.ndarray]) -> tuple[float, float]:
    """⟨gy, f(up) − f(down)⟩ and the size of its terms."""
    found = pairing(case.gy, case.y(**up).astype("float64") - case.y(**down).astype("float64"))
    return found, total(case.gy, case.sizes(**up)["y"]) + total(case.gy, case.sizes(**down)["y"])


def secant(case: Case, seed: int = 0, directions: int = 2) -> None:
    """A step of order one along each argument in which y is affine; without m that is each of them."""
    got, size, rng = case.grads(), case.sizes(), np.random.default_rng(seed)
    for name, value in case.at.items():
        if "m" in case.at and name in ("A", "B", "W"):
            continue  # compensated_secant's
        for _ in range(directions):
            up, down, delta = _ends(case, name, rng.standard_normal(value.shape))
            want, terms = _pair(case, {name: up}, {name: down})
            terms += total(size[name], delta)
            assert_close(f"<g{name}, v>", pairing(got[name], delta), want, STEP * case.eps * terms)


def compensated_secant(case: Case, seed: int = 0, directions: int = 2) -> None:
    """DoRA along A, B and W, the magnitude moved along so that k is constant and y affine.

    Detached, ⟨gy, Δy⟩ = ⟨gθ, δ⟩; full, ⟨gm, m·d‖V‖/‖V‖⟩ is added, with d‖V_j‖ = ⟨V_j, ΔV_j⟩/‖V_j‖.
    """
    if "m" not in case.at:
        return
    got, size, rng = case.grads(), case.sizes(), np.random.default_rng(seed)
    at = {k: np.asarray(v, "float64") for k, v in case.at.items()}
    n, m = norms(at, case.s), case.at["m"]
    V = at["W"] + case.s * at["B"] @ at["A"]
    for name in ("A", "B", "W"):
        for _ in range(directions):
            up, down, delta = _ends(case, name, rng.standard_normal(at[name].shape))
            moved = [
                {name: end, "m": (at["m"] * norms({**at, name: end}, case.s) / n).astype(m.dtype)}
                for end in (up, down)
            ]
            want, terms = _pair(case, *moved)
            terms += total(size[name], delta)
            found = pairing(got[name], delta)
            if case.full:
                dV = delta if name == "W" else case.s * (at["B"] @ delta if name == "A" else delta @ at["A"])
                dn = at["m"] * np.sum(V * dV, axis=1) / n**2
                found += pairing(got["m"], dn)
                terms += total(size["m"], dn)
            assert_close(f"<g{name}, v>", found, want, STEP * case.eps * terms)


def central_difference(case: Case, seed: int = 0) -> None:
    """(φ(θ + hv) − φ(θ − hv))/2h in float64, along each argument by which the gradient is one of φ.

    By A, B and W the detached gradient of DoRA is none, so that these are left to the other checkers.

    The truncation is h²/6·φ''' + O(h⁴); from steps h and 2h its size is |D(2h) − D(h)|/3, of which three are
    allowed; the rounding is COMPLEX·eps of the terms, divided by h.
    """
    got, rng, h = case.grads(), np.random.default_rng(seed), 2.0**-17
    for name, value in case.at.items():
        if "m" in case.at and not case.full and name in ("A", "B", "W"):
            continue
        v = rng.standard_normal(value.shape)
        slopes = []
        for step in (h, 2 * h):
            up, down, _ = _ends(case, name, step * v)
            difference, terms = _pair(case, {name: up}, {name: down})
            slopes.append(difference / (2 * step))
        bound = abs(slopes[1] - slopes[0]) + COMPLEX * case.eps * terms / h
        assert_close(f"<g{name}, v>", pairing(got[name], v), slopes[0], bound)


def second_order(case: Case) -> None:
    """(lora.15): gB = s·G Aᵀ, gA = s·BᵀG with G = gyᵀxd, the other order of evaluation; k∘gy under DoRA."""
    at, got, size = case.at, case.grads(), case.sizes()
    gy = np.asarray(case.gy).reshape(-1, at["W"].shape[0])
    x = (at["x"] if case.mask is None else at["x"] * case.mask).reshape(-1, at["W"].shape[1])
    G = gy * (at["m"] / norms(at, case.s)) if "m" in at else gy
    gD = G.T @ x
    if "m" in at and case.full:
        n = norms(at, case.s)
        V = at["W"] + case.s * at["B"] @ at["A"]
        gk = np.sum(gy * (x @ V.T), axis=0)
        gD = gD - (gk * at["m"] / n**3)[:, None] * V
    for name, want in (("A", case.s * at["B"].T @ gD), ("B", case.s * gD @ at["A"].T)):
        assert_close(f"g{name}", got[name], want, STEP * case.eps * size[name])


def gauge(case: Case) -> None:
    """(lora.16): Bᵀ gB = gA Aᵀ, since y knows A and B only through BA."""
    at, got, size = case.at, case.grads(), case.sizes()
    bound = np.abs(at["B"]).T @ size["B"] + size["A"] @ np.abs(at["A"]).T
    assert_close("gA Aᵀ", got["A"] @ at["A"].T, at["B"].T @ got["B"], STEP * case.eps * bound)


def scale_identity(case: Case) -> None:
    """(lora.17): s·∂L/∂s = tr(Bᵀ gB), for plain LoRA: y − base is linear in s."""
    if "m" in case.at or "bB" in case.at:
        return
    at, got, size = case.at, case.grads(), case.sizes()
    z = (at["x"] if case.mask is None else at["x"] * case.mask) @ at["A"].T
    bound = STEP * case.eps * total(at["B"], size["B"])
    want = pairing(case.gy, case.s * (z @ at["B"].T))
    assert_close("tr(Bᵀ gB)", pairing(at["B"], got["B"]), want, bound)


def magnitude_identity(case: Case) -> None:
    """(dora.16): m∘gm = Σ gy∘(y − b) without a mask, since y − b is linear in m."""
    if "m" not in case.at or case.mask is not None:
        return
    at, got, size = case.at, case.grads(), case.sizes()
    bias = at.get("b", at.get("b0", 0.0))
    d_out = at["W"].shape[0]
    want = np.sum((case.gy * (case.y() - bias)).reshape(-1, d_out), axis=0)
    bound = np.abs(at["m"]) * size["m"] + np.sum(np.abs(case.gy * size["y"]).reshape(-1, d_out), axis=0)
    assert_close("m gm", at["m"] * got["m"], want, STEP * case.eps * bound)


def norm_identity(case: Case) -> None:
    """(dora.15): ⟨gV_j, V_j⟩ = 0 for the total gradient by V, full norm and no mask, since V's length is lost.

    y knows W only through V = W + s·BA, so that gW is the gradient by V.
    """
    if "m" not in case.at or case.mask is not None or not case.full:
        return
    at, got, size = case.at, case.grads(), case.sizes()
    V = at["W"] + case.s * at["B"] @ at["A"]
    bound = (
        STEP * case.eps * np.sum(size["W"] * (np.abs(at["W"]) + case.s * np.abs(at["B"]) @ np.abs(at["A"])), 1)
    )
    assert_close("<gV, V>", np.sum(got["W"] * V, axis=1), np.zeros(len(V)), bound)


FAMILIES: dict[str, Callable[[Case], None]] = {
    "complex step": complex_step,
    "secant": secant,
    "compensated secant": compensated_secant,
    "central difference": central_difference,
    "second order": second_order,
    "gauge": gauge,
    "scale identity": scale_identity,
    "magnitude identity": magnitude_identity,
    "norm identity": norm_identity,
}
