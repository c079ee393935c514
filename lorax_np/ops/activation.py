"""Activations, entry by entry, and their adjoints.  Derivation: specs/activation.md."""

from math import pi, sqrt
from typing import Any, NamedTuple

from ..backend import Array, namespace_of, real
from ..blocks import by_blocks
from ..shapes import bind
from .erf import erf, sign_of


def sigmoid(u: Array) -> Array:
    """σ(u) = 1/(1 + e^−u), of u : (...), without overflow on either side.

    Source: specs/activation.md.

    >>> import numpy as np
    >>> sigmoid(np.array([0.0, -1000.0, 1000.0])).tolist()
    [0.5, 0.0, 1.0]
    """
    s: Array = _sigmoids(u)[0]
    return s


def _sigmoids(u: Array) -> tuple[Any, Any]:
    """σ(u) and 1 − σ(u) = σ(−u), each to its own last digits."""
    xp, sign = namespace_of(u=u), sign_of(u)
    e = xp.exp(-(sign * u))                  # (...)  (activation.1), at most 1
    large = 1.0 / (1.0 + e)                  # (...)  (activation.2), the greater of the two
    right = 0.5 + 0.5 * sign                 # (...)  1 where u ≥ 0, else 0
    left = 1.0 - right
    return (right + left * e) * large, (left + right * e) * large  # (...)  (activation.3)


@by_blocks
def silu_forward(u: Array) -> Array:
    """y = u∘σ(u), of u : (...).

    Source: Elfwing et al. 2017, arXiv:1702.03118; specs/activation.md.

    >>> import numpy as np
    >>> silu_forward(np.array([0.0, -1000.0, 1000.0])).tolist()
    [0.0, -0.0, 1000.0]
    """
    return u * sigmoid(u)                    # (...)  (activation.4)


@by_blocks
def silu_backward(gy: Array, u: Array) -> Array:
    """Adjoint of silu_forward: gy, u : (...) -> gu : (...)."""
    bind(gy=(gy, "..."), u=(u, "..."))
    s, t = _sigmoids(u)
    gu: Array = gy * (s + u * s * t)         # (...)  (activation.5), undoes (activation.4)
    return gu


class SwigluSaved(NamedTuple):
    """Activations that swiglu_backward reads. The sigmoid is computed again."""

    u: Array  # (..., f)  the gate
    w: Array  # (..., f)  what it multiplies


def swiglu_forward(u: Array, w: Array) -> tuple[Array, SwigluSaved]:
    """y = u∘σ(u)∘w: u : (..., f), the gate, and w : (..., f).

    Returns y : (..., f) and the saved activations.
    Raises ShapeError where the two differ in shape, DtypeError where they do in dtype.
    Source: Shazeer 2020, arXiv:2002.05202, eq. 5; specs/activation.md.

    >>> import numpy as np
    >>> swiglu_forward(np.array([1000.0]), np.array([2.0]))[0].tolist()
    [2000.0]
    """
    bind(u=(u, "... f"), w=(w, "... f"))
    return silu_forward(u) * w, SwigluSaved(u, w)  # (..., f)  (activation.6)


def swiglu_backward(gy: Array, saved: SwigluSaved) -> tuple[Array, Array]:
    """Adjoint of swiglu_forward: gy : (..., f) -> gu, gw : (..., f)."""
    u, w = saved
    gw = gy * silu_forward(u)                # (..., f)  (activation.7), undoes (activation.6)
    gu = silu_backward(gy * w, u)            # (..., f)  (activation.8)
    return gu, gw


@by_blocks
def gelu_forward(u: Array) -> Array:
    """y = uΦ(u) with the normal distribution's Φ(u) = ½(1 + erf(u/√2)), of u : (...): BERT's.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415; specs/activation.md.

    >>> import numpy as np
    >>> gelu_forward(np.array([0.0, 1.0, -50.0])).round(6).tolist()
    [0.0, 0.841345, -0.0]
    """
    y: Array = u * _normal(u)                # (...)  (activation.10)
    return y


@by_blocks
def gelu_backward(gy: Array, u: Array) -> Array:
    """Adjoint of gelu_forward: gy, u : (...) -> gu : (...)."""
    bind(gy=(gy, "..."), u=(u, "..."))
    gu: Array = gy * gelu_sloped(u)[1]       # (...)  (activation.12)
    return gu


@by_blocks
def gelu_sloped(u: Array) -> tuple[Array, Array]:
    """y = uΦ(u) of gelu_forward and its slope f′(u), of u : (...): erf is taken once for both.

    gelu_backward(gy, u) is gy∘slope. Source: specs/activation.md.

    >>> import numpy as np
    >>> [each.round(6).tolist() for each in gelu_sloped(np.array([0.0, 1.0, -50.0]))]
    [[0.0, 0.841345, -0.0], [0.5, 1.083315, 0.0]]
    """
    xp, Phi = namespace_of(u=u), _normal(u)
    density = (1.0 / sqrt(2.0 * pi)) * xp.exp(-0.5 * (u * u))  # (...)  (activation.11)
    return u * Phi, Phi + u * density        # (...)  (activation.10), (activation.25)


def _normal(u: Array) -> Any:
    return 0.5 * (erf(sqrt(0.5) * u) + 1.0)  # (...)  (activation.9)


KAPPA, CUBE = sqrt(2.0 / pi), 0.044715


@by_blocks
def gelu_tanh_forward(u: Array) -> Array:
    """y = ½u(1 + tanh κ(u + 0.044715u³)), κ = √(2/π), of u : (...): GPT-2's, within 5e-4 of gelu_forward.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415; specs/activation.md.

    >>> import numpy as np
    >>> gelu_tanh_forward(np.array([0.0, 1.0, -50.0])).round(6).tolist()
    [0.0, 0.841192, -0.0]
    """
    y: Array = 0.5 * u * (1.0 + _inner(u))   # (...)  (activation.14)
    return y


@by_blocks
def gelu_tanh_backward(gy: Array, u: Array) -> Array:
    """Adjoint of gelu_tanh_forward: gy, u : (...) -> gu : (...)."""
    bind(gy=(gy, "..."), u=(u, "..."))
    gu: Array = gy * gelu_tanh_sloped(u)[1]  # (...)  (activation.16)
    return gu


@by_blocks
def gelu_tanh_sloped(u: Array) -> tuple[Array, Array]:
    """y of gelu_tanh_forward and its slope f′(u), of u : (...): tanh is taken once for both.

    gelu_tanh_backward(gy, u) is gy∘slope. Source: specs/activation.md.

    >>> import numpy as np
    >>> [each.round(6).tolist() for each in gelu_tanh_sloped(np.array([0.0, 1.0, -50.0]))]
    [[0.0, 0.841192, -0.0], [0.5, 1.082964, 0.0]]
    """
    t = _inner(u)
    half = 0.5 * (1.0 + t)
    rise = (0.5 * KAPPA) * (3.0 * CUBE * (u * u) + 1.0)  # (...)  (activation.15), halved
    return u * half, half + u * (1.0 - t * t) * rise  # (...)  (activation.14), (activation.26)


def _inner(u: Array) -> Any:
    xp = namespace_of(u=u)
    return xp.tanh(KAPPA * (u + CUBE * (u * u * u)))  # (...)  (activation.13)


def relu_forward(u: Array) -> Array:
    """y = u where u > 0, else 0, of u : (...). NaN stays NaN.

    Source: specs/activation.md.

    >>> import numpy as np
    >>> relu_forward(np.array([-2.0, 0.0, 3.0])).tolist()
    [0.0, 0.0, 3.0]
    """
    xp = namespace_of(u=u)
    part: Any = real(u)
    y: Array = xp.where(part <= 0.0, xp.zeros_like(u), u)   # (...)  (activation.17)
    return y


def relu_backward(gy: Array, u: Array) -> Array:
    """Adjoint of relu_forward: gy, u : (...) -> gu : (...), 0 at u = 0."""
    bind(gy=(gy, "..."), u=(u, "..."))
    xp = namespace_of(u=u)
    part: Any = u
    gu: Array = xp.where(part <= 0.0, xp.zeros_like(gy), gy)  # (...)  (activation.18), undoes (activation.17)
    return gu


def tanh_forward(u: Array) -> Array:
    """y = tanh u, of u : (...).

    Source: specs/activation.md.

    >>> import numpy as np
    >>> tanh_forward(np.array([0.0, 100.0])).tolist()
    [0.0, 1.0]
    """
    xp = namespace_of(u=u)
    y: Array = xp.tanh(u)                    # (...)  (activation.19)
    return y


def tanh_backward(gy: Array, y: Array) -> Array:
    """Adjoint of tanh_forward, from its result: gy, y : (...) -> gu : (...)."""
    bind(gy=(gy, "..."), y=(y, "..."))
    t: Any = y
    gu: Array = gy * ((1.0 - t) * (1.0 + t))  # (...)  (activation.20), undoes (activation.19)
    return gu
