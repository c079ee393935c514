"""The factors of fused experts, stored as two matrices: apart, together again, and their updates.

Derivation: specs/experts.md.
"""

from collections.abc import Sequence

from ..backend import Array, namespace_of
from ..errors import ShapeError
from ..shapes import bind
from .lora import delta_backward, delta_forward


def split_experts(A: Array, B: Array, *, experts: int) -> tuple[list[Array], list[Array]]:
    """The factors of each expert, as views where the library gives them.

    A : (r·E, d_in)   expert-slowest: the r rows of expert 0, then those of expert 1
    B : (d_out, r·E)  expert-fastest: column 0 of every expert, then column 1 of every expert
    experts : int     E

    Returns E matrices A_e : (r, d_in), and E matrices B_e : (d_out, r).
    Raises ShapeError where E does not divide the stored rank, or one axis gets two sizes.
    Source: specs/experts.md.

    >>> import numpy as np
    >>> As, Bs = split_experts(np.arange(4.0)[:, None], np.arange(4.0)[None, :], experts=2)
    >>> As[1].ravel().tolist(), Bs[1].ravel().tolist()
    ([2.0, 3.0], [1.0, 3.0])
    """
    sizes = bind(A=(A, "r·E d_in"), B=(B, "d_out r·E"))
    if experts < 1 or sizes["r·E"] % experts:
        raise ShapeError(f"A: expected (r·E, d_in) with E={experts} set by W, got {tuple(A.shape)}")
    xp, r = namespace_of(A=A, B=B), sizes["r·E"] // experts
    slow = xp.reshape(A, (experts, r, sizes["d_in"]))      # (E, r, d_in)
    fast = xp.reshape(B, (sizes["d_out"], r, experts))     # (d_out, r, E)
    As = [slow[e, :, :] for e in range(experts)]           # each (r, d_in)     (experts.1)
    Bs = [fast[:, :, e] for e in range(experts)]           # each (d_out, r)    (experts.2)
    return As, Bs


def join_experts(As: Sequence[Array], Bs: Sequence[Array]) -> tuple[Array, Array]:
    """Undo split_experts: A_e : (r, d_in) and B_e : (d_out, r) -> A : (r·E, d_in), B : (d_out, r·E).

    It is the adjoint of split_experts too, since that only moves entries: of gradients it makes gradients.
    """
    sizes: dict[str, int] = {}
    for e, (A, B) in enumerate(zip(As, Bs, strict=True)):
        here = bind(A=(A, "r d_in"), B=(B, "d_out r"))
        if e and here != sizes:
            raise ShapeError(f"A: expected every expert's factors to be alike, got {here} beside {sizes}")
        sizes = here
    if not sizes:
        raise ShapeError("A: expected the factors of one expert at least, got none")
    xp, rank = namespace_of(A=As[0], B=Bs[0]), sizes["r"] * len(As)
    A = xp.reshape(xp.stack(list(As)), (rank, sizes["d_in"]))             # (experts.1)
    B = xp.reshape(xp.stack(list(Bs), axis=-1), (sizes["d_out"], rank))   # (experts.2)
    return A, B


def experts_delta_forward(A: Array, B: Array, *, experts: int, scaling: float) -> Array:
    """The update of every expert written out, delta_e = s·B_e A_e : (E, d_out, d_in).  (experts.3)"""
    As, Bs = split_experts(A, B, experts=experts)
    deltas = [delta_forward(A_e, B_e, scaling=scaling) for A_e, B_e in zip(As, Bs, strict=True)]
    delta: Array = namespace_of(A=A).stack(deltas)         # (E, d_out, d_in)   (experts.3)
    return delta


def experts_delta_backward(gdelta: Array, A: Array, B: Array, *, scaling: float) -> tuple[Array, Array]:
    """Adjoint of experts_delta_forward: gdelta : (E, d_out, d_in) -> gA, gB, shaped as A, B.

    Where W_e + delta_e is all that the loss sees of A and B, gdelta is the gradient by W, which an engine that
    writes the sum out already has.
    """
    bind(gdelta=(gdelta, "E d_out d_in"), A=(A, "r·E d_in"), B=(B, "d_out r·E"))
    As, Bs = split_experts(A, B, experts=gdelta.shape[0])
    pairs = [
        delta_backward(gdelta[e, :, :], A_e, B_e, scaling=scaling)        # (experts.4), (experts.5)
        for e, (A_e, B_e) in enumerate(zip(As, Bs, strict=True))
    ]
    return join_experts([gA for gA, _ in pairs], [gB for _, gB in pairs])
