"""Whether factors of fused experts stand in the order that their format says, by what training left in them.

Experts are trained by different tokens, so the sizes of their rows differ from one to the next and agree within
each. The share of the variance of log sizes between groups, η², is Beta((E − 1)/2, (n − E)/2) where a grouping
of n rows into E means nothing; the other order is convicted where its η² would be a chance below 1e-6, and the
format's own is much less telling.
"""

from math import lgamma

import numpy as np

from ..backend import HostArray

CHANCE = 1e-6


def misplaced(A: HostArray, B: HostArray, experts: int) -> str:
    """Which of A (E·r, d_in), expert by expert, and B (d_out, r·E), expert fastest, is in the other order."""
    n = A.shape[0]
    r = n // experts
    if experts < 2 or r < 2:
        return ""
    slow, fast = np.arange(n) // r, np.arange(n) % experts
    wrong = [
        name
        for name, values, right, other in (("A", A, slow, fast), ("B", B.T, fast, slow))
        if _convicted(np.linalg.norm(values.astype(np.float64), axis=1), right, other, experts)
    ]
    return " and ".join(wrong)


def _convicted(sizes: HostArray, right: HostArray, other: HostArray, experts: int) -> bool:
    if not (sizes > 0).all():
        return False
    chance = {name: _chance(np.log(sizes), groups, experts) for name, groups in (("r", right), ("o", other))}
    return chance["o"] < CHANCE and chance["o"] < chance["r"] ** 2


def _chance(values: HostArray, groups: HostArray, experts: int) -> float:
    """P(η² ≥ what is seen) where the groups mean nothing, by the trapezoidal rule on Beta's density."""
    n = len(values)
    means = np.array([values[groups == e].mean() for e in range(experts)])
    total = float(((values - values.mean()) ** 2).sum())
    between = float(n / experts * ((means - values.mean()) ** 2).sum())
    if total == 0:
        return 1.0
    a, b = (experts - 1) / 2, (n - experts) / 2
    logs = np.linspace(np.log(max(1 - between / total, 1e-300)), -700.0, 20001)  # of 1 − η², which may be tiny
    density = (a - 1) * np.log1p(-np.minimum(np.exp(logs), 1 - 1e-16)) + b * logs
    scale = lgamma(a + b) - lgamma(a) - lgamma(b)
    heights = np.exp(density + scale)
    steps = np.abs(np.diff(logs))
    return min(1.0, float((steps * (heights[1:] + heights[:-1]) / 2).sum()))
