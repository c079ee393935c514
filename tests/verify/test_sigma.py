"""The deviations: no right layer is accused, in any profile and order; small errors are seen."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorax_np.verify.bounds.sigma import THRESHOLD, ceiling, deviations, tolerance
from lorax_np.verify.bounds.slope import slope, slopes
from lorax_np.verify.bounds.worst import bounds
from lorax_np.verify.cases import KINDS, MIDDLE, SMALL, draw, grid
from lorax_np.verify.conventions import Spec
from lorax_np.verify.layers.rounding import ORDERS, layer, to_bits
from lorax_np.verify.precision import PRECISIONS

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import false_alarms

sys.path.pop(0)

BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
MODES = ("lora", "lora, dropout", "dora", "dora full norm", "dora full norm, dropout")


def rounded(case, profile):
    """The case with arrays that the profile's dtype holds, as float64."""
    bits = BITS[PRECISIONS[profile].dtype]
    return replace(case, **{name: to_bits(value, bits) for name, value in case.arrays().items()})


def made(kind, profile, seed, shape=(9, 11, 5, (6,)), **more):
    return rounded(
        draw("made", kind, shape, "float64", (seed,), bias="trained", lora_bias=True, **more), profile
    )


def truth(case, dtype=np.float64):
    return false_alarms.truth(case, dtype is np.longdouble)


# ---- the arithmetic that is emulated -----------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bits"), [(np.float16, 11), (np.float32, 24)])
def test_rounding_is_that_of_the_hardware(dtype, bits):
    values = np.random.default_rng(0).standard_normal(5000) * 10.0 ** np.arange(-2, 3)[:, None]
    ties = (1 + (2 * np.arange(64) + 1) * 2.0**-bits) * np.array([[1.0], [-1.0]])
    for value in (values[np.abs(values) > 1e-4], ties):  # float16 is subnormal below 6e-5
        assert np.array_equal(to_bits(value, bits), value.astype(dtype).astype(np.float64))


def test_rounding_to_bfloat16_is_that_of_ml_dtypes():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32).astype(np.float64)
    assert np.array_equal(to_bits(values, 8), values.astype(np.float32).astype(bfloat16).astype(np.float64))


def test_truncation_never_grows():
    values = np.random.default_rng(0).standard_normal(1000)
    cut = to_bits(values, 8, toward_zero=True)
    assert np.all(np.abs(cut) <= np.abs(values))
    assert np.all(np.abs(cut - values) < 2.0**-7 * np.abs(values))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", MODES)
def test_every_order_is_the_layer(order, kind):
    case = made(kind, "fp64", 1)
    y, found = layer(case, PRECISIONS["fp64"], ORDERS[order])
    found["y"] = y
    want = truth(case)
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12)


def test_orders_round_differently():
    case = made("lora, dropout", "fp32", 2, (13, 21, 5, (20,)))
    results = set()
    for order in ORDERS.values():
        y, found = layer(case, PRECISIONS["fp32"], order)
        results.add(b"".join(value.tobytes() for value in (y, *found.values())))
    assert len(results) == len(ORDERS) >= 8


# ---- no right layer is accused -----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PRECISIONS)
def test_no_false_alarm_below_the_ceiling_and_calibrated(profile):
    _, rows = false_alarms.chunk((profile, 7, 0, 25))
    results = [result for *_, result in rows if result is not None]
    assert len(results) >= 15
    z = {(i, name): cells for i, result in enumerate(results) for name, cells in result.items()}
    assert max(cells[0] for cells in z.values()) < 5.5 < THRESHOLD
    assert max(cells[2] for cells in z.values()) <= 1.0  # the ceiling
    entries, squares = sum(cells[3] for cells in z.values()), sum(cells[4] for cells in z.values())
    assert 0.2 < np.sqrt(squares / entries) < 1.5
    large = [cells[1] for cells in z.values() if cells[3] >= 50]
    assert 0.15 < np.median(large) < 1.5


@pytest.mark.parametrize("profile", ["fp32", "bf16", "tf32-rz"])
@pytest.mark.parametrize("kind", MODES)
def test_on_the_layers_of_the_harness(profile, kind):
    for seed, shape in enumerate((*SMALL, *MIDDLE)):
        case = made(kind, profile, seed, shape)
        want = truth(case)
        for order in ("z first", "BA first", "s in the mask"):
            y, found = layer(case, PRECISIONS[profile], ORDERS[order])
            allowed = tolerance(case, PRECISIONS[profile])
            for name, got in {**found, "y": y}.items():
                assert np.all(np.abs(got - want[name]) <= allowed[name]), (order, shape, name)


# ---- and a wrong one is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
def test_a_thousandth_is_seen_in_every_tensor(profile):
    seen = set()
    for case in grid("complex", MIDDLE, profile, Spec(norm_gradient=(False, True)), 3, "quick"):
        want, allowed = truth(case), tolerance(case, PRECISIONS[profile])
        for name, value in want.items():
            if np.any(value):
                share = np.abs(0.001 * value) / np.maximum(allowed[name], 1e-300)
                assert share.max() > 10, (case.id, name)
                seen.add(name)
    assert seen == {"y", "x", "W", "A", "B", "m", "b", "bB"}


def test_tf32_under_the_claim_of_fp32_is_seen():
    case = made("lora", "fp32", 0)
    y, _ = layer(case, PRECISIONS["tf32"], ORDERS["z first"])
    error = np.abs(y - truth(case)["y"])
    assert np.max(error / tolerance(case, PRECISIONS["fp32"])["y"]) > 10
    assert np.max(error / tolerance(case, PRECISIONS["tf32"])["y"]) < 0.5


def test_truncation_under_the_claim_of_nearest_is_seen():
    case = made("lora", "fp32", 0, (6, 900, 3, (5,)))
    case = replace(case, x=np.abs(case.x), W=np.abs(case.W))
    y, _ = layer(case, replace(PRECISIONS["fp32"], rounding="toward zero"), ORDERS["z first"])
    z = {}
    for rounding in ("nearest", "toward zero"):
        p = replace(PRECISIONS["fp32"], rounding=rounding)
        z[rounding] = np.max(np.abs(y - truth(case)["y"]) / deviations(case, p)["y"])
    assert z["nearest"] > THRESHOLD > 4 * z["toward zero"]


# ---- the model itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["fp32", "bf16", "fp16", "tf32"])
def test_the_full_norm_against_emulated_roundings(profile):
    """Root mean square error over draws and orders, over the deviation, of gA, gB and gW."""
    p, squares, count = PRECISIONS[profile], {}, {}
    for seed in range(24):
        case = made("dora full norm", profile, seed, (8, 9, 4, (5,)))
        case = rounded(replace(case, x=case.x + 3 * case.W.mean(axis=0)), profile)
        sigma, want = deviations(case, p), truth(case)
        order = list(ORDERS.values())[seed % len(ORDERS)]
        _, found = layer(case, p, order)
        for name in ("A", "B", "W"):
            z = (found[name] - want[name]) / sigma[name]
            squares[name] = squares.get(name, 0.0) + float((z * z).sum())
            count[name] = count.get(name, 0) + z.size
    for name, total in squares.items():
        assert 0.15 < np.sqrt(total / count[name]) < 1.2, name


def test_without_the_terms_of_the_norm_right_layers_would_be_accused():
    """The detached deviations are too small for the full norm: what its derivation is for."""
    worst = 0.0
    for seed in range(30):
        case = made("dora full norm", "bf16", seed, (8, 9, 4, (1,)))
        case = rounded(replace(case, m=1e3 * case.m, b=None), "bf16")
        case = rounded(replace(case, A=case.A * np.linspace(1, 40, 4)[:, None]), "bf16")
        _, found = layer(case, PRECISIONS["bf16"], ORDERS["z first"])
        error = np.abs(found["W"] - truth(case)["W"])
        full = deviations(case, PRECISIONS["bf16"])["W"]
        half = deviations(replace(case, norm_gradient=False), PRECISIONS["bf16"])["W"]
        worst = max(worst, float((error / half).max()))
        assert np.all(error < THRESHOLD * full)
    assert worst > 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_zero_tokens_and_positive(kind):
    for lead in ((0,), (), (2, 3)):
        drawn = kind if lead != (0,) else kind.replace(", dropout", "")  # a mask of nothing has no two values
        case = draw("shapes", drawn, (4, 6, 3, lead), "float32", (1,), bias="trained", lora_bias=True)
        for profile in PRECISIONS.values():
            for values in (deviations(case, profile), tolerance(case, profile), ceiling(case, profile)):
                assert {"y", *case.wanted, "W"} <= values.keys()
                for name, value in values.items():
                    assert value.shape == (case.gy if name == "y" else getattr(case, name)).shape
                    assert np.all(np.isfinite(value))
                    assert np.all(value >= 0)


@pytest.mark.parametrize("kind", MODES)
def test_the_ceiling_is_the_bound_where_all_roundings_are_alike(kind):
    """At one u for all it agrees with bounds.bounds within the few roundings that the two count differently."""
    case = made(kind, "fp32", 3)
    one, other = ceiling(case, PRECISIONS["fp32"]), bounds(case, 2.0**-24)
    if case.m is not None and case.mask is None:  # (bounds.53), which knows of another order for gb
        k = np.abs(case.m) / np.linalg.norm(case.W + case.scaling * case.B @ case.A, axis=1)
        other["b"] = other["b"] * (1 + 2 * (k + 1))
    for name, value in other.items():
        ratio = one[name] / value
        assert np.all(ratio > 0.6), name
        assert np.all(ratio < 1.8), name


def test_the_ceiling_is_infinite_where_a_row_is_lost():
    case = made("dora", "bf16", 0)
    lost = replace(case, W=-case.scaling * case.B @ case.A + 1e-4)
    assert np.all(np.isinf(ceiling(lost, PRECISIONS["bf16"])["y"]))


# ---- the slope ---------------------------------------------------------------------------------------------


def emulated(order, error, seed):
    """y of a layer with 4096 outputs in emulated bf16, all of it larger by a relative error."""
    case = rounded(draw("slope", "lora", (64, 48, 8, (64,)), "float64", (seed,), bias="absent"), "bf16")
    y, _ = layer(replace(case, x=case.x * (1 + error)), PRECISIONS["bf16"], ORDERS[order])
    return y, truth(case)["y"], deviations(case, PRECISIONS["bf16"])["y"]


def test_slope_finds_a_thousandth_below_the_noise_of_bf16():
    for order, least in (("fused", 20.0), ("z first", 13.0)):
        got, want, sigma = emulated(order, 1e-3, 0)
        found, z = slope(got, want, sigma)
        assert abs(found - 1e-3) < 2e-4
        assert z > least
        assert np.max(np.abs(got - want) / sigma) < THRESHOLD  # no entry shows it


def test_slope_finds_three_ten_thousandths():
    z = [slope(*emulated("fused", 3e-4, seed))[1] for seed in range(4)]
    assert 5 < np.mean(z) < 10
    assert max(abs(slope(*emulated("z first", 0.0, seed))[1]) for seed in range(4)) < 4


def test_slope_counts_only_what_says_something():
    zero = np.zeros(3)
    assert slope(zero, zero, zero) == (0.0, 0.0)
    assert slope(np.ones(3), zero, np.ones(3)) == (0.0, 0.0)
    assert slope(np.full(2, 1.01), np.ones(2), np.full(2, 0.01), shared=0.01)[1] < 1.0


def test_slopes_allow_for_what_entries_share():
    """DoRA's k is rounded once for all tokens: taken as independent, that looks like a wrong scale."""
    alone, together = [], []
    for seed in range(6):
        case = made("dora", "bf16", seed, (3, 24, 4, (300,)))
        case = replace(case, b=None)
        y, _ = layer(case, PRECISIONS["bf16"], ORDERS["z first"])
        want = truth(case)["y"]
        alone.append(abs(slope(y, want, deviations(case, PRECISIONS["bf16"])["y"])[1]))
        together.append(abs(slopes(case, PRECISIONS["bf16"], {"y": y}, {"y": want})["y"][1]))
    assert max(together) < 4
    assert max(alone) > 2 * max(together)


def test_slopes_allow_for_a_scale_next_to_a_power_of_two():
    """s = 2.002 is 2 to bfloat16: with one token, gbB is off by a thousandth in every entry, and right."""
    case = rounded(draw("s", "lora", (60, 5, 4, (1,)), "float64", (3,), alpha=8.008, lora_bias=True), "bf16")
    _, found = layer(case, PRECISIONS["bf16"], ORDERS["z first"])
    want = truth(case)
    assert abs(slope(found["bB"], want["bB"], deviations(case, PRECISIONS["bf16"])["bB"])[1]) > THRESHOLD
    assert abs(slopes(case, PRECISIONS["bf16"], found, want)["bB"][1]) < 4
