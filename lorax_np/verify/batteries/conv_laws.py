"""Laws of a convolution that need no other one: shifts, secants, items, magnitudes, merges, starts.

Its kernel is taken apart: with one entry of it alone a convolution only shifts. What y is affine in is moved by
steps of order one. Derivation: specs/subjects.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from math import log, prod, sqrt
from typing import Any

import numpy as np

from ... import LoraConfig
from ..cases import PROFILES, UNIT, HostArray
from ..report import Check
from .conv import cases
from .conv_case import PADS, ConvCase, as_linear, conv_bounds, wide
from .edges import law, off
from .starts import CHANCE
from .tensors import Absent, ask, by_name, chosen

Run = Callable[[], str | None]
ALL: Any = (slice(None), slice(None))  # items and channels
AFFINE = "x", "W", "b", "A", "B", "bB", "m"  # y is affine in each alone; under DoRA not in W, A, B


def battery_conv_laws(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Laws of convolutions, for subjects with conv_forward; of gradients and merges, where they have those."""
    if not hasattr(subject, "conv_forward"):
        return
    for case in cases(subject, profile, seed, "quick", only, "convlaws"):
        for name, run in laws(subject, case).items():
            yield law(f"{case.id}/{name.split(',')[0].replace(' ', '-')}", "conv laws", case.kind, name, run)


def laws(subject: Any, case: ConvCase) -> dict[str, Run]:
    """The laws that a case can show, by what they say."""
    found: dict[str, Run] = {}
    if not len(case.x):
        return found
    if case.m is None and case.mask is None:
        found["an entry of the kernel, alone, is a shift"] = partial(_shifts, subject, case)
    if hasattr(subject, "conv_backward"):
        found["gradients are secants, where y is affine"] = partial(_secants, subject, case)
    if len(case.x) > 1:
        found["items do not see each other"] = partial(_alone, subject, case)
    if case.m is not None:
        found["a magnitude of n changes nothing"] = partial(_neutral, subject, case)
    if hasattr(subject, "conv_merge") and case.groups == 1:
        found["merged, it gives what both gave"] = partial(_served, subject, case)
    return found


def forward(subject: Any, case: ConvCase) -> HostArray:
    """y, of the right shape."""
    y = by_name("conv_forward", {"y": ask(subject, "conv_forward", case.copy())}, ("y",))["y"]
    if y.shape != case.gy.shape:
        raise ValueError(f"y: expected shape {case.gy.shape}, got {y.shape}")
    return y


def _shifts(subject: Any, case: ConvCase) -> str | None:
    """W and A cut down to one entry of the kernel: y is W of that entry times a shifted, thinned-out x."""
    k, v = len(case.kernel), wide(case)
    padded = np.pad(v.x, [(0, 0), (0, 0), *((p, p) for p in case.padding)], mode=PADS[case.mode])
    for t in product(*map(range, case.kernel)):
        cut = np.zeros(case.kernel)
        cut[t] = 1.0
        one = replace(case, W=(case.W * cut).astype(case.W.dtype), A=(case.A * cut).astype(case.A.dtype))
        first = [q * d for q, d in zip(t, case.dilation, strict=True)]
        ends = [
            f + (P - 1) * step + 1 for f, P, step in zip(first, case.gy.shape[2:], case.stride, strict=True)
        ]
        spans: Any = [slice(*span) for span in zip(first, ends, case.stride, strict=True)]
        seen = padded[(*ALL, *spans)]
        at = (*ALL, *t)
        want = _channels(v.W[at], seen, case.groups)
        z = np.einsum("ri,ni...->nr...", v.A[at], seen)
        want = want + case.scaling * _channels(v.B[(*ALL, *(0,) * k)], z, case.groups)
        for bias, factor in ((v.b, 1.0), (v.bB, case.scaling)):
            want = want + (0.0 if bias is None else factor * bias.reshape(-1, *(1,) * k))
        wrong = off("y", forward(subject, one), want, _slack(one))
        if wrong:
            return f"entry {t} of the kernel: {wrong}"
    return None


def _channels(W: HostArray, x: HostArray, groups: int) -> HostArray:
    """W : (d_out, d/groups) times the channels of x : (N, d, *P), group by group."""
    parts = zip(np.split(W, groups), np.split(x, groups, axis=1), strict=True)
    return np.concatenate([np.einsum("oi,ni...->no...", w, part) for w, part in parts], axis=1)


def _secants(subject: Any, case: ConvCase) -> str | None:
    """⟨gy, y(θ + v) − y(θ − v)⟩ = ⟨gθ, 2v⟩ for each θ in which y is affine, v of θ's size."""
    again = case.copy()
    got = by_name("conv_backward", ask(subject, "conv_backward", again, again.gy), AFFINE)
    bound, G, rng = _limit(case), case.gy.astype(np.float64), np.random.default_rng(5)
    fixed = ("W", "A", "B") if case.m is not None else ()
    for name in AFFINE:
        value = getattr(case, name)
        if value is None or name in fixed or (name not in got and name in ("W", "b")):
            continue
        if name not in got or got[name].shape != value.shape:
            return f"g{name}: expected shape {value.shape}, got {got[name].shape if name in got else 'none'}"
        v = (rng.standard_normal(value.shape) * np.abs(value).mean()).astype(value.dtype)
        ends = [replace(case, **{name: value + v}), replace(case, **{name: value - v})]
        step = getattr(ends[0], name).astype(np.float64) - getattr(ends[1], name)
        ys = [forward(subject, end).astype(np.float64) for end in ends]
        found, want = float(np.sum(G * (ys[0] - ys[1]))), float(np.sum(got[name].astype(np.float64) * step))
        slack = sum(float(np.sum(np.abs(G) * _slack(end))) for end in ends)
        slack += float(np.sum(bound[name] * np.abs(step)))
        if not abs(found - want) <= slack:
            return f"⟨g{name}, v⟩ = {want:.6g}, and y changes by {found:.6g}"
    return None


def _alone(subject: Any, case: ConvCase) -> str | None:
    """The last item by itself."""
    cut = {name: getattr(case, name)[-1:] for name in ("x", "gy", "mask") if getattr(case, name) is not None}
    one = replace(case, **cut)
    return off("y", forward(subject, one), forward(subject, case)[-1:].astype(np.float64), 2 * _slack(one))


def _neutral(subject: Any, case: ConvCase) -> str | None:
    """m = ‖W + s·BA‖ over channels and kernel: y is the layer's without a magnitude. m∘gm = Σ gy∘(y − b)."""
    flat = as_linear(wide(case))
    n = np.linalg.norm(flat.W + case.scaling * flat.B @ flat.A, axis=1)
    plain = case.plain()
    same = replace(case, m=n.astype(case.x.dtype))
    slack = _slack(same) + _slack(plain)
    wrong = off("y", forward(subject, same), forward(subject, plain).astype(np.float64), slack)
    if wrong or case.mask is not None or case.m is None or not hasattr(subject, "conv_backward"):
        return wrong
    again = case.copy()
    g = by_name("conv_backward", ask(subject, "conv_backward", again, again.gy), AFFINE)
    if "m" not in g:
        raise Absent("the subject gives no gradient by m")
    b = 0.0 if case.b is None else case.b.reshape(-1, *(1,) * len(case.kernel)).astype(np.float64)
    G, y, axes = (
        case.gy.astype(np.float64),
        forward(subject, case).astype(np.float64),
        (0, *range(2, case.gy.ndim)),
    )
    bound = _limit(case)
    want, rest = np.sum(G * (y - b), axis=axes), np.sum(np.abs(G) * bound["y"], axis=axes)
    m = case.m.astype(np.float64)
    return off("m∘gm", m * g["m"].astype(np.float64), want, np.abs(m) * bound["m"] + rest)


def _served(subject: Any, case: ConvCase) -> str | None:
    """The merged layer with B = 0, and what base and adapter gave without dropout."""
    bare = replace(case, mask=None)
    found = by_name("conv_merge", ask(subject, "conv_merge", bare.copy()), ("W", "b"))
    if "W" not in found or found["W"].shape != case.W.shape:
        return f"W: expected shape {case.W.shape}, got {found['W'].shape if 'W' in found else 'none'}"
    after = replace(bare.plain(), W=found["W"], b=found.get("b"), B=0 * case.B, bB=None)
    slack = 2 * (_slack(bare) + _slack(after))  # what a merge rounds is less than what a product does
    return off("y", forward(subject, after), forward(subject, bare).astype(np.float64), slack)


def _limit(case: ConvCase) -> dict[str, HostArray]:
    """What roundings of the case's dtype explain, and the float64 of these laws."""
    return conv_bounds(case, UNIT[case.x.dtype.name] + UNIT["float64"])


def _slack(case: ConvCase) -> HostArray:
    """The same of y alone."""
    return conv_bounds(case, UNIT[case.x.dtype.name] + UNIT["float64"], y_alone=True)["y"]


# ---- starts ------------------------------------------------------------------------------------------------


def battery_conv_start(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """How a convolution's adapter starts: B, the size of A and its moments, for subjects with conv_init."""
    yield from _starts(
        subject, profile, seed, only, "convstart", "A ≤ 1/√(d_in·∏κ), of its variance; B = 0", _moments
    )


def battery_conv_spread(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """The distribution of A, by Kolmogorov and Smirnov's distance; and y before the first step."""
    yield from _starts(subject, profile, seed, only, "convspread", "A is uniform, and y the base's", _spread)


def _starts(
    subject: Any, profile: str, seed: int, only: str, stem: str, name: str, look: Any
) -> Iterator[list[Check]]:
    if not hasattr(subject, "conv_init"):
        return
    for j, kernel in enumerate(((3, 3), (5,))):
        id = f"{stem}/{len(kernel)}/{j}"
        if chosen(id, only):
            rng, config = np.random.default_rng((seed, 72, j)), LoraConfig(r=8, lora_alpha=11)
            W = rng.standard_normal((12, 7, *kernel)).astype(PROFILES[profile])
            battery = {"convstart": "conv start", "convspread": "conv spread"}[stem]
            yield law(id, battery, "conv", name, partial(_begun, subject, W, config, seed + j, look))


def _begun(subject: Any, W: HostArray, config: LoraConfig, seed: int, look: Any) -> str | None:
    got = by_name("conv_init", ask(subject, "conv_init", W.copy(), config, seed), ("A", "B", "m", "bB"))
    one = tuple(1 for _ in W.shape[2:])
    for name, shape in (("A", (config.r, *W.shape[1:])), ("B", (len(W), config.r, *one))):
        if name not in got or got[name].shape != shape:
            return f"{name}: expected shape {shape}, got {got[name].shape if name in got else 'none'}"
    found: str | None = look(subject, W, config, got)
    return found


def _moments(subject: Any, W: HostArray, config: LoraConfig, got: dict[str, HostArray]) -> str | None:
    A, top = got["A"].astype(np.float64), 1 / sqrt(prod(W.shape[1:]))
    if np.abs(A).max() > top * (1 + 1e-6):
        return f"|A| reaches {np.abs(A).max():.3g}, more than {top:.3g}"
    away = sqrt(2 * log(4 / CHANCE) / A.size)  # Hoeffding: of squares within [0, top²]
    if not abs((A * A).mean() / top**2 - 1 / 3) <= away / 2:
        return f"the mean square of A is {(A * A).mean():.3g}, expected {top**2 / 3:.3g}"
    return "B is not 0" if got["B"].any() else None


def _spread(subject: Any, W: HostArray, config: LoraConfig, got: dict[str, HostArray]) -> str | None:
    values = np.sort(got["A"].astype(np.float64).ravel()) * sqrt(prod(W.shape[1:]))
    chance = np.clip((values + 1) / 2, 0.0, 1.0)
    away = float(np.abs(np.arange(1, values.size + 1) / values.size - chance).max())
    if away > sqrt(log(2 / CHANCE) / (2 * values.size)) + 1 / values.size:  # Dvoretzky, Kiefer, Wolfowitz
        return f"A is {away:.2f} away from the uniform distribution"
    k = len(W.shape) - 2
    one, L = (1,) * k, tuple(size + 2 for size in W.shape[2:])
    x = np.random.default_rng(6).standard_normal((2, W.shape[1], *L)).astype(W.dtype)
    gy = np.zeros((2, len(W), *(3,) * k), W.dtype)
    case = ConvCase("", "conv", config, x, W, got["A"], got["B"], gy, one, (0,) * k, one)
    plain = replace(case, A=0 * got["A"])
    slack = _slack(plain)
    return off("y", forward(subject, case), forward(subject, plain).astype(np.float64), slack)
