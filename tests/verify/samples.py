"""Reports to write out: judged ones that pass, fail and crash, one of hostile text, and a kill matrix."""

from dataclasses import dataclass, fields
from functools import cache
from math import inf, nan
from types import SimpleNamespace

import numpy as np

import lorax_np as lx
from lorax_np.verify import Check, Report
from lorax_np.verify.diagnosis.regression import Factor, Finding
from lorax_np.verify.diagnosis.told import Diagnosis, Name
from lorax_np.verify.diagnosis.tree import Branch
from lorax_np.verify.mutants import CATALOGUE
from lorax_np.verify.pages import heat

HOSTILE = (
    "a<script>alert(1)</script>&amp;\"'>]]><!-- | `b` ```c``` \x00\x07\x1b[31m \u202eedoc \u2028 \ud800 "
    "\ufffe 🦊\n"
    "</details></pre></table><img src=x onerror=alert(1)> @everyone #1 [x](javascript:alert(1)) ' -- \\| é"
)


@dataclass(frozen=True)
class Mapped(Check):
    """A check that carries its error by entry."""

    map: tuple[tuple[float, ...], ...] | None = None


class Wrong:
    """Half of gB, NaN in gx, a last row of gA that is off, no DoRA."""

    def __init__(self):
        self.right = lx.verify.subjects.reference()

    def run(self, case, gy):
        if case.m is not None:
            raise NotImplementedError("no DoRA | here")
        y, g = self.right.run(case, gy)
        g["A"][-1] *= 1 + case.x.dtype.type(1e-3)
        g["x"][..., 0] = np.nan if case.mask is not None else g["x"][..., 0]
        return y, {**g, "B": 0.5 * g["B"]}


class Crashing:
    def run(self, case, gy):
        raise RuntimeError(HOSTILE)


@cache
def judged(name):
    """Reports that come from judging something, by what came out."""
    subjects = {"pass": "reference", "fail": Wrong(), "crash": Crashing()}
    subject = CATALOGUE[name].subject() if name in CATALOGUE else subjects[name]
    profiles = ("fp64", "fp32") if name == "pass" else ("fp32",)
    title = "my_kernel" if name in CATALOGUE else ""
    reports = [lx.verify.verify(subject, profile, "quick", title=title) for profile in profiles]
    if name == "fail":
        rng = np.random.default_rng(0)
        for report in reports:
            for i, check in enumerate(report.checks):
                if check.verdict == "fail":
                    shares = 0.3 * np.abs(rng.standard_normal((90, 70) if i % 2 else (5, 7)))
                    shares[-1] *= 10.0 ** (i % 9)
                    rows = heat.shrink(shares)
                    known = {f.name: getattr(check, f.name) for f in fields(Check) if f.name != "map"}
                    report.checks[i] = Mapped(**known, map=rows)
    return tuple(reports)


def caused(text, **more):
    """A diagnosis in which everything that can be said is the text."""
    names = (
        Name((text, "S4", text, text, text), (text,) * 5, 1.5, text, text),
        Name(("S5",), (text,), inf, "", ""),
    )
    factor = Factor(text, nan, 1.0, (text, text))
    return Diagnosis(
        **{
            **{"subject": text, "profile": "fp32", "branch": Branch("backward", text), "only": text},
            **{"names": names, "nearest": (text, 0.5), "case": text, "reproduce": text, "asked": 3},
            "findings": (Finding("A", inf, (factor,), ""), Finding("x", 13.0, (), text)),
            **more,
        }
    )


def hostile(text=HOSTILE):
    """A report in which everything that a subject can say is the text."""
    report = Report(text, "fp32", 3, text, notes=[text], seconds=1.0)
    for i, verdict in enumerate(("pass", "fail", "vacuous", "not run", "crash")):
        report.checks += [
            Check(f"weights/{text}/{i}/A", "weights", text, "A", verdict, 0.5, (0, 1), 1.0, float("nan"), text),
            Check(f"conduct/lora/{i}", "conduct", "lora", text, verdict, note=text),
        ]
    report.cause = caused(text)
    report.checks.append(Check("exact/lora/0/y", "exact", "lora", "y", "fail", float("inf"), (), 1.0, 2.0))
    return report


CHECKS = ("exact", "complex", "merge", "conduct", "start", "weights", "lattice", "secant", "mask")


def matrix(rows=120):
    """A kill matrix of two kinds of fault, of which every check misses S5."""
    title = "a scale of alpha in place of alpha/r <b>"
    faults = [
        SimpleNamespace(id=f"S{i}", title=title, kind="dora" if i % 3 else "forward") for i in range(rows)
    ]

    def cell(fault, check):
        i, j = int(fault.id[1:]), CHECKS.index(check) if check in CHECKS else 1
        return "." if i == 5 else "K.-E"[(7 * i + 3 * j) % 4]

    return SimpleNamespace(faults=faults, checks=CHECKS, cell=cell, naive=("differences",))


NAMES = ("pass-fp64", "pass-fp32", "fail", "crash", "D5", "R13", "hostile")


def report(name):
    """One of the reports, by its name; what it takes is computed when it is first asked for."""
    what, _, profile = name.partition("-")
    return hostile() if what == "hostile" else judged(what)[profile == "fp32"]


def every():
    """All of them."""
    return [report(name) for name in NAMES]
