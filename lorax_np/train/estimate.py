"""What a run will take, in time and memory, before it is begun.  Counts and rates: specs/training.md."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .duration import seconds_of
from .memory import available, base_bytes, memory_of
from .work import Work

SHARE = 0.6  # of the free memory, beyond which blocks are computed again
BITS = {"int8": 8.0, "nf4": 4.5}  # of a number, its share of the scales included


class Estimate(NamedTuple):
    """What one step takes, and what is in memory at its height.

    tokens, labels : of one step of one rank, the decoder's too
    seconds : of one step; None on a device, of which the host's products say nothing
    parts : bytes, by what they are for
    """

    tokens: float
    labels: float
    seconds: float | None
    parts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def estimated(work: Work) -> Estimate:
    """Return the estimate of a run, for which products of its shapes are timed where the host computes them."""
    tokens = work.all * work.batch * work.turns
    labels = float(np.mean(work.labels)) * work.batch * work.turns
    seconds = None if work.passes.on_device else seconds_of(work, tokens, labels)
    return Estimate(tokens, labels, seconds, memory_of(work))


def decide(work: Work) -> bool:
    """Have blocks computed again in the backward where the estimate is past 60 % of the free memory.

    And where the base is in few bits, which is chosen to save memory. Only where grad_checkpoint is auto.
    Returns whether it was decided so.
    """
    if work.passes.config.grad_checkpoint != "auto" or work.passes.checkpoint:
        return False
    free, coded = available(work.trained), hasattr(work.passes.model.weights, "codes")
    if not coded and (not free or sum(memory_of(work).values()) <= SHARE * free):
        return False
    work.passes.recompute()
    return True


def alternatives(work: Work) -> list[tuple[str, int]]:
    """What else there is, and the bytes that it would take."""
    now = sum(memory_of(work).values())
    found = []
    if not work.passes.checkpoint:
        found.append(("--grad-checkpoint on", sum(memory_of(work, checkpoint=True).values())))
    if work.batch > 1:
        found.append(("--batch-size 1", sum(memory_of(work._replace(batch=1.0)).values())))
    if not getattr(work.model.weights, "codes", {}):
        for way, bits in BITS.items():
            found.append((f"--quantize {way}", now - base_bytes(work) + base_bytes(work, bits)))
    return found
