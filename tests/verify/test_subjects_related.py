"""Related forms and combinations: what is right passes in other orders of evaluation, and each fault shows."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from often import one_in

import lorax_np as lx
from lorax_np.verify.batteries import blended, blended_case, related, related_laws
from lorax_np.verify.batteries.blended_case import METHODS, Blends
from lorax_np.verify.batteries.related import GRADIENTS
from lorax_np.verify.batteries.related_case import SHAPES, RelatedReference
from lorax_np.verify.mutants.blended import FAULTS as BLENDED
from lorax_np.verify.mutants.related import FAULTS as RELATED
from lorax_np.verify.subjects import reference

BATTERIES = {
    "related": related.battery_related,
    "related laws": related_laws.battery_related_laws,
    "blended": blended.battery_blended,
    "blended exact": blended.battery_blended_exact,
    "blended laws": blended.battery_blended_laws,
}


def judged(subject, profile="fp32", level="full", seed=0, only="", batteries=tuple(BATTERIES)):
    return [
        check
        for name in batteries
        for checks in BATTERIES[name](subject, profile, seed, level, only)
        for check in checks
    ]


class Merged(RelatedReference, Blends):
    """The same through written-out updates, in the arrays' own dtype; a combination by float32's own SVD."""

    def _delta(self, case):
        v = case.at
        if case.form == "vera":
            return (v["lambda_b"][:, None] * v["B"]) @ (v["lambda_d"][:, None] * v["A"])
        c = v["x"].dtype.type(case.alpha / (case.rank + 1e-5))
        return c * (v["B"] @ (v["E"][:, None] * v["A"]))

    def _dense(self, case):
        v = case.at
        xd = v["x"] * v.get("mask", np.ones((), v["x"].dtype))
        return v["x"] @ v["W"].T + xd @ self._delta(case).T

    vera_forward = adalora_forward = _dense

    def tokens_forward(self, case):
        v, n = case.at, len(case.at["W"])
        onehot = np.eye(n, dtype=v["W"].dtype)
        keep = np.setdiff1d(np.arange(n), v["index"])
        return onehot[v["ids"]][..., keep] @ v["W"][keep] + onehot[v["ids"]][..., v["index"]] @ v["T"]

    def cut(self, update, rank):
        U, S, Vh = np.linalg.svd(update.astype("float32"), full_matrices=False)
        root = np.sqrt(S[:rank])
        return root[:, None] * Vh[:rank], U[:, :rank] * root


class Plain(RelatedReference, Blends):
    """Right, by the equations."""


@pytest.mark.parametrize("profile", ["fp32", "fp64"])
@pytest.mark.parametrize("right", [Plain, reference, Merged])
def test_the_right_pass(right, profile):
    if right is Merged and profile == "fp64":
        return  # its SVD is in float32
    for seed in range(2):
        checks = judged(right(), profile, seed=seed)
        assert [c for c in checks if c.verdict != "pass"] == []
        assert max(c.ratio for c in checks if c.ratio is not None) < 0.6
    assert len({c.id for c in checks}) == len(checks)
    quick = judged(right(), profile, "quick")
    count = {b: [sum(c.battery == b for c in v) for v in (quick, checks)] for b in ("related", "related laws")}
    assert 0 < count["related"][0] < count["related"][1] / 2
    assert count["related laws"][0] == count["related laws"][1] > 0  # laws are drawn once at either level


def test_the_truth_is_the_definition():
    """Complex steps of the equations, tensor by tensor."""
    right = RelatedReference()
    for form, names in GRADIENTS.items():
        for layout in range(len(SHAPES)):
            case = related.draw("", form, layout, "float64", (5, layout))
            want = related.truth(case)
            assert np.abs(want["y"] - getattr(right, f"{form}_forward")(case)).max(initial=0) < 1e-12
            for name in names:
                for at in np.ndindex(case.at[name].shape):
                    moved = case.at[name].astype("complex128")
                    moved[at] += 1e-30j
                    y = getattr(right, f"{form}_forward")(replace(case, at=case.at | {name: moved}))
                    slope = float(np.sum(case.gy * y.imag)) / 1e-30
                    padded = name == "T" and case.at["index"][at[0]] == case.padding
                    assert abs(want[name][at] - (0 if padded else slope)) < 1e-11, (case.kind, name, at)


def test_cases_are_generic():
    for layout, (d_out, d_in, r, _) in enumerate(SHAPES):
        case = related.draw("", "adalora", layout, "float32", (0, layout))
        assert case.rank == r != case.alpha
        assert (case.at["E"] == 0).sum() == (r > 1)
        assert case.at["W"].shape == (d_out, d_in)
        tokens = related.draw("", "tokens", layout, "float32", (0, layout)).at
        assert (np.diff(tokens["index"]) < 0).any()
        assert len(set(tokens["index"])) == len(tokens["index"])
        assert pickle.loads(pickle.dumps(case)).at["E"].tolist() == case.at["E"].tolist()
    for method in METHODS:
        case = blended_case.draw("", method, "float32", (0, 0))
        assert {w < 0 for w in case.weights} == {True, False}
        assert (case.density is None) == (METHODS[method][1] == "all")


@pytest.mark.parametrize("method", METHODS)
def test_combinations_are_the_engines(method):
    """What the harness holds to be right equals lx.combine, on cases that it draws."""
    case = blended_case.draw("", method, "float64", (3, 1))
    ours, theirs = reference().blend(case), Blends().blend(case)
    size = np.linalg.norm(theirs["A"]) * np.linalg.norm(theirs["B"])
    assert np.abs(ours["B"] @ ours["A"] - theirs["B"] @ theirs["A"]).max() <= 1e-13 * size


@pytest.mark.parametrize("fault", one_in(3, [*RELATED, *BLENDED]), ids=lambda fault: fault.id)
def test_each_fault_shows_at_other_seeds(fault):
    """By the definition, and by another check that shares nothing with it."""
    first, *others = [name for name in BATTERIES if name.startswith(fault.kind)]
    for seed in (1, 2):
        with np.errstate(all="ignore"):
            bad = {
                name: [c for c in judged(fault.subject(), seed=seed, batteries=(name,)) if c.verdict == "fail"]
                for name in (first, *others)
            }
        assert bad[first], fault.title
        assert any(bad[name] for name in others), fault.title


@pytest.mark.parametrize("fault", [RELATED[0], RELATED[10], BLENDED[6]], ids=lambda fault: fault.id)
def test_a_report_says_where_it_is(fault):
    report = lx.verify.verify(fault.subject(), "fp32", "quick")
    assert not report.passed
    assert "only in" in str(report.cause) or "only in" in str(report)
    assert {check.battery.split()[0] for check in report.checks if check.verdict == "fail"} == {fault.kind}


def test_a_subject_is_asked_for_what_it_offers():
    class VeraAlone:
        vera_forward, vera_backward = RelatedReference.vera_forward, RelatedReference.vera_backward

    assert {c.id.split("/")[1] for c in judged(VeraAlone())} == {"vera"}
    assert judged(object()) == []
    found = {c.id for c in judged(Plain(), only="related/tokens/1")}
    assert found == {"related/tokens/1/y", "related/tokens/1/T"}
    assert {c.id for c in judged(Plain(), only="blended-exact/ties")} == {"blended-exact/ties/0"}


class Silent:
    """Has the methods, and returns nothing of use."""

    def vera_forward(self, case):
        return case.gy

    def vera_backward(self, case, gy):
        return {}

    def blend(self, case):
        return {"A": case.pairs[0][0]}


def test_what_is_missing_is_a_failure():
    checks = judged(Silent(), level="quick")
    assert {c.verdict for c in checks if c.battery == "related"} == {"fail"}
    passed = {c.tensor for c in checks if c.battery == "related laws" and c.verdict == "pass"}
    assert passed == {"rows of A, against λ_d", "rows of B, against λ_b"}, "a y that never moves is unchanged"
    assert {c.verdict for c in checks if c.battery.startswith("blended")} == {"fail"}
