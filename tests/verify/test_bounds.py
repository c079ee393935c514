"""The bounds hold for right implementations in every order of evaluation, and refuse small errors."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from strategies import seeds

from lorax_np.verify.batteries.tensors import EPS, with_truth
from lorax_np.verify.bounds.worst import bounds, merged_bounds
from lorax_np.verify.cases import KINDS, MIDDLE, SMALL, UNIT, draw, grid
from lorax_np.verify.conventions import Spec
from lorax_np.verify.truths import exact, truth

ORDERS = (
    "z first",
    "BA first",
    "s in A",
    "s in B",
    "s in x and gy",
    "mask with s",
    "row blocks",
    "column blocks",
)
sides = st.one_of(st.integers(1, 9), st.integers(1, 200))


def share(error, bound):
    """The largest error as a share of its bound; a bound of 0 allows no error."""
    none = np.where(np.abs(error) > 0, np.inf, 0.0)
    return float(np.divide(np.abs(error), bound, out=none, where=bound > 0).max())


def product_in_blocks(a, b, size):
    """a @ b, summed up block by block of the inner axis."""
    found = a[:, :size] @ b[:size]
    for i in range(size, a.shape[1], size):
        found = found + a[:, i : i + size] @ b[i : i + size]
    return found


def evaluate(case, order):
    """A right implementation in the case's own dtype, which takes its products in one order or another."""
    rows = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
    x, G, W, A, B = rows(case.x), rows(case.gy), case.W, case.A, case.B
    mask = np.ones_like(x) if case.mask is None else rows(case.mask)
    s, xd = case.scaling, x * mask
    size = {"row blocks": 3, "column blocks": 7}.get(order)
    mm = (lambda a, b: a @ b) if size is None else (lambda a, b: product_in_blocks(a, b, size))
    V = W + s * mm(B, A)
    if order == "BA first":
        Q = mm(xd, (s * mm(B, A)).T)
    elif order == "s in A":
        Q = mm(mm(xd, (s * A).T), B.T)
    elif order == "s in B":
        Q = mm(mm(xd, A.T), (s * B).T)
    elif order == "s in x and gy":
        Q = mm(mm(s * xd, A.T), B.T)
    elif order == "mask with s":
        Q = mm(mm(x * (s * mask), A.T), B.T)
    else:
        Q = s * mm(mm(xd, A.T), B.T)
    P = mm(xd, W.T)
    k = n = None
    y = mm(x, W.T) if case.b is None else mm(x, W.T) + case.b
    if case.m is None:
        y = y + Q if case.bB is None else y + (Q + s * case.bB)
        Gk = G
    else:
        n = np.sqrt((V * V).sum(axis=1))
        k = case.m / n
        Gk = G * k
        if order == "BA first":
            y = y + (mm(xd, (k[:, None] * V).T) - P)
        elif order == "z first":
            y = y + ((case.m - n) / n * P + k * Q)
        else:
            y = y + ((k - 1) * P + k * Q)
    if order == "BA first":
        gV = mm(Gk.T, xd)
        gA, gB, gxd = s * mm(B.T, gV), s * mm(gV, A.T), s * mm(Gk, mm(B, A))
    elif order == "s in A":
        gA, gB, gxd = s * mm(mm(Gk, B).T, xd), mm(Gk.T, mm(xd, (s * A).T)), mm(mm(Gk, B), s * A)
    elif order == "s in B":
        gA, gB, gxd = mm(mm(Gk, s * B).T, xd), s * mm(Gk.T, mm(xd, A.T)), mm(mm(Gk, s * B), A)
    elif order == "mask with s":
        xs = x * (s * mask)
        gA, gB, gxd = mm(mm(Gk, B).T, xs), mm(Gk.T, mm(xs, A.T)), s * mm(mm(Gk, B), A)
    else:
        gu = s * Gk
        gA, gB, gxd = mm(mm(gu, B).T, xd), mm(gu.T, mm(xd, A.T)), mm(mm(gu, B), A)
    gW = mm(G.T, x)
    if k is not None:
        gxd = gxd + mm(G * (k - 1), W) if order != "BA first" else mm(Gk, V) - mm(G, W)
        gW = gW + mm((G * (k - 1)).T, xd) if order != "BA first" else gW - mm(G.T, xd) + mm(Gk.T, xd)
    gx = mm(G, W) + (gxd * mask if order != "row blocks" else mask * gxd)
    found = {"y": y, "x": gx, "A": gA, "B": gB, "W": gW, "b": G.sum(axis=0), "bB": s * G.sum(axis=0)}
    if k is not None:
        dense = order in ("BA first", "row blocks")
        gk = (G * mm(xd, V.T)).sum(axis=0) if dense else (G * P).sum(axis=0) + (G * Q).sum(axis=0)
        found["m"] = gk / n
    if case.norm_gradient:
        gV = (
            -(gk * case.m / (n * n * n))[:, None] * V
            if order == "BA first"
            else -(found["m"] * k / n)[:, None] * V
        )
        found["A"] = found["A"] + s * mm(B.T, gV)
        found["B"] = found["B"] + (s * mm(gV, A.T) if order != "s in A" else mm(gV, (s * A).T))
        found["W"] = found["W"] + gV
    shapes = {name: value.shape for name, value in case.arrays().items()} | {"y": case.gy.shape}
    return {
        name: value.reshape(shapes[name]) for name, value in found.items() if name in ("y", "W", *case.wanted)
    }


def in_float64(case):
    """The same numbers, as float64."""
    return replace(case, **{name: value.astype(np.float64) for name, value in case.arrays().items()})


def drawn(seed, kind, shape, cancel, rslora, lora_bias):
    """A layer of any size; with cancel, one whose V = W + s·BA is that share of W."""
    try:
        case = draw("", kind, shape, "float32", (seed,), bias="trained", rslora=rslora, lora_bias=lora_bias)
    except ValueError:  # two of its constants coincide
        assume(False)
    if cancel:
        W = (-case.scaling / (1 - cancel) * case.B.astype(np.float64) @ case.A).astype(np.float32)
        n = np.linalg.norm(W + case.scaling * case.B.astype(np.float64) @ case.A, axis=1)
        assume((n > 0.1 * cancel * np.linalg.norm(W, axis=1)).all())
        case = replace(case, W=W, m=None if case.m is None else (1.3 * n).astype(np.float32))
    return case


@settings(max_examples=max(150, settings().max_examples))
@given(
    seed=seeds,
    kind=st.sampled_from(KINDS),
    shape=st.tuples(
        sides, sides, st.integers(1, 20), st.one_of(st.just(()), st.tuples(sides), st.just((2, 3)))
    ),
    cancel=st.sampled_from([0, 0.01, 1e-4]),
    rslora=st.booleans(),
    lora_bias=st.booleans(),
)
def test_right_implementations_stay_within(seed, kind, shape, cancel, rslora, lora_bias):
    """(verify.2) to (verify.10), in float32, every order of evaluation against the same formulas in float64."""
    if shape[1] == 1 and not shape[3]:
        shape = (*shape[:3], (2,))  # a mask holds both its values
    case = drawn(seed, kind, shape, cancel, rslora, lora_bias)
    want, bound = evaluate(in_float64(case), "z first"), bounds(case, UNIT["float32"])
    of_want = bounds(case, EPS)
    worst = 0.0
    for order in ORDERS:
        got = evaluate(case, order)
        assert set(got) == set(bound) - ({"b"} - set(got)) == set(want)
        for name, value in got.items():
            assert value.dtype == np.float32
            part = share(value.astype(np.float64) - want[name], bound[name] + of_want[name])
            assert part <= 1, (order, name, part)
            worst = max(worst, part)
    event(f"largest error: {worst:.1f} of the bound" + (f", cancelled to {cancel}" if cancel else ""))


@pytest.mark.parametrize("battery", ["exact", "complex"])
def test_an_error_of_a_thousandth_is_past_the_bound(battery):
    """At each of the harness's own cases in float32, whatever the direction: as a factor, and as noise."""
    shapes = SMALL if battery == "exact" else MIDDLE
    margins = {}
    for case in grid(
        battery, shapes, "fp32", Spec(norm_gradient=(False, True)), int(battery == "complex"), "full"
    ):
        want = evaluate(in_float64(case), "z first")
        bound = bounds(case, UNIT["float32"]) if battery == "exact" else with_truth(case, UNIT["float32"])
        noise = np.random.default_rng(0)
        for name, value in want.items():
            direction = noise.standard_normal(value.shape)
            direction *= np.linalg.norm(value) / np.linalg.norm(direction)
            for error in (1e-3 * value, 1e-3 * direction):
                margins.setdefault(name, []).append(share(error, bound[name]))
    for name, found in margins.items():
        print(
            f"{battery} {name}: 1e-3 is {min(found):.1f} bounds or more, in the median {np.median(found):.0f}"
        )
        assert min(found) > 1
        assert np.median(found) > 50


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merged_bounds_hold(dtype):
    """Against exact arithmetic, for one product at a time and in blocks; and a thousandth is past them."""
    for case in grid("merge", SMALL, {"float32": "fp32", "float64": "fp64"}[dtype], Spec(), 2, "full"):
        bound, want, s = merged_bounds(case, UNIT[dtype]), exact.merged(case), case.scaling
        for BA in (case.B @ case.A, product_in_blocks(case.B, case.A, 1)):
            W = case.W + s * BA
            if case.m is not None:
                W = (case.m / np.sqrt((W * W).sum(axis=1)))[:, None] * W
            b = np.zeros_like(W[:, 0]) if case.b is None else case.b
            b = b if case.bB is None else b + s * case.bB
            for name, got in {"W": W, "b": b}.items():
                if name in want:
                    error = np.abs(exact.to_float(np.asarray(exact.fixed(got), dtype=object) - want[name]))
                    assert (error <= bound[name]).all()
                    assert (np.abs(1e-3 * got) > bound[name]).any()


@pytest.mark.parametrize("i", range(3))
def test_complex_steps_equal_exact_arithmetic(i):
    """Within the bound that with_truth adds for a float64 truth; a third of the cases each."""
    worst = 0.0
    for case in list(grid("exact", SMALL, "fp64", Spec(norm_gradient=(False, True)), 0, "full"))[i::3]:
        want = {name: exact.to_float(value) for name, value in exact.truth(case).items()}
        got = {"y": truth.dense(case), **truth.gradients(case)}
        limit = bounds(replace(case, norm_gradient=case.m is not None), EPS)
        assert set(got) == {"y", *case.wanted}
        for name, value in got.items():
            part = share(value - want[name], limit[name])
            assert part <= 1, (case.id, name, part)
            worst = max(worst, part)
        noise = np.random.default_rng(i)
        for name in case.wanted:
            v = noise.standard_normal(want[name].shape)
            slack = np.sum((limit[name] + EPS * np.abs(want[name])) * np.abs(v))
            assert abs(truth.along(case, name, v) - np.sum(want[name] * v)) <= slack
    print(f"at most {worst:.3f} of the bound")


def test_y_alone_has_the_bound_that_it_has_among_all():
    for case in grid("", SMALL, "fp64", Spec(norm_gradient=(False, True)), 0, "full"):
        (name, alone), *rest = bounds(case, EPS, y_alone=True).items()
        assert (name, rest) == ("y", [])
        assert alone.tobytes() == bounds(case, EPS)["y"].tobytes()


def test_complex_steps_see_a_wrong_engine(monkeypatch):
    """A forward that conjugates has no derivative along a complex step: the truths then disagree."""
    case = draw("", "lora", SMALL[0], "float64", (1,))
    gradients = inspect.unwrap(truth.gradients)  # as it is where nothing is remembered
    right = gradients(case)["A"]
    forward = truth.lora_linear_forward
    monkeypatch.setattr(truth, "lora_linear_forward", lambda *a, **k: (np.conj(forward(*a, **k)[0]), None))
    wrong = gradients(case)["A"]
    assert np.allclose(wrong, -right)
    assert (np.abs(wrong - right) > bounds(case, EPS)["A"]).all()
