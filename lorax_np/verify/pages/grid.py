"""The part of a page that shows which check refuses which planted fault.  Format: specs/reports.md."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Protocol

from .digest import short

LETTERS = {  # letter: (its class in the style, what it means)
    "K": ("k", "refused"),
    "E": ("e", "refused: the check met an exception"),
    ".": ("m", "missed"),
    "-": ("n", "does not apply"),
}


class Matrix(Protocol):
    """Faults down, checks across, and a letter of LETTERS for each pair.

    A fault or a check is a word, a pair (id, title), or an object with an id or a name. A fault may have a
    title, and a kind: there is a table for each. The matrix may have naive, more checks, which do not count.
    """

    @property
    def faults(self) -> Sequence[Any]: ...  # noqa: D102

    @property
    def checks(self) -> Sequence[Any]: ...  # noqa: D102

    def cell(self, fault: Any, check: Any) -> str: ...  # noqa: D102


def matrix_section(matrix: Matrix) -> Iterator[str]:
    """The section of the page: a summary, a legend, and a table for each kind of fault."""
    faults, checks = list(matrix.faults), list(matrix.checks)
    killers = [sum(str(matrix.cell(fault, check)) in "KE" for check in checks) for fault in faults]
    missed = [fault for fault, n in zip(faults, killers, strict=True) if not n]
    yield "<section aria-labelledby=matrix><h2 id=matrix>Planted faults</h2>"
    total = f"{len(faults) - len(missed)} of {len(faults)} faults are refused"
    single = sum(n == 1 for n in killers)
    yield f"<p>{total} by at least one of {len(checks)} checks, {single} by one alone."
    if missed:
        yield f"<strong>Missed by all: {', '.join(_text(name(fault)[0]) for fault in missed)}.</strong>"
    yield "</p><p class=legend>" + "".join(
        f"<span class=word><span class={style}>{letter}</span> {said}</span>"
        for letter, (style, said) in LETTERS.items()
    )
    if getattr(matrix, "naive", ()):
        yield "<span class=word>* a naive check, which does not count</span>"
    yield "</p>"
    for kind in dict.fromkeys(str(getattr(fault, "kind", "")) for fault in faults):
        yield from _table(matrix, kind, [f for f in faults if str(getattr(f, "kind", "")) == kind])
    yield "</section>"


def _table(matrix: Matrix, kind: str, faults: list[Any]) -> Iterator[str]:
    """The faults of one kind, by the checks that were run on any of them; naive ones stand last."""
    naive = list(getattr(matrix, "naive", ()))
    columns = [c for c in (*matrix.checks, *naive) if any(str(matrix.cell(f, c)) != "-" for f in faults)]
    counted = [check not in naive for check in columns]
    label = f"Planted faults{f': {_text(kind)}' * bool(kind)}"
    yield f'<div class="scroll tall" role=region tabindex=0 aria-label="{label}"><table class=matrix>'
    heads = [_text(name(c)[0]) + ("" if yes else " *") for c, yes in zip(columns, counted, strict=True)]
    head = "".join(f"<th scope=col><span>{one}</span>" for one in [*heads, "refused by"])
    yield f"<thead><tr><th scope=col class=kind>{_text(kind) or 'fault'}{head}<tbody>"
    sums = [0] * len(columns)
    for fault in faults:
        letters = [str(matrix.cell(fault, check)) for check in columns]
        hits = [letter in "KE" for letter in letters]
        sums = [before + hit for before, hit in zip(sums, hits, strict=True)]
        n = sum(hit and yes for hit, yes in zip(hits, counted, strict=True))
        id, title = name(fault)
        row = "".join(f"<td class={LETTERS.get(one, 'n')[0]}>{_text(one)}" for one in letters)
        yield f"<tr><th scope=row class=kind><b>{_text(id)}</b> <span>{_text(title)}</span>{row}"
        yield f"<td class={'n' if n else 'bad'}>{n or 'none'}"
    foot = "".join(f"<td>{n}" for n in sums)
    yield f"<tfoot><tr><th scope=row class=kind>refused{foot}<td></table></div>"


def name(thing: Any) -> tuple[str, str]:
    """What a fault or a check is called, and its title where it has one."""
    if type(thing) is tuple and len(thing) == 2:
        return str(thing[0]), str(thing[1])
    id = next((getattr(thing, field) for field in ("id", "name") if hasattr(thing, field)), thing)
    return str(id), "" if isinstance(thing, str) else str(getattr(thing, "title", ""))


def _text(value: object) -> str:
    return escape(short(str(value), 200))
