"""How many numbers a mixture's forward keeps for its backward, known before.  Derivation: specs/moe.md."""

from .llama_kept import linears_kept, llama_kept
from .moe_config import DOWN, GATE_UP
from .passes import Pass


def moe_kept(at: Pass, N: int, keep: str) -> int:
    """Return how many numbers moe_forward keeps of N tokens, as llama_kept. Source: specs/moe.md, (moe.16)."""
    return llama_kept(at, N, keep, _mixture)


def _mixture(at: Pass, block: str) -> int:
    """Numbers kept of one token by the second half of a block.  (moe.16)"""
    d, ff, E = (int(at.config[name]) for name in ("hidden_size", "intermediate_size", "num_local_experts"))
    k, mlp = int(at.config["num_experts_per_tok"]), f"{block}.mlp"
    found = d + 1 + k + k * d + 2 * k * ff  # the norm; w, e, gate and up
    found += 0 if at.config["norm_topk_prob"] else E  # the softmax of all
    found += linears_kept(at, d, {f"{mlp}.gate": E})
    for name, rows, size in (
        (f"{mlp}.{GATE_UP}", k, d),
        (f"{mlp}.{DOWN}", k, ff),
        (f"{mlp}.gate.weight", 1, d),
    ):
        if name in at.trained.adapters:
            found += rows * (size + at.sites[name].r)
        elif at.whole(name) and not name.endswith(".weight"):
            found += rows * size
    return found
