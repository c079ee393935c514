"""Layers drawn by Hypothesis: generic, of every kind, small once they fail; answers judged one at a time."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import find, given, settings

import lorax_np as lx
from lorax_np.verify import Case, Spec
from lorax_np.verify.cases import ALPHAS, DROPS
from lorax_np.verify.conformance import assert_case, assert_conforms
from lorax_np.verify.layers.plain import Plain, run
from lorax_np.verify.strategies import _apart, lora_cases, specs

ROOT = Path(lx.__file__).parents[1]
SEEK = settings(max_examples=1000, deadline=None, database=None, derandomize=True)


@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_right_layer_passes_whatever_is_drawn(dtype, lattice):
    kinds = set()

    @given(case=lora_cases(lattice, dtype=dtype))
    def judge(case):
        kinds.add(case.kind)
        assert isinstance(case, Case)
        assert {value.dtype.name for value in case.arrays().values()} == {dtype}
        checks = assert_case(case, *run(case, case.gy))
        assert lattice or all(check.verdict == "pass" for check in checks)  # a generic layer has no zero truth
        assert max(check.ratio or 0 for check in checks) < 1

    judge()
    assert len(kinds) >= 4


@given(case=lora_cases(empty=True, max_dim=4))
def test_layers_without_tokens_are_vacuous_where_they_should_be(case):
    checks = assert_case(case, *run(case, case.gy))
    if not case.x.size:
        assert {check.verdict for check in checks if check.tensor in ("y", "x", "A", "B")} == {"vacuous"}


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        ({"dora": False}, lambda case: case.m is None),
        ({"dora": True}, lambda case: case.m is not None),
        ({"dora": "detached"}, lambda case: case.m is not None and not case.norm_gradient),
        ({"dora": "full"}, lambda case: case.norm_gradient),
        ({"dropout": True}, lambda case: len(np.unique(case.mask)) == 2),
        ({"dropout": False}, lambda case: case.mask is None),
        ({"dora": False, "lora_bias": True}, lambda case: case.bB is not None),
        ({"bias": "trained"}, lambda case: case.train_b and case.b is not None),
        ({"rslora": True}, lambda case: case.config.use_rslora),
        ({"max_dim": 3}, lambda case: max(case.W.shape) <= 3 and case.config.r <= 5),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_hold(options, holds):
    @settings(max_examples=15)
    @given(case=lora_cases(**options))
    def judge(case):
        assert holds(case)

    judge()


WRONG = {  # a step of the plain layer put wrong, and d_out, d_in, r of the smallest layer that shows it
    "s twice": ({"s": lambda t: t.c.scaling**2}, (1, 1, 1)),
    "s in integers": ({"s": lambda t: float(t.c.config.lora_alpha // t.c.config.r)}, (1, 1, 1)),
    "gx ignores the mask": ({"back": lambda t: np.ones_like(t.x)}, (1, 1, 1)),
    "no bias": ({"bias": lambda t: 0}, (1, 1, 1)),
    "r capped": ({"u": lambda t: t.z[:, : t.W.shape[1]] @ t.B[:, : t.W.shape[1]].T}, (1, 1, 2)),
    "gm as without the norm": ({"gm": lambda t: t.gk}, (1, 1, 1)),
}


@pytest.mark.parametrize("bug", WRONG)
def test_a_failing_layer_shrinks_to_a_textbook_one(bug):
    changed, sizes = WRONG[bug]

    def wrong(case):
        try:
            assert_case(case, *run(case, case.gy, changed))
        except AssertionError:
            return True
        return False

    with np.errstate(all="ignore"):
        case = find(lora_cases(), wrong, settings=SEEK)
    assert (*case.W.shape, case.config.r) == sizes
    assert case.x.size <= 2
    assert case.id.endswith("-0")  # the seed


def test_no_constant_can_stand_for_another():
    for r, by_root, p in product(range(1, 200), (False, True), DROPS):
        assert any(_apart(alpha, r, by_root, p) for alpha in ALPHAS)
    assert not _apart(4.0, 4, False, 0.3)  # s = 1: lost and present look alike
    assert not _apart(2.0, 4, False, 0.5)  # s = 1 − p


@given(spec=specs())
def test_specs(spec):
    assert isinstance(spec, Spec)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dora": "dense"}, "dora: expected"),
        ({"bias": "all"}, "bias: expected"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"max_dim": 0}, "max_dim, exponents: expected at least 1 and 0, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_unknown_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        lora_cases(**options)


def test_without_hypothesis_the_extra_is_named():
    code = """
import sys
sys.modules["hypothesis"] = None
import lorax_np.verify.strategies as strategies
for strategy in (strategies.lora_cases, strategies.specs):
    try:
        strategy()
    except ModuleNotFoundError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.count("pip install 'lorax-np[test]'") == 2


# ---- assertions --------------------------------------------------------------------------------------------


def test_assert_case_names_what_is_wrong():
    case = find(lora_cases(dora=False), lambda case: case.W.size > 30, settings=SEEK)
    y, gradients = run(case, case.gy)
    for changed, says in (
        (
            (y, gradients | {"A": 2 * gradients["A"]}),
            r"FAIL  drawn/lora/.*/A at \[.*: got .*, want .*× the bound",
        ),
        ((y[..., :-1], gradients), "/y  expected shape"),
        ((y, {"x": gradients["x"], "B": gradients["B"]}), "/A  asked for, and not given"),
        ((y.astype(np.float32), gradients), "/y  expected dtype float64, got float32"),
    ):
        with pytest.raises(AssertionError, match=says):
            assert_case(case, *changed)


class Nothing:
    """A subject that covers no case."""

    def forward(self, case):
        raise NotImplementedError("not yet")

    backward = forward


def test_assert_conforms():
    report = assert_conforms(Plain(), "fp64", "quick", case="exact/lora")
    assert report.passed
    with pytest.raises(AssertionError, match=r"(?s)does not conform.*FAIL  exact/lora/\d+/B.*FAIL  Plain"):
        assert_conforms(Plain({"gB": lambda t: 0 * t.W[:, :1] + t.B}), "fp64", "quick", case="exact/lora")
    for subject, case in ((Nothing(), "exact/lora"), (Plain(), "exact/no-such-kind")):
        with pytest.raises(AssertionError, match="NOTHING JUDGED"):
            assert_conforms(subject, level="quick", case=case)
