"""Merging against PEFT's, and how each of the two rounds.  See specs/merge.md."""

from decimal import Decimal, localcontext
from itertools import product
from typing import Any

import numpy as np
import pytest
from peft_layers import (
    Arrays,
    Case,
    assert_within,
    draw,
    gamma,
    norms,
    numpy_dtype,
    ours,
    peft_layer,
    records,
    relative,
    terms,
    to_numpy,
    to_torch,
    unit,
    widen,
)

import lorax_np as lx

pytestmark = pytest.mark.peft

EXACT = 1e-13  # float64: of the tensor's largest sum of absolute terms
SHAPES = ((6, 5, 3, (2, 4)), (5, 4, 9, (7,)), (1, 8, 2, (3,)), (24, 33, 8, (5,)))
CASES = [
    Case(base_bias, bias, lora_bias, use_rslora, use_dora, 0.0, shape, stored)
    for base_bias, bias, lora_bias, use_rslora, use_dora, shape, stored in product(
        (True, False),
        ("none", "all"),
        (False, True),
        (False, True),
        (False, True),
        SHAPES,
        ("(d_out, d_in)", "(d_in, d_out)"),
    )
    if not (lora_bias and use_dora)
    and not (lora_bias and not base_bias)  # PEFT cannot merge that, and ours can: see below
    and not (stored == "(d_in, d_out)" and not base_bias)  # Conv1D has one
]
SAFE = pytest.mark.parametrize("safe", [False, True], ids=["", "safe_merge"])


def our_merge(case: Case, v: Arrays) -> Arrays:
    base, adapter = records(case, v)
    merged = lx.merge(base, adapter, scaling=case.scaling)
    return {"W": merged.W} | ({} if merged.b is None else {"b": merged.b})


def peft_merge(case: Case, v: Arrays, *, safe: bool, autocast: bool = True) -> tuple[Arrays, Any]:
    """W and b after PEFT's merge, W as (d_out, d_in), and the merged layer."""
    _, layer = peft_layer(case, v, autocast=autocast)
    layer.merge(safe_merge=safe)
    W, b = layer.base_layer.weight, layer.base_layer.bias
    found = {"W": to_numpy(W).T if case.stored == "(d_in, d_out)" else to_numpy(W)}
    return found | ({} if b is None else {"b": to_numpy(b)}), layer


def merge_terms(case: Case, v: Arrays) -> Arrays:
    """The sums of absolute terms of W' and b', as peft_layers.terms does it."""
    w, (n, V) = {name: np.abs(value) for name, value in widen(v).items()}, norms(case, v)
    T = {"W": (w["m"] * np.linalg.norm(V, axis=1) / n**2)[:, None] * V if case.use_dora else V}
    if case.base_bias:
        T["b"] = w.get("b", w.get("b0")) + abs(case.scaling) * w.get("bB", np.zeros(len(n)))
    return T


@SAFE
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_peft_to_1e_13(case: Case, safe: bool) -> None:
    v = draw(case, "float64")
    got, T = our_merge(case, v), merge_terms(case, v)
    want, layer = peft_merge(case, v, safe=safe)
    assert got.keys() == want.keys() == T.keys()
    for name in got:
        assert got[name].shape == want[name].shape
        assert got[name].dtype == want[name].dtype == np.float64
        assert relative(got[name], want[name], T[name]) <= EXACT, name
    y = to_numpy(layer(to_torch(v["x"])))  # of the merged layer, against ours before the merge
    assert relative(y, ours(case, v)["y"], terms(case, v)["y"]) <= EXACT


@SAFE
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_one_rounding_in_ours_and_a_few_in_peft(case: Case, safe: bool) -> None:
    _, d_in, r, _ = case.shape
    v = draw(case, "float32")
    exact, T = our_merge(case, widen(v)), merge_terms(case, v)
    got, (peft, _) = our_merge(case, v), peft_merge(case, v, safe=safe)
    assert {value.dtype for value in (*got.values(), *peft.values())} == {np.dtype("float32")}
    assert all((got[name] == exact[name].astype("float32")).all() for name in got)
    few = {"W": r + 3, "b": 3}  # the sum, s and times s, the base
    if case.use_dora:
        few["W"] += 2 + (r + 3) + d_in // 2 + 4  # times m/n, and the norm
    assert_within(peft, exact, {name: gamma(few[name], "float32") * T[name] for name in T})


# ---- which of two numbers is the nearest: 16 bits ----------------------------------------------------------


def exact_merge(case: Case, v: Arrays) -> list[list[Decimal]]:
    """W' to 100 digits: without a norm that is all of them."""
    W, A, B, m = (
        [[Decimal(float(e)) for e in row] for row in np.atleast_2d(v.get(name, 0.0))]
        for name in ("W", "A", "B", "m")
    )
    s = Decimal(case.scaling)
    V = [
        [
            w + s * sum((b * a for b, a in zip(row_B, column, strict=True)), Decimal(0))
            for w, column in zip(row_W, zip(*A, strict=True), strict=True)
        ]
        for row_W, row_B in zip(W, B, strict=True)
    ]
    if not case.use_dora:
        return V
    return [[mag / sum(e * e for e in row).sqrt() * e for e in row] for mag, row in zip(m[0], V, strict=True)]


def nearest(values: np.ndarray, exact: list[list[Decimal]]) -> int:
    """How many of the values lie no farther from the exact ones than their two neighbours do."""
    high, low = (np.nextafter(values, np.asarray(end, values.dtype)) for end in (np.inf, -np.inf))
    count = 0
    for at in np.ndindex(values.shape):
        e = exact[at[0]][at[1]]
        own, *others = (abs(Decimal(float(a[at])) - e) for a in (values, high, low))
        count += own <= min(others)
    return count


GRADED = [
    (dtype, adapter, use_dora)
    for dtype in ("bfloat16", "float16")
    for adapter in ("float32", dtype)
    for use_dora in (False, True)
]


@pytest.mark.parametrize(("dtype", "adapter", "use_dora"), GRADED, ids=str)
def test_ours_is_the_nearest_16_bit_number_everywhere(dtype: str, adapter: str, use_dora: bool) -> None:
    """peft-0.21.2/safe-merge, peft-0.21.2/cpu-bf16-merge: how many of 192 entries are the nearest, in PEFT."""
    case = Case(use_dora=use_dora, shape=(16, 12, 4, (2,)))
    v = draw(case, dtype, adapter)
    autocast = adapter == "float32"
    with localcontext() as context:
        context.prec = 100
        exact = exact_merge(case, v)
        grade = {"ours": nearest(our_merge(case, v)["W"], exact)}
        for safe in (False, True):
            merged, _ = peft_merge(case, v, safe=safe, autocast=autocast)
            assert merged["W"].dtype == numpy_dtype(dtype)
            grade[f"safe_merge={safe}"] = nearest(merged["W"], exact)
    print(f"peft-0.21.2/safe-merge {dtype}, adapter {adapter}, use_dora={use_dora}: of 192 {grade}")
    assert grade["ours"] == 192
    plain, safe = grade["safe_merge=False"], grade["safe_merge=True"]
    assert plain >= safe
    if autocast and not use_dora:
        assert plain > safe
    if not autocast and not use_dora:
        assert plain == safe < 0.8 * 192


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_bias_is_rounded_once(dtype: str) -> None:
    case = Case(bias="all", lora_bias=True, shape=(64, 12, 4, (2,)))
    v = draw(case, dtype, "float32")
    exact = our_merge(case, widen(v))["b"]
    got = our_merge(case, v)["b"]
    assert (got == exact.astype(numpy_dtype(dtype))).all()
    for safe in (False, True):
        peft = peft_merge(case, v, safe=safe)[0]["b"].astype("float64")
        T = merge_terms(case, v)["b"]
        assert (
            np.abs(peft - exact) <= (1 + unit(dtype)) * (unit(dtype) * np.abs(exact) + gamma(3, "float32") * T)
        ).all()


# ---- named differences -------------------------------------------------------------------------------------


def test_unmerging_gives_pefts_base_back_only_nearly() -> None:
    """peft-0.21.2/unmerge: subtraction in 16 bits; ours still has the record it started from."""
    case = Case(shape=(16, 12, 4, (2,)))
    v = draw(case, "bfloat16", "float32")
    _, layer = peft_merge(case, v, safe=False)
    layer.unmerge()
    changed = int((to_numpy(layer.base_layer.weight) != v["W"]).sum())
    print(f"peft-0.21.2/unmerge: {changed} of 192 entries changed by a round trip")
    assert changed > 0
    base, adapter = records(case, v)
    before = base.W.tobytes()
    lx.merge(base, adapter, scaling=case.scaling)
    assert base.W.tobytes() == before


@SAFE
def test_a_bias_of_B_without_a_base_bias_merges_in_ours_alone(safe: bool) -> None:
    """peft-0.21.2/merge-bias: PEFT has no place for s·bB, and W is already changed where it is not safe."""
    case = Case(base_bias=False, lora_bias=True)
    v = draw(case, "float64")
    _, layer = peft_layer(case, v)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        layer.merge(safe_merge=safe)
    assert (to_numpy(layer.base_layer.weight) == v["W"]).all() == safe
    got = our_merge(case, v)
    assert (got["b"] == case.scaling * v["bB"]).all()
    y = v["x"] @ got["W"].T + got["b"]
    assert relative(y, to_numpy(peft_layer(case, v)[1](to_torch(v["x"]))), terms(case, v)["y"]) <= EXACT


def test_what_is_not_finite_merges_in_peft_unless_asked() -> None:
    """peft-0.21.2/merge-finite."""
    case = Case()
    v = draw(case, "float64")
    v["B"] = np.where(np.arange(3) == 1, np.nan, v["B"])
    assert np.isnan(peft_merge(case, v, safe=False)[0]["W"]).all()
    with pytest.raises(ValueError, match="NaNs detected"):
        peft_merge(case, v, safe=True)
    with pytest.raises(lx.ConfigError, match=r"^W: expected finite numbers once merged"):
        our_merge(case, v)


def test_a_row_that_an_adapter_took_to_zero() -> None:
    """peft-0.21.2/dora-zero-row: PEFT merges it to NaN and says so only when safe; ours names it."""
    case = Case(use_dora=True)
    v = {name: np.round(value) for name, value in draw(case, "float64").items()}
    v["A"], v["B"], s = np.ones_like(v["A"]), np.ones_like(v["B"]), case.scaling
    v["W"][2] = -(s * (v["B"] @ v["A"])[2])
    merged, _ = peft_merge(case, v, safe=False)
    assert np.isnan(merged["W"][2]).all()
    with pytest.raises(ValueError, match="NaNs detected"):
        peft_merge(case, v, safe=True)
    with pytest.raises(lx.ConfigError, match=r"got 1 rows of zeros \(first: 2\)"):
        our_merge(case, v)


def test_taking_the_adapter_away_leaves_pefts_trained_bias() -> None:
    """peft-0.21.2/bias-restore: PEFT trains the base's own bias; ours is in the adapter."""
    case = Case(bias="all")
    v = draw(case, "float64")
    model, layer = peft_layer(case, v)
    with pytest.warns(UserWarning, match="disabling adapter layers with bias"), model.disable_adapter():
        y = to_numpy(layer(to_torch(v["x"])))
    base, _ = records(case, v)
    alone = v["x"] @ base.W.T + base.b
    T = terms(case, v)["y"]
    assert relative(y, v["x"] @ v["W"].T + v["b"], T) <= EXACT
    assert np.abs(y - alone).max() > 0.1
    assert base.b is v["b0"]
