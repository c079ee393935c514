"""LoftQ: a base in few bits, and the adapter that gives back most of what that lost.  Spec: specs/starts.md."""

import numpy as np

from ..backend import HostArray
from ..quant import dequantise_int8, dequantise_nf4, quantise_int8, quantise_nf4
from ..singular import largest
from .parts import Given, Start, check_rank


def loftq(given: Given) -> Start:
    """Quantise W − s·BA, fit s·BA to what is missing, as often as loftq_iter says."""
    W, r, s = given.W, given.r, given.s
    check_rank(r, min(W.shape), f"min(d_out, d_in)={min(W.shape)} set by W", "loftq")
    rest = W
    for turn in range(given.settings["loftq_iter"]):
        D = _on_the_grid(rest, given.settings["loftq_bits"])  # (starts.7)
        U, S, Vh = largest(W - D, r)  # (starts.8)
        if turn + 1 < given.settings["loftq_iter"]:
            rest = W - (U * S).astype(W.dtype) @ Vh.astype(W.dtype)
    root = np.sqrt(S / s)
    return Start(root[:, None] * Vh, U * root, W=D)  # (starts.9)


def _on_the_grid(W: HostArray, bits: int) -> HostArray:
    """What W's codes of that many bits stand for: NF4 in blocks of 64, or 8 bits by rows."""
    found = dequantise_nf4(quantise_nf4(W)) if bits == 4 else dequantise_int8(quantise_int8(W))
    return found.astype(W.dtype)
