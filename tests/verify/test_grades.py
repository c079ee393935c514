"""Grades of merges into 16 bits: each way to round gets its own, what is no rounding at all is refused."""

import subprocess
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from often import once_each, one_in

import lorax_np as lx
from lorax_np.verify.batteries import suited
from lorax_np.verify.batteries.grades import GRADES, battery_grades, graded, merge_case
from lorax_np.verify.truths.exact import BITS, fixed
from lorax_np.verify.truths.nearest import nearest, places

HALVES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
ONE, ONCE, TWICE, LOW = GRADES


def judged(subject, profile="bf16", seed=0):
    with np.errstate(all="ignore"):
        return [check for checks in battery_grades(subject, profile, seed, "full", "") for check in checks]


def grades(subject, profile="bf16", seed=0):
    """By the kind of layer and the adapters' dtype, the grades of W'."""
    checks = judged(subject, profile, seed)
    assert {check.verdict for check in checks} == {"pass"}, [c for c in checks if c.verdict != "pass"]
    return {tuple(c.kind.split(", ")): c.grade for c in checks if c.tensor == "W"}


# ---- the nearest number ------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", HALVES)
def test_the_nearest_number_is_that_of_one_rounding(profile):
    dtype = HALVES[profile]
    rng = np.random.default_rng(0)
    value = (rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 13, 4000)).astype(np.float32)
    every = np.arange(0, 0x7F80 if profile == "bf16" else 0x7C00, dtype=np.uint16)  # the finite ones
    every = every.view(dtype).astype(np.float64)
    ties = (every[1:] + every[:-1]) / 2  # of all neighbours, the subnormal ones too
    for values in (value, every[1:], ties, -ties):
        want = values.astype(np.float32).astype(dtype).astype(np.float64)
        assert np.array_equal(nearest(fixed(values), np.dtype(dtype).name), want)
    above = [int(v) + 1 for v in fixed(ties[:-1])]  # by 2**-640
    assert np.array_equal(nearest(np.array(above, object), np.dtype(dtype).name), every[1:-1])
    step = places(fixed(every[1:-1]), np.dtype(dtype).name)
    assert np.array_equal(step, (every[2:] - every[1:-1]))


def test_past_the_largest_number_is_infinity():
    for name, largest, over in (("float16", 65504.0, 65520.0), ("bfloat16", 2.0**128 - 2.0**120, 2.0**128)):
        assert nearest(fixed(np.array([largest, over, -over])), name).tolist() == [largest, np.inf, -np.inf]


# ---- every way to round has its grade ----------------------------------------------------------------------


class Merging:
    """A merge in NumPy, as a way of its own."""

    def __init__(self, way, s=1.0):
        self.way, self.s = way, s

    def merge(self, case):
        v = {name: value.astype(np.float64) for name, value in case.arrays().items()}
        W, b = self.way(v, self.s * case.scaling, case.W.dtype)
        return {"W": W.astype(case.W.dtype), **({} if b is None else {"b": b.astype(case.W.dtype)})}


def single(v, s, dtype):
    """Float32 throughout, rounded once."""
    f = {name: value.astype(np.float32) for name, value in v.items()}
    V = f["W"] + np.float32(s) * (f["B"] @ f["A"])
    if "m" in f:
        V = (f["m"] / np.linalg.norm(V, axis=1))[:, None] * V
    return V, f["b"] + np.float32(s) * f.get("bB", np.float32(0))


def delta_first(v, s, dtype):
    """Delta rounded, then the sum; what follows in float32."""
    f = {name: value.astype(np.float32) for name, value in v.items()}
    V = f["W"] + (np.float32(s) * (f["B"] @ f["A"])).astype(dtype).astype(np.float32)
    if "m" in f:
        V = (f["m"] / np.linalg.norm(V, axis=1))[:, None] * V
    return V, f["b"] + (np.float32(s) * f.get("bB", np.float32(0))).astype(dtype).astype(np.float32)


def half(v, s, dtype):
    """Every step and every partial sum in 16 bits."""

    def q(x):
        return np.asarray(x, np.float64).astype(np.float32).astype(dtype).astype(np.float64)

    W, A, B, total = v["W"], q(v["A"]), q(v["B"]), 0.0
    for i in range(A.shape[0]):
        total = q(total + q(B[:, i : i + 1] * A[i]))
    V = q(W + q(q(s) * total))
    if "m" in v:
        S = 0.0
        for column in V.T:
            S = q(S + q(column * column))
        V = q(q(q(v["m"]) / q(np.sqrt(S)))[:, None] * V)
    return V, q(v["b"] + q(q(s) * q(v.get("bB", 0.0))))


WAYS = {
    single: {ONE, ONCE},
    delta_first: {TWICE},
    half: {LOW},
}


@pytest.mark.parametrize("profile", HALVES)
@pytest.mark.parametrize("seed", range(3))
def test_our_own_merge_is_correctly_rounded_everywhere(profile, seed):
    checks = judged(lx.verify.subjects.reference(), profile, seed)
    assert {(check.verdict, check.grade) for check in checks} == {("pass", ONE)}
    assert {check.tensor for check in checks} == {"W", "b"}
    assert graded(checks, profile) == [f"merge in {profile}: correctly rounded (every entry of 4 layers)"]


@pytest.mark.parametrize(("way", "profile"), once_each(WAYS, HALVES))
def test_each_way_to_round_has_its_grade(way, profile):
    found = set()
    for seed in range(4):
        found |= set(grades(Merging(way), profile, seed).values())
    assert found == WAYS[way] if way is not single else found <= WAYS[way]
    assert way is not single or profile == "bf16" or ONCE in found  # 3 bits more, and float32 shows


def test_a_grade_says_how_many_and_how_far():
    lines = " ".join(" ".join(graded(judged(Merging(delta_first)), "bf16")).split())
    assert "merge in bf16, lora, float32 adapters: doubly rounded (delta rounded first: 2" in lines
    assert lines.count(" % of entries differ from the correctly rounded sum, worst ") == 4


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 10), marks=pytest.mark.thorough)], ids=str)
@pytest.mark.parametrize("profile", one_in(2, HALVES))
def test_arithmetic_in_16_bits_is_never_refused(profile, seeds):
    """The ceiling (merge.12), and the size of the update (merge.13)."""
    worst = 0.0
    for seed in seeds:
        checks = judged(Merging(half), profile, seed + 100)
        assert {check.verdict for check in checks} == {"pass"}, [c.note for c in checks if c.verdict != "pass"]
        worst = max([worst, *(check.ratio for check in checks)])
    print(f"{profile}: at most {worst:.3f} of the ceiling")


# ---- what is no rounding -----------------------------------------------------------------------------------


def without_s(v, s, dtype):
    return single(v, 1.0, dtype)


def transposed(v, s, dtype):
    W, b = single(v, s, dtype)
    return W.T.reshape(W.shape), b


def without_magnitude(v, s, dtype):
    return single({name: value for name, value in v.items() if name != "m"}, s, dtype)


def norm_of_W(v, s, dtype):
    W, b = single({name: value for name, value in v.items() if name != "m"}, s, dtype)
    return (W if "m" not in v else (v["m"] / np.linalg.norm(v["W"], axis=1))[:, None] * W), b


def bias_without_s(v, s, dtype):
    return single(v, s, dtype)[0], v["b"] + v.get("bB", 0.0)


def one_entry(v, s, dtype):
    W, b = single(v, s, dtype)
    W[3, 5] = -W[3, 5] - 1
    return W, b


@pytest.mark.parametrize("profile", HALVES)
@pytest.mark.parametrize(
    ("way", "kinds"),
    [
        (without_s, {"lora", "dora"}),
        (transposed, {"lora", "dora"}),
        (without_magnitude, {"dora"}),
        (norm_of_W, {"dora"}),
        (bias_without_s, {"lora"}),
        (one_entry, {"lora", "dora"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_refused(profile, way, kinds):
    bad = [check for check in judged(Merging(way), profile) if check.verdict == "fail"]
    assert {check.kind.partition(",")[0] for check in bad} == kinds
    assert {check.tensor for check in bad} == (
        {"b"} if way is bias_without_s else {"W"} | {c.tensor for c in bad}
    )
    assert not any(check.grade for check in bad)


@pytest.mark.parametrize("profile", HALVES)
def test_an_update_a_hundredth_too_large_is_refused(profile):
    """Below the noise of each entry in bfloat16; under DoRA there k may be off by as much.  (merge.13)"""
    bad = [check for check in judged(Merging(single, 1.01), profile) if check.verdict == "fail"]
    assert {check.kind.partition(",")[0] for check in bad} >= {"lora"}
    if profile == "bf16":
        assert all(c.note.startswith("the update is off by ") for c in bad)


def test_what_is_no_answer():
    class Wide:
        def merge(self, case):
            return {"W": case.W.astype(np.float32), "b": case.b[:-1]}

    class Lost:
        def merge(self, case):
            return {"W": case.W * np.nan}

    notes = {(check.verdict, check.tensor, check.note) for check in judged(Wide())}
    assert ("fail", "W", "expected dtype bfloat16, got float32") in notes
    assert ("fail", "b", "expected shape (48,), got (47,)") in notes
    assert {(c.verdict, c.tensor) for c in judged(Lost())} == {("fail", "W"), ("not run", "b")}
    assert judged(object()) == []
    assert list(battery_grades(lx.verify.subjects.reference(), "fp32", 0, "full", "")) == []
    assert "grades" in suited("bf16")
    assert "grades" not in suited("fp32")


def test_a_report_prints_and_writes_the_grade():
    report = lx.verify.verify(Merging(delta_first), "bf16", case="grades")
    assert report.passed
    assert "\nmerge in bf16, lora, float32 adapters: doubly rounded (delta rounded first:" in str(report)
    assert {check["grade"] for check in report.to_dict()["checks"]} >= {TWICE}
    failing = lx.verify.verify(Merging(without_s), "bf16", case="grades")
    assert failing.exit_code == 1
    assert failing.diagnosis[-1].startswith("merged W is wrong in ")


def test_the_truth_is_that_of_fractions():
    """(merge.9) of some entries, by fractions and not by 640 bits."""
    for adapters in ("float32", "bfloat16"):
        case = merge_case("", "lora", "bfloat16", adapters, (1,))
        got = lx.verify.subjects.reference().merge(case)["W"].astype(np.float64)
        s, (A, B) = Fraction(case.scaling), (case.A.astype(float), case.B.astype(float))
        for i, j in ((0, 0), (5, 7), (47, 39)):
            t = Fraction(float(case.W[i, j])) + s * sum(
                Fraction(b) * Fraction(a) for b, a in zip(B[i].tolist(), A[:, j].tolist(), strict=True)
            )
            whole = round(t * 2**BITS)
            assert nearest(np.array([whole], object), "bfloat16")[0] == got[i, j]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_bfloat16_is_known_by_its_name_whatever_is_asked():
    """In a process of its own, where nothing else has imported ml_dtypes."""
    code = "import lorax_np as lx; print(lx.verify.verify('reference', 'bf16', case='{}').exit_code)"
    for case in ("grades/lora-float32", "generic/lora/0"):
        run = subprocess.run(
            [sys.executable, "-c", code.format(case)], capture_output=True, text=True, check=False
        )
        assert run.stdout == "0\n", run.stderr
    block = "import sys; sys.modules['ml_dtypes'] = None; " + code.format("")
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    line = "profile: expected the package ml_dtypes for bf16, got none; pip install 'lorax-np[bf16]'"
    assert run.stderr.strip().endswith(line)


# ---- PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.peft
def test_pefts_merges_have_these_grades():
    """peft-0.21.2/safe-merge, peft-0.21.2/cpu-bf16-merge; specs/merge.md has the table."""
    report = lx.verify.verify("peft", "bf16", case="grades")
    assert report.passed
    assert {c.note for c in report.checks if c.verdict == "not run"} == {
        "autocast_adapter_dtype=False has adapters of the base's dtype"
    }
    found = {tuple(c.kind.split(", ")): c.grade for c in report.checks if c.tensor == "W" and c.grade}
    for (kind, _, safe, *without_autocast), grade in found.items():
        if without_autocast:
            assert grade == (TWICE if kind == "lora" else LOW)
        else:
            assert grade in ((TWICE,) if kind == "lora" and safe == "safe_merge=True" else (ONE, ONCE))
    assert len(found) == 12
    assert "merge in bf16, lora, bfloat16 adapters, safe_merge=True: doubly rounded (delta" in str(report)
