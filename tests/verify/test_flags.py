"""A subject is judged by its numbers: a flag of the processor's, which NumPy warns of, is no verdict.

OpenBLAS 0.3.31 sets such a flag for no reason. Its kernel of sgemv for rows of 5 in AVX-512 adds up a buffer of
8 numbers of which it writes 5, and drops what the others come to: where those hold a signalling NaN, which a
pointer left on the stack may look like, NumPy says "invalid value encountered in matmul" of a right product.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lorax_np as lx
from lorax_np.verify.batteries.tensors import answer, battery_exact
from lorax_np.verify.cases import SMALL, grid
from lorax_np.verify.conventions import Spec
from lorax_np.verify.gradcheck import gradcheck


def invalid():
    """Set the flag, of which NumPy warns; warnings are errors in these tests."""
    return np.float32(np.inf) - np.float32(np.inf)


class Flags:
    """The reference, in which every call sets the flag; a gradient that is NaN where it spoils one."""

    spoils = False

    def run(self, case, gy):
        value = invalid()
        y, g = lx.verify.subjects.reference().run(case, gy)
        return y, g | ({"A": g["A"] * value} if self.spoils else {})


class Spoils(Flags):
    spoils = True


class Apart(Flags):
    native = True  # judged in a process of its own


def test_the_flag_is_an_error_where_nobody_holds_it():
    with pytest.raises(RuntimeWarning, match="invalid value"):
        invalid()


@pytest.mark.parametrize("state", ["warn", "raise"])
def test_a_flag_is_no_verdict_and_a_nan_is(state):
    with np.errstate(all=state):
        right, wrong = (
            [check for checks in battery_exact(who, "fp32", 0, "quick", "") for check in checks]
            for who in (Flags(), Spoils())
        )
    assert {check.verdict for check in right} == {"pass"}
    assert {check.tensor for check in wrong if check.verdict != "pass"} == {"A"}
    assert all(check.note.startswith("not finite: nan") for check in wrong if check.tensor == "A")


@pytest.mark.parametrize("who", [Flags, Apart])
def test_the_verdict_on_it_is_a_pass(who):
    report = lx.verify.verify(who(), "fp32", "quick", case="exact")
    assert report.passed, str(report)


def test_another_thread_asks_as_quietly():
    """What NumPy does about flags, each thread is told anew."""
    case = next(iter(grid("exact", SMALL, "fp32", Spec(), 0, "quick")))
    with np.errstate(all="ignore"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(answer, Flags(), case).result()["y"].shape == case.gy.shape


@pytest.mark.parametrize("method", ["secant", "complex", "central"])
def test_gradcheck_judges_the_numbers(method):
    x = np.arange(1.0, 6.0)

    def f(x):
        invalid()
        return 3 * x

    def f_backward(gy, x):
        return 3 * gy + 0 * np.nan_to_num(invalid())

    assert gradcheck(f, f_backward, (x,), method, eps=1e-3)
    spoilt = gradcheck(f, lambda gy, x: 3 * gy + invalid(), (x,), method, raise_exception=False)
    assert not spoilt.passed
    assert "not finite" in str(spoilt)
