"""CorDA: W's directions as its inputs use them, the most or the least of them.  Spec: specs/starts.md."""

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from ..singular import largest
from .moments import Moments
from .parts import Given, Start, check_rank

DAMPING = 0.01  # of the mean square of an input


def corda(given: Given) -> Start:
    """The first or the last r singular triples of WC, taken back through C⁻¹; the base keeps W − s·BA."""
    W, r, s = given.W.astype(np.float64), given.r, given.s
    check_rank(r, min(W.shape), f"min(d_out, d_in)={min(W.shape)} set by W", "corda")
    C = covariance(given.inputs)
    if given.settings["corda_method"] == "ipm":
        U, S, Vh = largest(W @ C, r)  # (starts.13)
    else:
        U, S, Vh = np.linalg.svd(W @ C, full_matrices=False)
        U, S, Vh = U[:, -r:], S[-r:], Vh[-r:]  # (starts.14)
    root = np.sqrt(S / s)
    return Start(root[:, None] * np.linalg.solve(C, Vh.T).T, U * root, residual=True)  # (starts.15)


def covariance(inputs: Moments | None) -> HostArray:
    """C = XᵀX over the mean of its diagonal, and 0.01 more on the diagonal: (d_in, d_in), positive definite."""
    if inputs is None:
        raise ConfigError("inputs: expected a layer's inputs for init_lora_weights='corda', got None")
    C: HostArray = inputs.scatter / inputs.rows + np.outer(inputs.mean, inputs.mean)  # (starts.11)
    mean = float(np.mean(np.diagonal(C)))
    if mean == 0:
        raise ConfigError("inputs: expected some that are not 0, got zeros")
    C /= mean
    C[np.diag_indices_from(C)] += DAMPING  # (starts.12)
    return C
