"""The tables as a picture: with matplotlib a PNG, without it an SVG of our own few lines."""

from html import escape
from importlib.util import find_spec
from pathlib import Path

from .engines import ENGINES
from .ratios import by_case, ratio
from .table import TITLES, YARDSTICK
from .turns import Found

Series = dict[str, list[float | None]]  # engine: a ratio for each case, None where it was not measured
COLOURS = "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e"


BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
LONGEST = 2.5  # times the yardstick; longer bars are cut, and their number says so


def colour_of(engine: str) -> str:
    """One colour for an engine, in every table."""
    return COLOURS[list(ENGINES).index(engine) % len(COLOURS)]


def write(found: Found, stem: Path) -> Path | None:
    """Write a picture beside the figures; its path, or None where there is nothing to show."""
    tables = [(name, *_series(found, name)) for name in TITLES]
    tables = [(name, cases, series) for name, cases, series in tables if series]
    if not tables:
        return None
    if find_spec("matplotlib") is None:
        path = stem.with_suffix(".svg")
        path.write_text(svg(tables), encoding="utf-8")
        return path
    path = stem.with_suffix(".png")
    _png(tables, path)
    return path


def _series(found: Found, table: str) -> tuple[list[str], Series]:
    cases = by_case(found, table)
    yard = YARDSTICK.get(table, "peft")
    cases = {case: rows for case, rows in cases.items() if yard in rows}
    names = [name for name in ENGINES if name != yard and any(name in rows for rows in cases.values())]
    series: Series = {
        name: [ratio(rows[name], rows[yard]) if name in rows else None for rows in cases.values()]
        for name in names
    }
    return list(cases), series


def _png(tables: list[tuple[str, list[str], Series]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tall = [0.6 + 0.16 * len(cases) * (len(series) + 1) for _, cases, series in tables]
    figure, axes = pyplot.subplots(
        len(tables), 1, figsize=(9, sum(tall) + len(tables)), squeeze=False, height_ratios=tall
    )
    for (name, cases, series), ax in zip(tables, axes[:, 0], strict=True):
        for i, (engine, values) in enumerate(series.items()):
            at = [case * (len(series) + 1) + i for case in range(len(cases))]
            colour = colour_of(engine)
            ax.barh(at, [min(value or 0, LONGEST) for value in values], color=colour, label=engine, height=0.9)
            for y, value in zip(at, values, strict=True):
                if value is not None:
                    words = f"{value:.2f}{' (bar cut)' if value > LONGEST else ''}"
                    ax.text(min(value, LONGEST) + 0.02, y, words, fontsize=6, va="center", bbox=BEHIND)
        ax.set_xlim(0, LONGEST + 0.4)
        ax.axvline(1.0, color="black", linewidth=1)
        ax.set_yticks(
            [c * (len(series) + 1) + (len(series) - 1) / 2 for c in range(len(cases))], cases, fontsize=7
        )
        ax.invert_yaxis()
        ax.set_title(TITLES[name], fontsize=9)
        ax.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def svg(tables: list[tuple[str, list[str], Series]]) -> str:
    """Bars by case and engine, with a line at 1; plain shapes and words."""
    left, scale, bar = 230, 260, 11
    out, y = [], 20
    for name, cases, series in tables:
        out.append(f'<text x="8" y="{y}" font-weight="bold">{escape(TITLES[name])}</text>')
        top = y = y + 10
        for at, case in enumerate(cases):
            y += 6
            out.append(f'<text x="8" y="{y + 10}">{escape(case)}</text>')
            for engine, values in series.items():
                value = values[at]
                if value is None:
                    continue
                colour, width = colour_of(engine), min(value, LONGEST) * scale
                out.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{bar - 1}" fill="{colour}"/>')
                out.append(f'<text x="{left + width + 4:.1f}" y="{y + 9}">{value:.2f} {escape(engine)}</text>')
                y += bar
        one = left + scale
        out.append(f'<line x1="{one}" y1="{top}" x2="{one}" y2="{y}" stroke="black"/>')
        y += 30
    size = f'width="1080" height="{y}" font-family="sans-serif" font-size="10"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *out, "</svg>", ""])
