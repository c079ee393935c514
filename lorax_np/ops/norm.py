"""Rows divided by their root mean square, or by their deviation, and adjoints.  Derivation: specs/norm.md."""

from typing import NamedTuple

from ..backend import Array, cast, compute_dtype, dtype_name, namespace_of
from ..shapes import bind, rows


class NormSaved(NamedTuple):
    """Activations that the backward passes of both norms read; float32 at least."""

    h: Array    # (..., d)  rows of mean square 1
    rho: Array  # (..., 1)  what each row was multiplied by


def rms_norm_forward(x: Array, w: Array, *, eps: float) -> tuple[Array, NormSaved]:
    """Rows divided by their root mean square, y = w∘x/√(⟨x²⟩/d + ε); the mean stays.

    x : (..., d)  any leading axes
    w : (d,)      scale
    eps : float   added to the mean square

    Returns y : (..., d) in the one dtype of x and w, and the saved activations. 16-bit arrays are computed in
    float32, and y is rounded once.
    Raises ShapeError where one axis gets two sizes, DtypeError where two dtypes meet.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; specs/norm.md.

    >>> import numpy as np
    >>> rms_norm_forward(np.array([1.0, 7.0]), np.array([5.0, 10.0]), eps=0.0)[0].round(9).tolist()
    [1.0, 14.0]
    """
    d = bind(x=(x, "... d"), w=(w, "d"))["d"]
    xp = namespace_of(x=x)
    x, w, stored = cast(x, compute_dtype(x)), cast(w, compute_dtype(w)), dtype_name(x)
    rho = 1.0 / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) / d + eps)  # (..., 1)  (norm.1)
    h = rho * x                       # (..., d)    (norm.2)
    y = h * w                         # (..., d)    (norm.3)
    return cast(y, stored), NormSaved(h, rho)


def rms_norm_backward(gy: Array, saved: NormSaved, w: Array) -> Array:
    """Adjoint of rms_norm_forward in x: gy : (..., d) -> gx : (..., d)."""
    d, stored = _checked(gy, saved, w), dtype_name(gy)
    h, rho = saved
    g = cast(gy, compute_dtype(gy)) * cast(w, compute_dtype(w))       # (..., d)  (norm.4), undoes (norm.3)
    xp = namespace_of(g=g)
    along = xp.sum(g * h, axis=-1, keepdims=True) / d                 # (..., 1)
    gx: Array = rho * (g - h * along)  # (..., d)   (norm.5), undoes (norm.1) and (norm.2)
    return cast(gx, stored)


def rms_norm_backward_w(gy: Array, saved: NormSaved) -> Array:
    """Adjoint of rms_norm_forward in w: gy : (..., d) -> gw : (d,)."""
    bind(h=(saved.h, "... d"), gy=(cast(gy, compute_dtype(gy)), "... d"))
    xp = namespace_of(gy=gy)
    gw: Array = xp.sum(rows(cast(gy, compute_dtype(gy)) * saved.h), axis=0)  # (d,)  (norm.6), undoes (norm.3)
    return cast(gw, dtype_name(gy))


def layer_norm_forward(x: Array, w: Array, b: Array, *, eps: float) -> tuple[Array, NormSaved]:
    """Rows less their mean, divided by their standard deviation, y = w∘c/√(⟨c²⟩/d + ε) + b with c = x − ⟨x⟩/d.

    x : (..., d)  any leading axes
    w, b : (d,)   scale and shift
    eps : float   added to the variance

    Returns y : (..., d) in the one dtype of x, w and b, and the saved activations. The variance is that of the
    centred row, in a second pass: no difference of two large sums. 16-bit arrays are computed in float32.
    Raises ShapeError where one axis gets two sizes, DtypeError where two dtypes meet.
    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, eq. 4; specs/norm.md.

    >>> import numpy as np
    >>> layer_norm_forward(np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.ones(2), eps=0.0)[0].tolist()
    [-1.0, 3.0]
    """
    d = bind(x=(x, "... d"), w=(w, "d"), b=(b, "d"))["d"]
    xp = namespace_of(x=x)
    stored = dtype_name(x)
    x, w, b = cast(x, compute_dtype(x)), cast(w, compute_dtype(w)), cast(b, compute_dtype(b))
    c = x - xp.sum(x, axis=-1, keepdims=True) / d                         # (..., d)  (norm.7)
    rho = 1.0 / xp.sqrt(xp.sum(c * c, axis=-1, keepdims=True) / d + eps)  # (..., 1)  (norm.8)
    h = rho * c                       # (..., d)    (norm.9)
    y = h * w + b                     # (..., d)    (norm.10)
    return cast(y, stored), NormSaved(h, rho)


def layer_norm_backward(gy: Array, saved: NormSaved, w: Array) -> Array:
    """Adjoint of layer_norm_forward in x: gy : (..., d) -> gx : (..., d)."""
    d, stored = _checked(gy, saved, w), dtype_name(gy)
    h, rho = saved
    g = cast(gy, compute_dtype(gy)) * cast(w, compute_dtype(w))       # (..., d)  (norm.11), undoes (norm.10)
    xp = namespace_of(g=g)
    mean = xp.sum(g, axis=-1, keepdims=True) / d                      # (..., 1)
    along = xp.sum(g * h, axis=-1, keepdims=True) / d                 # (..., 1)
    gx: Array = rho * (g - mean - h * along)  # (..., d)  (norm.12), undoes (norm.7) to (norm.9)
    return cast(gx, stored)


def layer_norm_backward_w(gy: Array, saved: NormSaved) -> Array:
    """Adjoint of layer_norm_forward in w: gy : (..., d) -> gw : (d,), (norm.6) again.

    The gradient by b is linear_backward_b's.
    """
    return rms_norm_backward_w(gy, saved)


def _checked(gy: Array, saved: NormSaved, w: Array) -> int:
    """The size d, of arguments that fit."""
    bind(gy=(gy, "... d"), w=(w, "d"))
    size: int = bind(h=(saved.h, "... d"), gy=(cast(gy, compute_dtype(gy)), "... d"))["d"]
    return size
