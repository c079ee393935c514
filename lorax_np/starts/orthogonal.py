"""Orthogonal start: A and B of normals, in halves of the rank at right angles.  Spec: specs/starts.md."""

import numpy as np

from ..errors import ConfigError
from .parts import Given, Start, generator


def orthogonal(given: Given) -> Start:
    """A from the odd rows of a random orthogonal matrix, B from the even ones, so that BA = 0."""
    W, r, rng = given.W, given.r, generator(given.rng)
    if r % 2:
        raise ConfigError(f"r: expected an even number with init_lora_weights='orthogonal', got {r}")
    d_out, d_in = W.shape
    Q = np.linalg.qr(rng.standard_normal((r, r)))[0]
    A = (rng.standard_normal((d_in, r // 2)) @ Q[0::2]).T / 10  # (starts.3)
    B = (rng.standard_normal((r // 2, d_out)).T @ Q[1::2]) / 10  # (starts.4)
    return Start(A, B)
