"""How many numbers llama's forward keeps for its backward, known before.  Derivation: specs/models.md."""

from collections.abc import Callable

from ..params import Adapter
from .llama import ALL, EMBEDDING, INPUTS, first_block
from .pairs import REFERENCE
from .passes import Pass


def llama_kept(at: Pass, N: int, keep: str, half: Callable[[Pass, str], int] | None = None) -> int:
    """Return how many numbers are kept of N tokens; with keep="inputs", with those of a block computed again.

    What does not grow with N, such as norms of DoRA in lx.fast, is left out; so are copies of inputs where
    adapters have another dtype than activations. half counts what a block's second half keeps of one token,
    where that is not llama's own. Source: specs/models.md, (models.27).
    """
    d, L, first = int(at.config["hidden_size"]), int(at.config["num_hidden_layers"]), first_block(at)
    turn, table = int(at.config["head_dim"]), at.trained.adapters.get(EMBEDDING)
    if keep not in (ALL, INPUTS):
        return N * turn
    ends = turn + d + 1
    if isinstance(table, Adapter):
        ends += rank(table) + (0 if table.m is None else 2 * d)
    names, second = [f"model.layers.{i}" for i in range(first, L)], half or _gated
    blocks = [_attention(at, name) + second(at, name) for name in names]
    if keep == INPUTS:
        return N * (ends + (L - first) * d + max(blocks, default=0))
    return N * (ends + sum(blocks))


def _attention(at: Pass, block: str) -> int:
    """Numbers kept of one token by the first half of a block.  (models.26)"""
    d, D = int(at.config["hidden_size"]), int(at.config["head_dim"])
    H, K = (int(at.config[name]) for name in ("num_attention_heads", "num_key_value_heads"))
    attention = f"{block}.self_attn"
    found = d + 1 + 2 * (H + K) * D + H  # the norm; q, k, v, o, L
    found += sum(n * (D + 1) for n, name in ((H, "q"), (K, "k")) if at.has(f"{attention}.{name}_norm.weight"))
    heads = {f"{attention}.{name}_proj": n * D for name, n in (("q", H), ("k", K), ("v", K))}
    found += linears_kept(at, d, heads)
    return found + linears_kept(at, 0, {f"{attention}.o_proj": d}, d_in=H * D)  # its input is o


def _gated(at: Pass, block: str) -> int:
    """Numbers kept of one token by the second half of a block.  (models.26)"""
    d, ff, mlp = int(at.config["hidden_size"]), int(at.config["intermediate_size"]), f"{block}.mlp"
    found = d + 1 + 2 * ff  # the norm; gate and up
    found += linears_kept(at, d, {f"{mlp}.gate_proj": ff, f"{mlp}.up_proj": ff})
    return found + linears_kept(at, ff, {f"{mlp}.down_proj": d})


def linears_kept(at: Pass, shared: int, modules: dict[str, int], d_in: int | None = None) -> int:
    """Of modules, by what they put out, that read one input: the input once, and what each keeps besides."""
    adapters = {name: at.trained.adapters.get(name) for name in modules}
    adapted = {name: a for name, a in adapters.items() if isinstance(a, Adapter) and a.A is not None}
    found = shared if adapted or any(at.whole(f"{name}.weight") for name in modules) else 0
    reference = at.pair is REFERENCE
    for name, adapter in adapted.items():
        found += rank(adapter)
        if at.dropout is not None and at.sites[name].p:
            found += (2 if reference else 1) * (d_in or shared)  # the mask; the dropped input
        if adapter.m is not None:
            found += (2 if reference else 1) * modules[name]  # (dora.1)'s products, apart or added up
    return found


def rank(adapter: Adapter) -> int:
    """The r of an adapter; 0 where it is a bias alone."""
    return 0 if adapter.A is None else int(adapter.A.shape[0])
