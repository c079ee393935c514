"""A report as Markdown for a pull request, and as a badge.  Format: specs/reports.md."""

import re
from collections.abc import Iterator
from typing import Any

from ..lines import flat, many
from ..report import Check, Report
from .digest import (
    WORDS,
    Cell,
    Reports,
    Table,
    by_size,
    command,
    counts,
    environment,
    explained,
    grouped,
    heading,
    laws,
    listed,
    not_judged,
    number,
    refused,
    share,
    short,
    tables,
)

NAMED = 4  # explanations, and members of a class
SHOWN = 6  # groups of failing checks told in full, for each report
ROWS = 40  # rows of a folded table
LONGEST = 55_000  # letters; GitHub takes 65,536 as a comment
COLOURS = {0: "brightgreen", 1: "red", 2: "lightgrey", 3: "critical"}  # by exit code


def to_markdown(reports: Reports) -> str:
    """One report, or several, as GitHub's Markdown: the verdict first, then tables, failures and details."""
    found = listed(reports)
    blocks = [block for report in found for block in (_verdict(report), *_cause(report), *_diagnosis(report))]
    for report in found:
        title = f" in {code(report.profile)}" if len(found) > 1 else ""
        blocks += _tables(report, title)
        blocks += _failures(report, title)
    blocks += [block for report in found for block in _details(report)]
    text = "\n\n".join(blocks) + "\n"
    return text if len(text) <= LONGEST else _cut(blocks)


def to_badge(report: Report) -> dict[str, Any]:
    """The report as a badge, in the form that shields.io's endpoint reads."""
    word = WORDS[report.exit_code].lower()
    judged = report.count("pass") + report.count("fail")
    message = {0: f"{word}, {many(judged)}", 1: f"{word}, {report.count('fail')} of {judged} checks"}
    return {
        "schemaVersion": 1,
        "label": f"lorax_np {report.profile}",
        "message": message.get(report.exit_code, word),
        "color": COLOURS[report.exit_code],
        "isError": report.exit_code in (1, 3),
    }


def code(text: str) -> str:
    """A subject's text as a code span on one line: no markup, no mention and no link comes out of it."""
    text = re.sub(r"\s+", " ", short(text)).strip() or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def code_cell(text: str) -> str:
    """A code span in a table, where a bar ends the cell unless one backslash stands before it, not two."""
    return code(text.replace("\\|", "\\ |")).replace("|", "\\|")


def fence(text: str, language: str = "") -> str:
    """A subject's text as a block of code that nothing in it can close."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


# ---- the parts ---------------------------------------------------------------------------------------------


def _verdict(report: Report) -> str:
    """**FAIL** `subject` in `fp32`: 404 checks: 144 failed, 260 passed."""
    word = WORDS[report.exit_code]
    return f"**{word}** {code(report.subject)} in {code(report.profile)}, {counts(report)}"


def _cause(report: Report) -> Iterator[str]:
    """The cause, the equation to compare, the evidence, and the command in a block of code."""
    if report.cause is None:
        return
    cause, told = report.cause, explained(report.cause)
    yield f"**{told.title}**" + (f": {code(told.said)}" if told.said else "")
    rank = "1." if len(told.names) > 1 else "-"
    for name in told.names[:NAMED]:
        members = [code(f"{id}: {title}") for id, title in zip(name.ids, name.titles, strict=True)]
        rest = f" or {len(members) - NAMED} more" if len(members) > NAMED else ""
        alike = "one of these, whose answers are the same: " if len(members) > 1 else ""
        compare = f", compare {code(f'({name.line})')} in {code(name.file)}" if name.line else ""
        yield f"{rank} {alike}{' or '.join(members[:NAMED])}{rest}{compare}"
    lines = [f"right under another convention: {code(cause.elsewhere)}"] if cause.other else []
    lines += [f"wrong part: {code(f'{cause.branch.part}: {cause.branch.why}')}"]
    lines += [f"only with {code(cause.only)}"] if cause.only else []
    lines += [code(str(finding)) for finding in cause.findings]
    lines += [f"smallest layer: {code(cause.case)}"] if cause.case else []
    yield "\n".join(f"- {line}" for line in lines)
    if cause.reproduce:
        yield fence(flat(cause.reproduce), "sh")


def _diagnosis(report: Report) -> Iterator[str]:
    if report.diagnosis:
        yield "\n".join(f"- {code(line)}" for line in report.diagnosis)


def _tables(report: Report, title: str) -> Iterator[str]:
    """A row for each battery; the columns are the tensors that any of them judges."""
    found = tables(report, by_kind=False)
    if found:
        yield f"Largest error ÷ bound{title}; up to 1 passes."
        yield _grid(found)
    others: dict[str, list[Cell]] = {}
    for battery, _, cell in laws(report):
        others.setdefault(battery, []).append(cell)
    lines = []
    for battery, cells in others.items():
        bad, total = sum(cell.wrong for cell in cells), sum(cell.total for cell in cells)
        lines.append(f"- {code(battery)}: " + (f"**{bad} of {total} refused**" if bad else many(total)))
    if lines:
        yield "\n".join(lines)


def _grid(found: list[Table]) -> str:
    tensors = list(dict.fromkeys(heading(t, table.battery) for table in found for t in table.tensors))
    lines = ["|  | " + " | ".join(tensors) + " |", "| --- |" + " ---: |" * len(tensors)]
    for table in found:
        for kind, cells in table.rows[:ROWS]:
            named = [heading(tensor, table.battery) for tensor in table.tensors]
            row = dict(zip(named, cells, strict=True))
            line = " | ".join(_cell(row.get(tensor)) for tensor in tensors)
            lines.append(f"| {code_cell(kind)} | {line} |")
        if len(table.rows) > ROWS:
            lines.append(f"| and {len(table.rows) - ROWS} more |" + " |" * len(tensors))
    return "\n".join(lines)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.verdict in ("fail", "crash"):
        return f"**{cell.verdict.upper()}** {cell.wrong}/{cell.total}"
    if cell.verdict in ("vacuous", "not run"):
        return cell.verdict
    return "ok" if cell.ratio is None else share(cell.ratio)


def _failures(report: Report, title: str) -> Iterator[str]:
    groups = grouped(refused(report))
    if not groups:
        return
    yield f"### Refused{title}"
    told = sorted(groups.items(), key=lambda item: item[1][0].verdict != "crash")
    for (battery, kind, tensor), checks in told[:SHOWN]:
        first = min(checks, key=by_size)
        name = heading(tensor, battery)
        title = f"**{first.verdict.upper()}** {code(f'{battery}, {kind}: {name}')}, {many(len(checks))}"
        yield f"{title}, such as\n\n{_one(report, first)}"
    if len(groups) > SHOWN:
        yield f"... and {len(groups) - SHOWN} more kinds of check."


def _one(report: Report, check: Check) -> str:
    at = "" if check.at is None else f"at {list(check.at)}"
    values = "" if check.got is None else f"got {number(check.got)}, want {number(check.want)}"
    size = "" if check.ratio is None else f"{share(check.ratio)} × the bound"
    said = [part for part in (at, values, size, check.note and code(check.note)) if part]
    return f"{code(check.id)} {', '.join(said)}\n\n{fence(command(report, check), 'sh')}"


def _details(report: Report) -> Iterator[str]:
    profile = "".join(letter for letter in report.profile if letter.isalnum() or letter in "-_ ")
    for table in tables(report):
        name = "".join(letter for letter in table.battery if letter.isalnum() or letter in "-_ ")
        yield _folded(f"{profile}, {name}: {table.layers} layers by kind", _grid([table]))
    found = laws(report)
    if found:
        lines = ["| battery | law | checks | outcome |", "| --- | --- | ---: | --- |"]
        for battery, law, cell in found[:ROWS]:
            lines.append(f"| {code_cell(battery)} | {code_cell(law)} | {cell.total} | {_cell(cell)} |")
        lines += [f"| and {len(found) - ROWS} more | | | |"] * (len(found) > ROWS)
        yield _folded(f"{profile}, laws: {sum(cell.total for *_, cell in found)} checks", "\n".join(lines))
    reasons = not_judged(report)
    if reasons:
        lines = [f"- {count} {verdict}: {code(reason)}" for (verdict, reason), count in reasons.items()][:ROWS]
        yield _folded(f"{profile}, not judged: {sum(reasons.values())} checks", "\n".join(lines))
    if report.notes:
        yield _folded(f"{profile}, notes", fence("\n".join(short(note) for note in report.notes[:ROWS])))
    said = {"seed": str(report.seed), "seconds": f"{report.seconds:.1f}", **environment(report)}
    lines = [short(report.conventions, 2000), "", *(f"{name}: {short(value)}" for name, value in said.items())]
    yield _folded(f"{profile}, conventions and environment", fence("\n".join(lines)))


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _cut(blocks: list[str]) -> str:
    """As many whole blocks as a comment holds; each stands by itself, so nothing is left open."""
    kept, room = [], LONGEST - 100
    for block in blocks:
        if len(block) + 2 <= room:
            kept.append(block)
            room -= len(block) + 2
    return "\n\n".join([*kept, f"... and {len(blocks) - len(kept)} parts that have no room here."]) + "\n"
