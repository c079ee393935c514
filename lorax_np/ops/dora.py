"""Magnitude times direction, row by row, and its adjoints.  Derivation: specs/dora.md."""

from typing import NamedTuple

from ..backend import Array, namespace_of, real
from ..shapes import bind, rows


def row_norm_forward(V: Array) -> Array:
    """Euclidean norm of each row of V : (d_out, d_in) -> n : (d_out,).

    Each row is divided by its largest entry first, so that no square overflows or vanishes. No modulus is
    taken, so that the norm is differentiable along a complex step. A row of zeros has no direction: its n is
    NaN here, and init_adapter and merge refuse it by name.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5; specs/dora.md.

    >>> import numpy as np
    >>> row_norm_forward(np.array([[3.0, 4.0], [-5e200, 12e200]])).tolist()
    [5.0, 1.3e+201]
    """
    bind(V=(V, "d_out d_in"))
    xp = namespace_of(V=V)
    a = xp.max(xp.abs(real(V)), axis=1)    # (d_out,)        (dora.1)
    h = V / a[:, None]                     # (d_out, d_in)   (dora.2)
    n: Array = a * xp.sqrt(xp.sum(h * h, axis=1))  # (d_out,)  (dora.3)
    return n


def row_norm_backward(gn: Array, V: Array, *, n: Array) -> Array:
    """Adjoint of row_norm_forward: gn : (d_out,) -> gV : (d_out, d_in)."""
    bind(gn=(gn, "d_out"), V=(V, "d_out d_in"), n=(n, "d_out"))
    return (gn / n)[:, None] * V           # (d_out, d_in)   (dora.4), undoes (dora.1) to (dora.3)


class MagnitudeSaved(NamedTuple):
    """Activations that magnitude_backward reads."""

    P: Array  # (..., d_out)  base product of the dropped input
    Q: Array  # (..., d_out)  low-rank update of the dropped input


def magnitude_forward(P: Array, Q: Array, *, m: Array, n: Array) -> tuple[Array, MagnitudeSaved]:
    """What DoRA adds to the base output, t = (k − 1)∘P + k∘Q with k = m/n.

    P : (..., d_out)   xd Wᵀ, the base product of the dropped input, without bias
    Q : (..., d_out)   s·(xd Aᵀ)Bᵀ, the low-rank update of the dropped input
    m : (d_out,)       magnitude
    n : (d_out,)       row norms of V = W + s·BA

    Returns t : (..., d_out) and the saved activations. k − 1 is taken as (m − n)/n: near m = n the
    difference of two close numbers is exact, that of a rounded quotient and 1 is not.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5; specs/dora.md.

    >>> import numpy as np
    >>> one = np.ones(1)
    >>> magnitude_forward(2 * one, 3 * one, m=5 * one, n=4 * one)[0].tolist()
    [4.25]
    """
    bind(P=(P, "... d_out"), Q=(Q, "... d_out"), m=(m, "d_out"), n=(n, "d_out"))
    c = (m - n) / n                        # (d_out,)        (dora.5), k − 1
    k = m / n                              # (d_out,)        (dora.6)
    t = c * P + k * Q                      # (..., d_out)    (dora.7)
    return t, MagnitudeSaved(P, Q)


def magnitude_backward(
    gt: Array, saved: MagnitudeSaved, *, m: Array, n: Array
) -> tuple[Array, Array, Array, Array]:
    """Adjoint of magnitude_forward: gt : (..., d_out) -> gP, gQ, gm, gn, shaped as P, Q, m, n."""
    bind(gt=(gt, "... d_out"), P=(saved.P, "... d_out"), m=(m, "d_out"), n=(n, "d_out"))
    xp = namespace_of(gt=gt)
    gP = ((m - n) / n) * gt                # (..., d_out)    (dora.8), undoes (dora.7)
    gQ = (m / n) * gt                      # (..., d_out)    (dora.9)
    gk = xp.sum(rows(gt * (saved.P + saved.Q)), axis=0)  # (d_out,)  (dora.10)
    gm = gk / n                            # (d_out,)        (dora.11), undoes (dora.5) and (dora.6)
    gn = -(gm * m) / n                     # (d_out,)        (dora.12)
    return gP, gQ, gm, gn
