"""Size of an update s·BA by its singular values, from the small factors: no d_out × d_in matrix is formed."""

from math import isfinite, prod

import numpy as np

from .backend import HostArray, cast, to_host
from .errors import ConfigError
from .params import AnyAdapter, ConvAdapter


def delta_factors(adapter: AnyAdapter) -> tuple[HostArray, HostArray]:
    """Return A : (r, n) and B : (d_out, r) in float64 on the host, such that BA is the update as a matrix.

    A convolution's kernel is folded into n = d_in·∏κ; where it has groups, B is spread to its blocks.
    Raises ConfigError for an adapter without A and B.
    """
    if adapter.A is None or adapter.B is None:
        raise ConfigError("adapter: expected A and B, got a trained bias alone")
    A, B = (to_host(cast(to_host(part), "float64")) for part in (adapter.A, adapter.B))
    if not isinstance(adapter, ConvAdapter):
        return A, B
    r, d_out, each = A.shape[0], B.shape[0], B.shape[1]
    groups = r // each
    spread = np.zeros((groups, d_out // groups, groups, each))
    at = np.arange(groups)
    spread[at, :, at] = B.reshape(groups, d_out // groups, each)
    return A.reshape(r, prod(A.shape[1:])), spread.reshape(d_out, r)


def delta_spectrum(adapter: AnyAdapter, *, scaling: float, experts: int = 1) -> HostArray:
    """Return the singular values of s·BA in falling order : (min(r, d_out, n),), float64 on the host.

    With experts E > 1 the factors are those of a fused parameter: A (E·r, n) expert by expert, B (d_out, r·E)
    with the expert running fastest; the values of all experts are returned : (E, min(r, ...)).

    BA = Q_B (R_B R_Aᵀ) Q_Aᵀ with Q_B and Q_A orthonormal, so that the values are those of R_B R_Aᵀ : (r, r).
    Raises ConfigError for an adapter without A and B, or whose rank is no multiple of the experts.

    >>> from lorax_np.params import Adapter
    >>> delta_spectrum(Adapter(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0]])), scaling=0.5).tolist()
    [5.0]
    """
    A, B = delta_factors(adapter)
    if not isfinite(scaling):
        raise ConfigError(f"scaling: expected a finite float, got {scaling!r}")
    if experts == 1:
        return abs(scaling) * _values(A, B)
    if A.shape[0] % experts:
        raise ConfigError(f"experts: expected a divisor of A's {A.shape[0]} rows, got {experts}")
    r = A.shape[0] // experts
    A, B = A.reshape(experts, r, -1), B.reshape(B.shape[0], r, experts)
    return abs(scaling) * np.stack([_values(A[e], B[:, :, e]) for e in range(experts)])


def _values(A: HostArray, B: HostArray) -> HostArray:
    R_A, R_B = np.linalg.qr(A.T)[1], np.linalg.qr(B)[1]
    return np.linalg.svd(R_B @ R_A.T, compute_uv=False)
