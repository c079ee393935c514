"""Checks of several adapters: packed for serving, active together, converted, combined."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ... import LoraConfig
from ..cases import PROFILES, UNIT, Case, HostArray, draw
from ..layers.plain import rows
from ..truths import truth
from .edges import Checks, law, off
from .packed import LAYOUTS, NONE, PackedCase
from .packed import draw as draw_pack
from .tensors import answer, ask, chosen

WIDE = np.float64
FEW = 60  # roundings along the longest path of these small layers, of every sum and scaling


def battery_unpacked(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Packed tokens against the subject itself: its own layer, without base, token by token.  (faults.2)"""
    if not hasattr(subject, "packed_forward"):
        return
    for i, layout in enumerate(LAYOUTS):
        id = f"unpacked/{layout[0]}/0"
        if chosen(id, only) and layout[0] in ("ragged", "permuted", "slices", "idle"):
            case = draw_pack(id, i, PROFILES[profile], (seed, 53, i))
            yield law(id, "unpacked", layout[0], "the layer, token by token", partial(_by_layer, subject, case))


def _by_layer(subject: Any, case: PackedCase) -> str | None:
    y = ask(subject, "packed_forward", case.copy())
    g = ask(subject, "packed_backward", case.copy(), case.gy.copy())
    want = {"y": case.y.astype(WIDE), "x": np.zeros(case.x.shape), "A": np.zeros(case.A.shape)}
    for a, tokens, (ranks, outs, cols) in case.parts():
        A, B = case.A[a, ranks], case.B[a, outs, cols]
        config = LoraConfig(r=A.shape[0], lora_alpha=case.scalings[a] * A.shape[0])
        W = np.zeros((B.shape[0], A.shape[1]), A.dtype)
        for t in tokens:
            one = Case("", "lora", config, case.x[t], W, A, B, case.gy[t, outs])
            alone = answer(subject, one)
            want["y"][t, outs] += alone["y"]
            want["x"][t] += alone["x"]
            want["A"][a, ranks] += alone["A"]
    u = FEW * UNIT[case.x.dtype.name] * len(case.ids)
    return next(
        (
            wrong
            for name, got in (("y", y), ("x", g["x"]), ("A", g["A"]))
            if (wrong := off(name, got, want[name], u * (1 + np.abs(want[name]).max())))
        ),
        None,
    )


# ---- two adapters active ---------------------------------------------------------------------------------


def _two(profile: str, seed: tuple[int, ...]) -> list[Case]:
    first = draw("", "lora, dropout", (5, 7, 3, (2, 3)), PROFILES[profile], seed, p=0.3, alpha=3.7)
    second = draw("", "lora, dropout", (5, 7, 2, (2, 3)), PROFILES[profile], (*seed, 1), p=0.45, alpha=5.3)
    return [first, replace(second, x=first.x, W=first.W, b=first.b, gy=first.gy)]


def battery_together(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Two adapters on one base against complex-step truths, and against the subject's own single layers."""
    if not hasattr(subject, "together"):
        return
    cases = _two(profile, (seed, 55))
    u, gy = FEW * UNIT[PROFILES[profile]], cases[0].gy
    if chosen("together/mixed/0", only) and hasattr(subject, "mixed"):
        yield law(
            "together/mixed/0",
            "together",
            "mixed",
            "a sample, an adapter",
            lambda: _mixed(subject, profile, seed),
        )
    if chosen("together/lora/0", only):
        yield law(
            "together/lora/0",
            "together",
            "lora",
            "the sum of two updates",
            lambda: _summed(subject, cases, gy, u),
        )


def battery_apart(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Two active adapters less one is the other: the subject against its own single layers.  (faults.3)"""
    if not hasattr(subject, "together"):
        return
    cases = _two(profile, (seed, 56))
    u, gy = FEW * UNIT[PROFILES[profile]], cases[0].gy

    def run() -> str | None:
        y, g = ask(subject, "together", [case.copy() for case in cases], gy.copy())
        one, two = (answer(subject, case) for case in cases)
        base = answer(subject, replace(cases[0], B=0 * cases[0].B))
        for name, both in (("y", y), ("x", g["x"])):
            size = 1 + sum(float(np.abs(v[name]).max()) for v in (one, two, base))
            wrong = off(name, both, one[name].astype(WIDE) + two[name] - base[name], 4 * u * size)
            if wrong:
                return wrong
        for i, alone in enumerate((one, two)):
            for name in ("A", "B"):
                limit = 4 * u * (1 + float(np.abs(alone[name]).max()))
                wrong = off(f"{name}{i}", g[f"{name}{i}"], alone[name], limit)
                if wrong:
                    return wrong
        return None

    if chosen("apart/mixed/0", only) and hasattr(subject, "mixed"):
        name = "a mixed batch is its samples alone"
        yield law("apart/mixed/0", "apart", "mixed", name, lambda: _mixed(subject, profile, seed, alone=True))
    if chosen("apart/lora/0", only):
        yield law("apart/lora/0", "apart", "lora", "two adapters less one are the other", run)


def _summed(subject: Any, cases: list[Case], gy: HostArray, u: float) -> str | None:
    y, g = ask(subject, "together", [case.copy() for case in cases], gy.copy())
    x, G, W = rows(cases[0].x).astype(WIDE), rows(gy).astype(WIDE), cases[0].W.astype(WIDE)
    want, gx = x @ W.T + (0 if cases[0].b is None else cases[0].b), G @ W
    for i, case in enumerate(cases):
        mask = rows(case.mask) if case.mask is not None else np.ones_like(x)
        delta = case.scaling * case.B.astype(WIDE) @ case.A.astype(WIDE)
        want, gx = want + (x * mask) @ delta.T, gx + (G @ delta) * mask
        H = case.scaling * G.T @ (x * mask)  # s times the gradient by the dense update
        for name, value in ((f"A{i}", case.B.T @ H), (f"B{i}", H @ case.A.T)):
            wrong = off(name, g[name], value, u * (1 + np.abs(value).max()) * 4)
            if wrong:
                return wrong
    limit = 4 * u * (1 + np.abs(want).max())
    return off("y", rows(y), want, limit) or off("x", rows(g["x"]), gx, 4 * u * (1 + np.abs(gx).max()))


def _mixed(subject: Any, profile: str, seed: int, *, alone: bool = False) -> str | None:
    """A sample, an adapter or none: against the definition, or the subject's layer on each.  (faults.7)"""
    first = draw("", "lora", (5, 7, 3, (7, 2)), PROFILES[profile], (seed, 63), alpha=3.7, bias="frozen")
    second = draw("", "lora", (5, 7, 2, (7, 2)), PROFILES[profile], (seed, 64), alpha=5.3)
    cases, ids = (
        [first, replace(second, x=first.x, W=first.W, b=first.b, gy=first.gy)],
        [0, 1, NONE, 1, 0, NONE, 1],
    )
    y = ask(subject, "mixed", [case.copy() for case in cases], list(ids))
    wide, W = first.x.astype(WIDE), first.W.astype(WIDE)
    want = wide @ W.T + (0 if first.b is None else first.b)
    for i, a in enumerate(ids):
        case = replace(first, B=0 * first.B) if a == NONE else cases[a]
        if alone:
            want[i] = answer(subject, replace(case, x=first.x[i], gy=first.gy[i]))["y"]
        else:
            want[i] += case.scaling * (wide[i] @ case.A.astype(WIDE).T) @ case.B.astype(WIDE).T
    return off("y", y, want, 4 * FEW * UNIT[PROFILES[profile]] * (1 + np.abs(want).max()))


# ---- adapters turned into others -------------------------------------------------------------------------


def _trained(profile: str, seed: tuple[int, ...], rslora: bool) -> tuple[Any, ...]:
    """A PiSSA-like start of a weight, the pair after some training, and the configuration."""
    rng, dtype = np.random.default_rng(seed), PROFILES[profile]
    config = LoraConfig(r=3, lora_alpha=5.0, use_rslora=rslora, init_lora_weights="pissa")
    W = rng.standard_normal((6, 8))
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:3] / config.scaling)
    A0, B0 = (root[:, None] * Vh[:3]).astype(dtype), (U[:, :3] * root).astype(dtype)
    A = (A0 + 0.5 * rng.standard_normal(A0.shape)).astype(dtype)
    B = (B0 + 0.5 * rng.standard_normal(B0.shape)).astype(dtype)
    return W.astype(dtype), (A0, B0), (A, B), config


def battery_converted(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """PiSSA made plain: the update is the difference of the products.  (faults.4)"""
    if not hasattr(subject, "convert"):
        return
    for i, rslora in enumerate((False, True)):

        def run(rslora: bool = rslora) -> str | None:
            _, start, pair, config = _trained(profile, (seed, 57), rslora)
            A, B, found = ask(subject, "convert", start, pair, config)
            products = [b.astype(WIDE) @ a.astype(WIDE) for a, b in (pair, start)]
            want = config.scaling * (products[0] - products[1])
            size = config.scaling * sum(np.abs(b).astype(WIDE) @ np.abs(a) for a, b in (pair, start))
            return off(
                "the update", found.scaling * B.astype(WIDE) @ A, want, 20 * UNIT[PROFILES[profile]] * size
            )

        if chosen(f"converted/lora/{i}", only):
            yield law(f"converted/lora/{i}", "converted", "lora", "PiSSA made plain: its update", run)


def battery_on_base(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """The plain adapter on W computes what the trained one did on the residual, through the subject's layer."""
    if not hasattr(subject, "convert"):
        return
    for i, rslora in enumerate((False, True)):

        def run(rslora: bool = rslora) -> str | None:
            W, (A0, B0), (A1, B1), config = _trained(profile, (seed, 58), rslora)
            rng, dtype = np.random.default_rng((seed, 59)), W.dtype
            x, gy = rng.standard_normal((4, 8)).astype(dtype), np.ones((4, 6), dtype)
            A, B, found = ask(subject, "convert", (A0, B0), (A1, B1), config)
            rest = (W.astype(WIDE) - config.scaling * B0.astype(WIDE) @ A0).astype(dtype)
            before = answer(
                subject, Case("", "lora", replace(config, init_lora_weights=True), x, rest, A1, B1, gy)
            )
            after = answer(subject, Case("", "lora", found, x, W, A, B, gy))
            return off("y", after["y"], before["y"], 400 * UNIT[dtype.name] * (1 + np.abs(before["y"]).max()))

        if chosen(f"on-base/lora/{i}", only):
            yield law(f"on-base/lora/{i}", "on base", "lora", "PiSSA made plain: the same layer", run)


def battery_combined(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """A weighted sum of adapters: its update.  (faults.5)"""
    if not hasattr(subject, "combine"):
        return

    def run() -> str | None:
        cases, weights = _two(profile, (seed, 60)), [0.7, -1.3]
        A, B, s = ask(subject, "combine", cases, weights)
        parts = [
            w * c.scaling * c.B.astype(WIDE) @ c.A.astype(WIDE) for c, w in zip(cases, weights, strict=True)
        ]
        size = np.abs(np.array(parts)).sum(axis=0).max()
        return off("the update", s * B.astype(WIDE) @ A, sum(parts), 100 * UNIT[PROFILES[profile]] * (1 + size))

    if chosen("combined/lora/0", only):
        yield law("combined/lora/0", "combined", "lora", "the weighted sum of the updates", run)


def battery_alone(subject: Any, profile: str, seed: int, level: str, only: str) -> Checks:
    """Combinations that change nothing, through the subject's layer: one of weight 1; w and −w of one."""
    if not hasattr(subject, "combine"):
        return

    def identity() -> str | None:
        for case in _two(profile, (seed, 61)):
            wrong = _same_layer(subject, [case], [1.0], case)
            if wrong:
                return wrong
        return None

    def linear() -> str | None:
        one, two = _two(profile, (seed, 62))
        return _same_layer(subject, [one, two, one], [2.5, 1.0, -2.5], two)

    for j, (name, run) in enumerate(
        (("one adapter of weight 1 is itself", identity), ("w and −w cancel", linear))
    ):
        if chosen(f"alone/lora/{j}", only):
            yield law(f"alone/lora/{j}", "alone", "lora", name, run)


def _same_layer(subject: Any, cases: list[Case], weights: list[float], want: Case) -> str | None:
    A, B, s = ask(subject, "combine", cases, weights)
    config = LoraConfig(r=A.shape[0], lora_alpha=s * A.shape[0])
    got = answer(subject, replace(want.undropped(), A=A, B=B, config=config))
    return off(
        "y",
        got["y"],
        truth.dense(want.undropped()),
        400 * UNIT[want.x.dtype.name] * (1 + np.abs(got["y"]).max()),
    )
