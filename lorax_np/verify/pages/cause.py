"""The part of a page that names what is wrong: cause, equation to compare, evidence, command."""

from collections.abc import Iterator
from html import escape
from typing import Any

from ..report import Report, many
from .cards import text
from .digest import Explained, explained, flat, heading

SHOWN = 4  # explanations, and members of a class


def cause_card(report: Report, key: str) -> Iterator[str]:
    """What the diagnosis says of a report, the cause first; nothing where nothing was refused."""
    if report.cause is None:
        return
    told = explained(report.cause)
    yield f'<section class=cause aria-labelledby="{key}-cause">'
    yield f'<h3 id="{key}-cause">{text(told.title)}</h3>'
    yield from _named(told)
    yield from _evidence(report.cause)
    if report.cause.reproduce:
        yield "<p class=label>See it again</p>"
        yield f"<pre class=copy>{_options(report.cause.reproduce)}</pre>"
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


def _evidence(cause: Any) -> Iterator[str]:
    """Which part, on which layers alone, what each wrong tensor is made of, the smallest layer."""
    facts = [("Wrong part", f"<b>{text(cause.branch.part)}</b>: {text(cause.branch.why)}")]
    facts += [("Only with", text(cause.only))] if cause.only else []
    facts += [
        (heading(finding.tensor), f"{text(finding.words)} <span>z = {text(finding.far)}</span>")
        for finding in cause.findings
    ]
    facts += [("Smallest layer", f"<code>{text(cause.case)}</code>")] if cause.case else []
    yield "<dl class=evidence>" + "".join(f"<div><dt>{name}<dd>{said}</div>" for name, said in facts) + "</dl>"


def _options(command: str) -> str:
    """A command, its options kept together where lines end."""
    words = escape(flat(command)).split(" --")
    return " ".join([words[0], *(f"<span>--{word}</span>" for word in words[1:])])
