"""The figures as a person reads them, and which of them are outside of their ranges."""

from collections.abc import Sequence
from math import isfinite
from statistics import fmean
from typing import Any

from .tasks import DEMOS, Demo

HEADS = "demonstration", "task", "rows", "score", "ours", "PEFT", "CPU seconds", "peak RSS"
SAME = 1e-5  # of the largest logit: 30 layers in float32, rounded in another order
FIRST = 10  # steps whose losses are compared


def outside(demo: Demo, runs: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each figure that left its range; scores and their distances are means over the seeds."""
    lines, ours = list[str](), [run["ours"]["after"] for run in runs]
    for name, (low, high) in demo.ranges.items():
        if not low <= (value := fmean(after[name] for after in ours)) <= high:
            wanted = f"{low:g} to {high:g} after training"
            lines.append(f"{demo.name}: {name}: expected {wanted}, got {value:.4f}")
    for name in demo.figures:
        for after, again in zip(ours, (run["evaluate"][name] for run in runs), strict=True):
            if not abs(again - after[name]) <= 1e-4 * max(1.0, abs(after[name])):
                wanted = f"{after[name]:.6f} of the saved adapter"
                lines.append(f"{demo.name}: {name}: expected {wanted}, got {again:.6f}")
    for run in runs if demo.same else ():
        apart, largest = run["logits"]["apart"], run["logits"]["largest"]
        if not apart <= SAME * largest:
            wanted = f"the dense model's, up to {largest:.1f}, within {SAME * largest:.1g} before training"
            lines.append(f"{demo.name}: logits: expected {wanted}, got {apart:.1g}")
    if all("peft" in run for run in runs):
        for name, most in demo.apart.items():
            each = [abs(run["peft"]["after"][name] - run["ours"]["after"][name]) for run in runs]
            if not (apart := fmean(each)) <= most:
                lines.append(f"{demo.name}: {name}: expected PEFT within {most:g}, got {apart:.4f}")
        if not (found := max(map(curve, runs))) <= demo.curve:
            wanted = f"PEFT within {demo.curve:g} in the first {FIRST} steps"
            lines.append(f"{demo.name}: loss: expected {wanted}, got {found:.2g}")
    return lines


def above(found: Sequence[dict[str, Any]], there: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each run whose first score is too far from that of the same seed of what stands beside it."""
    lines = list[str]()
    for one in found:
        demo, seed = DEMOS[one["name"]], one["settings"]["seed"]
        other, most = demo.beside or ("", 0.0)
        score = demo.figures[0]
        same = [run for run in there if run["name"] == other and run["settings"]["seed"] == seed]
        for gap in (one["ours"]["after"][score] - run["ours"]["after"][score] for run in same):
            if not abs(gap) <= most:
                wanted = f"within {most:g} of that of {other}"
                lines.append(f"{demo.name}: {score}: expected {wanted}, got {gap:+.4f}")
    return lines


def curve(found: dict[str, Any]) -> float:
    """The largest difference of the two engines' losses in the first steps.

    Later ones differ by more: Adam makes a whole step of a gradient near zero, whatever its rounding.
    """
    pairs = list(zip(found["ours"]["losses"], found["peft"]["losses"], strict=True))[:FIRST]
    return max(abs(a - b) if a is not None and isfinite(a - b) else float("inf") for a, b in pairs)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a score, the mean of a demonstration's seeds, with the range of what came of them.

    Where one cell holds two figures, the second is PEFT's.
    """
    rows, names = [HEADS, tuple("---" for _ in HEADS)], dict.fromkeys(one["name"] for one in found)
    for name in names:
        runs = [one for one in found if one["name"] == name]
        for number, score in enumerate(DEMOS[name].figures):
            rows.append(_row(runs, score, first=number == 0))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(runs: Sequence[dict[str, Any]], score: str, *, first: bool) -> tuple[str, ...]:
    both = [[run[side] for run in runs] for side in ("ours", "peft") if all(side in run for run in runs)]
    change = [_change(side, score) for side in both]
    counts = runs[0]["rows"]
    rows = f"{counts['train']} + {counts['valid']}" + (f", {len(runs)} seeds" if len(runs) > 1 else "")
    own = (runs[0]["name"], runs[0]["task"], rows) if first else ("", "", "")
    figures = (
        " / ".join(f"{_mean(side, 'cpu_seconds'):.0f}" for side in both),
        " / ".join(f"{_mean(side, 'peak_bytes') / 1e9:.2f} GB" for side in both),
    )
    return (*own, score, change[0], *(change[1:] or [""]), *(figures if first else ("", "")))


def _mean(side: Sequence[dict[str, Any]], name: str) -> float:
    return fmean(run[name] for run in side)


def _change(side: Sequence[dict[str, Any]], score: str) -> str:
    before, after = ([run[when][score] for run in side] for when in ("before", "after"))
    spread = f" ({min(after):.3f} to {max(after):.3f})" if len(side) > 1 else ""
    return f"{fmean(before):.3f} → {fmean(after):.3f}{spread}"


def told(demo: Demo, found: dict[str, Any]) -> str:
    """A demonstration in a few lines, and what the model wrote."""
    ours = found["ours"]
    lines = [
        f"{demo.name}, seed {found['settings']['seed']}: {demo.about}",
        f"  {found['what']}; {ours['pass']}",
    ]
    lines += [f"  {note}" for note in (*found["notes"], *([demo.note] if demo.note else []))]
    for name in ("loss", *demo.figures):
        line = f"  {name}: {ours['before'][name]:.4f} → {ours['after'][name]:.4f}"
        if "peft" in found:
            line += f"; PEFT {found['peft']['before'][name]:.4f} → {found['peft']['after'][name]:.4f}"
        lines.append(line)
    if "peft" in found:
        lines.append(f"  losses of the first {FIRST} steps: at most {curve(found):.2g} apart")
    if "logits" in found:
        apart, largest = found["logits"]["apart"], found["logits"]["largest"]
        lines.append(f"  logits before training: up to {largest:.1f}, {apart:.1e} from the dense model's")
    for prompt, before, after in found["written"]:
        lines += [f"  asked: {prompt}", *_quoted("before", before), *_quoted("after", after)]
    return "\n".join(lines)


def _quoted(when: str, text: str) -> list[str]:
    return [f"  {when}:", *(f"    {line}" for line in text.strip().splitlines())]
