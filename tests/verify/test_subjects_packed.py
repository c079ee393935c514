"""Packed adapters: what is right passes in every order of evaluation, what is wrong is convicted by name."""

import warnings

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.verify.batteries import packed
from lorax_np.verify.batteries.packed import LAYOUTS, NONE, PackedReference, battery_packed, draw
from lorax_np.verify.isolate import isolated

PROFILES = "fp32", "fp64"
KINDS = [layout[0] for layout in LAYOUTS]


def judged(subject, profile="fp32", level="full", only=""):
    with np.errstate(all="ignore"):
        return [check for checks in battery_packed(subject, profile, 0, level, only) for check in checks]


def bad(checks):
    return {(check.kind, check.tensor[:6]) for check in checks if check.verdict != "pass"}


class BySegments:
    """A kernel as servers have it: run after run of tokens, in other orders of evaluation, padding included."""

    def packed_forward(self, case):
        y = case.y
        for begin, end, a in case.segments():
            if a != NONE:
                y[begin:end] += case.x[begin:end] @ self.delta(case, a).T
        return y

    def packed_backward(self, case, gy):
        found = {"x": np.zeros_like(case.x), "A": np.zeros_like(case.A), "B": np.zeros_like(case.B)}
        for begin, end, a in case.segments():
            if a == NONE:
                continue
            found["x"][begin:end] = gy[begin:end] @ self.delta(case, a)
            gV = case.scalings[a] * gy[begin:end].T @ case.x[begin:end]
            for rows, outs, cols in self.slices(case, a):
                found["A"][a, rows] += case.B[a, outs, cols].T @ gV[outs]
                found["B"][a, outs, cols] += gV[outs] @ case.A[a, rows].T
        return found

    def slices(self, case, a):
        return [parts for one, _, parts in case.parts() if one == a]

    def delta(self, case, a):
        parts = [case.B[a, outs, cols] @ case.A[a, rows] for rows, outs, cols in self.slices(case, a)]
        return case.scalings[a] * np.concatenate(parts)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("subject", [PackedReference(), BySegments()], ids=lambda s: type(s).__name__)
def test_the_right_pass(subject, profile):
    checks = judged(subject, profile)
    assert bad(checks) == set()
    assert {check.kind for check in checks} == set(KINDS)
    assert max(check.ratio for check in checks if check.ratio is not None) < 0.5
    assert len({check.id for check in checks}) == len(checks)
    assert {check.id.split("/")[1] for check in judged(subject, only="packed/last/0")} == {"last"}
    assert 0 < len(judged(subject, level="quick")) <= len(checks) / 2


def test_the_truth_is_the_definition():
    """Token by token, in plain loops."""
    case = draw("", 3, "float64", (1,))
    want = case.y.copy()
    for t, a in enumerate(case.ids):
        begin = 0
        for i, d_out in enumerate(case.d_outs):
            for o in range(d_out) if a != NONE else ():
                for q in range(case.ranks[a]):
                    z = case.x[t] @ case.A[a, i * case.r_max + q]
                    want[t, begin + o] += case.scalings[a] * z * case.B[a, begin + o, q]
            begin += d_out
    assert np.abs(packed.truth(case)["y"] - want).max() < 1e-12


class Spoiled(PackedReference):
    """The reference with a fault; `where` are the layouts that show it."""

    where = frozenset(KINDS) - {"none", "empty"}


class LastIsNone(Spoiled):
    where = frozenset({"ragged", "permuted", "last", "slices", "long"})

    def packed_forward(self, case):
        case.ids[case.ids == len(case.ranks) - 1] = NONE
        return super().packed_forward(case)


class NoneIsLast(Spoiled):
    where = frozenset({"ragged", "permuted", "slices", "idle", "none"})

    def packed_forward(self, case):
        case.ids[case.ids == NONE] = len(case.ranks) - 1
        return super().packed_forward(case)


class Padded(Spoiled):
    def packed_forward(self, case):
        object.__setattr__(case, "ranks", (case.r_max,) * len(case.ranks))
        return super().packed_forward(case)


class PaddingTimesZero(Spoiled):
    """Masks the padding by multiplying, which leaves NaN."""

    def packed_forward(self, case):
        live = np.zeros_like(case.B)
        for a, _, (_, outs, cols) in case.parts():
            live[a, outs, cols] = 1
        case.B[...] *= live
        object.__setattr__(case, "ranks", (case.r_max,) * len(case.ranks))
        return super().packed_forward(case)


class OneScale(Spoiled):
    where = frozenset(KINDS) - {"none", "empty"}

    def packed_forward(self, case):
        object.__setattr__(case, "scalings", (1.5,) * len(case.ranks))
        return super().packed_forward(case)


class Sorted(Spoiled):
    """Sorts the tokens and forgets to put them back."""

    where = frozenset({"ragged", "permuted", "slices", "idle", "long"})

    def packed_forward(self, case):
        order = np.argsort(case.ids, kind="stable")
        case.x[...] = case.x[order]
        return super().packed_forward(case)


class Overwrites(Spoiled):
    where = frozenset(KINDS) - {"empty"}

    def packed_forward(self, case):
        case.y[...] = 0
        return super().packed_forward(case)


class SlicesSwapped(Spoiled):
    where = frozenset({"slices", "long"})

    def packed_forward(self, case):
        blocks = case.A.reshape(len(case.ranks), len(case.d_outs), case.r_max, -1)
        case.A[...] = blocks[:, ::-1].reshape(case.A.shape)
        return super().packed_forward(case)


class GradientOfOneSlice(Spoiled):
    where = frozenset({"slices", "long"})

    def packed_backward(self, case, gy):
        gy[:, case.d_outs[0] :] = 0
        return super().packed_backward(case, gy)


class GradientOfNone(Spoiled):
    where = frozenset({"ragged", "permuted", "slices", "idle", "none"})

    def packed_backward(self, case, gy):
        g = super().packed_backward(case, gy)
        g["x"][case.ids == NONE] = 1e-30
        return g


class PaddingLeftNaN(Spoiled):
    where = frozenset(KINDS)

    def packed_backward(self, case, gy):
        g = super().packed_backward(case, gy)
        g["A"][np.isnan(case.A)] = np.nan
        return g


class Unscaled(Spoiled):
    def packed_backward(self, case, gy):
        g = super().packed_backward(case, gy)
        return {**g, "B": g["B"] / np.array(case.scalings, g["B"].dtype)[:, None, None]}


@pytest.mark.parametrize("fault", Spoiled.__subclasses__(), ids=lambda fault: fault.__name__)
def test_the_wrong_are_convicted(fault):
    checks = judged(fault())
    assert {kind for kind, _ in bad(checks)} == fault.where
    assert {check.verdict for check in checks} <= {"pass", "fail"}


class NotSorted(PackedReference):
    def packed_forward(self, case):
        if len(case.segments()) > len(set(case.ids)):
            raise NotImplementedError("tokens of one adapter have to follow each other")
        return super().packed_forward(case)


def test_what_is_not_covered_or_not_offered_or_raises():
    checks = judged(NotSorted())
    assert {(check.kind, check.verdict) for check in checks if check.verdict != "pass"} == {
        (kind, "not run") for kind in ("permuted", "slices", "long")
    }
    assert judged(object()) == []

    class Forward:
        packed_forward = PackedReference.packed_forward

    assert bad(judged(Forward())) == {(kind, name) for kind in KINDS[:-2] for name in ("x", "A", "B")}
    assert {check.verdict for check in judged(Forward())} == {"pass", "not run"}

    class Raises:
        def packed_forward(self, case):
            raise ZeroDivisionError("here")

    assert {(check.verdict, check.note) for check in judged(Raises())} == {("crash", "ZeroDivisionError: here")}


def test_through_the_pipe():
    subject = isolated(PackedReference())
    with warnings.catch_warnings():
        assert bad(judged(subject, level="quick")) == set()
    subject.close()


def test_segments():
    case = draw("", 0, "float32", (1,))
    assert case.segments() == [(0, 3, 1), (3, 4, NONE), (4, 9, 0), (9, 11, 3), (11, 18, 2)]
    assert draw("", 7, "float32", (1,)).segments() == []
    assert lx.verify.Report("", "", 0, "", judged(PackedReference())).passed
