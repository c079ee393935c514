"""The auditor's one function: everything it looks at, one directory at a time.  See specs/audit.md."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .keys import Read, read
from .report import Audit, Row
from .settings import check_config, check_others
from .sites import check_place

Say = Callable[[int, int, str], None]


def audit(
    path: str | os.PathLike[str], base: Mapping[str, Any] | None = None, *, progress: Say | None = None
) -> Audit:
    """Look an adapter directory over without loading a model: its config, its keys, its numbers.

    path : a PEFT adapter directory
    base : weights by their names, as open_checkpoint gives them; with it sites are looked up, sizes compared,
           rows without direction counted under DoRA, and what a merge into 16 bits loses is computed
    progress : called with the sites done, all sites, and the next one's name

    Raises FormatError where there is no directory, config or weights to judge; whatever else is wrong is a
    finding of the Audit, never an exception.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(
            f"{folder}: expected an adapter directory, got {'a file' if folder.exists() else 'nothing'}"
        )
    found = read(folder)
    say = progress or (lambda done, total, name: None)
    rows: list[Row] = []
    check_config(found, getattr(base, "residual", ""))
    check_others(found)
    for done, place in enumerate(found.places.values()):
        say(done, len(found.places), place.name)
        if row := check_place(found, place, base):
            rows.append(row)
    _check_identity(found, rows)
    return Audit(str(folder), tuple(found.findings), tuple(rows), dict(found.raw))


def _check_identity(found: Read, rows: list[Row]) -> None:
    """Sites whose update is exactly zero; under DoRA the magnitude alone may still change something."""
    idle = [row.site for row in rows if row.norm == 0]
    if not idle or found.config.use_dora:
        return
    trained = found.others or any("bB" in place.parts for place in found.places.values())
    if len(idle) == len(rows) and not trained:
        found.say("identity", f"s·BA is 0 at all {len(rows)} sites: not trained, or not saved")
        return
    for site in idle:
        found.say("identity-site", "s·BA is 0", site)
