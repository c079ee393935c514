"""What a person reads: a line for each case, a column for each engine, ratios, means, and the worst."""

from collections.abc import Sequence

from .engines import ENGINES
from .ratios import by_case, mean, ratio
from .turns import Found, Refused

YARDSTICK = {  # the engine that a table's ratios are to
    "merge": "merge peft",
    "PiSSA": "svd_lowrank 16",
    "bf16": "peft f32",
    "gpu": "gpu peft",
    "gpu, DoRA": "gpu peft",
}
TITLES = {
    "LoRA": "LoRA, float32, one step: ratio to PEFT eager",
    "ranks": "other ranks: ratio to PEFT eager",
    "no gx": "without the gradient by x: ratio to PEFT eager",
    "DoRA": "DoRA, float32, one step: ratio to PEFT eager, whose norm is constant in all rows",
    "memory": "memory",
    "merge": "a merge: ratio to PEFT's form in torch",
    "PiSSA": "a PiSSA start: time as ratio to torch.svd_lowrank, niter 16",
    "bf16": "weights of bfloat16: ratio to PEFT eager in float32",
    "tokens": "scaling with tokens: ratio to PEFT eager",
    "width": "scaling with width: ratio to PEFT eager",
    "rank": "scaling with rank: ratio to PEFT eager",
    "gpu": "one step on the device: ratio to PEFT eager",
    "gpu, DoRA": "DoRA on the device: ratio to PEFT eager",
}
MEASURES = {
    "step": "",
    "peak": "peak MB above parameters and inputs",
    "saved": "MB kept between forward and backward, beside x",
    "angle": "sine of the largest angle to the true singular vectors",
}


def render(found: Found, tables: Sequence[str]) -> str:
    """All tables that have rows, and who was not measured."""
    blocks = []
    for name in tables:
        for measure in MEASURES:
            block = _block(found, name, measure)
            if block:
                blocks.append("\n".join([_title(found, name, measure), *block]))
    if found.refused:
        blocks.append("\n".join(["not measured:", *refusals(found.refused)]))
    return "\n\n".join(blocks)


def refusals(refused: Sequence[Refused]) -> list[str]:
    """A line for each engine and reason, with the number of cases."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in refused:
        groups.setdefault((row.engine, row.how, row.why), []).append(f"{row.table}: {row.case}")
    return [
        f"  {engine}: {how}: {why} ({where[0] if len(where) == 1 else f'{len(where)} cases'})"
        for (engine, how, why), where in groups.items()
    ]


def _title(found: Found, table: str, measure: str) -> str:
    """What a table shows: ratios, or figures where whoever they would be to was not measured."""
    cases, yard = by_case(found, table, measure), YARDSTICK.get(table, "peft")
    title = TITLES[table]
    if not any(yard in rows for rows in cases.values()):
        unit = next(iter(next(iter(cases.values())).values())).unit
        title = title.replace(title[title.find("ratio to") :], unit) if "ratio to" in title else title
    return title + (f": {MEASURES[measure]}" if MEASURES[measure] else "")


def _block(found: Found, table: str, measure: str) -> list[str]:
    cases = by_case(found, table, measure)
    names = [name for name in ENGINES if any(name in rows for rows in cases.values())]
    if not cases or not names:
        return []
    yard = YARDSTICK.get(table, "peft")
    relative = measure != "angle" and any(yard in rows for rows in cases.values())
    unit = next(iter(next(iter(cases.values())).values())).unit
    others = [name for name in names if name != yard] if relative else names
    widths = [max(len(name), 7) + 2 for name in others]
    wide = max(len(case) for case in cases) + 2
    head = f"{'':<{wide}}" + (f"{yard + ' ' + unit:>{len(yard) + 6}}" if relative else "")
    lines = [head + "".join(f"{name:>{w}}" for name, w in zip(others, widths, strict=True))]
    columns: dict[str, list[float]] = {name: [] for name in others}
    for case, rows in cases.items():
        line = f"{case:<{wide}}"
        if relative:
            line += f"{_figure(rows[yard].median) if yard in rows else '-':>{len(yard) + 6}}"
        for name, w in zip(others, widths, strict=True):
            if name not in rows or (relative and yard not in rows):
                line += f"{'-':>{w}}"
            elif relative:
                value = ratio(rows[name], rows[yard]) if rows[yard].median else float("nan")
                columns[name].append(value)
                line += f"{value:>{w}.2f}"
            else:
                line += f"{_figure(rows[name].median):>{w}}"
        lines.append(line)
    if relative and len(cases) > 1:
        for word, function in (("geometric mean", mean), ("worst", max)):
            cells = "".join(
                f"{function(columns[name]) if _whole(columns[name]) else float('nan'):>{w}.2f}"
                for name, w in zip(others, widths, strict=True)
            )
            lines.append(f"{word:<{wide}}{'':>{len(yard) + 6}}{cells.replace('nan', '  -')}")
    return lines


def _whole(values: Sequence[float]) -> bool:
    return bool(values) and all(value > 0 for value in values)


def _figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
