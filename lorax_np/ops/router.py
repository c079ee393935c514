"""Which experts a token goes to, and with which weights; and the adjoint.  Derivation: specs/router.md."""

from typing import Any, NamedTuple

from ..backend import Array, from_host, namespace, namespace_of, real
from ..errors import ConfigError
from ..shapes import bind
from .targets import two_axes


class RouterSaved(NamedTuple):
    """Activations that the routers' adjoints read."""

    ids: Array  # (N, k)  experts, best first
    w: Array    # (N, k)  their weights
    s: Array | None  # (N, k) sigmoids of the kept logits, or (N, E) the softmax of all
    E: int
    scale: float  # what a token's weights add up to, where they are shares


def topk_softmax_forward(z: Array, k: int) -> tuple[Array, Array, RouterSaved]:
    """Softmax of the k largest of each row of z : (N, E) -> ids, w : (N, k), and the saved activations.

    ids come largest first; of equal logits the lowest index goes first. Mixtral's router.
    Source: Jiang et al. 2024, arXiv:2401.04088, section 2.1; specs/router.md.

    >>> import numpy as np
    >>> ids, w, _ = topk_softmax_forward(np.log(np.array([[1.0, 3.0, 1.0, 0.5]])), 2)
    >>> ids.tolist(), w.round(12).tolist()
    ([[1, 0]], [[0.75, 0.25]])
    """
    E = bind(z=(z, "... E"))["E"]
    two_axes(z=z)
    ids = _largest(real(z), k)                           # (N, k)        (router.1)
    xp = namespace_of(z=z)
    kept = xp.take_along_axis(z, ids, axis=1)            # (N, k)
    w = _softmax(kept)                                   # (N, k)        (router.2)
    return ids, w, RouterSaved(ids, w, None, E, 1.0)


def topk_softmax_backward(gw: Array, saved: RouterSaved) -> Array:
    """Adjoint of topk_softmax_forward: gw : (N, k) -> gz : (N, E), 0 off the kept."""
    bind(gw=(gw, "... k"), w=(saved.w, "... k"))
    xp = namespace_of(gw=gw)
    g = saved.w * (gw - xp.sum(gw * saved.w, axis=1)[:, None])  # (N, k)  (router.3)
    return _spread(g, saved)


def softmax_topk_forward(z: Array, k: int) -> tuple[Array, Array, RouterSaved]:
    """The k largest of the softmax of each row of z : (N, E) as they are -> ids, w : (N, k), and saved.

    As topk_softmax_forward, but the weights add up to less than 1: norm_topk_prob = false in Qwen's and OLMoE's
    configurations. Source: specs/router.md.

    >>> import numpy as np
    >>> ids, w, _ = softmax_topk_forward(np.log(np.array([[1.0, 5.0, 1.0, 3.0]])), 2)
    >>> ids.tolist(), w.round(12).tolist()
    ([[1, 3]], [[0.5, 0.3]])
    """
    E = bind(z=(z, "... E"))["E"]
    two_axes(z=z)
    ids = _largest(real(z), k)                           # (N, k)        (router.1)
    P = _softmax(z)                                      # (N, E)
    w = namespace_of(z=z).take_along_axis(P, ids, axis=1)  # (N, k)      (router.9)
    return ids, w, RouterSaved(ids, w, P, E, 1.0)


def softmax_topk_backward(gw: Array, saved: RouterSaved) -> Array:
    """Adjoint of softmax_topk_forward: gw : (N, k) -> gz : (N, E), which reaches every expert's logit."""
    bind(gw=(gw, "... k"), w=(saved.w, "... k"))
    xp, P = namespace_of(gw=gw), _kept(saved, "softmax_topk_forward", saved.E)
    along = xp.sum(gw * saved.w, axis=1)                 # (N,)
    gz: Array = _spread(gw * saved.w, saved) - P * along[:, None]  # (N, E)  (router.10)
    return gz


def topk_sigmoid_forward(
    z: Array,
    k: int,
    *,
    bias: Array | None = None,
    scale: float = 1.0,
    groups: int = 1,
    keep_groups: int = 1,
) -> tuple[Array, Array, RouterSaved]:
    """Sigmoids of the k best of each row of z : (N, E), as shares of their sum -> ids, w : (N, k), saved.

    bias   : (E,)   added to the sigmoids for choosing alone, or None; it has no gradient
    scale  : float  what the weights of a token add up to
    groups : int    equal parts of the experts; those with the largest sums of two, keep_groups of them, are
                    chosen from

    DeepSeek-V3's router. Source: arXiv:2412.19437, section 2.1.2; specs/router.md.

    >>> import numpy as np
    >>> ids, w, _ = topk_sigmoid_forward(np.array([[0.0, 50.0, -1.0]]), 2)
    >>> ids.tolist(), w.round(12).tolist()
    ([[1, 0]], [[0.666666666667, 0.333333333333]])
    """
    E = bind(z=(z, "... E"), bias=(bias, "? E"))["E"]
    two_axes(z=z)
    xp, scale = namespace_of(z=z), float(scale)
    s = 1.0 / (1.0 + xp.exp(-z))                         # (N, E)        (router.4)
    chosen = real(s) if bias is None else real(s) + real(bias)[None, :]
    ids = _largest(_grouped(chosen, groups, keep_groups, k), k)  # (N, k)  (router.1)
    kept = xp.take_along_axis(s, ids, axis=1)            # (N, k)
    w = scale * kept / xp.sum(kept, axis=1)[:, None]     # (N, k)        (router.5)
    return ids, w, RouterSaved(ids, w, kept, E, scale)


def topk_sigmoid_backward(gw: Array, saved: RouterSaved) -> Array:
    """Adjoint of topk_sigmoid_forward: gw : (N, k) -> gz : (N, E), 0 off the kept."""
    bind(gw=(gw, "... k"), w=(saved.w, "... k"))
    xp, scale = namespace_of(gw=gw), saved.scale
    s = _kept(saved, "topk_sigmoid_forward", saved.ids.shape[1])
    share = saved.w / scale                              # (N, k)  s over the sum
    gs = scale * (gw - xp.sum(gw * share, axis=1)[:, None]) / xp.sum(s, axis=1)[:, None]  # (router.6)
    g = gs * s * (1.0 - s)                               # (N, k)        (router.7)
    return _spread(g, saved)


def _kept(saved: RouterSaved, whose: str, columns: int) -> Any:
    if saved.s is None or saved.s.shape[1] != columns:
        raise ConfigError(f"saved: expected {whose}'s, got another router's")
    return saved.s


def _softmax(z: Array) -> Array:
    xp = namespace_of(z=z)
    e = xp.exp(z - xp.max(real(z), axis=1)[:, None])
    return e / xp.sum(e, axis=1)[:, None]  # type: ignore[no-any-return]


def _largest(z: Array, k: int) -> Array:
    """Columns of the k largest of each row, one after the other; of equals the first: (N, k)."""
    E = z.shape[1]
    if not 1 <= k <= E:
        raise ConfigError(f"k: expected 1 to {E}, the number of experts, got {k!r}")
    xp = namespace_of(z=z)
    columns, ids = _columns(E, z), []
    for _ in range(k):
        best = xp.argmax(z, axis=1)                      # (N,)  the first where several are
        ids.append(best)
        z = xp.where(columns == best[:, None], xp.full_like(z, -float("inf")), z)
    found: Array = xp.stack(ids, axis=1)
    return found


def _grouped(s: Array, groups: int, keep: int, k: int) -> Array:
    """s : (N, E) with −∞ in all but the groups that are chosen from."""
    N, E = s.shape
    if groups < 1 or E % groups or not 1 <= keep <= groups or k > keep * (E // groups):
        wanted = f"a divisor of {E} experts, and at least {k} experts in keep_groups"
        raise ConfigError(f"groups: expected {wanted}, got {groups} of which {keep}")
    if keep == groups:
        return s
    xp, size = namespace_of(s=s), E // groups
    apart = xp.reshape(s, (N * groups, size))
    two = xp.take_along_axis(apart, _largest(apart, min(2, size)), axis=1)
    best = _largest(xp.reshape(xp.sum(two, axis=1), (N, groups)), keep)  # (N, keep)  (router.11)
    part = _columns(E, s) // size                        # (1, E)  the group of each expert
    inside = part == best[:, :1]
    for j in range(1, keep):
        inside = inside | (part == best[:, j : j + 1])
    return xp.where(inside, s, xp.full_like(s, -float("inf")))  # type: ignore[no-any-return]


def _columns(E: int, like: Array) -> Any:
    return from_host(namespace("numpy").arange(E), like)[None, :]


def _spread(g: Array, saved: RouterSaved) -> Array:
    """g : (N, k) back into the columns it was taken from: (N, E)."""
    xp, columns = namespace_of(g=g), _columns(saved.E, g)
    gz = xp.where(columns == saved.ids[:, :1], g[:, :1], xp.zeros_like(g[:, :1]))
    for j in range(1, saved.ids.shape[1]):
        at = columns == saved.ids[:, j : j + 1]
        gz = xp.where(at, g[:, j : j + 1], gz)           # (N, E)        (router.8)
    return gz  # type: ignore[no-any-return]
