"""How many numbers the forwards of BERT and GPT-2 keep for their backward, known before.  See specs/bert.md."""

from collections.abc import Sequence

from ..params import Adapter
from .bert_config import bert_prefix
from .gpt2 import PLACES, WORDS
from .llama_kept import linears_kept, rank
from .parts import first_block
from .passes import Pass


def bert_kept(at: Pass, N: int, keep: str) -> int:
    """Return how many numbers bert_forward keeps of N tokens; with keep="inputs", with those of a block anew.

    What is left out, and why, is as of llama_kept. Source: specs/bert.md, (bert.14) and (bert.15).
    """
    prefix, d = bert_prefix(at.config), int(at.config["hidden_size"])
    tables = [f"{prefix}embeddings.{part}_embeddings" for part in ("word", "token_type", "position")]
    blocks, first = f"{prefix}encoder.layer", f"{prefix}embeddings"
    L = int(at.config["num_hidden_layers"])
    each = [_bert_block(at, f"{blocks}.{i}") for i in range(first_block(at, [first], blocks, L), L)]
    return N * _sum(at, d, tables, each, keep)


def gpt2_kept(at: Pass, N: int, keep: str) -> int:
    """Return how many numbers gpt2_forward keeps of N tokens, as bert_kept."""
    d, L = int(at.config["n_embd"]), int(at.config["n_layer"])
    first = first_block(at, [WORDS, PLACES], "transformer.h", L)
    each = [_gpt2_block(at, f"transformer.h.{i}") for i in range(first, L)]
    return N * _sum(at, d, [WORDS, PLACES], each, keep)


def _sum(at: Pass, d: int, tables: Sequence[str], blocks: Sequence[int], keep: str) -> int:
    """Numbers kept of one token: of a norm, of tables with adapters, of blocks.  (bert.15)"""
    found = d + 1
    for table in tables:
        adapter = at.trained.adapters.get(table)
        if isinstance(adapter, Adapter):
            found += rank(adapter) + (0 if adapter.m is None else 2 * d)
    if keep == "all":
        return found + sum(blocks)
    return found + (len(blocks) * d + max(blocks, default=0) if keep == "inputs" else 0)


def _bert_block(at: Pass, block: str) -> int:
    """Numbers kept of one token by one block.  (bert.14)"""
    d, ff, H = (int(at.config[name]) for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    found = 2 * (d + 1) + 4 * d + H + ff  # norms; q, k, v, o, L; u
    heads = {f"{block}.attention.self.{part}": d for part in ("query", "key", "value")}
    found += linears_kept(at, d, heads)
    found += linears_kept(at, 0, {f"{block}.attention.output.dense": d}, d_in=d)  # its input is o
    found += linears_kept(at, d, {f"{block}.intermediate.dense": ff})
    return found + linears_kept(at, ff, {f"{block}.output.dense": d})


def _gpt2_block(at: Pass, block: str) -> int:
    """The same of GPT-2, whose q, k and v are one array.  (bert.14)"""
    d, ff, H = (int(at.config[name]) for name in ("n_embd", "n_inner", "n_head"))
    found = 2 * (d + 1) + 4 * d + H + ff
    found += linears_kept(at, d, {f"{block}.attn.c_attn": 3 * d})
    found += linears_kept(at, 0, {f"{block}.attn.c_proj": d}, d_in=d)
    found += linears_kept(at, d, {f"{block}.mlp.c_fc": ff})
    return found + linears_kept(at, ff, {f"{block}.mlp.c_proj": d})
