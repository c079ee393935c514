"""Subjects that are wrong on purpose, and a few that are right: what the harness has to tell apart.

Each broken one is the reference's own answer with one fault in it; `wrong` names the tensors that shows in.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import lorax_np as lx

RIGHT = lx.verify.subjects.reference()
BOTH = lx.verify.Spec(norm_gradient=(False, True))


def right(case, gy):
    """y and the gradients that a case asks for."""
    y, g = RIGHT.run(case, gy)
    return y, {name: g[name] for name in case.wanted}


def parts(case, gy):
    """What the faults are made of, with tokens as rows; k is 1 and n is None without DoRA."""
    rows = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
    x, G, s = rows(case.x), rows(gy), case.scaling
    mask = np.ones_like(x) if case.mask is None else rows(case.mask)
    n = None if case.m is None else np.linalg.norm(case.W + s * case.B @ case.A, axis=1)
    k = np.ones_like(case.W[:, 0]) if case.m is None else case.m / n
    P, Q = (x * mask) @ case.W.T, s * ((x * mask) @ case.A.T) @ case.B.T
    branch = (G * (k - 1)) @ case.W + s * ((G * k) @ case.B) @ case.A  # the gradient by x∘mask
    found = {"x": x, "G": G, "s": s, "mask": mask, "n": n, "k": k, "P": P, "Q": Q, "branch": branch}
    return SimpleNamespace(**found, xd=x * mask, base=G @ case.W)


class Broken:
    """The reference, spoiled."""

    spec = BOTH
    wrong: frozenset[str] = frozenset()

    def run(self, case, gy):
        y, g = right(case, gy)
        y, g = self.spoil(case, gy, y, g, parts(case, gy))
        like = {
            "y": y.reshape(gy.shape),
            **{name: v.reshape(getattr(case, name).shape) for name, v in g.items()},
        }
        like = {name: self.cast(name, v.astype(case.x.dtype)) for name, v in like.items()}
        return like.pop("y"), like

    def cast(self, name, value):
        return value

    def spoil(self, case, gy, y, g, p):
        raise AssertionError("each broken subject has its own")


def broken(*wrong):
    """Make a subject of a function that spoils: it is named after the function, wrong in the tensors named."""

    def made(spoil):
        def method(self, case, gy, y, g, p):
            return spoil(case, gy, y, g, p)

        words = {"spoil": method, "wrong": frozenset(wrong), "__doc__": spoil.__doc__, "__module__": __name__}
        return type(spoil.__name__, (Broken,), words)

    return made


# ---- one tensor of the gradient ----------------------------------------------------------------------------


@broken("A")
def ScaleMissingInA(case, gy, y, g, p):
    return y, g | {"A": g["A"] / p.s}


@broken("B")
def ScaleMissingInB(case, gy, y, g, p):
    return y, g | {"B": g["B"] / p.s}


@broken("x")
def ScaleMissingInX(case, gy, y, g, p):
    """The adapter's term of gx without s."""
    return y, g | {"x": p.base + ((p.G * (p.k - 1)) @ case.W + ((p.G * p.k) @ case.B) @ case.A) * p.mask}


@broken("x")
def AdapterMissingInX(case, gy, y, g, p):
    return y, g | {"x": p.base}


@broken("x")
def MaskMissingInX(case, gy, y, g, p):
    return y, g | {"x": p.base + p.branch}


@broken("x")
def MaskUnscaledInX(case, gy, y, g, p):
    """A mask of 0 and 1 where it should be 0 and 1/(1 − p)."""
    return y, g | {"x": p.base + p.branch * (p.mask != 0)}


@broken("x")
def MaskOnAllOfX(case, gy, y, g, p):
    """The base's term of gx dropped as well."""
    return y, g | {"x": (p.base + p.branch) * p.mask}


@broken("A")
def AOfUndroppedInput(case, gy, y, g, p):
    return y, g | {"A": g["A"] + p.s * ((p.G * p.k) @ case.B).T @ (p.x - p.xd)}


@broken("A")
def AWithoutMagnitude(case, gy, y, g, p):
    """k missing in gA."""
    return y, g | {"A": g["A"] - p.s * ((p.G * (p.k - 1)) @ case.B).T @ p.xd}


@broken("A")
def RankTailDropped(case, gy, y, g, p):
    """The last r % 4 rows of gA are zero, as where a kernel's tiles are 4 rows high."""
    gA = g["A"].copy()
    gA[gA.shape[0] - gA.shape[0] % 4 :] = 0
    return y, g | {"A": gA}


@broken("A")
def ATransposedReshaped(case, gy, y, g, p):
    return y, g | {"A": g["A"].T.reshape(g["A"].shape)}


@broken("B")
def BOffByAThousandth(case, gy, y, g, p):
    return y, g | {"B": 1.001 * g["B"]}


@broken("m")
def MagnitudeWithoutNorm(case, gy, y, g, p):
    """gm without 1/n."""
    return y, g | ({"m": g["m"] * p.n} if "m" in g else {})


@broken("m")
def MagnitudeWithoutAdapter(case, gy, y, g, p):
    """gm of the base product P alone, without the adapter's Q."""
    return y, g | ({"m": (p.G * p.P).sum(axis=0) / p.n} if "m" in g else {})


@broken("bB")
def BiasOfBUnscaled(case, gy, y, g, p):
    return y, g | ({"bB": g["bB"] / p.s} if "bB" in g else {})


@broken("b")
def BiasFrozen(case, gy, y, g, p):
    """gb zero where the bias is trained."""
    return y, g | ({"b": 0 * g["b"]} if "b" in g else {})


class BOfAnotherDtype(Broken):
    wrong = frozenset({"B"})

    def spoil(self, case, gy, y, g, p):
        return y, g

    def cast(self, name, value):
        other = {"float32": "float64", "float64": "float32"}[value.dtype.name]
        return value.astype(other) if name == "B" else value


# ---- the norm of DoRA --------------------------------------------------------------------------------------


@broken("A", "B")
def NormGradientOfWrongSign(case, gy, y, g, p):
    still = right(replace(case, norm_gradient=False), gy)[1]
    return y, g | {name: 2 * still[name] - g[name] for name in ("A", "B")}


class NormNotDetached(Broken):
    """Declares that the norm is a constant, and differentiates it."""

    spec = lx.verify.Spec(norm_gradient=(False,))
    wrong = frozenset({"A", "B"})

    def spoil(self, case, gy, y, g, p):
        return y, right(replace(case, norm_gradient=True), gy)[1]


# ---- the forward, with or without the gradients that belong to it ------------------------------------------


@broken("y")
def BiasTimesMagnitude(case, gy, y, g, p):
    """k(xWᵀ + b): the bias is multiplied by m/n."""
    return y + (0 if case.b is None else (p.k - 1) * case.b), g


@broken("y")
def BaseCountedTwice(case, gy, y, g, p):
    return y.reshape(p.G.shape) + p.x @ case.W.T, g


@broken("y")
def BaseOfDroppedInput(case, gy, y, g, p):
    return y.reshape(p.G.shape) + (p.xd - p.x) @ case.W.T, g


@broken("y", "x", "A", "B", "m", "bB")
def AlphaNotDividedByRank(case, gy, y, g, p):
    """s = α: a wrong forward with the backward that belongs to it, which no gradcheck sees."""
    return right(replace(case, config=replace(case.config, r=1, use_rslora=False)), gy)


@broken("y", "x", "A", "B", "m", "bB")
def RsloraIgnored(case, gy, y, g, p):
    return right(replace(case, config=replace(case.config, use_rslora=False)), gy)


BROKEN = {
    name: value for name, value in list(vars().items()) if isinstance(value, type) and value is not Broken
}
BROKEN = {name: kind for name, kind in BROKEN.items() if issubclass(kind, Broken)}


# ---- right, or partly right --------------------------------------------------------------------------------


class Naive:
    """A stranger's LoRA, complete but for DoRA, as the README shows it."""

    def forward(self, case):
        if case.m is not None:
            raise NotImplementedError("LoRA without DoRA")
        self.xd = case.x if case.mask is None else case.x * case.mask
        u = self.xd @ case.A.T @ case.B.T + (0 if case.bB is None else case.bB)
        return case.x @ case.W.T + (0 if case.b is None else case.b) + case.scaling * u

    def backward(self, case, gy):
        rows = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
        gu, mask = case.scaling * gy, 1 if case.mask is None else case.mask
        g = {"x": gy @ case.W + gu @ case.B @ case.A * mask, "A": rows(gu @ case.B).T @ rows(self.xd)}
        return g | {"B": rows(gu).T @ rows(self.xd @ case.A.T), "b": rows(gy).sum(0), "bB": rows(gu).sum(0)}


class NoDora:
    """The reference with its start and its merge, for LoRA alone."""

    spec = BOTH

    def run(self, case, gy):
        if case.m is not None:
            raise NotImplementedError("no DoRA here\nand a second line that no report shows")
        return right(case, gy)

    def init(self, W, config, seed):
        if config.use_dora:
            raise NotImplementedError("no DoRA here")
        return RIGHT.init(W, config, seed)

    def merge(self, case):
        return {name: value for name, value in RIGHT.merge(case).items() if case.m is None or self.run(case, 0)}


class CoversNothing:
    def run(self, case, gy):
        raise NotImplementedError


# ---- bad conduct -------------------------------------------------------------------------------------------


class Crashes:
    def run(self, case, gy):
        raise ZeroDivisionError("one over nothing\nand more")


class CrashesLate:
    """Right until a layer with DoRA comes."""

    def run(self, case, gy):
        return right(case, gy) if case.m is None else 1 // 0


class Exits:
    def run(self, case, gy):
        sys.exit(0)


class EndsItsProcess:
    def run(self, case, gy):
        os._exit(7)


class Segfaults:
    def run(self, case, gy):
        os.kill(os.getpid(), signal.SIGSEGV)


class WritesIntoItsInputs:
    def run(self, case, gy):
        answer = right(case, gy)
        case.x[...] *= 2
        gy[...] += 1
        return answer


class Nan:
    def run(self, case, gy):
        y, g = right(case, gy)
        return np.full_like(y, np.nan), {name: np.full_like(value, np.inf) for name, value in g.items()}


class Chatty:
    def run(self, case, gy):
        print("what a subject says is no part of a report")
        return right(case, gy)


class Asleep:
    def run(self, case, gy):
        Path(os.environ["ASLEEP"]).write_text(str(os.getpid()), encoding="utf-8")
        time.sleep(60)


class WantsAnArgument:
    def __init__(self, config):
        self.config = config

    run = Naive.forward


class NoMethods:
    pass


# ---- garbage: (what run, init and merge return), none of which may break the harness -----------------------


class Garbage:
    """Returns what it is told to: run(y, g) makes the answer out of the right one."""

    def __init__(self, run=None, init=None, merge=None):
        self._run = run
        if init:
            self.init = lambda W, config, seed: init(RIGHT.init(W, config, seed))
        if merge:
            self.merge = lambda case: merge(RIGHT.merge(case))

    def run(self, case, gy):
        return self._run(*right(case, gy)) if self._run else right(case, gy)


def words(value):
    return value.astype(float).astype(str)


def largest(dtype):
    return np.finfo(dtype).max if dtype.kind == "f" else 2.0**128 - 2.0**120  # bfloat16's


GARBAGE = {  # name: (what it does, exit code)
    "none": (lambda y, g: None, 3),
    "one array": (lambda y, g: y, 3),
    "three": (lambda y, g: (y, g, 0), 3),
    "gradients none": (lambda y, g: (y, None), 3),
    "gradients a list": (lambda y, g: (y, list(g.values())), 3),
    "a name of its own": (lambda y, g: (y, {f"g{name}": value for name, value in g.items()}), 3),
    "a number as name": (lambda y, g: (y, {1: g["A"]}), 3),
    "a dict as array": (lambda y, g: (y, g | {"A": {"value": g["A"]}}), 3),
    "ragged lists": (lambda y, g: (y, g | {"A": [[1.0], [1.0, 2.0]]}), 3),
    "lists of objects": (lambda y, g: (y, g | {"A": [[object()]]}), 1),
    "lists": (lambda y, g: (y, {name: value.tolist() for name, value in g.items()}), 1),
    "words": (lambda y, g: ("y", {name: name for name in g}), 1),
    "word arrays": (lambda y, g: (words(y), {name: words(value) for name, value in g.items()}), 1),
    "scalars": (lambda y, g: (0.5, dict.fromkeys(g, 0.5)), 1),
    "flat": (lambda y, g: (y.ravel(), {name: value.ravel() for name, value in g.items()}), 1),
    "an axis more": (lambda y, g: (y[None], {name: value[None] for name, value in g.items()}), 1),
    "complex": (lambda y, g: (y + 1j, {name: value + 1j for name, value in g.items()}), 1),
    "objects": (lambda y, g: (y.astype(object), g), 1),
    "integers": (lambda y, g: (y.astype(int), g), 1),
    "huge": (lambda y, g: (np.full_like(y, largest(y.dtype)), g), 1),
}
GARBAGE_STARTS = {
    "none": (lambda found: None, 3),
    "nothing": (lambda found: {}, 3),
    "without B": (lambda found: {"A": found["A"]}, 3),
    "without m": (lambda found: {name: value for name, value in found.items() if name != "m"}, 3),
    "transposed": (lambda found: found | {"A": found["A"].T}, 3),
    "W of one row": (lambda found: found | {"W": found["W"][:1]}, 3),
    "words": (lambda found: {name: value.astype(str) for name, value in found.items()}, 3),
    "nan": (lambda found: {name: value * np.nan for name, value in found.items()}, 1),
    "zeros": (lambda found: {name: value * 0 for name, value in found.items()}, 1),
}
GARBAGE_MERGES = {
    "none": (lambda found: None, 3),
    "an array": (lambda found: found["W"], 3),
    "without W": (lambda found: {name: value for name, value in found.items() if name == "b"}, 1),
    "off": (lambda found: found | {"W": 1.001 * found["W"]}, 1),
}
