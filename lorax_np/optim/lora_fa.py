"""LoRA-FA as an optimiser: gradients of B corrected, A without any.  Derivation: specs/lorafa.md."""

from collections.abc import Mapping

from ..backend import Array
from ..errors import ConfigError
from ..layers.lora_fa import lora_fa_corrected
from ..ops.experts import join_experts, split_experts
from ..tree import Leaves


def lora_fa_gradients(
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    scaling: Mapping[str, float],
    *,
    ranks: Mapping[str, int] | None = None,
) -> Leaves:
    """Return gradients for a step that holds every A: those of A left out, ĝB = s⁻²·gB(AAᵀ + 1e-8·I)⁺ for B.

    params, grads : arrays by name; SITE.A beside every SITE.B
    scaling       : s by SITE, the name up to its last part; any other gradient passes as it is
    ranks         : r of one expert by SITE, where A and B hold those of several: each has its own A, and its ĝB

    Feed them to adamw_step or sgd_step, which leave what has no gradient alone.
    Raises ConfigError for a site without a scaling or without A, for ranks that do not divide A's rows, and
    where s is 0.
    Source: Zhang et al. 2023, arXiv:2308.03303; specs/lorafa.md.

    >>> import numpy as np
    >>> params = {"q.A": np.diag([1.0, 2.0]), "q.B": np.zeros((1, 2))}
    >>> grads = {"q.A": np.ones((2, 2)), "q.B": np.array([[3.0, 8.0]])}
    >>> {k: g.round(6).tolist() for k, g in lora_fa_gradients(params, grads, {"q": 0.5}).items()}
    {'q.B': [[12.0, 8.0]]}
    """
    found: Leaves = {}
    for name, g in grads.items():
        site, _, last = name.rpartition(".")
        if last == "B" and site not in scaling:
            raise ConfigError(f"scaling: expected one for {site}, got none")
        if site not in scaling or last not in ("A", "B"):
            found[name] = g
        elif last == "B":
            if f"{site}.A" not in params:
                raise ConfigError(f"{site}.A: expected it among the parameters, got none")
            A = params[f"{site}.A"]
            found[name] = _corrected(site, g, A, scaling[site], (ranks or {}).get(site, A.shape[0]))
    return found


def _corrected(site: str, gB: Array, A: Array, s: float, r: int) -> Array:
    """ĝB of each expert by its own A; there is one where A has r rows."""
    if r == A.shape[0]:
        return lora_fa_corrected(gB, A, scaling=s)
    if r < 1 or A.shape[0] % r:
        raise ConfigError(f"ranks: expected a divisor of {A.shape[0]}, the rows of {site}.A, got {r}")
    As, gBs = split_experts(A, gB, experts=A.shape[0] // r)
    return join_experts(As, [lora_fa_corrected(g, A_e, scaling=s) for A_e, g in zip(As, gBs, strict=True)])[1]
