"""What is wrong with a subject that failed: the part, the known faults that explain it, the evidence for them.

Three sources: a decision tree over the failed checks (tree.py), the dictionary of known faults and of pairs of
them (dictionary.py, pairs.py), and regression on the layer's terms (regression.py). A fault is named only where
its replay gives what the subject gave, within roundings; faults that cannot be told apart come as one class.
How it is said: told.py. Derivation: specs/diagnosis.md.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..batteries.tensors import answer, layered
from ..conventions import spec_of
from ..pages.digest import again
from ..precision import PRECISIONS
from ..report import RIGHT, Check
from .dictionary import LIMIT, Comparison, Match, faults
from .op_faults import op_names
from .pairs import pairs
from .probe_layers import KINDS, Ask, observe
from .regression import explain
from .smallest import smallest
from .told import Diagnosis, Name
from .tree import Branch, branch, refused_ops

FILES = {  # where the equations of a spec are computed
    "linear": ("ops/linear.py", "layer.py"),
    "dropout": ("ops/dropout.py", "random.py", "layer.py"),
    "lora": ("ops/lora.py", "config.py"),
    "dora": ("ops/dora.py", "layer.py"),
    "init": ("init.py",),
    "merge": ("merge.py",),
    "norm": ("ops/norm.py",),
    "rope": ("ops/rope.py",),
    "attention": ("ops/attention.py", "ops/relative.py"),
    "activation": ("ops/activation.py", "ops/erf.py"),
    "loss": ("ops/loss.py",),
    "embedding": ("ops/embedding.py", "layers/embedding.py"),
    "router": ("ops/router.py",),
}


def diagnose(
    subject: Any,
    checks: Sequence[Check],
    profile: str = "fp32",
    ask: Ask = answer,
    *,
    name: str = "",
    seed: int = 0,
    without: frozenset[str] = frozenset(),
) -> Diagnosis:
    """Say what is wrong with a subject, given its checks.

    checks : of one report, of any batteries
    ask : how the subject is asked: (subject, case) to tensors by name, raising Absent or Crash
    name, seed : of the subject and the run, for the line that reproduces a failure
    without : ids of faults that are not to be thought of

    Raises ValueError for an unknown profile.
    """
    if profile not in PRECISIONS:
        raise ValueError(f"profile: expected one of {', '.join(PRECISIONS)}, got {profile!r}")
    where = branch(checks)
    name = name or type(subject).__name__
    with np.errstate(all="ignore"):
        norms = spec_of(subject).norm_gradient
        there = layered(subject)
        kinds = tuple(kind for kind in KINDS if there and (kind == "lora" or ("full" in kind) in norms))
        compared = Comparison(*observe(subject, profile, kinds, ask), without)
        silent = where.part == "crash"  # an exception is no answer to explain
        ops = [] if silent else refused_ops(checks)
        names = [] if silent or ops else _names(compared)
        right = compared.is_right
        near = None if names or right or silent or ops else compared.nearest()
        findings = [] if right or silent else explain(compared)
        case = "" if right else _smallest(subject, compared, profile)
    return Diagnosis(
        subject=name,
        profile=profile,
        branch=where if where.part != "none" or right else _seen_by_probes(compared),
        only="" if right else _trait(compared),
        names=_of_ops(subject, ops, profile) if ops else tuple(_name(match) for match in names),
        nearest=None if near is None else (near.ids[0], near.share),
        findings=tuple(findings),
        case=case,
        reproduce=_reproduce(name, checks, profile, seed),
        asked=len(compared.probes),
    )


def _of_ops(subject: Any, ops: Sequence[str], profile: str) -> tuple[Name, ...]:
    """The known faults of the ops that were refused whose answers are the subject's: one class of names."""
    from ..mutants import CATALOGUE

    found = op_names(subject, ops, profile)
    if not found:
        return ()
    line, ids = CATALOGUE[found[0][0]].line, tuple(id for id, _ in found)
    return (Name(ids, tuple(CATALOGUE[id].title for id in ids), found[0][1], line, source(line), " bounds"),)


def _names(compared: Comparison) -> list[Match]:
    if not compared.probes:
        return []
    return compared.single() or compared.rounded() or pairs(compared)


def _seen_by_probes(compared: Comparison) -> Branch:
    """A part for a subject whose checks all passed, or were not given: from the layers asked here."""
    wrong = {
        tensor
        for layer, z in zip(compared.probes, compared.wrong, strict=True)
        for tensor, away in zip(layer.names, z, strict=True)
        if away > LIMIT
    }
    checks = [Check(f"probe/{t}", "probe", "", t, "fail") for t in sorted(wrong)]
    return branch(checks)


def _trait(compared: Comparison) -> str:
    """What every layer that came out wrong has and no layer that came out right has."""
    wrong = [p.traits for p, z in zip(compared.probes, compared.wrong, strict=True) if (z > LIMIT).any()]
    right = [p.traits for p, z in zip(compared.probes, compared.wrong, strict=True) if not (z > LIMIT).any()]
    if not wrong or not right:
        return ""
    shared = frozenset.intersection(*wrong)
    for trait in sorted(shared):
        if not any(trait in traits for traits in right):
            return trait
    return ""


def _name(match: Match) -> Name:
    known = faults()
    titles = []
    for id in match.ids:
        titles.append(
            " + ".join(known[one].title if one != RIGHT else "the right layer" for one in id.split(" + "))
        )
    first = next((one for id in match.ids for one in id.split(" + ") if one != RIGHT), "")
    line = known[first].line if first else ""
    return Name(match.ids, tuple(titles), match.z, line, source(line) if line else "")


@cache
def source(line: str) -> str:
    """The file of the reference that computes an equation, and the number of its line there.

    >>> source("lora.8").partition(":")[0]
    'lorax_np/ops/lora.py'
    """
    folder = Path(__file__).parents[2]
    number = re.compile(rf"\({re.escape(line)}\)")
    candidates = FILES.get(line.partition(".")[0], ())
    for file in candidates:
        if not (folder / file).is_file():
            continue
        for i, text in enumerate((folder / file).read_text(encoding="utf-8").splitlines(), 1):
            at = number.search(text)
            if at and "undoes" not in text[: at.start()]:
                return f"lorax_np/{file}:{i}"
    return f"specs/{line.partition('.')[0]}.md"


def _smallest(subject: Any, compared: Comparison, profile: str) -> str:
    """Parameters of the smallest exact layer that fails, of the kind that came out wrong first."""
    if PRECISIONS[profile].dtype not in ("float64", "float32", "float16", "bfloat16"):
        return ""
    for layer, z in zip(compared.probes, compared.wrong, strict=True):
        if (z > LIMIT).any():
            found = smallest(subject, layer.case, profile)
            if found is not None:
                return _parameters(layer.key[1], found[1])
    return ""


def _parameters(kind: str, p: dict[str, Any]) -> str:
    sizes = f"{kind}, d_in={p['d_in']} d_out={p['d_out']} r={p['r']} lead={p['lead']}"
    sizes += f" alpha={p['alpha']:g} p={p['p']:g}"
    extra = [f"bias {p['bias']}"] if p["bias"] != "absent" else []
    extra += ["lora_bias"] if p["lora_bias"] else []
    extra += ["rslora"] if p["rslora"] else []
    return ", ".join([sizes, *extra])


def _reproduce(name: str, checks: Sequence[Check], profile: str, seed: int) -> str:
    bad = next((check for check in checks if check.verdict in ("fail", "crash")), None)
    if bad is None:
        return ""
    return again(name, profile, seed, bad)
