"""Whether an engine that is to be timed is right: layers and merges by their formula, starts by their angle."""

from collections.abc import Callable

import numpy as np

from . import cases, truth
from .cases import AnyCase, Arrays, Merge, Start
from .engines import ENGINES

Judge = Callable[[str, Arrays], tuple[list[str], dict[str, float]]]


def judge_of(case: AnyCase, arrays: Arrays) -> Judge:
    """A function of an engine's name and results: its faults, and figures of how near it came."""
    if isinstance(case, Merge):
        return _judge_merge(case, arrays)
    if isinstance(case, Start):
        return _judge_start(case, arrays)
    prepared, mask = truth.prepare(case, arrays), cases.mask(case)

    def judge(name: str, got: Arrays) -> tuple[list[str], dict[str, float]]:
        entry = ENGINES[name]
        asked = case
        if entry.maker == "Peft":  # which holds DoRA's norm constant
            asked = case._replace(norm_gradient=False)
        dtype = entry.options.get("dtype", case.dtype)
        unit = truth.UNIT[entry.unit or ("bfloat16" if "bfloat16" in dtype else "float32")]
        return truth.judge(asked, prepared, got, mask, draws=entry.draws, unit=unit), {}

    return judge


def _judge_merge(case: Merge, arrays: Arrays) -> Judge:
    W, A, B = (arrays[name].astype(np.float64) for name in "WAB")
    want = W + cases.SCALING * B @ A
    unit = truth.UNIT["float32"]
    bound = 2 * unit * (np.sqrt(case.r) + truth.STORED)

    def judge(name: str, got: Arrays) -> tuple[list[str], dict[str, float]]:
        error = float(np.linalg.norm(got["W"] - want) / np.linalg.norm(want))
        wrong = f"W: expected an error of at most {bound:.1e} of its size, got {error:.1e}"
        return ([] if error <= bound else [wrong]), {}

    return judge


def _judge_start(case: Start, arrays: Arrays) -> Judge:
    def judge(name: str, got: Arrays) -> tuple[list[str], dict[str, float]]:
        """No start is exact: what counts is the angle; only rows of the wrong number or length are a fault."""
        A = got["A"].astype(np.float64)
        if A.shape != (case.r, case.n) or not np.isfinite(A).all() or np.linalg.matrix_rank(A) < case.r:
            return [f"A: expected {case.r} independent rows of {case.n}, got {A.shape}"], {}
        Q = np.linalg.qr(A.T)[0]
        off = Q - arrays["Vh"].T @ (arrays["Vh"] @ Q)
        return [], {"angle": float(np.linalg.norm(off, 2))}

    return judge
