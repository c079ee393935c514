"""The part of a page that tells what was refused: a card for each kind of check, its error a picture."""

from collections.abc import Iterator
from html import escape

from ..lines import flat
from ..report import Check, Report
from . import heat
from .digest import CUT, by_size, command, grouped, heading, number, refused, share, short

ROWS = 60  # rows of a folded table


def text(value: object, limit: int = CUT) -> str:
    """Anything as text of the page: visible, cut, escaped."""
    return escape(short(str(value), limit))


def groups_of(report: Report) -> list[list[Check]]:
    """The checks refused, by battery, kind and tensor; those that crashed by what they said."""
    groups: dict[tuple[str, ...], list[Check]] = {}
    for check in refused(report):
        key = (check.note,) if check.verdict == "crash" else (check.battery, check.kind, check.tensor)
        groups.setdefault(key, []).append(check)
    return [sorted(checks, key=by_size) for checks in groups.values()]


def told(report: Report, groups: list[list[Check]], key: str, budget: int) -> Iterator[str]:
    """Each group, its worst check in full, until the page is long enough."""
    every = grouped(report.checks)
    for i, checks in enumerate(groups):
        kinds = {(check.battery, check.kind, check.tensor): None for check in checks}
        part = _group(report, list(kinds), checks, f"{key}-{i}", sum(len(every[kind]) for kind in kinds))
        budget -= len(part)
        if budget < 0:
            return
        yield part


def _group(report: Report, kinds: list[tuple[str, str, str]], checks: list[Check], key: str, of: int) -> str:
    """Checks refused alike, of so many of their kinds: the first in full, the others folded away."""
    first = checks[0]
    battery, kind, tensor = kinds[0]
    title = f"{text(battery)}, {text(kind)}: <b>{text(heading(tensor, battery))}</b>"
    if len(kinds) > 1:
        title = f"{len(kinds)} kinds of check, alike"
    lines = [
        f'<article id={key}><h4><span class="word bad">{first.verdict.upper()}</span> {title} '
        f"<span class=of>{len(checks)} of {of} checks</span></h4>",
        f"<div class=case><div><p><code>{text(first.id)}</code></p>{_facts(first)}",
        f"<pre class=copy>{options(command(report, first))}</pre></div>{_picture(first)}</div>",
    ]
    if len(checks) > 1:
        lines.append(
            f"<details><summary>{len(checks) - 1} more</summary>{check_list(checks[1:], key)}</details>"
        )
    return "\n".join([*lines, "</article>"])


def options(said: str) -> str:
    """A command, its options kept together where lines end."""
    words = escape(flat(said)).split(" --")
    return " ".join([words[0], *(f"<span>--{word}</span>" for word in words[1:])])


def _facts(check: Check) -> str:
    """Where, what came, what was wanted, how far off, and the note."""
    facts: list[tuple[str, str]] = []
    if check.at is not None:
        facts.append(("at", str(list(check.at))))
    if check.got is not None:
        facts += [("got", number(check.got)), ("want", number(check.want))]
    if check.ratio is not None:
        facts.append(("error ÷ bound", share(check.ratio)))
    rows = "".join(f"<div><dt>{name}<dd>{text(value)}</div>" for name, value in facts)
    note = f"<p class=note><bdi>{text(check.note)}</bdi></p>" if check.note else ""
    return (f"<dl class=facts>{rows}</dl>" if rows else "") + note


def _picture(check: Check) -> str:
    """The error ÷ bound by entry, where the check carries it."""
    rows = getattr(check, "map", None)
    if not rows:
        return ""
    height, width = len(rows), len(rows[0])
    pixel = max(3, min(16, 192 // max(height, width)))
    words = heat.in_words(rows)
    picture = (
        f'<img src="{heat.data_uri(rows)}" width={width * pixel} height={height * pixel} '
        f'alt="Error by entry, {height} × {width}: {words}.">'
    )
    return f"<figure>{picture}<figcaption>{words}.</figcaption></figure>"


def colours() -> str:
    """What the colours of the pictures mean."""
    ramp = "".join(f'<i style="background:{one}"></i>' for one in heat.COLOURS)
    return (
        "<p class=legend><span class=word>Pictures show error ÷ bound by entry: "
        f"0 <span class=ramp aria-hidden=true>{ramp}</span> 1e15 and more; "
        "blue within the bound, yellow to black beyond it, a shade for each factor of 32</span></p>"
    )


def check_list(checks: list[Check], label: str) -> str:
    """The other checks of a kind, a row each; a column that would be empty is left out."""
    columns = {
        "at": [str(list(check.at)) if check.at is not None else "" for check in checks],
        "got": [number(check.got) if check.got is not None else "" for check in checks],
        "want": [number(check.want) if check.got is not None else "" for check in checks],
        "÷ bound": [share(check.ratio) if check.ratio is not None else "" for check in checks],
        "note": [text(check.note, 160) for check in checks],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rows = zip(checks, *columns.values(), strict=True)
    lines = [
        f'<div class=scroll role=region tabindex=0 aria-label="checks, {label}"><table class=list>',
        "<thead><tr><th scope=col>check" + "".join(f"<th scope=col>{name}" for name in columns) + "<tbody>",
    ]
    for check, *cells in list(rows)[:ROWS]:
        lines.append(f"<tr><th scope=row><code>{text(check.id)}</code>" + "".join(f"<td>{c}" for c in cells))
    more = f"<p>… and {len(checks) - ROWS} more, all in the JSON.</p>" if len(checks) > ROWS else ""
    return "\n".join(lines) + f"</table></div>{more}"
