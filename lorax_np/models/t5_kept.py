"""How many numbers T5's forward keeps for its backward, known before.  Derivation: specs/encdec.md."""

from collections.abc import Sequence

from ..params import Adapter
from .llama_kept import linears_kept, rank
from .parts import first_block
from .passes import Pass
from .t5_block import READ, T5, WRITE, t5_of
from .t5_config import TABLE


def t5_kept(at: Pass, N: int, keep: str) -> int:
    """Return how many numbers t5_forward keeps of N tokens that are read and as many that are written."""
    return t5_kept_of(at, N, N, keep)


def t5_kept_of(at: Pass, M: int, N: int, keep: str) -> int:
    """Return how many numbers t5_forward keeps of M tokens that are read and N that are written.

    What is left out, and why, is as of llama_kept. Source: specs/encdec.md, (encdec.22) and (encdec.23).
    """
    form, d, table = t5_of(at), int(at.config["d_model"]), at.trained.adapters.get(TABLE)
    ends = d + 1
    if isinstance(table, Adapter):
        ends += rank(table) + (0 if table.m is None else 2 * d)
    readers, writers = _names(at, READ, [TABLE], form), _names(at, WRITE, [TABLE, READ], form)
    read = [M * _block(at, name, 1, form) for name in readers]
    write = [N * _block(at, name, 2, form) + M * _memory(at, name, form) for name in writers]
    found = (M + N) * ends + M * d
    if keep == "all":
        return found + sum(read) + sum(write)
    return found + (d * (M * len(read) + N * len(write)) + max([0, *read, *write]) if keep == "inputs" else 0)


def _names(at: Pass, stack: str, below: Sequence[str], form: T5) -> list[str]:
    """The blocks of a stack that have a backward."""
    count = form.layers[stack]
    first = first_block(at, below, f"{stack}.block", count)
    return [f"{stack}.block.{i}" for i in range(first, count)]


def _block(at: Pass, block: str, attentions: int, form: T5) -> int:
    """Numbers kept of one of its own tokens by one block.  (encdec.22)"""
    d, ff, inner = (int(at.config["d_model"]), int(at.config["d_ff"]), form.heads * int(at.config["d_kv"]))
    own = f"{block}.layer.0.SelfAttention"
    found = d + 1 + 4 * inner + form.heads  # the norm; q, k, v, o, L
    found += linears_kept(at, d, {f"{own}.{part}": inner for part in "qkv"})
    found += linears_kept(at, 0, {f"{own}.o": d}, d_in=inner)  # its input is o
    if attentions == 2:
        cross = f"{block}.layer.1.EncDecAttention"
        found += d + 1 + 2 * inner + form.heads
        found += linears_kept(at, d, {f"{cross}.q": inner})
        found += linears_kept(at, 0, {f"{cross}.o": d}, d_in=inner)
    dense = f"{block}.layer.{attentions}.DenseReluDense"
    ups = ("wi_0", "wi_1") if form.gated else ("wi",)
    found += d + 1 + len(ups) * ff
    found += linears_kept(at, d, {f"{dense}.{up}": ff for up in ups})
    return found + linears_kept(at, ff, {f"{dense}.wo": d})


def _memory(at: Pass, block: str, form: T5) -> int:
    """Numbers kept of one token of the memory by one block of the decoder.  (encdec.22)"""
    d, inner, cross = (
        int(at.config["d_model"]),
        form.heads * int(at.config["d_kv"]),
        f"{block}.layer.1.EncDecAttention",
    )
    return 2 * inner + linears_kept(at, 0, {f"{cross}.{part}": inner for part in "kv"}, d_in=d)
