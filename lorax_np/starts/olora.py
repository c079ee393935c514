"""OLoRA: the first r columns of W's factor Q, and what they see of W.  Spec: specs/starts.md."""

import numpy as np

from .parts import Given, Start, check_rank


def olora(given: Given) -> Start:
    """B = Q[:, :r], A = R[:r] of W = QR; the base keeps W − s·BA, whatever s is."""
    W, r = given.W, given.r
    check_rank(r, min(W.shape), f"min(d_out, d_in)={min(W.shape)} set by W", "olora")
    B = np.linalg.qr(W[:, :r])[0]  # (d_out, r)  of W's first columns, which are Q's  (starts.5)
    A = np.triu(B.T @ W)  # (r, d_in)  (starts.6)
    return Start(A, B, residual=True)
