"""Gradients scaled down to a largest norm.  Derivation: specs/optim.md."""

from collections.abc import Iterator, Mapping
from math import isnan, sqrt
from typing import Any

from ..backend import Array, cast, dtype_name, namespace_of, quiet, to_host
from ..errors import ConfigError
from ..tree import Leaves
from .state import PART, single


def clip(grads: Mapping[str, Array], max_norm: float | None) -> tuple[Leaves, float]:
    """Return the gradients times min(1, max_norm/(N + 1e-6)), and their norm N before that.

    max_norm : the largest norm, above 0; None only measures

    N = √Σg² over all arrays, in float64. Where it is not finite the gradients come back as they are: whoever
    steps looks at N first. N is read on the host. Source: specs/optim.md.

    >>> import numpy as np
    >>> grads, norm = clip({"A": np.array([3.0]), "B": np.array([4.0])}, 1.0)
    >>> norm, grads["A"].round(6).tolist()
    (5.0, [0.6])
    """
    norm, c = _factor(grads, max_norm)
    return {name: g if c is None else _times(g, c) for name, g in grads.items()}, norm


def clip_into(grads: Mapping[str, Any], max_norm: float | None) -> float:
    """As clip, but write the result over the gradients, which may be views of one buffer; return N."""
    norm, c = _factor(grads, max_norm)
    if c is not None:
        for g in grads.values():
            g *= single(c) if dtype_name(g) == "float32" else c
    return norm


def _factor(grads: Mapping[str, Array], max_norm: float | None) -> tuple[float, float | None]:
    if max_norm is not None and (isnan(max_norm) or max_norm <= 0):
        raise ConfigError(f"max_norm: expected a number above 0, or None, got {max_norm!r}")
    norm = _norm(grads)
    if max_norm is None or not norm < float("inf"):
        return norm, None
    return norm, min(1.0, max_norm / (norm + 1e-6))  # (optim.11)


def _norm(grads: Mapping[str, Array]) -> float:
    """√Σg², each part's sum where it lives, and one number read at the end."""
    if not grads:
        return 0.0
    xp = namespace_of(**grads)
    with quiet():
        parts = xp.stack([part for g in grads.values() for part in _squares(g)])
        return sqrt(float(to_host(xp.sum(parts[None, :], axis=1))[0]))  # (optim.10)


def _squares(g: Array) -> Iterator[Array]:
    xp = namespace_of(g=g)
    flat = xp.reshape(g, (-1,))
    for i in range(0, max(flat.shape[0], 1), PART):
        wide = cast(flat[i : min(i + PART, flat.shape[0])], "float64")
        yield xp.sum(wide * wide)


def _times(g: Array, c: float) -> Array:
    return g * (single(c) if dtype_name(g) == "float32" else c)  # (optim.12)
