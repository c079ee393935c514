"""Probes of a subject from outside: how many bits each of its stages keeps, and which masks it draws.

A width is measured with numbers of 1, 2, 3, ... bits, one a token, laid out so that no two meet in a sum:
the first that comes back wrong names the width of the stage that it went through.
Derivation: specs/lattice.md.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import log, sqrt
from typing import Any

import numpy as np

from ... import LoraConfig
from ..cases import Case, HostArray
from ..conventions import spec_of
from ..layers.dyadic import solve
from ..precision import PRECISIONS
from ..report import Check
from .lattice import cast
from .tensors import NOT_OFFERED, Absent, Crash, Unlike, answer, chosen, offers, refusal

WIDEST = {"float64": 53, "float32": 27, "float16": 24, "bfloat16": 27}  # float16 ends at 2^−24
NAMES = {53: "float64", 24: "float32", 11: "TF32 or float16", 8: "bfloat16", 4: "FP8 E4M3", 3: "FP8 E5M2"}
#         the least width of operands, sums and z that a profile may show: past what the next narrower one has
LEAST = {"fp64": 26, "fp32": 13, "tf32": 9, "fp16": 9, "bf16": 5, "bf16-pure": 5, "tf32-rz": 9, "bf16-rz": 5}
LEAST_SUM = {
    "fp64": 26,
    "fp32": 13,
    "tf32": 13,
    "fp16": 13,
    "bf16": 13,
    "bf16-pure": 5,
    "tf32-rz": 13,
    "bf16-rz": 13,
}
CHANCE = 1e-9  # with which a sound keep rate is refused
P_RANK, P_BITS, P_TOKENS = 4, 16, 48  # of mask decoding: 3·2^16·48 < 2^24, so that gB is exact in float32


# ---- precision ----------------------------------------------------------------------------------------------


def _layer(x: HostArray, W: HostArray, A: HostArray, B: HostArray, gy: HostArray, dtype: str) -> Case:
    """A layer with s = 2, which costs no bit."""
    r = A.shape[0]
    arrays: dict[str, Any] = {"x": x, "W": W, "A": A, "B": B, "gy": gy}
    return cast(Case(id="probes", kind="lora", config=LoraConfig(r=r, lora_alpha=2 * r), **arrays), dtype)


def _stages(dtype: str) -> Iterator[tuple[str, str, int, Case, HostArray]]:
    """Stage, tensor, the axis along which widths 1, 2, ... lie, the case, and the truth of that tensor."""
    T = WIDEST[dtype]
    r, i = 2, np.arange(T)
    rng = np.random.default_rng(53)
    odd = np.ones(T)  # i + 1 bits, the first and the last set, in [1, 2) so that nothing overflows
    odd[1:] += [2.0**-w + 2.0 ** (1 - w) * int(rng.integers(0, 2 ** (w - 1))) for w in i[1:].tolist()]
    one, none = np.eye(T), np.zeros((T, T))
    A, B = np.where((i + np.arange(r)[:, None]) % 2, -1.0, 1.0), np.zeros((T, r))
    B[i, i % r] = 1.0
    zeros = np.zeros((T, r))
    wide = np.diag(odd)
    for stage, W, B_ in (("x in the base", one, zeros), ("z in y", none, B)):
        base = _layer(wide, W, A, B_, one, dtype)
        yield stage, "y", 0, base, odd if W is one else 2 * odd * A[i % r, i]
    lora = _layer(wide, none, A, B, one, dtype)
    yield "z in gB", "B", 0, lora, 2 * odd[:, None] * A.T
    yield "x in gA", "A", 1, lora, 2 * odd * B.T
    back = _layer(one, none, A, B, wide, dtype)
    yield "gy in gx", "x", 0, back, (2 * odd)[:, None] * A[i % r]
    yield "gy in gA", "A", 1, back, 2 * odd * B.T
    yield "gy in gB", "B", 0, back, 2 * odd[:, None] * A.T
    yield "gy in gx of the base", "x", 0, _layer(one, one, A, zeros, wide, dtype), wide
    x = np.zeros((T, 2 * T))
    x[i, i], x[i, T + i] = i > 0, 2.0**-i  # a sum of i + 1 bits, of two numbers of 1 bit
    ones = np.ones((r, 2 * T))
    yield "z, a sum, in y", "y", 0, _layer(x, np.zeros((T, 2 * T)), ones, B, one, dtype), 2 * x.sum(axis=1)
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):  # 1 + 2^−i − 1: of one bit, if the sum is wide enough
        x = np.zeros((T, 3))
        x[:, order[0]], x[:, order[1]], x[:, order[2]] = 1.0, -1.0, 2.0**-i
        case = _layer(x, np.ones((T, 3)), np.ones((r, 3)), zeros, one, dtype)
        yield "sums over d_in", "y", 0, case, 2.0**-i


def infer_precision(subject: Any, profile: str = "fp32") -> dict[str, Any]:
    """How many bits each stage of a subject keeps, and a sentence about it.

    Returns {"operands", "sums", "z": bits; "stages": {stage: bits}; "sentence"}. Widths end at WIDEST of the
    dtype, or at what the dtype can hold. Raises Crash and Absent as the subject does.
    """
    dtype = PRECISIONS[profile].dtype
    stages: dict[str, int] = {}
    for stage, tensor, axis, case, want in _stages(dtype):
        if not offers(subject, tensor):
            continue
        got, like = answer(subject, case).get(tensor), getattr(case, "gy" if tensor == "y" else tensor)
        if got is None or got.shape != like.shape or got.dtype != like.dtype:
            came = "none" if got is None else f"{got.dtype} {got.shape}"
            raise Unlike(f"{tensor}: expected {like.dtype} {like.shape}, got {came}")
        found = got.astype(np.float64)
        found = np.moveaxis(found, axis, 0)
        target = np.moveaxis(want, axis, 0) if want.ndim == 2 else want
        if tensor == "y":
            found = found[np.arange(len(want)), np.arange(len(want))]
        same = (found == target).reshape(len(found), -1).all(axis=1)
        width = int(np.argmin(same)) if not same.all() else len(same)
        stages[stage] = min(width, stages.get(stage, width))
    if not any(stage.startswith(("x", "gy")) for stage in stages):
        raise Absent(NOT_OFFERED)
    operands = min(bits for stage, bits in stages.items() if stage.startswith(("x", "gy")))
    z = min(bits for stage, bits in stages.items() if stage.startswith("z"))
    measured = {"operands": operands, "sums": stages["sums over d_in"], "z": z}
    return {**measured, "stages": stages, "sentence": _sentence(measured, stages)}


def _name(bits: int) -> str:
    """A width, with the format that has it."""
    if bits < 2:
        return "fewer than 2 bits, which is no matter of precision"
    return f"{bits} bits" + (f" ({NAMES[bits]})" if bits in NAMES else "")


def _sentence(measured: dict[str, int], stages: dict[str, int]) -> str:
    parts = [f"{what} {'keep' if what != 'z' else 'keeps'} {_name(bits)}" for what, bits in measured.items()]
    least = min(stages.values())
    narrow = [stage for stage, bits in stages.items() if bits == least]
    where = "" if len(set(stages.values())) == 1 else f"; narrowest: {', '.join(narrow)}"
    return f"inferred: {', '.join(parts)}{where}"


def first_differing(subject: Any, profile: str = "fp32", seed: int = 0) -> dict[str, int]:
    """The first width of odd integers, in a layer with sums, at which each tensor's bits differ; absent: none.

    Of two layers: x wide with A and B generic, and x wide with A and B sparse signs, which strains z.
    """
    dtype = PRECISIONS[profile].dtype
    found: dict[str, int] = {}
    rng = np.random.default_rng((seed, 8))
    for w in range(1, WIDEST[dtype] - 3):
        for sparse in (False, True):
            x = 2.0 * rng.integers(-(2 ** (w - 1)), 2 ** (w - 1), (6, 15)) + 1
            A, B, W, gy = (
                rng.integers(-2, 3, size).astype(float) for size in ((4, 15), (7, 4), (7, 15), (6, 7))
            )
            if sparse:
                A, B = np.sign(A) * (rng.random(A.shape) < 0.3), np.sign(B) * (rng.random(B.shape) < 0.3)
            wide = _layer(x, W, A, B, gy, "float64")
            want, case = solve(wide)[0], cast(wide, dtype)
            got = answer(subject, case)
            for name in want:
                with np.errstate(over="ignore"):  # float16 ends at 2^16
                    wanted = want[name].astype(case.x.dtype)
                if name in got and name not in found and not np.array_equal(got[name], wanted):
                    found[name] = w
    return found


def battery_probes(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """The widths of a subject's stages against what its profile claims; then its own masks, if it draws any."""
    if chosen("probes/lora", only):
        try:
            found = infer_precision(subject, profile)
        except (Absent, Crash) as error:
            verdict = refusal(error)
            yield [
                Check(
                    "probes/lora/0",
                    "probes",
                    "lora",
                    "widths of operands, sums and z",
                    verdict,
                    note=str(error),
                )
            ]
        else:
            yield [_width(found, i, stage, profile) for i, stage in enumerate(("operands", "sums", "z"))]
    if draws(subject) and PRECISIONS[profile].dtype in ("float32", "float64"):
        rates = (0.5,) if level == "quick" else (0.5, 0.75)
        for i, p in enumerate(rates):
            if chosen(f"probes/mask/{i}", only):
                yield list(_masks(subject, profile, p, f"probes/mask/{i}"))


def _width(found: dict[str, Any], i: int, stage: str, profile: str) -> Check:
    bits, least = found[stage], (LEAST_SUM if stage == "sums" else LEAST)[profile]
    law, note = f"{stage} of {least} bits or more", found["sentence"]
    if bits < 2:  # no format is so narrow: a fault, and not one of precision
        return Check(f"probes/lora/{i}", "probes", "lora", law, "not run", note=note)
    return Check(f"probes/lora/{i}", "probes", "lora", law, "pass" if bits >= least else "fail", note=note)


# ---- masks --------------------------------------------------------------------------------------------------


def draws(subject: Any) -> bool:
    """Whether a subject draws its own dropout: case.mask is None then, and config.lora_dropout is p."""
    return bool(getattr(spec_of(subject), "draws_mask", False) or getattr(subject, "draws_mask", False))


def mask_case(profile: str = "fp32", p: float = 0.5) -> Case:
    """The layer that shows its mask: A holds powers of two, so z's bits are the kept columns.  (lattice.10)"""
    r, d_in, d_out = P_RANK, P_RANK * P_BITS, P_RANK + 3
    A = np.zeros((r, d_in))
    for q in range(r):
        A[q, q * P_BITS : (q + 1) * P_BITS] = 2.0 ** np.arange(P_BITS)
    gy = np.zeros((P_TOKENS, d_out))
    gy[:, :r] = 1.0
    config = LoraConfig(r=r, lora_alpha=1.5 * r, lora_dropout=p)
    x, W, B = np.ones((P_TOKENS, d_in)), np.zeros((d_out, d_in)), np.eye(d_out, r)
    W[r:, 0] = 1.0  # no row of V is empty
    case = Case(id="probes/mask", kind="lora, dropout", config=config, x=x, W=W, A=A, B=B, gy=gy)
    return cast(case, PRECISIONS[profile].dtype)


def decode_masks(subject: Any, profile: str = "fp32", p: float = 0.5) -> tuple[HostArray, HostArray, float]:
    """The masks that a subject drew, read from y and from gx, as booleans (N, d_in), and the share it kept.

    Raises Crash where y or gx is none of any mask's: the note says which.
    """
    return _decode(mask_case(profile, p), answer(subject, mask_case(profile, p)), p)


def _decode(case: Case, got: dict[str, HostArray], p: float) -> tuple[HostArray, HostArray, float]:
    s, r = case.scaling, P_RANK
    for name, shape in (("y", case.gy.shape), ("x", case.x.shape)):
        if name not in got or got[name].shape != shape or got[name].dtype != case.x.dtype:
            raise Unlike(f"{name}: expected shape {shape}, got {got[name].shape if name in got else 'none'}")
    H = got["y"][:, :r].astype(np.float64) / s * (1 - p)
    code = np.rint(H)
    if not (np.abs(H - code) < 0.25).all() or (code < 0).any() or (code >= 2**P_BITS).any():
        raise Unlike("y: expected sums of distinct powers of two, scaled by 1/(1 − p)")
    forward = (code.astype(np.int64)[:, :, None] >> np.arange(P_BITS)) & 1
    share = (1 - p) * got["x"].astype(np.float64) / (s * (case.gy[:, :r] @ case.A).astype(np.float64))
    backward = np.rint(share)
    if not (np.abs(share - backward) < 0.01).all() or not np.isin(backward, (0.0, 1.0)).all():
        raise Unlike("x: expected gradients of 0 or 1/(1 − p) times those without dropout")
    kept = forward.reshape(case.x.shape).astype(bool)
    return kept, backward.astype(bool), float(kept.mean())


def _masks(subject: Any, profile: str, p: float, id: str) -> Iterator[Check]:
    """Both masks equal, the rate right, then every tensor bit for bit with the mask that was read."""

    def check(i: int, law: str, wrong: str) -> Check:
        return Check(f"{id}/{i}", "probes", "lora, dropout", law, "fail" if wrong else "pass", note=wrong)

    law = "y and gx are those of a dropout mask"
    case = mask_case(profile, p)
    try:
        if not offers(subject, "x"):
            raise Absent(NOT_OFFERED)
        got = answer(subject, case)
    except (Absent, Crash) as error:
        verdict = refusal(error)
        yield Check(f"{id}/0", "probes", "lora, dropout", law, verdict, note=str(error))
        return
    try:
        forward, backward, rate = _decode(case, got, p)
    except Crash as error:
        yield check(0, law, str(error))
        return
    yield check(0, law, "")
    differ = int((forward != backward).sum())
    wrong = f"{differ} of {forward.size} entries differ" if differ else ""
    yield check(1, "backward applies the mask of forward", wrong)
    limit = sqrt(log(2 / CHANCE) / (2 * forward.size))  # Hoeffding; (lattice.11)
    wrong = (
        ""
        if abs(rate - (1 - p)) <= limit
        else f"{rate:.3f} kept of {forward.size}, expected {1 - p} ± {limit:.3f}"
    )
    yield check(2, "it keeps a share of 1 − p", wrong)
    want, _ = solve(replace(case, mask=(forward / (1 - p)).astype(case.x.dtype)))
    for i, name in enumerate(("y", "x", "A", "B")):
        same = name in got and np.array_equal(got[name], want[name])
        yield check(
            3 + i,
            f"{name if name == 'y' else 'g' + name} with that mask, bit for bit",
            "" if same else "differs",
        )
