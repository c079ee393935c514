"""LoRA-GA: directions of the loss's gradient, so that a first step goes W's way.  Spec: specs/starts.md."""

import numpy as np

from ..backend import HostArray
from ..errors import ConfigError
from ..singular import largest
from .parts import Given, Start, check_rank, generator, signed


def lora_ga(given: Given) -> Start:
    """A of r right singular vectors of the gradient, B of r left ones times their values; W − s·BA remains."""
    W, r, s, G = given.W, given.r, given.s, given.gradient
    if G is None:
        raise ConfigError("gradient: expected the loss's by W for init_lora_weights='lora_ga', got None")
    check_rank(r, min(W.shape) // 2, f"min(d_out, d_in)/2={min(W.shape) // 2} set by W", "lora_ga")
    if not G.any():
        raise ConfigError("gradient: expected one with directions, got zeros")
    U, S, Vh = largest(G, 2 * r)  # (starts.16)
    sign = signed(Vh)
    U, Vh = U * sign.T, Vh * sign
    to_A, to_B = _shared(given.settings["direction"], r, given.rng)
    A, B = Vh[to_A], U[:, to_B] * S[to_B]  # (starts.17)
    scale = given.settings["scale"]
    if scale == "stable":
        B = B * (W.shape[0] ** 0.25 / given.settings["stable_gamma"] ** 0.5)  # (starts.18)
    elif scale == "weight_svd" and S[to_B][0] > 0:
        B = B * (largest(W, 1).S[0] / S[to_B][0])  # (starts.19)
    elif scale == "gd_scale":
        A, B = A / s, B / s  # (starts.20)
    return Start(A, B, residual=True)


def _shared(direction: str, r: int, rng: np.random.Generator | None) -> tuple[HostArray, HostArray]:
    """Which of the 2r triples A takes its vectors from, and which B."""
    if direction == "random":
        chosen = generator(rng).permutation(2 * r)[:r]
        return chosen, chosen
    even, odd, first, last = (
        np.arange(2 * r)[part] for part in (np.s_[0::2], np.s_[1::2], np.s_[:r], np.s_[r:])
    )
    return {"ArBr": (odd, even), "A2rBr": (last, first), "ArB2r": (first, last)}[direction]
