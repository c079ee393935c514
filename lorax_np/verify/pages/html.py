"""A report as one HTML file that needs nothing else, not even a script.  Format: specs/reports.md."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..lines import many
from ..report import TENSORS, Report
from .cards import ROWS, check_list, colours, groups_of, text, told
from .cause import cause_card
from .digest import (
    WORDS,
    WORST_FIRST,
    Cell,
    Reports,
    Table,
    by_size,
    counts,
    environment,
    gravest,
    heading,
    laws,
    listed,
    not_judged,
    share,
    tables,
    write_text,
)
from .grid import Matrix, matrix_section

STEPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the bound where a shade ends
BUDGET = 200_000  # letters of failures told in full, over all reports
NEAREST = 5  # passing checks nearest to their bound
STYLE = Path(__file__).with_name("report.css")


def to_html(reports: Reports, path: str | Path, matrix: Matrix | None = None) -> None:
    """Write one report, or several, as one self-contained HTML file, with a kill matrix if one is given."""
    write_text(html(reports, matrix), path)


def html(reports: Reports, matrix: Matrix | None = None) -> str:
    """The page itself: verdicts, diagnosis, failures, tables, what was not judged, conventions, environment."""
    found = listed(reports)
    word, subject = WORDS[gravest(found)], text(found[0].subject)
    several = len(found) > 1
    parts = [_head(found, several=several)]
    for i, report in enumerate(found):
        parts += _section(report, f"r{i}", BUDGET // len(found))
    if matrix is not None:
        parts += matrix_section(matrix)
    parts.append(_about(found))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f'<link rel="icon" href="data:,">\n<title>{word.capitalize()}: {subject}, judged by lorax_np</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


# ---- the page's top and bottom -----------------------------------------------------------------------------


def _head(found: list[Report], *, several: bool) -> str:
    """The subject, a verdict for each report, and ways to the sections where there are several."""
    lines = [f"<header>\n<p class=kicker>LoRA conformance</p>\n<h1><bdi>{text(found[0].subject)}</bdi></h1>"]
    if several:
        for i, report in enumerate(found):
            name = f'<a href="#r{i}"><code>{text(report.profile)}</code></a>'
            lines.append(f"<p class=verdict>{_pill(report)} {name} <span>{text(counts(report))}</span></p>")
    return "\n".join([*lines, "</header>", "<main>" if several else "<main class=one>"])


def _pill(report: Report) -> str:
    return f'<strong class="pill e{report.exit_code}">{WORDS[report.exit_code]}</strong>'


def _about(found: list[Report]) -> str:
    """Conventions and environment, once where the reports share them."""
    lines = ["<section aria-labelledby=about><h2 id=about>Conventions and environment</h2>"]
    seen: dict[str, list[str]] = {}
    for report in found:
        seen.setdefault(report.conventions, []).append(report.profile)
    for said, profiles in seen.items():
        title = f"<p><code>{text(', '.join(profiles))}</code></p>" if len(seen) > 1 else ""
        lines.append(f"{title}<pre class=wrap>{text(said, 4000)}</pre>")
    facts = {"seed": ", ".join(dict.fromkeys(str(report.seed) for report in found))}
    facts["seconds"] = ", ".join(f"{report.seconds:.1f}" for report in found)
    facts |= environment(found[0])
    rows = "".join(f"<div><dt>{text(name)}<dd>{text(value)}</div>" for name, value in facts.items())
    return "\n".join([*lines, f"<dl class=facts>{rows}</dl>", "</section>\n</main>"])


# ---- one report --------------------------------------------------------------------------------------------


def _section(report: Report, key: str, budget: int) -> Iterator[str]:
    title = f"{_pill(report)} <code>{text(report.profile)}</code> <span>{text(counts(report))}</span>"
    yield f"<section aria-labelledby={key}><h2 id={key}>{title}</h2>"
    yield from cause_card(report, key)
    if report.diagnosis:
        yield "<ul class=diagnosis>" + "".join(f"<li>{text(line)}" for line in report.diagnosis) + "</ul>"
    groups = groups_of(report)
    cards = list(told(report, groups, key, budget))
    links = {
        (check.battery, check.kind, check.tensor): f"{key}-{i}"
        for i, checks in enumerate(groups[: len(cards)])
        for check in checks
    }
    found = tables(report)
    if found:
        yield "<h3>Error ÷ bound, the largest of each kind of layer</h3>"
        yield _legend(found)
        yield "<div class=tables>"
        yield from (_table(table, links) for table in found)
        yield "</div>"
    if groups:
        yield "<h3>Refused</h3>"
        if any(getattr(check, "map", None) for checks in groups for check in checks):
            yield colours()
        yield "<div class=refused>"
        yield from cards
        yield "</div>"
        if len(cards) < len(groups):
            yield f"<p>… and {len(groups) - len(cards)} more kinds of check, all in the JSON.</p>"
    yield from _laws(report, links)
    yield from _rest(report)
    yield "</section>"


def _legend(found: list[Table]) -> str:
    """What the shades and the words in the tables mean, those that occur."""
    verdicts = {cell.verdict for table in found for _, cells in table.rows for cell in cells if cell}
    shades = "".join(f"<span class=s{i}>{step:g}</span>" for i, step in enumerate(STEPS))
    said = {
        "fail": "<span class=bad>FAIL</span> beyond the bound, or no answer to compare",
        "crash": "<span class=bad>CRASH</span> an exception",
        "vacuous": "<span class=none>vac.</span> vacuous: the truth is 0, nothing judged",
        "not run": "<span class=none>n/r</span> not run: not covered by the subject",
    }
    words = "".join(f"<span class=word>{line}</span>" for verdict, line in said.items() if verdict in verdicts)
    passing = f"<span class=word>up to 1 passes; shades up to <span class=shades>{shades}</span></span>"
    return f"<p class=legend>{passing if 'pass' in verdicts else ''}{words}</p>"


def _table(table: Table, links: dict[tuple[str, str, str], str]) -> str:
    """One battery: kinds of layer down, tensors across."""
    head = "".join(f"<th scope=col>{heading(tensor, table.battery)}" for tensor in table.tensors)
    title = f"{text(table.battery)} <span>{table.layers} layers</span>"
    lines = [
        f'<div class=scroll role=region tabindex=0 aria-label="{text(table.battery)}"><table class=grid>',
        f"<caption>{title}</caption><thead><tr><th scope=col class=kind>kind{head}<tbody>",
    ]
    for kind, cells in table.rows:
        row = "".join(
            _cell(cell, links.get((table.battery, kind, tensor)))
            for tensor, cell in zip(table.tensors, cells, strict=True)
        )
        lines.append(f"<tr><th scope=row class=kind>{text(kind)}{row}")
    return "\n".join([*lines, "</table></div>"])


def _cell(cell: Cell | None, link: str | None) -> str:
    if cell is None:
        return "<td>"
    if cell.verdict in ("fail", "crash"):
        word = cell.verdict.upper()
        word = f'<a href="#{link}">{word}</a>' if link else word
        return f"<td class=bad>{word}"
    if cell.verdict in ("vacuous", "not run"):
        letters = {"vacuous": "vac.", "not run": "n/r"}[cell.verdict]
        return f'<td class=none><abbr title="{cell.verdict}">{letters}</abbr>'
    if cell.ratio is None:
        return "<td class=s0>ok"
    shade = next((i for i, step in enumerate(STEPS) if cell.ratio <= step), len(STEPS) - 1)
    return f"<td class=s{shade}>{share(cell.ratio)}"


def _laws(report: Report, links: dict[tuple[str, str, str], str]) -> Iterator[str]:
    """What is no single tensor's: a line for each battery, its laws folded where all are kept."""
    found: dict[str, list[tuple[str, Cell]]] = {}
    for battery, law, cell in laws(report):
        found.setdefault(battery, []).append((law, cell))
    if not found:
        return
    yield "<h3>Laws</h3>\n<div class=laws-list>"
    for battery, mine in found.items():
        worst = max((cell for _, cell in mine), key=lambda cell: -WORST_FIRST.index(cell.verdict))
        said = f"{many(sum(cell.total for _, cell in mine))} of {many(len(mine), 'law')}"
        word = f"<span class='out{' bad' * bool(worst.wrong)}'>{_word(worst)}</span>"
        open_if = " open" * (worst.verdict != "pass")
        yield f"<details{open_if}><summary><b>{text(battery)}</b> <i>{said}</i> {word}</summary>"
        yield f'<div class=scroll role=region tabindex=0 aria-label="Laws: {text(battery)}"><table class=laws>'
        yield "<thead><tr><th scope=col>law<th scope=col>checks<th scope=col>outcome<tbody>"
        for law, cell in mine:
            link = next((to for group, to in links.items() if (group[0], group[2]) == (battery, law)), None)
            yield f"<tr><th scope=row>{text(law)}<td>{cell.total}{_cell(cell, link)}"
        yield "</table></div></details>"
    yield "</div>"


def _word(cell: Cell) -> str:
    return {"pass": "ok", "fail": "FAIL", "crash": "CRASH"}.get(cell.verdict, cell.verdict)


# ---- what is folded away -----------------------------------------------------------------------------------


def _rest(report: Report) -> Iterator[str]:
    """What came nearest to its bound, what was not judged, and notes."""
    passed = [c for c in report.checks if c.verdict == "pass" and c.ratio is not None and c.tensor in TENSORS]
    nearest = sorted(passed, key=by_size)[:NEAREST]
    if nearest:
        yield f"<details><summary>Nearest to the bound among {len(passed)} that passed</summary>"
        yield check_list(nearest, "nearest") + "</details>"
    reasons = not_judged(report)
    if reasons:
        yield f"<details open><summary>Not judged: {sum(reasons.values())} checks</summary><ul>"
        yield from _items((f"{n} {verdict}: {why}" for (verdict, why), n in reasons.items()), len(reasons))
        yield "</ul></details>"
    if report.notes:
        yield "<details open><summary>Notes</summary><pre>"
        yield from (text(note) for note in report.notes[:ROWS])
        yield "</pre></details>"


def _items(lines: Iterable[str], total: int) -> Iterator[str]:
    for i, line in enumerate(lines):
        if i == ROWS:
            yield f"<li>… and {total - ROWS} more, all in the JSON."
            return
        yield f"<li><bdi>{text(line)}</bdi>"
