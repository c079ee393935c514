"""The 640-bit truth against arithmetic of other kinds: fractions, which round nothing, and 120 decimal digits.

The gradients here are the formulas of specs/lora.md and specs/dora.md; exact.py takes difference quotients.
"""

from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from lorax_np.verify.cases import KINDS, SMALL, draw, grid
from lorax_np.verify.conventions import Spec
from lorax_np.verify.truths import exact

LORA = [kind for kind in KINDS if kind.startswith("lora")]
DORA = [kind for kind in KINDS if kind.startswith("dora")]


def by_formula(case, number):
    """y and every gradient, as arrays of a number type whose arithmetic is exact or very long."""
    v = {name: np.vectorize(number, otypes=[object])(value) for name, value in case.arrays().items()}
    rows = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
    x, G, W, A, B, s = rows(v["x"]), rows(v["gy"]), v["W"], v["A"], v["B"], number(case.scaling)
    mask = rows(v["mask"]) if "mask" in v else np.full(x.shape, number(1), dtype=object)
    xd, zero = x * mask, number(0)
    V = W + s * (B @ A)
    k = np.full(len(W), number(1), dtype=object)
    if "m" in v:
        n = np.array([(row @ row).sqrt() for row in V], dtype=object)
        k = v["m"] / n
    y = x @ W.T + v.get("b", zero) + xd @ (k[:, None] * V - W).T + s * v.get("bB", zero)
    Gk = G * k
    g = {"A": s * (B.T @ (Gk.T @ xd)), "B": s * (Gk.T @ xd @ A.T)}
    g["x"] = G @ W + (Gk @ V - G @ W) * mask
    g["W"] = G.T @ x - G.T @ xd + Gk.T @ xd
    g["b"] = G.sum(axis=0)
    g["bB"] = s * G.sum(axis=0)
    if "m" in v:
        g["m"] = (G * (xd @ V.T)).sum(axis=0) / n
    if case.norm_gradient:
        gV = -(g["m"] * v["m"] / (n * n))[:, None] * V
        g["A"], g["B"], g["W"] = g["A"] + s * (B.T @ gV), g["B"] + s * (gV @ A.T), g["W"] + gV
    merged = {"W": k[:, None] * V, "b": v.get("b", zero) + s * v.get("bB", zero)}
    found = {name: g[name].reshape(getattr(case, name).shape) for name in (*case.wanted, "W")}
    return {"y": y.reshape(case.gy.shape), **found}, merged


def off(got, want, one):
    """The largest difference, got being in units of 2**-640."""
    return max(abs(one * int(a) / (1 << exact.BITS) - b) for a, b in zip(got.flat, want.flat, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "bias", "lora_bias"), list(product(LORA, ("absent", "trained"), (False, True)))
)
def test_lora_equals_fractions(kind, bias, lora_bias, dtype):
    """Without a norm all is rational: nothing is rounded on one side, and on the other below 1e-90."""
    case = draw("", kind, (2, 3, 2, (2,)), dtype, (1, 2), bias=bias, lora_bias=lora_bias)
    want, merged = by_formula(case, Fraction)
    got = exact.truth(case)
    assert set(got) == set(want)
    for name in got:
        assert got[name].shape == want[name].shape
        assert off(got[name], want[name], Fraction(1)) < Fraction(1, 10**90), name
    for name, value in exact.merged(case).items():
        assert off(value, merged[name], Fraction(1)) < Fraction(1, 10**90), name


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("kind", DORA)
def test_dora_equals_120_digits(kind, shape):
    case = draw("", kind, shape, "float32", (3, 4), bias="trained")
    with localcontext(prec=120):
        want, merged = by_formula(case, lambda value: Decimal(float(value)))
        got = exact.truth(case)
        assert set(got) == set(want)
        worst = max(off(got[name], want[name], Decimal(1)) for name in got)
        print(f"off by at most {worst:.1e}")
        assert worst < Decimal("1e-88")
        for name, value in exact.merged(case).items():
            assert off(value, merged[name], Decimal(1)) < Decimal("1e-100"), name


def test_the_other_arithmetic_would_see_a_wrong_sign():
    """Shown a fault of 1e-80 of one entry, the comparison refuses it."""
    case = draw("", "lora", (2, 3, 2, (2,)), "float32", (1, 2))
    want, _ = by_formula(case, Fraction)
    got = exact.truth(case)["A"].copy()
    got[0, 0] += int(Fraction(1 << exact.BITS) / 10**80)
    assert off(got, want["A"], Fraction(1)) > Fraction(1, 10**90)


def test_full_and_detached_norms_differ():
    case = draw("", "dora full norm", SMALL[0], "float64", (5,))
    full, still = exact.truth(case), exact.truth(replace(case, norm_gradient=False))
    differs = {name for name in full if np.any(full[name] != still[name])}
    assert differs == {"A", "B", "W"}


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.5, 0.1, 5e-324, -1e-300, 1.7e308, 2.0**-149])
def test_fixed_point_holds_every_small_layers_float(value):
    """Exact down to 2**-640; below that the distance is under one unit."""
    distance = abs(Fraction(value) - Fraction(int(exact.fixed(value)), 1 << exact.BITS))
    assert distance < Fraction(1, 1 << exact.BITS)
    back = exact.to_float(np.array([exact.fixed(value)], dtype=object))[0]
    assert back == value if abs(value) > 1e-100 else abs(back - value) <= 2.0**-640


def test_the_cases_are_generic():
    """No kind is missing, no tensor is zero, and each has its own constants."""
    cases = list(grid("exact", SMALL, "fp32", Spec(norm_gradient=(False, True)), 0, "full"))
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.b is None for case in cases} == {True, False}
    assert {case.train_b for case in cases} == {True, False}
    for case in cases:
        assert all(np.any(value) for value in case.arrays().values())
        assert case.W.shape[0] != case.W.shape[1]
        assert (case.m is not None) == case.kind.startswith("dora")
        assert (case.mask is not None) == case.kind.endswith("dropout")
        assert case.mask is None or len(np.unique(case.mask)) == 2
        want = exact.truth(case)
        assert all(np.any(value) for value in want.values())
