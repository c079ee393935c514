"""Known faults of LoRA layers, as published or as plausible: what a judge has to refuse.

>>> from lorax_np.verify.mutants import CATALOGUE
>>> CATALOGUE["S1"].title
's = α, not divided by the rank'
"""

from . import (
    adapters,
    attention,
    blended,
    conduct,
    conv,
    dora,
    dropout,
    embedding,
    experts,
    family,
    files,
    gradient,
    losses,
    merge,
    ops,
    packed,
    related,
    rounding,
    scale,
    several,
    shape,
    start,
)
from .dora import CONVENTIONS
from .fault import KINDS, Fault, Faulty, Kind


def _by_id(*groups: tuple[Fault, ...]) -> dict[str, Fault]:
    found: dict[str, Fault] = {}
    for fault in (fault for group in groups for fault in group):
        if fault.id in found:
            raise ValueError(f"fault: expected ids of their own, got {fault.id} twice")
        found[fault.id] = fault
    return found


CATALOGUE: dict[str, Fault] = _by_id(
    scale.FAULTS,
    dropout.FAULTS,
    shape.FAULTS,
    gradient.FAULTS,
    rounding.FAULTS,
    dora.FAULTS,
    conduct.FAULTS,
    start.FAULTS,
    family.FAULTS,
    merge.FAULTS,
    files.FAULTS,
    packed.FAULTS,
    adapters.FAULTS,
    several.FAULTS,
    experts.FAULTS,
    embedding.FAULTS,
    conv.FAULTS,
    related.FAULTS,
    blended.FAULTS,
    ops.FAULTS,
    losses.FAULTS,
    attention.FAULTS,
)

__all__ = ["CATALOGUE", "CONVENTIONS", "KINDS", "Fault", "Faulty", "Kind"]
