"""Laws of the ops of a model: what is true of them exactly, whoever computes them. None needs a truth.

Each function says in a line what is wrong, or nothing.  The laws: specs/modelops.md.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from ..cases import PROFILES
from ..report import Check
from .edges import law
from .op_attention_laws import ATTENTION_LAWS
from .op_case import OpCase, draw, offered
from .op_entry_laws import ENTRY_LAWS
from .op_pairs import Laws
from .op_row_laws import ROW_LAWS
from .ops import WIDTHS
from .tensors import ask, chosen

WRITTEN = "nothing that is given is written to"
LAWS: dict[str, Laws] = {**ENTRY_LAWS, "attention": ATTENTION_LAWS, **ROW_LAWS}


def battery_op_laws(subject: Any, profile: str, seed: int, level: str, only: str) -> Iterator[list[Check]]:
    """Laws of each op that a subject offers."""
    for op in offered(subject) if profile in WIDTHS else ():
        for i, (layout, name, run) in enumerate((*LAWS[op], (LAWS[op][0][0], WRITTEN, _written))):
            case = draw(op, layout, PROFILES[profile], (seed, 93), "op-laws")
            id = f"op-laws/{op.replace('_', '-')}/{i}"
            if chosen(id, only):
                yield law(id, "op laws", case.kind, f"{op}: {name}", partial(run, subject, case))


def _written(subject: Any, case: OpCase) -> str | None:
    """The arrays of the case are as they were."""
    mine = case.copy()
    ask(subject, case.op, mine, mine.gy)
    before = case.arrays()
    changed = [name for name, value in mine.arrays().items() if value.tobytes() != before[name].tobytes()]
    return f"{', '.join(changed)} changed" if changed else None
