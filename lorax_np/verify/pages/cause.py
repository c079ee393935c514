"""The part of a page that names what is wrong: cause, equation to compare, evidence, command."""

from collections.abc import Iterator
from typing import Any

from ..lines import many
from ..report import Report
from .cards import options, text
from .digest import Explained, explained, heading

SHOWN = 4  # explanations, and members of a class


def cause_card(report: Report, key: str) -> Iterator[str]:
    """What the diagnosis says of a report, the cause first; nothing where nothing was refused."""
    if report.cause is None:
        return
    told = explained(report.cause)
    yield f'<section class=cause aria-labelledby="{key}-cause">'
    yield f'<h3 id="{key}-cause">{text(told.title)}</h3>'
    if not told.names:
        yield f"<p class=fault>{text(report.cause.branch.why)}</p>"
    yield from _named(told)
    yield from _evidence(report.cause, why=bool(told.names))
    if report.cause.reproduce:
        yield "<p class=label>See it again</p>"
        yield f"<pre class=copy>{options(report.cause.reproduce)}</pre>"
    yield "</section>"


def _named(told: Explained) -> Iterator[str]:
    """The explanations that are accepted, nearest first: a fault, or a class whose members answer alike."""
    if told.names:
        yield "<ol class=names>" if len(told.names) > 1 else "<ul class=names>"
    for name in told.names[:SHOWN]:
        members = list(zip(name.ids, name.titles, strict=True))
        alike = "<p>One of these; their answers are the same.</p>" if len(members) > 1 else ""
        yield f"<li>{alike}"
        yield from (
            f"<p class=fault><code>{text(id)}</code> {text(title)}</p>" for id, title in members[:SHOWN]
        )
        if len(members) > SHOWN:
            yield f"<p>and {len(members) - SHOWN} more: {text(', '.join(name.ids[SHOWN:]))}</p>"
        if name.line:
            yield (
                f"<p class=compare>Compare equation <code>({text(name.line)})</code> in "
                f"<code>{text(name.file)}</code>; its replay is {name.z:.1f}σ away.</p>"
            )
    if told.names:
        yield "</ol>" if len(told.names) > 1 else "</ul>"
    if len(told.names) > SHOWN:
        yield f"<p>… and {many(len(told.names) - SHOWN, 'more explanation')}, all in the JSON.</p>"
    if told.said:
        yield f"<p>{text(told.said)}</p>"


def _evidence(cause: Any, *, why: bool) -> Iterator[str]:
    """Which part, on which layers alone, what each wrong tensor is made of, the smallest layer."""
    facts = [("Right under", text(cause.elsewhere))] if cause.other else []
    facts += [
        ("Wrong part", f"<b>{text(cause.branch.part)}</b>" + (f": {text(cause.branch.why)}" if why else ""))
    ]
    facts += [("Only with", text(cause.only))] if cause.only else []
    facts += [
        (heading(finding.tensor), f"{text(finding.words)} <span>z = {text(finding.far)}</span>")
        for finding in cause.findings
    ]
    facts += [("Smallest layer", f"<code>{text(cause.case)}</code>")] if cause.case else []
    yield "<dl class=evidence>" + "".join(f"<div><dt>{name}<dd>{said}</div>" for name, said in facts) + "</dl>"
