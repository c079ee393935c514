"""A LoRA or DoRA embedding: the linear layer on one-hot rows, looked up.  Derivation: specs/embedding.md.

The casts are those of layer.py: the base's rows are rounded to the base's dtype, the adapter's branch is
computed in the adapter's, the two are added in the wider one, and the sum is rounded once.
"""

from dataclasses import InitVar, dataclass, replace
from math import isfinite
from typing import NamedTuple

from ..backend import Array, cast, compute_dtype, dtype_name, namespace_of, one_dtype, to_host
from ..errors import ConfigError, DtypeError
from ..merge import merge
from ..ops.dora import (
    MagnitudeSaved,
    magnitude_backward,
    magnitude_forward,
    row_norm_backward,
    row_norm_forward,
)
from ..ops.embedding import lookup_backward, lookup_forward, lora_lookup_backward, lora_lookup_forward
from ..ops.lora import delta_backward, delta_forward
from ..params import Adapter, Linear, check_pair
from ..shapes import axes, bind


@dataclass(frozen=True, eq=False, slots=True)
class Embedding:
    """A table of rows, y = e·W[ids]. Never written to.

    W : (vocab, dim)        weight, a row for each id, as embeddings are stored
    padding_idx : int       an id whose row of W and column of A are not trained, or None
    scale : float           e, by which the layer multiplies what it looks up, as Gemma's does; None for 1
    scale_grad_by_freq : bool  whether the gradient of each row is divided by how often its id occurs
    max_norm : None         refused: it would change rows of W as they are read

    Raises ShapeError, DtypeError, TypeError or ConfigError when made of parts that do not fit.
    """

    W: Array
    padding_idx: int | None = None
    scale: float | None = None
    scale_grad_by_freq: bool = False
    max_norm: InitVar[float | None] = None

    def __post_init__(self, max_norm: float | None) -> None:
        vocab = bind(W=(self.W, "vocab dim"))["vocab"]
        if max_norm is not None:
            raise ConfigError(
                f"max_norm: expected None, since a merge cannot keep what it does to rows, got {max_norm!r}"
            )
        pad, e = self.padding_idx, self.scale
        if pad is not None and (type(pad) is not int or not 0 <= pad < vocab):
            raise ConfigError(f"padding_idx: expected None or an id from 0 to {vocab - 1}, got {pad!r}")
        if e is not None and (isinstance(e, bool) or not isinstance(e, (int, float)) or not isfinite(e)):
            raise ConfigError(f"scale: expected None or a finite float, got {e!r}")

    @property
    def linear(self) -> Linear:
        """The linear layer that this is on one-hot rows, without e: its weight is Wᵀ, a view."""
        return Linear(self.W.T)


class LoraEmbeddingSaved(NamedTuple):
    """Activations that the backward passes read; ids are the caller's own array."""

    ids: Array  # (...)
    z: Array  # (..., r)  in the dtype the adapter computes in
    dora: MagnitudeSaved | None  # likewise, where it has m


def lora_embedding_forward(
    ids: Array, base: Embedding, adapter: Adapter, *, scaling: float
) -> tuple[Array, LoraEmbeddingSaved]:
    """Embedding with its low-rank update, and DoRA's magnitude where the adapter has one.

    Without m:  y = e·(W[ids] + s·A[:, ids]ᵀBᵀ).
    With m:     y = e·k∘(W[ids] + s·A[:, ids]ᵀBᵀ),  k = m/‖Wᵀ + s·BA‖ by rows, one for each column of W.

    ids : (...)        integers from 0 to vocab − 1; any shape, of zero tokens too. They are read on the host,
                       where they may be
    base : Embedding   frozen weight
    adapter : Adapter  A (r, vocab), B (dim, r), m (dim,) or None; in the base's dtype or another
    scaling : float    s, as LoraConfig.scaling gives it

    Returns y : (..., dim) in W's dtype, and the saved activations. No argument is written to.
    Raises ShapeError, DtypeError, TypeError where array libraries mix; ConfigError for an id out of range and
    for an adapter with a bias, which an embedding does not have.
    Source: specs/embedding.md; rounding schedule: specs/linear.md.

    >>> import numpy as np
    >>> base, adapter = Embedding(np.eye(2)), Adapter(np.array([[3.0, 4.0]]), np.array([[1.0], [2.0]]))
    >>> lora_embedding_forward(np.array([1, 0]), base, adapter, scaling=0.5)[0].tolist()
    [[2.0, 5.0], [2.5, 3.0]]
    """
    s, e = _check(ids, base, adapter, scaling), base.scale
    narrow, wide, low = dtype_name(base.W), compute_dtype(base.W), compute_dtype(_A(adapter))
    A, B, m = cast(_A(adapter), low), cast(_B(adapter), low), cast(adapter.m, low)

    w = lookup_forward(base.W, ids)
    y0 = cast(_times(e, cast(w, wide)), narrow)  # (linear.6), the base's own output
    t, z = lora_lookup_forward(ids, A, B, scaling=s)
    dora = None
    if m is not None:
        n = row_norm_forward(cast(base.W.T, low) + delta_forward(A, B, scaling=s))  # (embedding.8)
        t, dora = magnitude_forward(cast(w, low), t, m=m, n=n)

    both = "float64" if "float64" in (wide, low) else wide
    y = cast(cast(y0, both) + cast(_times(e, t), both), narrow)  # (embedding.9), rounded as (linear.7)
    return y, LoraEmbeddingSaved(ids, z, dora)


def lora_embedding_backward(
    gy: Array,
    saved: LoraEmbeddingSaved,
    base: Embedding,
    adapter: Adapter,
    *,
    scaling: float,
    norm_gradient: bool = False,
) -> Adapter:
    """Adjoint of lora_embedding_forward in the adapter; ids have no gradient.

    gy : (..., dim)       gradient by y, in y's dtype
    saved, base, adapter, scaling : what the forward returned, and was given
    norm_gradient : bool  for DoRA, as of lora_linear_backward

    Returns an Adapter of gradients, each in the dtype of what it differentiates. The column of A of padding_idx
    has the gradient 0, while its tokens count in B's and m's. With scale_grad_by_freq the columns of A are
    divided by how often their ids occur; what runs through the norm is not, since it belongs to no token.
    Raises as the forward does, and DtypeError for complex arrays.
    Source: specs/embedding.md (embedding.10) to (embedding.12).
    """
    s = _check_backward(gy, saved, base, adapter, scaling)
    low = compute_dtype(_A(adapter))
    A, B, m = cast(_A(adapter), low), cast(_B(adapter), low), cast(adapter.m, low)
    pad, often = base.padding_idx, base.scale_grad_by_freq

    gt, gm, gn, V, n = _times(base.scale, cast(gy, low)), None, None, None, None  # (embedding.10)
    if m is not None and saved.dora is not None:
        V = cast(base.W.T, low) + delta_forward(A, B, scaling=s)
        n = row_norm_forward(V)
        _, gt, gm, gn = magnitude_backward(gt, saved.dora, m=m, n=n)
    gA, gB = lora_lookup_backward(gt, saved.ids, saved.z, A, B, scaling=s, padding=pad, by_frequency=often)
    if norm_gradient and gn is not None and V is not None and n is not None:
        gA_n, gB_n = delta_backward(row_norm_backward(gn, V, n=n), A, B, scaling=s)
        gA, gB = gA + _without(gA_n, pad), gB + gB_n  # (embedding.11)
    return Adapter(
        A=cast(gA, dtype_name(_A(adapter))),
        B=cast(gB, dtype_name(_B(adapter))),
        m=None if gm is None or adapter.m is None else cast(gm, dtype_name(adapter.m)),
    )


def lora_embedding_backward_base(
    gy: Array,
    saved: LoraEmbeddingSaved,
    base: Embedding,
    adapter: Adapter,
    *,
    scaling: float,
    norm_gradient: bool = False,
) -> Embedding:
    """Adjoint of lora_embedding_forward in the base, for whoever trains it, with the same arguments.

    Returns an Embedding whose W : (vocab, dim) is the gradient, in W's dtype; 0 in the row of padding_idx, and
    divided by how often an id occurs where the base says so.
    Source: specs/embedding.md (embedding.12).
    """
    s = _check_backward(gy, saved, base, adapter, scaling)
    wide, low = compute_dtype(base.W), compute_dtype(_A(adapter))
    both = "float64" if "float64" in (wide, low) else wide
    pad, often = base.padding_idx, base.scale_grad_by_freq

    G = _times(base.scale, cast(gy, wide))
    gV = None
    if adapter.m is not None and saved.dora is not None:
        A, B, m = cast(_A(adapter), low), cast(_B(adapter), low), cast(adapter.m, low)
        V = cast(base.W.T, low) + delta_forward(A, B, scaling=s)
        n = row_norm_forward(V)
        gP, _, _, gn = magnitude_backward(_times(base.scale, cast(gy, low)), saved.dora, m=m, n=n)
        G = cast(G, both) + cast(gP, both)  # (dora.13), of rows
        gV = row_norm_backward(gn, V, n=n) if norm_gradient else None
    gW = lookup_backward(G, saved.ids, cast(base.W, dtype_name(G)), padding=pad, by_frequency=often)
    if gV is not None:
        gW = gW + cast(_without(gV, pad).T, dtype_name(gW))  # (embedding.12)
    return replace(base, W=cast(gW, dtype_name(base.W)))


def merge_embedding(base: Embedding, adapter: Adapter, *, scaling: float) -> Embedding:
    """Return the one Embedding that computes what base and adapter compute together.

    W' = W + s·(BA)ᵀ, with DoRA k∘(W + s·(BA)ᵀ) by columns; the merge of the linear layer over Wᵀ. e stays
    outside. All is computed in float64 and rounded once to W's dtype. Raises as merge does.
    Source: specs/embedding.md (embedding.13), specs/merge.md.

    >>> import numpy as np
    >>> adapter = Adapter(np.ones((1, 2)), np.array([[2.0], [4.0]]))
    >>> merge_embedding(Embedding(np.eye(2)), adapter, scaling=0.5).W.tolist()
    [[2.0, 2.0], [1.0, 3.0]]
    """
    s = _check_pair(base, adapter, scaling)
    return replace(base, W=merge(base.linear, adapter, scaling=s).W.T)  # (embedding.13)


# ---- dtypes and checks -------------------------------------------------------------------------------------


def _A(adapter: Adapter) -> Array:
    if adapter.A is None:
        raise ConfigError("adapter: expected A and B, since an embedding has no bias to train alone, got none")
    return adapter.A


def _B(adapter: Adapter) -> Array:
    if adapter.B is None:
        raise ConfigError("adapter: expected A and B, since an embedding has no bias to train alone, got none")
    return adapter.B


def _times(e: float | None, x: Array) -> Array:
    return x if e is None else float(e) * x


def _without(gA: Array, padding: int | None) -> Array:
    """Columns (d, vocab) with that of padding set to 0."""
    if padding is None:
        return gA
    xp = namespace_of(gA=gA)
    zero = xp.zeros_like(gA)
    parts = gA[:, :padding], zero[:, padding : padding + 1], gA[:, padding + 1 :]
    whole: Array = xp.concat(parts, axis=1)
    return whole


def _check_pair(base: Embedding, adapter: Adapter, scaling: float) -> float:
    for name, value, kind in (("base", base, Embedding), ("adapter", adapter, Adapter)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    for name in ("b", "bB"):
        if getattr(adapter, name) is not None:
            raise ConfigError(f"{name}: expected None, since an embedding has no bias, got an array")
    axes(W=(base.W, "vocab dim"), A=(_A(adapter), "r vocab"), B=(_B(adapter), "dim r"))
    return check_pair(base.linear, adapter, scaling)


def _check(ids: Array, base: Embedding, adapter: Adapter, scaling: float) -> float:
    """Check all arguments together, ids by reading them on the host."""
    s = _check_pair(base, adapter, scaling)
    if not dtype_name(ids).startswith(("int", "uint")):
        raise DtypeError(f"ids: expected integers, got {dtype_name(ids)}")
    host, vocab = to_host(ids), base.W.shape[0]
    wrong = ((host < 0) | (host >= vocab)).reshape(-1)
    if wrong.any():
        first = host.reshape(-1)[wrong][0]
        raise ConfigError(
            f"ids: expected numbers from 0 to {vocab - 1}, with vocab={vocab} set by W, got {first} "
            f"({wrong.sum()} out of range)"
        )
    return s


def _check_backward(
    gy: Array, saved: LoraEmbeddingSaved, base: Embedding, adapter: Adapter, scaling: float
) -> float:
    """Check the backward's arguments against each other and against what the forward saved."""
    if not isinstance(saved, LoraEmbeddingSaved):
        raise TypeError(f"saved: expected what lora_embedding_forward returned, got {type(saved).__name__}")
    s = _check(saved.ids, base, adapter, scaling)
    axes(W=(base.W, "vocab dim"), A=(_A(adapter), "r vocab"), z=(saved.z, "... r"), gy=(gy, "... dim"))
    for name, value in (("W", base.W), ("A", adapter.A), ("B", adapter.B), ("m", adapter.m), ("gy", gy)):
        if value is not None and dtype_name(value) == "complex128":
            raise DtypeError(f"{name}: expected real arrays in a backward pass, got complex128")
    one_dtype(gy=gy)
    if dtype_name(gy) != dtype_name(base.W):
        raise DtypeError(f"gy: expected {dtype_name(base.W)}, set by W, got {dtype_name(gy)}")
    if (saved.dora is None) != (adapter.m is None):
        raise ConfigError("saved: expected this adapter's activations, got those of one with other parts")
    return s
