"""y and every gradient against torch's autograd through PEFT's own layers.  See specs/lora.md and dora.md."""

from itertools import product

import numpy as np
import pytest
from peft_layers import (
    Arrays,
    Case,
    assert_within,
    bounds,
    draw,
    gamma,
    norms,
    numpy_dtype,
    ours,
    peft_layer,
    relative,
    roundings,
    rows,
    terms,
    theirs,
    to_torch,
    unit,
    widen,
    written_out,
)

import lorax_np as lx

pytestmark = pytest.mark.peft

EXACT = 1e-13  # float64: of the tensor's largest sum of absolute terms
SHAPES = (  # d_out, d_in, r, leading axes
    (6, 5, 3, (2, 4)),
    (5, 4, 9, (7,)),  # r above both
    (1, 8, 2, (3,)),
    (7, 1, 2, (1, 3)),
    (4, 6, 1, ()),
    (3, 7, 2, (0, 2)),  # no token
    (24, 33, 8, (2, 3, 5)),
)
CHOICES = [
    Case(base_bias, bias, lora_bias, use_rslora, use_dora, p)
    for base_bias, bias, lora_bias, use_rslora, use_dora, p in product(
        (True, False), ("none", "all", "lora_only"), (False, True), (False, True), (False, True), (0.0, 0.3)
    )
    if not (lora_bias and use_dora)
]
CASES = [case._replace(shape=shape) for case in CHOICES for shape in SHAPES]
ACROSS = [
    Case(True, bias, lora_bias, True, use_dora, p, shape, "(d_in, d_out)")
    for bias, lora_bias, use_dora, p, shape in product(
        ("none", "all"), (False, True), (False, True), (0.0, 0.3), (SHAPES[0], SHAPES[1], SHAPES[6])
    )
    if not (lora_bias and use_dora)
]
DORA = [case for case in CASES if case.use_dora]
HALVES = [
    Case(True, bias, lora_bias, False, use_dora, p, shape)
    for bias, lora_bias, use_dora, p, shape in product(
        ("none", "all"), (False, True), (False, True), (0.0, 0.3), (SHAPES[0], SHAPES[1], SHAPES[6])
    )
    if not (lora_bias and use_dora)
]


@pytest.mark.parametrize("case", CASES + ACROSS, ids=str)
def test_float64_equals_peft_to_1e_13(case: Case) -> None:
    v = draw(case, "float64")
    got, want, T = ours(case, v), theirs(case, v), terms(case, v)
    assert got.keys() == want.keys()
    for name in got.keys() - ({"W"} if case.peft_loses_gW else set()):
        assert got[name].shape == want[name].shape
        assert got[name].dtype == want[name].dtype == np.float64
        assert relative(got[name], want[name], T[name]) <= EXACT, name


@pytest.mark.parametrize("case", CASES + ACROSS, ids=str)
def test_float32_is_within_its_roundings_of_peft_in_float64(case: Case) -> None:
    """PEFT's own float32 is held to the same kind of bound, so that the bound is no private excuse."""
    v = draw(case, "float32")
    truth, got, peft32 = theirs(case, widen(v)), ours(case, v), theirs(case, v)
    if case.peft_loses_gW:
        truth["W"], peft32["W"] = ours(case, widen(v))["W"], got["W"]
    assert {value.dtype for value in (*got.values(), *peft32.values())} == {np.dtype("float32")}
    assert_within(got, truth, bounds(case, v, "float32"))
    assert_within(peft32, truth, bounds(case, v, "float32", by_peft=True))


@pytest.mark.parametrize("case", DORA, ids=str)
def test_the_full_norm_equals_autograd_on_the_written_out_forward(case: Case) -> None:
    v = draw(case, "float64")
    got, want = ours(case, v, norm_gradient=True), written_out(case, v)
    T = terms(case, v, norm_gradient=True)
    assert got.keys() == want.keys()
    assert all(relative(got[name], want[name], T[name]) <= EXACT for name in got)
    v = draw(case, "float32")
    bound = bounds(case, v, "float32", norm_gradient=True)
    assert_within(ours(case, v, norm_gradient=True), written_out(case, widen(v)), bound)


def test_peft_detaches_the_norm_and_ours_says_so_at_the_call() -> None:
    """peft-0.21.2/norm-gradient."""
    case = Case(use_dora=True, p=0.3)
    v = draw(case, "float64")
    peft, detached, full = theirs(case, v), ours(case, v), ours(case, v, norm_gradient=True)
    for name, differs in {"y": False, "x": False, "m": False, "A": True, "B": True, "W": True}.items():
        assert relative(detached[name], peft[name], terms(case, v)[name]) <= EXACT
        apart = np.linalg.norm(full[name] - peft[name]) / np.linalg.norm(peft[name])
        assert apart > 0.05 if differs else apart < EXACT


def test_peft_gives_a_conv1d_weight_only_part_of_its_gradient() -> None:
    """peft-0.21.2/conv1d-dora-gW: under dropout its W is transposed into a Parameter of its own."""
    case = Case(use_dora=True, p=0.3, stored="(d_in, d_out)")
    v = draw(case, "float64")
    peft, T = theirs(case, v)["W"], terms(case, v)["W"]
    assert relative(peft, rows(v["gy"]).T @ rows(v["x"]), T) <= EXACT
    whole = theirs(case._replace(stored="(d_out, d_in)"), v)["W"]
    assert relative(ours(case, v)["W"], whole, T) <= EXACT
    assert np.linalg.norm(peft - whole) > 0.05 * np.linalg.norm(whole)


def test_peft_makes_an_axis_where_one_token_has_none() -> None:
    """peft-0.21.2/dora-one-token: x of (d_in,) gives y of (1, d_out) under DoRA."""
    case = Case(use_dora=True, shape=(4, 6, 2, ()))
    v = draw(case, "float64")
    _, layer = peft_layer(case, v)
    assert layer(to_torch(v["x"])).shape == (1, 4)
    assert ours(case, v)["y"].shape == (4,)


# ---- a base of 16 bits under an adapter of 32 --------------------------------------------------------------


def half_terms(case: Case, v: Arrays, exact: Arrays) -> tuple[Arrays, Arrays]:
    """What a rounding to 16 bits multiplies, for y and each gradient: in ours, and in PEFT's.

    Ours rounds the base's output, and each result once. PEFT's also rounds x Wᵀ before b, and each of the two
    shares of gx; under DoRA without dropout it takes P from the rounded output less b, rounded again, and its
    gradient back through 16 bits.
    """
    w = {name: np.abs(value) for name, value in widen(v).items()}
    x, W, gy = widen(v)["x"], widen(v)["W"], w["gy"]
    xW = x @ W.T
    y0 = xW + widen(v).get("b", widen(v).get("b0", np.zeros(len(W))))
    a = {name: np.abs(value) for name, value in exact.items()}
    here = {name: 0 * value for name, value in a.items()}
    here |= {name: a[name] for name in ("x", "W", "b") if name in a}
    here["y"] = np.abs(y0) + a["y"]
    there = dict(here)
    base = np.abs(widen(v)["gy"] @ W)
    there["y"] = here["y"] + np.abs(xW)
    there["x"] = a["x"] + base + np.abs(exact["x"] - widen(v)["gy"] @ W)
    if case.use_dora and case.p:  # W by way of its own 16-bit product, and of P
        gW = rows(widen(v)["gy"]).T @ rows(x)
        there["W"] = a["W"] + np.abs(gW) + np.abs(exact["W"] - gW)
    if case.use_dora and not case.p:
        n, _ = norms(case, v)
        k = widen(v)["m"] / n
        lost = np.abs(xW) + np.abs(y0) + np.abs(xW)  # of P
        there["y"] = there["y"] + np.abs(k - 1) * lost
        there["m"] = rows(gy * lost).sum(0) / n
        share = gy * (np.abs(k - 1) + np.abs(k))  # (k − 1)∘gy, and its sum with gy
        gP = np.abs((widen(v)["gy"] * k) @ W)
        there["x"] = a["x"] + share @ w["W"] + gP + np.abs(exact["x"] - (widen(v)["gy"] * k) @ W)
        there["W"] = rows(share).T @ rows(w["x"]) + a["W"]
        if "b" in a:
            sums = np.abs(rows(widen(v)["gy"]).sum(0))
            there["b"] = a["b"] + rows(share + gy * np.abs(k - 1)).sum(0) + (np.abs(k) + np.abs(k - 1)) * sums
    return here, there


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", HALVES, ids=str)
def test_a_16_bit_base_is_within_its_roundings_of_peft(dtype: str, case: Case) -> None:
    """PEFT's schedule: adapters in float32, the base's output rounded, the branch in float32, one rounding."""
    v = draw(case, dtype, "float32")
    exact, got, peft = theirs(case, widen(v)), ours(case, v), theirs(case, v)
    for name in got:
        assert got[name].dtype == peft[name].dtype
        assert got[name].dtype == numpy_dtype("float32" if name in ("A", "B", "m", "bB") else dtype)
    u = unit(dtype)
    tiny = float(np.finfo("float16").smallest_subnormal) if dtype == "float16" else 0.0
    here, there = half_terms(case, v, exact)
    own, of_peft = bounds(case, v, "float32"), bounds(case, v, "float32", by_peft=True)
    again = (1 + u) ** 3  # a rounding of what was rounded before
    limit = {name: again * (u * here[name] + tiny + own[name]) for name in got}
    assert_within(got, exact, limit)
    slack = {name: limit[name] + again * (u * there[name] + tiny + of_peft[name]) for name in got}
    assert_within(got, peft, slack)


LARGE = (64, 48, 4, (200,))


def same(one: np.ndarray, other: np.ndarray) -> float:
    """The share of elements that are equal."""
    return float((one.astype("float64") == other.astype("float64")).mean())


def off(got: np.ndarray, exact: np.ndarray) -> float:
    """The error in the Euclidean norm."""
    return float(np.linalg.norm(got.astype("float64") - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(shape=LARGE),
        Case(shape=LARGE, p=0.3),
        Case(shape=LARGE, lora_bias=True),
        Case(shape=LARGE, use_dora=True, p=0.3),
    ],
    ids=str,
)
def test_a_16_bit_output_follows_pefts_schedule(dtype: str, case: Case) -> None:
    """Equal but where a last bit of float32 falls on a tie; a branch rounded before the sum is told apart."""
    v = draw(case, dtype, "float32")
    got, peft, exact = ours(case, v), theirs(case, v), theirs(case, widen(v))
    assert same(got["y"], peft["y"]) > 0.99
    alone = v["x"].astype("float32") @ v["W"].astype("float32").T + v["b0"].astype("float32")
    base = alone.astype(v["x"].dtype)
    branch = (exact["y"] - base.astype("float64")).astype(base.dtype)
    assert same(base + branch, peft["y"]) < 0.95
    assert off(got["x"], exact["x"]) < 0.8 * off(peft["x"], exact["x"])  # one rounding against three


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pefts_magnitude_reads_a_rounded_product(dtype: str) -> None:
    """peft-0.21.2/16-bit-dora: without dropout PEFT's P is its 16-bit output less b; ours is of float32."""
    case = Case(use_dora=True, shape=LARGE)
    v = draw(case, dtype, "float32")
    got, peft, exact = ours(case, v), theirs(case, v), theirs(case, widen(v))
    errors = {name: (off(got[name], exact[name]), off(peft[name], exact[name])) for name in exact}
    print(f"peft-0.21.2/16-bit-dora {dtype}: {same(got['y'], peft['y']):.0%} of y equal; ours, PEFT:", errors)
    assert same(got["y"], peft["y"]) < 0.5
    assert errors["m"][0] < 1e-6 < unit(dtype) / 10 < errors["m"][1]
    assert all(errors[name][0] < errors[name][1] for name in ("y", "x", "m", "b", "W"))


# ---- the check refuses what is wrong -----------------------------------------------------------------------

PLAIN = Case(bias="all", lora_bias=True, p=0.3, shape=SHAPES[6])
MAGNITUDE = Case(bias="all", use_dora=True, p=0.3, shape=SHAPES[6])


def refused(case: Case, dtype: str) -> set[str]:
    """The tensors of ours that the checks above would refuse."""
    v = draw(case, dtype)
    got, truth, T = ours(case, v), theirs(case, widen(v)), terms(case, v)
    c = roundings(case)
    wrong = set()
    for name in got:
        error = np.abs(got[name].astype("float64") - truth[name])
        if dtype == "float64":
            right = relative(got[name], truth[name], T[name]) <= EXACT
        else:
            right = bool((error <= gamma(c[name], dtype) * T[name]).all())
        wrong |= set() if right else {name}
    return wrong


def scaled(function, place: int):
    """The function with one of its results wrong by 0.1 %."""

    def broken(*args, **kwargs):
        found = function(*args, **kwargs)
        if not isinstance(found, tuple):
            return found * type(found.flat[0])(1.001)
        return tuple(g * g.dtype.type(1.001) if i == place else g for i, g in enumerate(found))

    return broken


SLIGHT = [  # a function of the layer, which result, the case, what the check must refuse
    ("lora_backward", 0, PLAIN, {"x"}),
    ("lora_backward", 1, PLAIN, {"A"}),
    ("lora_backward", 2, PLAIN, {"B"}),
    ("lora_backward_bB", 0, PLAIN, {"bB"}),
    ("linear_backward_b", 0, PLAIN, {"b"}),
    ("linear_backward_W", 0, PLAIN, {"W"}),
    ("linear_backward_x", 0, PLAIN, {"x"}),
    ("linear_forward", 0, PLAIN, {"y"}),
    ("magnitude_backward", 0, MAGNITUDE, {"x", "W"}),
    ("magnitude_backward", 1, MAGNITUDE, {"x", "A", "B"}),
    ("magnitude_backward", 2, MAGNITUDE, {"m"}),
    ("dropout_backward", 0, PLAIN, {"x"}),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "place", "case", "hit"), SLIGHT, ids=lambda v: "".join(sorted(v)) if isinstance(v, set) else str(v)
)
def test_a_gradient_wrong_by_a_thousandth_is_refused(monkeypatch, dtype, name, place, case, hit) -> None:
    assert refused(case, dtype) == set()
    monkeypatch.setattr(f"lorax_np.layer.{name}", scaled(getattr(lx.layer, name), place))
    assert refused(case, dtype) == hit


def without_mask(gy, mask):
    return gy


def unscaled_A(gy, saved, A, B, *, scaling):
    gx, gA, gB = lx.ops.lora.lora_backward(gy, saved, A, B, scaling=scaling)
    return gx, gA / gA.dtype.type(scaling), gB


def of_the_undropped_input(gy, saved, A, B, *, scaling):
    dropped = saved._replace(x=np.where(saved.x == 0, saved.x.dtype.type(1), saved.x))
    return lx.ops.lora.lora_backward(gy, dropped, A, B, scaling=scaling)


def unscaled_bB(gy, *, scaling):
    return lx.ops.linear.linear_backward_b(gy)


def no_bias(gy):
    return 0 * gy.reshape(-1, gy.shape[-1]).sum(0)


def magnitude_without_norm(gt, saved, *, m, n):
    gP, gQ, gm, gn = lx.ops.dora.magnitude_backward(gt, saved, m=m, n=n)
    return gP, gQ, gm * n, gn


def plain_under_dora(gt, saved, *, m, n):
    gP, _, gm, gn = lx.ops.dora.magnitude_backward(gt, saved, m=m, n=n)
    return gP, gt, gm, gn


def k_for_k_less_one(gt, saved, *, m, n):
    _, gQ, gm, gn = lx.ops.dora.magnitude_backward(gt, saved, m=m, n=n)
    return gQ, gQ, gm, gn


BROKEN = [
    ("dropout_backward", without_mask, PLAIN, {"x"}),
    ("lora_backward", unscaled_A, PLAIN, {"A"}),
    ("lora_backward", of_the_undropped_input, PLAIN, {"A"}),
    ("lora_backward_bB", unscaled_bB, PLAIN, {"bB"}),
    ("linear_backward_b", no_bias, PLAIN, {"b"}),
    ("magnitude_backward", magnitude_without_norm, MAGNITUDE, {"m"}),
    ("magnitude_backward", plain_under_dora, MAGNITUDE, {"x", "A", "B"}),
    ("magnitude_backward", k_for_k_less_one, MAGNITUDE, {"x", "W"}),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "fault", "case", "hit"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_gradient_is_refused(monkeypatch, dtype, name, fault, case, hit) -> None:
    monkeypatch.setattr(f"lorax_np.layer.{name}", fault)
    assert refused(case, dtype) == hit


def test_the_full_norm_is_refused_where_the_detached_is_meant(monkeypatch) -> None:
    full = lx.lora_linear_backward
    monkeypatch.setattr(lx, "lora_linear_backward", lambda *a, **k: full(*a, **{**k, "norm_gradient": True}))
    assert refused(MAGNITUDE, "float64") == {"A", "B"}
    assert refused(MAGNITUDE, "float32") == {"A", "B"}
