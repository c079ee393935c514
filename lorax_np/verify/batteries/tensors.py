"""The checks of single tensors: each gives its largest error as a share of the bound on it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..bounds.worst import bounds, merged_bounds
from ..cases import MIDDLE, PROFILES, SMALL, UNIT, Case, HostArray, grid
from ..conventions import spec_of
from ..pages.heat import shrink
from ..report import Check, Verdict
from ..subjects.torch_arrays import to_array
from ..truths import exact, truth
from .op_case import offered

EPS = UNIT["float64"]  # of the float64 truths
NOT_OFFERED = "the subject declares that it gives no such gradient"
GRADIENTS = ("x", "W", "A", "B", "m", "b", "bB")  # the names that backward may return


class Crash(Exception):
    """The subject raised; the message is its exception in one line."""


class Unlike(Crash):
    """What the subject returned is not what was asked for; nobody raised."""


class Absent(Exception):
    """The subject said that it does not cover a case."""


def ask(subject: Any, method: str, *arguments: Any) -> Any:
    """Call a subject's method; tell what it does not cover from what breaks in it.

    Its numbers are judged. NumPy's warnings of a processor's flags are not: where they are made errors they
    would end what is right, and a kernel that reads what it then drops sets flags for no reason.
    """
    try:
        with np.errstate(all="ignore"):  # here and not around batteries: each thread has a state of its own
            return getattr(subject, method)(*arguments)
    except NotImplementedError as error:
        text = (str(error).strip().splitlines() or ["the subject does not cover this case"])[0]
        raise Absent(text) from error
    except (Exception, SystemExit) as error:
        raise Crash(in_one_line(error)) from error


def in_one_line(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"


def by_name(method: str, found: Any, names: tuple[str, ...]) -> dict[str, HostArray]:
    """What a subject's method returned, as NumPy arrays; Crash where that is no dict of arrays so named."""
    if not isinstance(found, dict):
        raise Crash(f"{method}: expected a dict of arrays by name, got {type(found).__name__}")
    arrays = {}
    for name, value in found.items():
        if name not in names:
            raise Crash(f"{method}: expected names among {', '.join(names)}, got {name!r}")
        try:
            arrays[name] = None if value is None else _to_numpy(value)
        except Exception as error:  # each library refuses in its own way
            raise Crash(f"{method}: expected an array as {name}, got {type(value).__name__}") from error
    return {name: array for name, array in arrays.items() if array is not None}


def _to_numpy(value: Any) -> HostArray:
    """An array of any library as a NumPy array of its own."""
    if type(value) is np.ndarray:
        return np.array(value)
    if hasattr(value, "detach"):  # torch
        value = to_array(value)
    elif not isinstance(value, np.ndarray) and hasattr(value, "get"):  # CuPy
        value = value.get()
    elif not isinstance(value, np.ndarray) and hasattr(value, "to_device"):  # the array standard
        value = value.to_device(value.__array_namespace__().__array_namespace_info__().default_device())
    return np.array(value)


def refusal(error: Exception) -> Verdict:
    """The verdict on what kept a subject from being judged: not run, fail, or crash."""
    if isinstance(error, Absent):
        return "not run"
    return "fail" if isinstance(error, Unlike) else "crash"


def answer(subject: Any, case: Case) -> dict[str, HostArray]:
    """y and the gradients that a subject makes of a case, as NumPy arrays."""
    mine = case.copy()
    if hasattr(subject, "run"):
        both = ask(subject, "run", mine, mine.gy)
        if not isinstance(both, tuple | list) or len(both) != 2:
            raise Crash(f"run: expected y and a dict of gradients, got {type(both).__name__}")
        y, gradients = both
    else:
        y = ask(subject, "forward", mine)
        gradients = ask(subject, "backward", mine, mine.gy)
    return by_name("forward", {"y": y}, ("y",)) | by_name("backward", gradients, GRADIENTS)


# ---- one tensor --------------------------------------------------------------------------------------------


def judge(
    id: str,
    battery: str,
    kind: str,
    tensor: str,
    got: HostArray | None,
    want: Any,
    bound: HostArray,
    dtype: str,
) -> Check:
    """Compare one tensor with the truth, which is float64, or fixed-point where it is made of integers."""
    check = partial(Check, f"{id}/{tensor}", battery, kind, tensor)
    fixed = want.dtype == object
    if got is None:
        return check("fail", note="asked for, and not given")
    if got.shape != want.shape:
        return check("fail", note=f"expected shape {want.shape}, got {got.shape}")
    if got.dtype != dtype:
        return check("fail", note=f"expected dtype {dtype}, got {got.dtype}")
    if not np.any(want):
        return check("vacuous", note="the truth is zero everywhere")
    finite = np.isfinite(got)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        value = float(exact.to_float(want[at]) if fixed else want[at])
        where = shrink(np.where(finite, 0.0, np.inf))
        return check("fail", at=at, got=float(got[at]), want=value, note=f"not finite: {got[at]}", map=where)
    if fixed:
        error = np.abs(exact.to_float(np.asarray(exact.fixed(got), dtype=object) - want))
        want = exact.to_float(want)
    else:
        error = np.abs(got.astype(np.float64) - want)
    share = np.divide(error, bound, out=np.where(error > 0, np.inf, 0.0), where=bound > 0)
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(share)), share.shape))
    values: Any = {"ratio": float(share[at]), "at": at, "got": float(got[at]), "want": float(want[at])}
    return check("pass", **values) if share[at] <= 1 else check("fail", **values, map=shrink(share))


def judge_case(
    subject: Any, battery: str, case: Case, want: dict[str, Any], bound: dict[str, HostArray]
) -> list[Check]:
    """Every tensor of a case that the truth has."""
    return judge_answer(subject, battery, case, want, bound)[1]


def judge_answer(
    subject: Any, battery: str, case: Case, want: dict[str, Any], bound: dict[str, HostArray]
) -> tuple[dict[str, HostArray], list[Check]]:
    """As judge_case, and besides what the subject answered; nothing where it did not."""
    try:
        got = answer(subject, case)
    except (Absent, Crash) as error:
        verdict = refusal(error)
        return {}, [Check(f"{case.id}/y", battery, case.kind, "y", verdict, note=str(error))]
    dtype = case.x.dtype.name
    checks = [
        judge(case.id, battery, case.kind, name, got.get(name), want[name], bound[name], dtype)
        if name in got or offers(subject, name)
        else Check(f"{case.id}/{name}", battery, case.kind, name, "not run", note=NOT_OFFERED)
        for name in want
        if name in ("y", *case.wanted) or name in got
    ]
    return got, checks


def offers(subject: Any, name: str) -> bool:
    """Whether a subject gives a tensor, by what it declares."""
    gradients = spec_of(subject).gradients
    return name == "y" or gradients is None or name in gradients


def layered(subject: Any) -> bool:
    """Whether there is a linear layer to ask; there is none where a subject offers ops of a model alone."""
    return hasattr(subject, "run") or hasattr(subject, "forward") or not any(offered(subject))


def chosen(id: str, only: str) -> bool:
    """Whether a case is on the path that was asked for, or everything was."""
    return not only or id == only or id.startswith(f"{only}/") or only.startswith(f"{id}/")


# ---- the batteries -----------------------------------------------------------------------------------------


def battery_exact(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Small layers of every kind against 640-bit arithmetic."""
    for case in grid("exact", SMALL, profile, spec_of(subject), seed, level):
        if chosen(case.id, only):
            yield judge_case(subject, "exact", case, exact.truth(case), bounds(case, UNIT[PROFILES[profile]]))


def battery_complex(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Larger layers of every kind against complex steps, and y against the dense definition."""
    for case in grid("complex", MIDDLE, profile, spec_of(subject), seed + 1, level):
        if chosen(case.id, only):
            want = {"y": truth.dense(case), **truth.gradients(case)}
            yield judge_case(subject, "complex", case, want, with_truth(case, UNIT[PROFILES[profile]]))


def with_truth(case: Case, u: float) -> dict[str, HostArray]:
    """The bound on a subject's error, and on a float64 truth's, which rounds where it holds the norm still."""
    widest = replace(case, norm_gradient=case.m is not None)
    of_truth = bounds(widest, EPS)
    alike = u == EPS and widest.norm_gradient == case.norm_gradient
    return {name: bound + of_truth[name] for name, bound in (of_truth if alike else bounds(case, u)).items()}


def battery_merge(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Merged weights and biases of small layers against 640-bit arithmetic."""
    if not hasattr(subject, "merge"):
        return
    dtype = PROFILES[profile]
    for case in grid(
        "merge", SMALL, profile, replace(spec_of(subject), norm_gradient=(False,)), seed + 2, level
    ):
        if case.mask is not None or not chosen(case.id, only):
            continue
        want, bound = exact.merged(case), merged_bounds(case, UNIT[dtype])
        try:
            got = by_name("merge", ask(subject, "merge", case.copy()), ("W", "b"))
        except (Absent, Crash) as error:
            verdict = refusal(error)
            yield [Check(f"{case.id}/W", "merge", case.kind, "W", verdict, note=str(error))]
            continue
        yield [
            judge(case.id, "merge", case.kind, name, got.get(name), want[name], bound[name], dtype)
            for name in want
        ]
