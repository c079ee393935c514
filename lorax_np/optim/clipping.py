"""Gradients scaled down to a largest norm.  Derivation: specs/optim.md."""

from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any

from ..backend import Array, cast, dtype_name, namespace_of, quiet, to_host
from ..errors import ConfigError
from ..tree import Leaves
from .state import PART


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
    N, c = _factor(grads, max_norm)
    norm = 0.0 if N is None else float(to_host(N)[0])
    if c is None or not norm < float("inf"):
        return dict(grads), norm
    return {name: g * cast(c, dtype_name(g)) for name, g in grads.items()}, norm  # (optim.12)


def clip_into(grads: Mapping[str, Any], max_norm: float | None) -> Array:
    """As clip, but write the result over the gradients, which may be views of one buffer, and do not read N.

    grads : at least one array, none of no axis
    Returns N : (1,) in float64, where the gradients live, so that a step may read it with its loss.
    """
    N, c = _factor(grads, max_norm)
    if N is None:
        raise ConfigError("grads: expected at least one, got none")
    for g in grads.values() if c is not None else ():
        g *= cast(c, dtype_name(g))
    return N


def _factor(grads: Mapping[str, Array], max_norm: float | None) -> tuple[Array | None, Array | None]:
    """N : (1,) and c : (1,), in float64; None where there is no gradient, and where nothing is scaled.

    Where N is not finite, c is 1.
    """
    if max_norm is not None and (isnan(max_norm) or max_norm <= 0):
        raise ConfigError(f"max_norm: expected a number above 0, or None, got {max_norm!r}")
    if not grads:
        return None, None
    xp = namespace_of(**grads)
    with quiet():
        parts = xp.stack([part for g in grads.values() for part in _squares(g)])
        N: Any = xp.sqrt(xp.sum(parts[None, :], axis=1))  # (optim.10)
        if max_norm is None:
            return N, None
        c = max_norm / (N + 1e-6)
        return N, xp.where((c < 1) & xp.isfinite(N), c, xp.ones_like(c))  # (optim.11)


def _squares(g: Array) -> Iterator[Array]:
    xp = namespace_of(g=g)
    flat = xp.reshape(g, (-1,))
    for i in range(0, max(flat.shape[0], 1), PART):
        wide = cast(flat[i : min(i + PART, flat.shape[0])], "float64")
        yield xp.sum(wide * wide)
