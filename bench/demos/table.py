"""The figures as a person reads them, and which of them are outside of their ranges."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from .tasks import DEMOS, Demo

HEADS = "demonstration", "task", "rows", "score", "ours", "PEFT", "CPU seconds", "tokens/s", "peak RSS"
FIRST = 10  # steps whose losses are compared


def outside(demo: Demo, found: dict[str, Any]) -> list[str]:
    """A line for each figure that left its range."""
    after, lines = found["ours"]["after"], list[str]()
    for name, (low, high) in demo.ranges.items():
        if not low <= after[name] <= high:
            wanted = f"{low:g} to {high:g} after training"
            lines.append(f"{demo.name}: {name}: expected {wanted}, got {after[name]:.4f}")
    for name in demo.figures:
        if not abs(found["evaluate"][name] - after[name]) <= 1e-4 * max(1.0, abs(after[name])):
            came = f"{found['evaluate'][name]:.6f}"
            lines.append(f"{demo.name}: {name}: expected {after[name]:.6f} of the saved adapter, got {came}")
    if "peft" in found:
        for name, most in demo.apart.items():
            if not (apart := abs(found["peft"]["after"][name] - after[name])) <= most:
                lines.append(f"{demo.name}: {name}: expected PEFT within {most:g}, got {apart:.4f}")
        if not curve(found) <= demo.curve:
            wanted = f"PEFT within {demo.curve:g} in the first {FIRST} steps"
            lines.append(f"{demo.name}: loss: expected {wanted}, got {curve(found):.2g}")
    return lines


def curve(found: dict[str, Any]) -> float:
    """The largest difference of the two engines' losses in the first steps.

    Later ones differ by more: Adam makes a whole step of a gradient near zero, whatever its rounding.
    """
    pairs = list(zip(found["ours"]["losses"], found["peft"]["losses"], strict=True))[:FIRST]
    return max(abs(a - b) if a is not None and isfinite(a - b) else float("inf") for a, b in pairs)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a score; where one cell holds two figures, the second is PEFT's."""
    rows = [HEADS, tuple("---" for _ in HEADS)]
    for one in found:
        demo = DEMOS[one["name"]]
        for number, score in enumerate(demo.figures):
            rows.append(_row(one, score, first=number == 0))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(one: dict[str, Any], score: str, *, first: bool) -> tuple[str, ...]:
    ours, theirs = one["ours"], one.get("peft")
    both = [ours, *([theirs] if theirs else [])]
    change = [f"{each['before'][score]:.3f} → {each['after'][score]:.3f}" for each in both]
    rows = f"{one['rows']['train']} + {one['rows']['valid']}"
    own = (one["name"], one["task"], rows) if first else ("", "", "")
    figures = (
        " / ".join(f"{each['cpu_seconds']:.0f}" for each in both),
        " / ".join(f"{each['tokens_per_second']:,.0f}" for each in both),
        " / ".join(f"{each['peak_bytes'] / 1e9:.2f} GB" for each in both),
    )
    return (*own, score, change[0], change[1] if theirs else "", *(figures if first else ("", "", "")))


def told(demo: Demo, found: dict[str, Any]) -> str:
    """A demonstration in a few lines, and what the model wrote."""
    ours = found["ours"]
    lines = [f"{demo.name}: {demo.about}", f"  {found['what']}; {ours['pass']}"]
    lines += [f"  {note}" for note in (*found["notes"], *([demo.note] if demo.note else []))]
    for name in ("loss", *demo.figures):
        line = f"  {name}: {ours['before'][name]:.4f} → {ours['after'][name]:.4f}"
        if "peft" in found:
            line += f"; PEFT {found['peft']['before'][name]:.4f} → {found['peft']['after'][name]:.4f}"
        lines.append(line)
    if "peft" in found:
        lines.append(f"  losses of the first {FIRST} steps: at most {curve(found):.2g} apart")
    for prompt, before, after in found["written"]:
        lines += [f"  asked: {prompt}", *_quoted("before", before), *_quoted("after", after)]
    return "\n".join(lines)


def _quoted(when: str, text: str) -> list[str]:
    return [f"  {when}:", *(f"    {line}" for line in text.strip().splitlines())]
