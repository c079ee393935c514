"""gradcheck: any hand-written forward and backward, held against three kinds of differences.

>>> import numpy as np
>>> from lorax_np.verify.gradcheck import gradcheck
>>> def f(x, W):
...     return x @ W.T
>>> def f_backward(gy, x, W):
...     return gy @ W, 0.75 * gy.T @ x
>>> draw = np.random.default_rng(0).standard_normal
>>> inputs = draw((4, 3)), draw((2, 3))
>>> result = gradcheck(f, f_backward, inputs, names="x W", raise_exception=False)
>>> [(tensor.name, tensor.verdict) for tensor in result.tensors]
[('x', 'pass'), ('W', 'fail')]
>>> result.tensors[1].factor
0.75
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..cases import HostArray
from . import quotients
from .handwritten import Pair
from .quotients import Quotient, Unfit, View
from .result import GradcheckError, GradcheckResult, GradTensor

Method = Literal["secant", "complex", "central"]
METHODS = ("secant", "complex", "central")
DIRECTIONS = 4  # gaussian ones: all four miss a tenth of an error with chance 0.08⁴
TELLING = 0.01  # a check that cannot tell this part of the largest entry judges nothing
ENTRIES = 4096  # looked at one by one to find where a failing projection comes from


def gradcheck(
    f: Callable[..., Any],
    f_backward: Callable[..., Any],
    inputs: Any,
    method: Method = "secant",
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    fast_mode: bool = False,
    has_saved: bool = False,
    names: str | Sequence[str] | None = None,
    seed: int = 0,
) -> GradcheckResult:
    """Hold a backward against differences of its own forward, one argument and one tensor at a time.

    f : f(*inputs) -> y, or a tuple of them; f(*inputs) -> (y, saved) with has_saved
    f_backward : f_backward(gy, *inputs), or f_backward(gy, saved, *inputs) with has_saved -> one gradient per
                 input, None where there is none. Under several outputs gy is a tuple as y is
    inputs : an array, or a tuple; float32 and float64 arrays are differentiated, anything else is passed on
    method : secant, exact where f is affine in each argument alone; complex, exact for holomorphic f;
             central, for anything smooth, in float64. specs/gradcheck.md says when each is right
    eps, atol, rtol : as in torch, of central alone; but atol hides no small gradient: it counts up to rtol of
                      the tensor's largest entry, and what differences cannot tell is vacuous
    nondet_tol : by how much two calls may differ
    fast_mode : four gaussian directions instead of every entry; where they fail, entries tell where
    has_saved : whether f returns (y, saved);  names : of the inputs, for the table
    seed : of gy and of the directions

    Returns the result, or raises GradcheckError with its table where it did not pass, unless told not to.
    Raises ValueError or TypeError where the arguments themselves make no sense.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for name, number, least in (
        ("eps", eps, 1e-300),
        ("atol", atol, 0),
        ("rtol", rtol, 0),
        ("nondet_tol", nondet_tol, 0),
    ):
        if not least <= number < np.inf:
            raise ValueError(f"{name}: expected a number that is not negative, and eps above 0, got {number!r}")
    pair = Pair(f, f_backward, inputs, has_saved, names, seed)
    if method == "central" and any(pair.inputs[k].dtype != np.float64 for k in pair.floating):
        raise TypeError(
            "inputs: expected float64 for method='central', got float32; method='secant' judges float32"
        )
    gradients, faults = pair.conduct(nondet_tol)
    tensors = []
    for k in pair.floating:
        name, theta, claimed = pair.names[k], pair.inputs[k], gradients[k]
        shaped = _shaped(name, theta, claimed)
        if shaped is not None:
            tensors.append(shaped)
            continue
        try:
            judge = _Judge(pair.view(k, wide=method != "secant"), method, eps, atol, rtol, (seed, k))
            tensors.append(replace(judge.tensor(claimed, fast_mode), name=name))
        except Unfit as error:
            tensors.append(GradTensor(name, theta.shape, error.verdict, note=str(error)))
    result = GradcheckResult(method, seed, tuple(tensors), tuple(faults))
    if raise_exception and not result.passed:
        raise GradcheckError(str(result))
    return result


def _shaped(name: str, theta: HostArray, claimed: Any) -> GradTensor | None:
    """What is wrong with a gradient before its values are looked at."""
    if claimed is None:
        return GradTensor(name, theta.shape, "not given", note="f_backward returned None")
    if claimed.shape != theta.shape:
        return GradTensor(name, theta.shape, "fail", note=f"expected shape {theta.shape}, got {claimed.shape}")
    if claimed.dtype != theta.dtype:
        return GradTensor(name, theta.shape, "fail", note=f"expected dtype {theta.dtype}, got {claimed.dtype}")
    if not np.isfinite(claimed).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(claimed))[0])
        return GradTensor(name, theta.shape, "fail", note=f"not finite at {list(at)}: {claimed[at]}")
    return None


class _Judge:
    """One gradient against quotients along directions or entries."""

    def __init__(
        self, view: View, method: str, eps: float, atol: float, rtol: float, seed: tuple[int, ...]
    ) -> None:
        self.view, self.method, self.eps = view, method, eps
        self.atol, self.rtol = (atol, rtol) if method == "central" else (0.0, 0.0)
        self.rng = np.random.default_rng((*seed, 1))

    def tensor(self, claimed: HostArray, fast: bool) -> GradTensor:
        """The verdict, without a name."""
        theta, claimed = self.view.theta, claimed.astype(np.float64)
        if not theta.size:
            return GradTensor("", theta.shape, "vacuous", note="it has no entries")
        directions = [np.asarray(self.rng.standard_normal(theta.shape)) for _ in range(DIRECTIONS)]
        for v in directions[:2]:
            if self.method == "secant":
                quotients.assert_affine(self.view, v)
            elif self.method == "complex":
                quotients.assert_holomorphic(self.view, v, self.eps)
        if fast:
            found = self.compare(claimed, directions, [None] * DIRECTIONS)
            if found.verdict != "fail":
                return found
        ats = list(np.ndindex(theta.shape))
        if fast and len(ats) > ENTRIES:
            ats = [ats[i] for i in sorted(self.rng.choice(len(ats), ENTRIES, replace=False))]
        entries = self.compare(claimed, (_unit(theta.shape, at) for at in ats), ats)
        if fast and entries.verdict == "pass":
            return found  # the fault is in none of the entries looked at
        return entries

    def quotient(self, v: HostArray) -> Quotient:
        """By the method that was asked for."""
        if self.method == "secant":
            return quotients.secant(self.view, v)
        if self.method == "complex":
            return quotients.complex_step(self.view, v)
        return quotients.central(self.view, v, self.eps)

    def compare(self, claimed: HostArray, vs: Iterable[HostArray], ats: Sequence[Any]) -> GradTensor:
        """Claimed against true derivatives along directions, which are entries where ats says so."""
        rows, seen, kink = [], [], ""
        for v, at in zip(vs, ats, strict=True):
            q = self.quotient(v)
            if q.kink is not None:
                where = f" at {list(at)}" if at is not None else ""
                before, after = q.kink
                kink = kink or f"f has a kink here{where}: slopes {before:.6g} before, {after:.6g} after"
                continue
            terms = claimed * q.delta
            length = float(np.linalg.norm(q.delta))  # an entry's own step, so that truths are derivatives
            slack = q.slack + quotients.ROUNDINGS * self.view.eps * float(np.abs(terms).sum())
            seen.append(at)
            rows.append((float(terms.sum()) / length, q.rise / length, slack / length))
        if not rows:
            return GradTensor("", claimed.shape, "kink", note=kink)
        mine, true, blur = (np.array(column) for column in zip(*rows, strict=True))
        return self.verdict(claimed.shape, mine, true, blur, seen, kink)

    def verdict(
        self, shape: tuple[int, ...], mine: HostArray, true: HostArray, slack: HostArray, ats: Any, kink: str
    ) -> GradTensor:
        """One line from the derivatives that were claimed, those that are true, and what rounding blurs."""
        largest = float(np.abs(true).max())
        allowed = slack + min(self.atol, self.rtol * largest) + self.rtol * np.abs(true)  # (gradcheck.8)
        error = np.abs(mine - true)
        share = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
        i = int(np.argmax(share))
        at = ats[i]
        blur = float(slack.max()) / largest if largest else np.inf  # (gradcheck.9)
        worst = {"at": at, "claimed": float(mine[i]), "truth": float(true[i]), "resolution": blur}
        if share[i] > 1:
            return GradTensor("", shape, "fail", factor=_factor(mine, true, slack), **worst)
        if kink:
            return GradTensor("", shape, "kink", note=kink)
        if blur > TELLING:
            note = (
                "zero everywhere"
                if not largest and not mine.any()
                else (f"at most {largest:.1e}, of which differences are sure to {float(slack.max()):.1e} only")
            )
            return GradTensor("", shape, "vacuous", note=note, **worst)
        beyond = float((error - slack).max())
        note = (
            f"off by {beyond / largest:.1e} of its largest entry, which rtol allows and rounding does not"
            if beyond > 0
            else ""
        )
        return GradTensor("", shape, "pass", note=note, **worst)


def _unit(shape: tuple[int, ...], at: tuple[int, ...]) -> HostArray:
    v = np.zeros(shape)
    v[at] = 1.0
    return v


def _factor(mine: HostArray, true: HostArray, slack: HostArray) -> float | None:
    """The number c with claimed = c·truth in every entry; None where there is none, or where it says little."""
    blur = float(slack.max() / np.abs(true).max(initial=1e-300))
    if blur > TELLING or mine.size < 2:
        return None
    c = float(mine @ true / (true @ true))
    if not (np.abs(mine - c * true) <= (1 + abs(c)) * slack).all():
        return None
    return round(c, int(-np.log10(max(blur, 1e-15)))) + 0.0  # as many digits as differences are sure of
