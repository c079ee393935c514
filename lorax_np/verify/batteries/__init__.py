"""The batteries of checks: each asks a subject about some layers, and yields a verdict a tensor or a law."""

from collections.abc import Callable, Iterator
from typing import Any

from ..report import Check
from . import (
    blended,
    calls,
    conduct,
    conv,
    conv_laws,
    edges,
    embedding,
    embedding_laws,
    experts,
    family,
    files,
    forms,
    generic,
    grades,
    lattice,
    op_laws,
    ops,
    packed,
    probes,
    related,
    related_laws,
    schedule,
    secant,
    several,
    starts,
    tensors,
)

Battery = Callable[[Any, str, int, str, str], Iterator[list[Check]]]
BATTERIES: dict[str, Battery] = {
    # of a layer's tensors
    "lattice": lattice.battery_lattice,
    "generic": generic.battery_generic,
    "exact": tensors.battery_exact,
    "complex": tensors.battery_complex,
    "secant": secant.battery_secant,
    "probes": probes.battery_probes,
    "schedule": schedule.battery_schedule,
    "edges": edges.battery_edges,
    "widened": edges.battery_widened,
    # of its conduct
    "conduct": conduct.battery_conduct,
    "views": forms.battery_views,
    "sequence": calls.battery_sequence,
    "training": calls.battery_training,
    # of what only some subjects offer: merge, unmerge
    "merge": tensors.battery_merge,
    "served": edges.battery_served,
    "unmerge": edges.battery_unmerge,
    "round trip": edges.battery_round_trip,
    # init
    "start": starts.battery_start,
    "moments": starts.battery_moments,
    "distribution": starts.battery_distribution,
    "orthogonal": starts.battery_orthogonal,
    "first step": starts.battery_first_step,
    # init_from
    "started": family.battery_started,
    "starting": family.battery_starting,
    # convert, combine
    "converted": several.battery_converted,
    "on base": several.battery_on_base,
    "combined": several.battery_combined,
    "alone": several.battery_alone,
    # blend
    "blended": blended.battery_blended,
    "blended exact": blended.battery_blended_exact,
    "blended laws": blended.battery_blended_laws,
    # save, load
    "reloaded": files.battery_reloaded,
    "foreign": files.battery_foreign,
    "rebuilt": files.battery_rebuilt,
    "resumed": files.battery_resumed,
    # embedding_forward, embedding_backward
    "embedding": embedding.battery_embedding,
    # packed_forward, packed_backward, together, mixed
    "embedding laws": embedding_laws.battery_embedding_laws,
    # conv_forward, conv_backward, conv_merge, conv_init
    "conv": conv.battery_conv,
    "conv laws": conv_laws.battery_conv_laws,
    "conv start": conv_laws.battery_conv_start,
    "conv spread": conv_laws.battery_conv_spread,
    # packed_forward, packed_backward, together
    "packed": packed.battery_packed,
    "unpacked": several.battery_unpacked,
    "together": several.battery_together,
    "apart": several.battery_apart,
    # experts_forward, experts_backward, experts_merge
    "experts": experts.battery_experts,
    "routed": experts.battery_routed,
    # vera_forward, vera_backward, and likewise adalora and tokens
    "related": related.battery_related,
    "related laws": related_laws.battery_related_laws,
    # rms_norm, rope, attention and the other ops of a model
    "ops": ops.battery_ops,
    "op differences": ops.battery_op_differences,
    "op laws": op_laws.battery_op_laws,
}
HALVES: dict[str, Battery] = {"grades": grades.battery_grades}  # of merges into weights of 16 bits
LAYERED = (  # which ask for a linear layer
    *("lattice", "generic", "exact", "complex", "secant", "probes", "schedule", "edges", "widened"),
    *("conduct", "views", "sequence", "training"),
)
PROOF = ("exact", "complex")  # of what computes in float64, which then is the truth for narrower profiles
UNIT_PROFILES = ("fp64", "fp32")  # of one unit roundoff throughout
# The bounds of the rest know one unit roundoff, or are blind beside three of them, as the secant's are
ANY_WIDTH = ("lattice", "generic", "probes", "schedule", "conduct", "embedding", "ops")


def suited(profile: str, asked: str = "", *, layered: bool = True) -> dict[str, Battery]:
    """The batteries that a profile is judged by, and the one that is asked for by name.

    layered : whether there is a linear layer to ask

    Exact truths cost the most, and are for what computes in float64; the laws of one width for fp64 and fp32.
    """
    absent = () if layered else LAYERED
    if profile not in UNIT_PROFILES:
        return {name: BATTERIES[name] for name in ANY_WIDTH if name not in absent} | HALVES
    left_out = absent if profile == "fp64" else (*absent, *PROOF)
    return {
        name: battery
        for name, battery in BATTERIES.items()
        if name not in left_out or (name == asked and name not in absent)
    }
