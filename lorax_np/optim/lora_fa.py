"""LoRA-FA as an optimiser: gradients of B corrected, A without any.  Derivation: specs/lorafa.md."""

from collections.abc import Mapping, Sequence

from ..backend import Array
from ..errors import ConfigError
from ..layers.lora_fa import lora_fa_corrected, lora_fa_inverse
from ..ops.experts import join_experts, split_experts
from ..tree import Leaves

Inverses = Mapping[str, Sequence[Array]]  # by SITE, of each of its experts


def lora_fa_gradients(
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    scaling: Mapping[str, float],
    *,
    ranks: Mapping[str, int] | None = None,
    inverses: Inverses | None = None,
) -> Leaves:
    """Return gradients for a step that holds every A: those of A left out, ĝB = s⁻²·gB(AAᵀ + 1e-8·I)⁺ for B.

    params, grads : arrays by name; SITE.A beside every SITE.B
    scaling       : s by SITE, the name up to its last part; any other gradient passes as it is
    ranks         : r of one expert by SITE, where A and B hold those of several: each has its own A, and its ĝB
    inverses      : lora_fa_inverses' of the same A, so that none is read on the host again; None for anew

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
            A, s = params[f"{site}.A"], scaling[site]
            own = _inverses(site, A, s, ranks) if inverses is None else inverses[site]
            found[name] = _corrected(g, A, s, own)
    return found


def lora_fa_inverses(
    params: Mapping[str, Array], scaling: Mapping[str, float], *, ranks: Mapping[str, int] | None = None
) -> Inverses:
    """Return the matrices of (lorafa.5) by SITE, of every A that stands beside a B: held, they never change.

    Arguments and errors as of lora_fa_gradients.
    """
    names = [name.removesuffix(".B") for name in params if name.endswith(".B")]
    sites = [site for site in names if site in scaling and f"{site}.A" in params]
    return {site: _inverses(site, params[f"{site}.A"], scaling[site], ranks) for site in sites}


def _inverses(site: str, A: Array, s: float, ranks: Mapping[str, int] | None) -> list[Array]:
    """Those of each expert's A; there is one where A has r rows."""
    r, have = (ranks or {}).get(site, A.shape[0]), A.shape[0]
    if r < 1 or have % r:
        raise ConfigError(f"ranks: expected a divisor of {have}, the rows of {site}.A, got {r}")
    As = [A] if r == have else split_experts(A, A.T, experts=have // r)[0]
    return [lora_fa_inverse(A_e, scaling=s) for A_e in As]


def _corrected(gB: Array, A: Array, s: float, inverses: Sequence[Array]) -> Array:
    """ĝB of each expert by its own A."""
    if len(inverses) == 1:
        return lora_fa_corrected(gB, A, scaling=s, inverse=inverses[0])
    As, gBs = split_experts(A, gB, experts=len(inverses))
    parts = zip(As, gBs, inverses, strict=True)
    return join_experts(As, [lora_fa_corrected(g, A_e, scaling=s, inverse=M) for A_e, g, M in parts])[1]
