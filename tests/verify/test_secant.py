"""Secants: right layers of every kind pass, wrong gradients do not, and the two norms are told apart."""

from dataclasses import replace

import numpy as np
import pytest
from often import one_in

import lorax_np as lx
from lorax_np.verify.batteries import secant
from lorax_np.verify.batteries.secant import battery_secant, judge_secants, norm_of, secants
from lorax_np.verify.cases import KINDS, draw
from lorax_np.verify.layers import plain
from lorax_np.verify.layers.plain import BACKWARD, FORWARD
from lorax_np.verify.precision import PRECISIONS

STEPS = {**FORWARD, **BACKWARD}


def run(subject, profile="fp32", seed=0, level="full", only=""):
    return [check for checks in battery_secant(subject, profile, seed, level, only) for check in checks]


def wrong(checks):
    return [check for check in checks if check.verdict in ("fail", "crash")]


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
@pytest.mark.parametrize("subject", [lx.verify.subjects.reference(), plain.Plain()], ids=["reference", "plain"])
def test_right_subjects_pass(subject, profile):
    checks = run(subject, profile)
    assert {check.verdict for check in checks} == {"pass"}
    assert len({check.id for check in checks}) == len(checks)
    assert {check.tensor for check in checks} == {"x", "A", "B", "m", "b", "bB", "W"}
    assert max(check.ratio for check in checks) < 0.1


def random_layer(i, profile):
    rng = np.random.default_rng(i)
    d_out, d_in, r, N = rng.integers(1, 14, 4).tolist()
    kind = KINDS[i % len(KINDS)]
    d_in += 1  # room for both values of a mask, and a direction across V's rows
    options = {
        "alpha": float(rng.uniform(0.3, 30)),
        "p": float(rng.uniform(0.05, 0.7)),
        "lora_bias": i % 4 == 0,
    }
    bias = ("absent", "frozen", "trained")[i % 3]
    case = draw(
        "secant/random/0", kind, (d_out, d_in, r, (N,)), PRECISIONS[profile].dtype, (i,), bias=bias, **options
    )
    big = {name: 10.0 ** int(rng.integers(-2, 3)) for name in ("x", "A", "gy", "b", "bB")}
    changed = {
        name: (value * big[name]).astype(value.dtype) for name, value in case.arrays().items() if name in big
    }
    return replace(case, **changed)


def test_right_layers_raise_no_alarm():
    """Of every kind, at sizes from 1e-2 to 1e2, one direction in each argument, in both dtypes."""
    worst, layers, count = 0.0, 0, 0
    for i in range(400):  # 2,000 of them, run once: 10,165 gradients, at most 0.029 of the tolerance
        profile = ("fp32", "fp64")[i % 2]
        case = random_layer(i, profile)
        checks = judge_secants(plain.Plain(), case, PRECISIONS[profile], (i,), count=1)
        assert not wrong(checks), (i, wrong(checks))
        layers, count = layers + 1, count + len(checks)
        worst = max([worst, *(check.ratio for check in checks if check.ratio is not None)])
    print(f"{layers} layers, {count} gradients, largest share of the tolerance {worst:.3f}")


GRADIENT_FAULTS = {
    "S4 gA misses s": ({"gA": lambda t: BACKWARD["gA"](t) / t.s}, {"A"}),
    "S5 gB misses s": ({"gB": lambda t: BACKWARD["gB"](t) / t.s}, {"B"}),
    "S6 gx misses s": ({"gx_lora": lambda t: BACKWARD["gx_lora"](t) / t.s}, {"x"}),
    "D2 gx's mask without 1/(1-p)": ({"back": lambda t: (t.mask != 0).astype(t.mask.dtype)}, {"x"}),
    "D4 fresh mask in backward": ({"back": lambda t: np.roll(t.keep, 1)}, {"x"}),
    "D5 gx ignores the mask": ({"back": lambda t: np.ones_like(t.keep)}, {"x"}),
    "D6 gA from undropped x": ({"gA": lambda t: t.gz.T @ t.x}, {"A"}),
    "D7 gB from undropped x": ({"gB": lambda t: t.gu.T @ (t.x @ t.A.T)}, {"B"}),
    "T1 gA reshaped": ({"gA": lambda t: (t.xd.T @ t.gz).reshape(t.A.shape)}, {"A"}),
    "T4 gB reshaped": ({"gB": lambda t: (t.z.T @ t.gu).reshape(t.B.shape)}, {"B"}),
    "G1 gx without adapter": ({"gx_lora": lambda t: 0 * t.x}, {"x"}),
    "G2 gx without base": ({"gx_base": lambda t: 0 * t.x}, {"x"}),
    "G3 gA = 0": ({"gA": lambda t: 0 * t.A, "gA_norm": lambda t: 0 * t.A}, {"A"}),
    "G5 token mean": ({"gB": lambda t: BACKWARD["gB"](t) / len(t.x)}, {"B"}),
    "G8 gb = 0": ({"gb": lambda t: 0 * t.G.sum(axis=0)}, {"b"}),
    "G9 sign of gA": ({"gA": lambda t: -BACKWARD["gA"](t)}, {"A"}),
    "Z6 token tail dropped": ({"gB": lambda t: t.gu[:4].T @ t.z[:4]}, {"B"}),
    "B4 gbB unscaled": ({"gbB": lambda t: t.G.sum(axis=0)}, {"bB"}),
    "R2 gm lacks 1/n": ({"gm": lambda t: t.gk}, {"m"}),
    "R8 sign of the norm gradient": ({"gV": lambda t: -BACKWARD["gV"](t)}, {"A", "B", "W"}),
    "R9 gm lacks the adapter": ({"gm": lambda t: (t.G * t.P).sum(axis=0) / t.n}, {"m"}),
    "N6 gB from a z of few bits": ({"gB": lambda t: t.gu.T @ np.round(t.z * 64) / 64}, {"B"}),
    "W2 gW undropped": (
        {"gW": lambda t: t.G.T @ t.xd + t.gV + (0 if t.m is None else (t.G * (t.k - 1)).T @ t.xd)},
        {"W"},
    ),
}


@pytest.mark.parametrize("name", one_in(3, GRADIENT_FAULTS))
def test_wrong_gradients_are_refused_in_their_tensor(name):
    changed, tensors = GRADIENT_FAULTS[name]
    assert {check.tensor for check in wrong(run(plain.Plain(changed)))} == tensors


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_gm_is_no_fault_of_what_goes_through_the_norm(seed):
    """gA, gB and gW through the norm have a rate along m besides: the forward's own, not gm's."""
    wrong_gm = plain.Plain({"gm": lambda t: t.gk * t.n})
    found = run(wrong_gm, seed=seed, only="secant/dora-full-norm/5")
    assert {check.tensor: check.verdict for check in found if check.tensor in "mABW"} == {
        "m": "fail",
        **dict.fromkeys("ABW", "pass"),
    }


def test_gradients_through_the_norm_are_judged_without_any_gm():
    class WithoutGm(plain.Plain):
        def run(self, case, gy):
            y, g = super().run(case, gy)
            return y, {name: value for name, value in g.items() if name != "m"}

    found = {check.tensor: check.verdict for check in run(WithoutGm(), only="secant/dora-full-norm/5")}
    assert found == {"x": "pass", "m": "fail", **dict.fromkeys("ABW", "pass")}
    assert norm_of(WithoutGm(), asked=True) == "full"
    assert norm_of(WithoutGm()) == "detached"


def test_the_norm_taken_the_other_way_is_refused():
    class Otherwise(plain.Plain):
        def run(self, case, gy):
            return plain.run(replace(case, norm_gradient=not case.norm_gradient), gy)

    found = wrong(run(Otherwise()))
    assert {check.tensor for check in found} == {"A", "B", "W"}
    assert {check.kind.partition(",")[0] for check in found} == {"dora", "dora full norm"}


def test_forward_and_backward_wrong_alike_agree_with_themselves():
    """What a secant cannot see, as no check of a gradient against its own forward can: other batteries do."""
    found = wrong(run(plain.Plain({"s": lambda t: 2 * t.c.scaling})))
    assert {check.kind.partition(",")[0] for check in found} == {"dora", "dora full norm"}  # n is the harness's
    found = wrong(run(plain.Plain({"keep": lambda t: (t.mask != 0).astype(t.mask.dtype)})))
    assert not found


@pytest.mark.parametrize("step", one_in(3, ["gA", "gB", "gx_lora"]))
def test_an_error_of_a_thousandth_shows_in_fp32(step):
    def alarms(size):
        return len(wrong(run(plain.Plain({step: lambda t: STEPS[step](t) * (1 + size)}))))

    print(f"{step}: " + ", ".join(f"{size:g}: {alarms(size)} of 7" for size in (1e-3, 3e-4, 1e-4)))
    assert alarms(1e-3) == 7


@pytest.mark.parametrize("step", ["gA", "gB", "gx_lora", "gm", "gb", "gbB"])
def test_an_error_of_1e_12_shows_in_fp64(step):
    assert wrong(run(plain.Plain({step: lambda t: STEPS[step](t) * (1 + 3e-12)}), "fp64"))


def test_a_step_is_long_and_both_ends_are_of_the_dtype():
    case = draw("", "dora", (5, 7, 3, (4,)), "float32", (1,))
    found = list(
        secants(plain.Plain(), case, plain.Plain().run(case, case.gy)[1], "A", PRECISIONS["fp32"], (0,))
    )
    assert len(found) == secant.DIRECTIONS == 4
    for one in found:
        assert abs(one.rise - one.slope) <= one.limit < 0.05 * abs(one.rise) + 10 * one.limit
        assert one.through != 0


# ---- which norm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
@pytest.mark.parametrize("subject", [lx.verify.subjects.reference(), plain.Plain()], ids=["reference", "plain"])
def test_the_norm_is_told_from_outside(subject, profile):
    assert norm_of(subject, profile) == "detached"
    assert norm_of(subject, profile, asked=True) == "full"


def test_a_norm_that_is_neither_is_neither():
    half = plain.Plain({"gV": lambda t: 0.5 * BACKWARD["gV"](t)})
    assert norm_of(half, asked=True) == "neither"
    assert norm_of(plain.Plain({"gA": lambda t: BACKWARD["gA"](t) / t.s})) == "neither"

    class Shapeless(plain.Plain):
        def run(self, case, gy):
            y, g = super().run(case, gy)
            return y, g | {"A": g["A"].T}

    assert norm_of(Shapeless()) == "neither"


@pytest.mark.peft
def test_peft_holds_the_norm_and_passes():
    subject = lx.verify.subjects.peft()
    assert norm_of(subject) == "detached"
    checks = run(subject, level="quick", only="secant/dora-dropout/4") + run(
        subject, level="quick", only="secant/lora/0"
    )
    assert not wrong(checks), wrong(checks)[:3]
    assert sum(check.verdict == "pass" for check in checks) >= 9


# ---- what breaks ---------------------------------------------------------------------------------------------


def test_crashes_refusals_and_missing_tensors():
    class Later(plain.Plain):
        def run(self, case, gy):
            raise NotImplementedError("later")

    class Broken(plain.Plain):
        calls = 0

        def run(self, case, gy):
            self.calls += 1
            if self.calls > 1:
                raise ValueError("once only")
            return super().run(case, gy)

    class Partial(plain.Plain):
        def run(self, case, gy):
            y, g = super().run(case, gy)
            return y, {"x": g["x"], "A": g["A"].T, "B": g["B"].astype(np.float64)}

    class Flat(plain.Plain):
        def run(self, case, gy):
            y, g = super().run(case, gy)
            return (y.reshape(-1), g)

    assert {check.verdict for check in run(Later())} == {"not run"}
    assert "crash" in {check.verdict for check in run(Broken())}
    found = {check.tensor: check.verdict for check in run(Partial(), only="secant/lora/0")}
    assert found == {"x": "pass", "A": "fail", "B": "fail", "b": "fail", "bB": "fail"}
    assert {check.verdict for check in run(Flat())} == {"fail"}
    nan = plain.Plain({"gA": lambda t: BACKWARD["gA"](t) * np.nan})
    assert {check.tensor for check in wrong(run(nan))} == {"A"}


def test_forward_alone_is_asked_where_there_is_one():
    class Two:
        spec = plain.Plain().spec
        forwards = backwards = 0

        def forward(self, case):
            self.forwards += 1
            return plain.run(case, case.gy)[0]

        def backward(self, case, gy):
            self.backwards += 1
            return plain.run(case, gy)[1]

    subject = Two()
    assert not wrong(run(subject))
    assert subject.backwards == 7
    assert subject.forwards > 7 * 8 * 4
