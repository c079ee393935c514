"""Packed adapters, as servers run them: many requests' tokens in one matrix, each with an adapter or with none.

What stands in the stack past an adapter's rank is never read, and its gradient is 0.
Derivation: specs/packed.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, HostArray, cast, compute_dtype, dtype_name, one_dtype
from ..errors import ConfigError, DtypeError, ShapeError
from ..layer import wider
from ..ops.lora import LoraSaved, lora_backward, lora_forward
from ..shapes import axes
from .packing import check_pack, each_factors, places
from .routing import Routing, gather, host_ids, route, scatter, zeros

NONE = -1  # the id of a token without adapter


class PackedSaved(NamedTuple):
    """What lora_packed_backward reads: the tokens of each adapter, and what each of its slices saved."""

    routing: Routing  # the tokens of none first, then those of each adapter
    ranks: tuple[int, ...]
    d_outs: tuple[int, ...]
    loras: tuple[tuple[LoraSaved, ...], ...]  # adapter by adapter, slice by slice


def lora_packed_forward(
    x: Array,
    A: Array,
    B: Array,
    ids: Any,
    ranks: Sequence[int],
    scalings: Sequence[float],
    *,
    starts: Any = None,
    d_outs: Sequence[int] | None = None,
    y: Array | None = None,
) -> tuple[Array, PackedSaved]:
    """y + s_a·(x A_aᵀ)B_aᵀ for the tokens of adapter a, and y itself for tokens of none.

    x : (T, d_in)            tokens
    A : (L, S·r_max, d_in)   slice by slice: the rows of slice i of adapter a begin at i·r_max
    B : (L, Σ d_out, r_max)  rows slice by slice
    ids : (T,)               the adapter of each token, or −1 for none; read on the host
    ranks, scalings          of each adapter; A and B past a rank may hold anything, NaN too
    starts : (n,)            where given, the first token of each of n segments, and ids is (n,), one for each
    d_outs                   of each slice, as of q, k and v in one matrix; None for one slice, all of B
    y : (T, Σ d_out)         what is added to, in x's dtype, not written to; None for zeros

    Returns y : (T, Σ d_out) in x's dtype, and the saved activations.
    Raises ShapeError, DtypeError, TypeError; ConfigError for ids, ranks, scalings or starts out of range.
    Source: specs/packed.md.

    >>> import numpy as np
    >>> A, B = np.ones((2, 1, 1)), np.array([[[2.0]], [[3.0]]])
    >>> y, _ = lora_packed_forward(np.ones((3, 1)), A, B, [1, -1, 0], (1, 1), (1.0, 10.0))
    >>> y.ravel().tolist()
    [30.0, 0.0, 2.0]
    """
    stacked = check_pack(A, B, ranks, scalings, d_outs)
    axes(x=(x, "... d_in"), A=(A, "L S·r_max d_in"), B=(B, "L Σd_out r_max"), y=(y, "? ... Σd_out"))
    if x.ndim != 2:
        raise ShapeError(f"x: expected (T, d_in), got {tuple(x.shape)}")
    one_dtype(x=x, y=y)
    L, whole = len(stacked.ranks), sum(stacked.d_outs)
    routing = route(_per_token(ids, starts, x.shape[0], L) - NONE, L + 1)
    narrow, wide, low = dtype_name(x), compute_dtype(x), compute_dtype(A)
    both = wider(wide, low)

    tokens = gather(cast(x, low), routing)
    before = [zeros((x_a.shape[0], whole), [x]) for x_a in tokens] if y is None else gather(y, routing)
    after, saved = [before[0]], []
    scales, stored = stacked.scalings, each_factors(stacked)
    for x_a, y_a, s, factors in zip(tokens[1:], before[1:], scales, stored, strict=True):
        factors = [(cast(A_i, low), cast(B_i, low)) for A_i, B_i in factors]
        each = [lora_forward(x_a, A_i, B_i, scaling=s) for A_i, B_i in factors]  # (packed.1)
        update: Any = zeros((x_a.shape[0], whole), [u for u, _ in each])
        for (_, outs, _), (u, _) in zip(places(0, 0, stacked.d_outs), each, strict=True):
            update[:, outs] = u
        after.append(cast(cast(y_a, both) + cast(update, both), narrow))  # (packed.2)
        saved.append(tuple(lora for _, lora in each))
    return scatter(after, routing), PackedSaved(routing, stacked.ranks, stacked.d_outs, tuple(saved))


def lora_packed_backward(
    gy: Array, saved: PackedSaved, A: Array, B: Array, scalings: Sequence[float]
) -> tuple[Array, Array, Array]:
    """Adjoint of lora_packed_forward in x, A and B; the gradient by the y that was added to is gy itself.

    gy : (T, Σ d_out)  gradient by y, in y's dtype

    Returns gx : (T, d_in) in gy's dtype, and gA, gB, shaped and typed as A, B. gx for tokens of none, and the
    gradients past a rank and of adapters without tokens, are 0. Raises as the forward does.
    Source: specs/packed.md.
    """
    stacked = check_pack(A, B, saved.ranks, scalings, saved.d_outs)
    wanted = (saved.routing.bounds[-1], sum(stacked.d_outs))
    if tuple(gy.shape) != wanted:
        raise ShapeError(f"gy: expected {wanted}, set by the forward, got {tuple(gy.shape)}")
    for name, array in (("gy", gy), ("A", A), ("B", B)):
        if dtype_name(array) == "complex128":
            raise DtypeError(f"{name}: expected real arrays in a backward pass, got complex128")
    narrow, low, r_max, d_in = dtype_name(gy), compute_dtype(A), B.shape[2], A.shape[2]
    gA: Any = zeros(tuple(A.shape), [A])
    gB: Any = zeros(tuple(B.shape), [B])

    none, *tokens = gather(cast(gy, low), saved.routing)
    gxs = [zeros((none.shape[0], d_in), [gy])]
    for a, factors in enumerate(each_factors(stacked)):
        gx = zeros((tokens[a].shape[0], d_in), tokens)
        at = places(stacked.ranks[a], r_max, stacked.d_outs)
        for (rows, outs, cols), (A_i, B_i), lora in zip(at, factors, saved.loras[a], strict=True):
            A_i, B_i = cast(A_i, low), cast(B_i, low)
            gx_i, gA_i, gB_i = lora_backward(tokens[a][:, outs], lora, A_i, B_i, scaling=stacked.scalings[a])
            gB[a, outs, cols] = cast(gB_i, dtype_name(B))  # (packed.3)
            gA[a, rows, :] = cast(gA_i, dtype_name(A))  # (packed.4)
            gx = gx + gx_i  # (packed.5)
        gxs.append(cast(gx, narrow))
    return scatter(gxs, saved.routing), gA, gB


def _per_token(ids: Any, starts: Any, T: int, L: int) -> HostArray:
    """The adapter of each token, (T,), of ids or of segments."""
    if starts is None:
        return host_ids("ids", ids, T, low=NONE, high=L, what="token")
    begins = host_ids("starts", starts, len(starts), low=0, high=T + 1, what="segment")
    ends = np.append(begins[1:], T)
    if (ends < begins).any() or (begins[:1] != 0).any() or (T and not begins.size):
        raise ConfigError(f"starts: expected 0 first, and no start before the last, got {begins.tolist()}")
    of = host_ids("ids", ids, len(begins), low=NONE, high=L, what="segment")
    return np.asarray(np.repeat(of, ends - begins))
