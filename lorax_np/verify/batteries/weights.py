"""A subject on the linear weights of a real model, a line a tensor, read from a safetensors file."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log10
from pathlib import Path
from typing import Any

import numpy as np

from ... import FormatError, LoraConfig, SafetensorsFile, open_safetensors
from ..bounds.worst import bounds
from ..cases import PROFILES, UNIT, Case, HostArray, draw, under
from ..conventions import spec_of
from ..report import Check, Report
from ..subjects.engine import Reference
from ..truths import truth
from .laws import start_of
from .tensors import Absent, Crash, answer, chosen, judge, judge_case

KINDS = ("lora, dropout", "dora, dropout", "dora full norm, dropout")
RANK, ALPHA, DROP, LEAD = 7, 11.9, 0.3, (3,)
FLOATING = ("F16", "BF16", "F32", "F64")
LARGE = 1e100  # beyond it the squares that a judgement takes have no float64
BARS = " ▁▂▃▄▅▆▇█"


def battery_weights(
    where: str | Path, report: Report
) -> Callable[[Any, str, int, str, str], Iterator[list[Check]]]:
    """The battery over one tensor of a file (FILE:TENSOR), or over all its linear weights (FILE).

    A linear weight is a floating tensor of two axes that no name calls an embedding; what is passed over is
    noted in the report. One that holds NaN or infinity is not run, and refused where it was named.
    Raises FormatError where the file is damaged, or holds no such tensor.
    """
    path, name = _split(where)
    file = open_safetensors(path)
    names = [name] if name else list(_linear_names(file, report))
    if not names:
        raise FormatError(f"{path}: expected a floating tensor of two axes, got none")
    for one in names:
        if one not in file:
            raise FormatError(f"{path}: expected a tensor {one!r}, got none of that name among {len(file)}")
        if not _linear(file, one):
            raise FormatError(
                f"{path}: {one}: expected a floating tensor of two axes of at least 1, got "
                f"{file.dtype(one)} {list(file.shape(one))}"
            )

    def battery(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
        for i, one in enumerate(names):
            if chosen(f"weights/{one}", only):
                W, b = _read(file, one)
                fault = _fault(one, W, b, PROFILES[profile])
                if fault and name:
                    raise FormatError(f"{path}: {fault}")
                if fault:
                    yield [Check(f"weights/{one}/y", "weights", _row(one, W), "y", "not run", note=fault)]
                    continue
                yield _judge_weight(subject, one, W, b, profile, (seed, 5, i))
                if name and hasattr(subject, "init"):
                    report.notes.extend(_spectrum(subject, W.astype(PROFILES[profile]), seed))

    return battery


def _split(where: str | Path) -> tuple[Path, str]:
    path, text = Path(where), str(where)
    if path.exists() or ":" not in text:
        return path, ""
    cuts = [i for i, letter in enumerate(text) if letter == ":"]  # a path may hold colons, and so may a name
    cut = next((i for i in reversed(cuts) if Path(text[:i]).exists()), cuts[-1])
    name = text[cut + 1 :]
    return (path, "") if "/" in name and not Path(text[:cut]).exists() else (Path(text[:cut]), name)


def _linear(file: SafetensorsFile, name: str) -> bool:
    shape = file.shape(name)
    return len(shape) == 2 and 0 not in shape and file.dtype(name) in FLOATING


def _linear_names(file: SafetensorsFile, report: Report) -> Iterator[str]:
    for name in file.names:
        if _linear(file, name):
            if "embed" in name.lower():
                report.notes.append(f"passed over, an embedding by its name: {name} {list(file.shape(name))}")
            else:
                yield name


def _read(file: SafetensorsFile, name: str) -> tuple[HostArray, HostArray | None]:
    W = file[name].astype(np.float64)
    beside = f"{name.removesuffix('weight')}bias"
    b = file[beside].astype(np.float64) if beside != name and beside in file else None
    if b is not None and b.shape != (W.shape[0],):
        b = None
    return W, b


def _fault(name: str, W: HostArray, b: HostArray | None, dtype: str) -> str:
    """What keeps a weight or the bias beside it from being judged, or nothing."""
    for what, value in ((name, W), (f"the bias of {name}", b)):
        if value is not None and not (np.abs(value.astype(dtype)) < LARGE).all():
            return f"{what}: expected numbers below {LARGE} in {dtype}, got NaN, infinity or more"
    return ""


def _row(name: str, W: HostArray) -> str:
    """What the report calls one weight: its name and its size."""
    return f"{name.removesuffix('.weight')} {W.shape[0]}×{W.shape[1]}"


def _judge_weight(
    subject: Any, name: str, W: HostArray, b: HostArray | None, profile: str, seed: tuple[int, ...]
) -> list[Check]:
    """One row of the report: LoRA and DoRA at this weight, every tensor of each."""
    dtype = PROFILES[profile]
    checks: list[Check] = []
    for kind in KINDS:
        if kind.startswith("dora") and ("full" in kind) not in spec_of(subject).norm_gradient:
            continue
        bias = "absent" if b is None else "trained"
        shape = (*W.shape, RANK, LEAD)
        id = f"weights/{name}/{kind.partition(',')[0].replace(' ', '-')}"
        case = draw(id, kind, shape, dtype, seed, alpha=ALPHA, p=DROP, bias=bias, weight=W, base_bias=b)
        case = under(replace(case, kind=_row(name, W)), spec_of(subject))
        checks += _judge_real(subject, case, profile)
    return checks


def _judge_real(subject: Any, case: Case, profile: str) -> list[Check]:
    """y against the dense definition, gradients against the float64 engine, and that against complex steps."""
    u = UNIT[PROFILES[profile]]
    ours = (case.dora, case.dropout) == ("peft", "pre")
    engine = answer(Reference(), truth.widened(case)) if ours else truth.derived(case)
    own, both = bounds(case, u), bounds(case, u)
    for name, value in bounds(replace(case, norm_gradient=case.m is not None), UNIT["float64"]).items():
        both[name] = own[name] + value
    proof = _along(case, engine, both)
    if isinstance(subject, Reference) and profile == "fp64":
        own_y = judge(case.id, "weights", case.kind, "y", engine["y"], truth.dense(case), both["y"], "float64")
        return [own_y, *proof]
    want = {name: engine[name] for name in case.wanted} | {"y": truth.dense(case)}
    wrong = [check for check in proof if check.verdict != "pass"]
    return wrong or judge_case(subject, "weights", case, want, both)


def _along(case: Case, engine: dict[str, HostArray], bound: dict[str, HostArray]) -> list[Check]:
    """The float64 engine's gradients along random directions, each against a complex step."""
    rng, checks = np.random.default_rng(len(case.id)), []
    for name in case.wanted:
        v = np.asarray(rng.standard_normal(engine[name].shape))
        got, want = np.array(np.sum(engine[name] * v)), np.array(truth.along(case, name, v))
        slack = np.array(np.sum(bound[name] * np.abs(v)))
        checks.append(judge(case.id, "weights", case.kind, name, got, want, slack, "float64"))
    return checks


# ---- the PiSSA start of one weight -------------------------------------------------------------------------


def _spectrum(subject: Any, W: HostArray, seed: int) -> list[str]:
    """PiSSA at this weight, for a person: what it takes, what it leaves, and whether the two give W back."""
    config = LoraConfig(r=min(16, *W.shape), lora_alpha=ALPHA, init_lora_weights="pissa")
    try:
        got = start_of(subject, W, config, seed)
    except (Absent, Crash) as error:
        return [f"PiSSA start: none, {error}"]
    if not W.any() or not np.isfinite(got["W"]).all():
        return [f"PiSSA start: none, the {'residual is not finite' if W.any() else 'weight is zero'}"]
    S = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    update = config.scaling * got["B"] @ got["A"]
    off = np.abs(got["W"] + update - W).max()
    ulp = np.spacing(np.abs(W).max(), dtype=W.dtype)
    share = (S[: config.r] ** 2).sum() / (S**2).sum()
    columns = np.array_split(S, min(64, S.size))
    height = [log10(max(float(part.max()) / S[0], 1e-4)) / 4 + 1 for part in columns]
    return [
        f"PiSSA start, r = {config.r}: {share:.1%} of the squared norm goes into the adapter",
        f"singular values, {S[0]:.4g} down to {S[-1]:.3g} (height: logarithm over four decades)",
        "  " + "".join(BARS[round(h * (len(BARS) - 1))] for h in height),
        f"  1{' ' * (len(columns) - 1 - len(str(S.size)))}{S.size}",
        f"largest singular value left in the residual: {np.linalg.norm(got['W'], 2):.6g}, "
        f"singular value {config.r + 1} of W: {S[config.r] if config.r < S.size else 0:.6g}",
        f"residual + s·BA − W: at most {off:.2g}, {off / float(ulp):.2f} ulp of W's largest entry",
    ]
