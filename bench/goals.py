"""What was aimed at, and whether it is met: ratios to PEFT eager of the same run unless another is named."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .ratios import by_case, mean, ratio, ratios
from .turns import Found

TEN = ("LoRA",)
WIDE = 2048


class Goal(NamedTuple):
    """One row: what is measured, the bound, what no engine can beat, and the figure, or why there is none."""

    name: str
    bound: float
    figure: float | None
    limit: float | None
    why: str = ""
    least: bool = False  # the figure is to be at least the bound

    @property
    def state(self) -> str:
        """met, NOT MET, or not judged."""
        if self.figure is None:
            return "not judged"
        good = self.figure >= self.bound if self.least else self.figure <= self.bound
        return "met" if good else "NOT MET"


def goals(found: Found) -> list[Goal]:
    """Every goal, judged by what was measured."""
    rows = list(_lora(found)) + list(_dora(found)) + list(_memory(found))
    return rows + list(_merges(found)) + list(_starts(found)) + list(_bf16(found)) + list(_gpu(found))


def _goal(
    name: str,
    bound: float,
    values: Iterable[float],
    limits: Iterable[float] = (),
    *,
    of: Callable[[Iterable[float]], float] = mean,
    least: bool = False,
    need: str = "",
) -> Goal:
    values, limits = list(values), list(limits)
    if not values:
        return Goal(name, bound, None, None, f"needs {need}", least)
    return Goal(name, bound, of(values), of(limits) if limits else None, "", least)


def _lora(found: Found) -> Iterable[Goal]:
    for engine, own, bounds in (
        ("fast", "numpy base", ((0.88, mean), (1.00, max))),
        ("fast mkl", "torch base", ((0.80, mean), (0.95, max))),
    ):
        values = ratios(found, TEN, engine, "peft").values()
        limits = ratios(found, TEN, own, "peft").values()
        for bound, of in bounds:
            word = "mean" if of is mean else "worst"
            yield _goal(
                f"LoRA, 10 cases, {engine}: {word}", bound, values, limits, of=of, need=f"layer, {engine}"
            )
        if engine == "fast":
            some = ratios(found, TEN, engine, "peft", p=bool).values()
            below = ratios(found, TEN, own, "peft", p=bool).values()
            yield _goal("LoRA, p = 0.05, fast: mean", 0.82, some, below, need="layer, fast")
    for dropped, bound in ((False, 1.08), (True, 1.20)):
        how = {"p": (lambda p, dropped=dropped: bool(p) == dropped), "d_in": lambda d: d >= WIDE}
        values = ratios(found, TEN, "fast", "numpy base", **how).values()
        rows = [r["fast"].fields for r in by_case(found, "LoRA").values() if "fast" in r]
        flops = [1 + 1.5 * f["r"] * (1 / f["d_in"] + 1 / f["d_out"]) for f in rows if f["d_in"] >= WIDE]
        word = "p > 0" if dropped else "p = 0"
        name = f"over its own products, d >= {WIDE}, {word}: worst"
        yield _goal(name, bound, values, flops, of=max, need="layer, fast and numpy base")


def _dora(found: Found) -> Iterable[Goal]:
    how = {"norm_gradient": False}
    for p, bound, of in ((0.0, 0.65, mean), (0.05, 0.80, max)):
        values = ratios(found, ("DoRA",), "fast", "peft", p=p, **how).values()
        limits = ratios(found, ("DoRA",), "numpy base", "peft", p=p, **how).values()
        word = "mean" if of is mean else "worst"
        yield _goal(f"DoRA, p = {p:g}, fast: {word}", bound, values, limits, of=of, need="layer, fast")


def _memory(found: Found) -> Iterable[Goal]:
    for name, bound, how in (
        ("peak memory, LoRA p > 0: worst", 0.45, {"dora": False, "p": bool}),
        (
            "peak memory, DoRA p = 0, d >= 2048: worst",
            0.35,
            {"dora": True, "p": 0.0, "d_in": lambda d: d >= WIDE},
        ),
    ):
        values = ratios(found, ("memory",), "fast", "peft", "peak", **how)
        rows = by_case(found, "memory", "peak")
        limits = [
            rows[c]["peft"].fields["tokens"]
            * (rows[c]["peft"].fields["d_in"] + rows[c]["peft"].fields["d_out"])
            * 4e-6
            / rows[c]["peft"].median
            for c in values
        ]
        yield _goal(name, bound, values.values(), limits, of=max, need="memory, fast")
    beyond = []
    for rows in by_case(found, "memory", "saved").values():
        if "fast" in rows and rows["fast"].fields["p"] and not rows["fast"].fields["dora"]:
            f = rows["fast"].fields
            beyond.append(1e6 * rows["fast"].median / (4 * f["tokens"] * f["r"] + 16))
    name = "kept beside x, p > 0, in units of 4mr + 16 bytes: worst"
    yield _goal(name, 1.0, beyond, [1.0] if beyond else [], of=max, need="memory, fast")


def _merges(found: Found) -> Iterable[Goal]:
    how = {"d_out": lambda d: d >= WIDE}
    values = ratios(found, ("merge",), "merge fast", "merge peft", **how).values()
    limits = ratios(found, ("merge",), "copy", "merge peft", **how).values()
    yield _goal(f"merge, d >= {WIDE}: worst", 0.25, values, limits, of=max, need="merge, fast")
    speed = [1 / value for value in ratios(found, ("merge",), "merge fast", "copy", **how).values()]
    name = f"merge, d >= {WIDE}, GB/s in units of a copy's: worst"
    yield _goal(name, 0.9, speed, [1.0] if speed else [], of=min, least=True, need="merge, fast")


def _starts(found: Found) -> Iterable[Goal]:
    ours, theirs = "start niter 4", "svd_lowrank 16"
    values = ratios(found, ("PiSSA",), ours, theirs, n=4096).values()
    yield _goal("PiSSA niter mode at 4096, time: worst", 0.8, values, of=max, need="pissa")
    angles = [
        rows[theirs].median / rows[ours].median
        for rows in by_case(found, "PiSSA", "angle").values()
        if ours in rows and theirs in rows and rows[ours].fields["n"] == 4096
    ]
    yield _goal(
        "PiSSA niter mode at 4096, angle better by: worst", 10.0, angles, of=min, least=True, need="pissa"
    )


def _bf16(found: Found) -> Iterable[Goal]:
    for to, bound in (("peft f32", 0.40), ("peft bf16", 0.85)):
        values = ratios(found, ("bf16",), "fast bf16 mkl", to).values()
        limits = ratios(found, ("bf16",), "torch base bf16", to).values()
        name, need = f"bfloat16 (mkl), of {to}: mean", "bf16, mkl"
        alone = list(ratios(found, ("bf16",), "torch base bf16", "peft f32").values())
        if alone and mean(alone) > 1:
            need = f"a processor that multiplies bfloat16: here the products alone take {mean(alone):.2f}"
            values = ()
        yield _goal(name, bound, values, limits, need=need)


def _gpu(found: Found) -> Iterable[Goal]:
    rows = [r for r in by_case(found, "gpu").values() if next(iter(r.values())).fields["tokens"] == 8192]
    best = [
        min((r[n] for n in ("gpu fast", "gpu fast graph") if n in r), key=lambda w: w.median, default=None)
        for r in rows
    ]
    for to, bound in (("gpu peft", 0.75), ("gpu compiled", 1.0), ("gpu triton", 1.0)):
        pairs = [(one, r) for one, r in zip(best, rows, strict=True) if one and to in r]
        values = [ratio(one, r[to]) for one, r in pairs]
        limits = [ratio(r["gpu torch base"], r[to]) for _, r in pairs if "gpu torch base" in r]
        name = f"GPU, 8192 x 4096 x 4096 bfloat16, of {to}: worst"
        yield _goal(name, bound, values, limits, of=max, need="a GPU: not run on one")


def render(rows: list[Goal]) -> str:
    """One line a goal."""
    if not rows:
        return "goals: none of what was measured has one"
    wide = max(len(row.name) for row in rows) + 2
    lines = ["goals", f"{'':<{wide}}{'figure':>8}{'goal':>9}{'limit':>8}"]
    for row in rows:
        sign = ">=" if row.least else "<="
        figure = "-" if row.figure is None else f"{row.figure:.2f}"
        limit = "-" if row.limit is None else f"{row.limit:.2f}"
        state = row.state + (f": {row.why}" if row.why else "")
        lines.append(f"{row.name:<{wide}}{figure:>8}{f'{sign} {row.bound:.2f}':>9}{limit:>8}  {state}")
    lines.append(
        "limit: the frozen products alone, a copy for merges, outputs for memory; nothing can go below it"
    )
    lines.append("the error of DoRA's norm is judged by the tests of lorax_np.fast, not by a clock")
    return "\n".join(lines)
