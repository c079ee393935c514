"""BERT and RoBERTa: embeddings, blocks whose norms stand behind, a pooler; and their adjoints.

Derivation: specs/bert.md.
"""

from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from ..ops.activation import tanh_backward, tanh_forward
from ..ops.attention import AttentionSaved, attention_backward, attention_forward
from ..ops.norm import NormSaved
from ..ops.pooling import pick_backward, pick_forward
from .bert_config import bert_prefix
from .parts import (
    ACTIVATIONS,
    Activation,
    activated,
    check_kept,
    check_types,
    first_block,
    join_heads,
    joined,
    positions,
    split_heads,
    to_keep,
)
from .passes import Pass
from .records import Batch, Gradients, Rows


class Bert(NamedTuple):
    """What the passes read of a model's config.json."""

    prefix: str  # "bert." or "roberta.", in front of every name
    layers: int
    heads: int
    eps: float
    act: Activation
    first: int  # the position of a sequence's first token: 0, in RoBERTa past that of padding
    padding: int | None  # the id whose row of the table does not train


class BlockSaved(NamedTuple):
    """What a block's backward reads; entries are those of its layers, in the order of the forward pass."""

    query: Any
    key: Any
    value: Any
    attention: AttentionSaved
    dense: Any
    norm: NormSaved
    up: Any
    slope: Any  # (N, d_ff)  of the activation at its input
    down: Any
    last: NormSaved


class BertSaved(NamedTuple):
    """What bert_backward reads."""

    rows: Rows
    words: Any
    types: Any
    places: Any
    norm: NormSaved
    blocks: tuple[Any, ...]  # of each block what it saved, or its input where it is computed again
    first: int  # the first block in or below which something trains


def bert_of(at: Pass) -> Bert:
    """What the passes read, of config.json with defaults filled in."""
    config = at.config
    return Bert(
        prefix=bert_prefix(config),
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        eps=config["layer_norm_eps"],
        act=ACTIVATIONS[config["hidden_act"]],
        first=config["first_position"],
        padding=config["pad_token_id"],
    )


# ---- the encoder -------------------------------------------------------------------------------------------


def bert_forward(at: Pass, batch: Batch, keep: str = "all") -> tuple[Array, BertSaved]:
    """The last hidden state of each token.

    at : Pass      weights by name, what trains at them, config.json with defaults filled in
    batch : Batch  ids : (N,), and types : (N,) or None for 0
    keep : str     "all"; "inputs", of blocks, which the backward computes again; "nothing", where none follows

    Returns h : (N, d) and the saved activations. The model's own dropout is not applied (specs/bert.md).
    Raises ConfigError for ids, types and lengths past the tables.
    """
    form, rows, ids = bert_of(at), batch.rows, batch.ids
    name = f"{form.prefix}embeddings"
    N = rows.starts[-1]
    types = np.zeros(N, "int64") if batch.types is None else batch.types
    check_types(types, N, at.config["type_vocab_size"])
    place = positions(rows, first=form.first, most=at.config["max_position_embeddings"])

    e, words = at.embedding(f"{name}.word_embeddings", ids)
    t, of_types = at.embedding(f"{name}.token_type_embeddings", types)
    p, places = at.embedding(f"{name}.position_embeddings", place)
    h, norm = at.layer_norm(f"{name}.LayerNorm", e + t + p, form.eps)  # (N, d)  (bert.1)
    name, blocks = f"{form.prefix}encoder.layer", []
    first = first_block(at, [f"{form.prefix}embeddings"], name, form.layers)
    for i in range(form.layers):
        x = h
        h, block = block_forward(at, f"{name}.{i}", x, rows, form, kept=keep == "all" and i >= first)
        blocks.append(to_keep(keep if i >= first else "nothing", x, block))
        del block  # what is not kept makes room for the next block's
    return h, BertSaved(rows, words, of_types, places, norm, tuple(blocks), first)


def bert_backward(gh: Array, saved: BertSaved, at: Pass, gradients: Gradients) -> None:
    """Adjoint of bert_forward: gh : (N, d); adds the gradients of all that trains."""
    form, g = bert_of(at), gh
    check_kept(saved.blocks, saved.first)
    for i in reversed(range(saved.first, form.layers)):
        name, block = f"{form.prefix}encoder.layer.{i}", saved.blocks[i]
        if not isinstance(block, BlockSaved):
            _, block = block_forward(at, name, block, saved.rows, form, kept=True)
        g = block_backward(at, name, g, block, saved.rows, gradients, form)
    name = f"{form.prefix}embeddings"
    if not at.trains(name):
        return
    g = at.layer_norm_back(f"{name}.LayerNorm", g, saved.norm, gradients)  # (N, d)  (bert.8), one for all three
    at.embedding_back(f"{name}.word_embeddings", g, saved.words, gradients, padding=form.padding)
    at.embedding_back(f"{name}.token_type_embeddings", g, saved.types, gradients)
    at.embedding_back(f"{name}.position_embeddings", g, saved.places, gradients)  # no token has padding's place


def block_forward(
    at: Pass, name: str, x: Array, rows: Rows, form: Bert, *, kept: bool
) -> tuple[Array, BlockSaved]:
    """One block: attention, then a perceptron, each added to its input and the sum normed.

    x : (N, d) -> y : (N, d), and the saved activations, of which a backward reads all if they are kept.
    Source: specs/bert.md, (bert.2) to (bert.5).
    """
    q, query = at.linear(f"{name}.attention.self.query", x, rows)
    k, key = at.linear(f"{name}.attention.self.key", x, rows)
    v, value = at.linear(f"{name}.attention.self.value", x, rows)
    q, k, v = (split_heads(each, form.heads) for each in (q, k, v))
    o, attention = at.op(attention_forward)(
        q, k, v, starts=rows.starts, scale=q.shape[2] ** -0.5, causal=False
    )  # (N, H, D)  (bert.2)
    flat, attention = joined(o, attention)
    a, dense = at.linear(f"{name}.attention.output.dense", flat, rows)
    n, norm = at.layer_norm(f"{name}.attention.output.LayerNorm", x + a, form.eps)  # (N, d)  (bert.3)
    u, up = at.linear(f"{name}.intermediate.dense", n, rows)
    f, slope = activated(at, form.act, u, kept=kept)
    w, down = at.linear(f"{name}.output.dense", f, rows)  # (N, d)  (bert.4)
    y, last = at.layer_norm(f"{name}.output.LayerNorm", n + w, form.eps)  # (N, d)  (bert.5)
    return y, BlockSaved(query, key, value, attention, dense, norm, up, slope, down, last)


def block_backward(
    at: Pass, name: str, gy: Array, saved: BlockSaved, rows: Rows, gradients: Gradients, form: Bert
) -> Array:
    """Adjoint of block_forward: gy : (N, d) -> gx : (N, d); what leaves a norm goes both ways of its sum.

    Source: specs/bert.md, (bert.9) to (bert.12).
    """
    g = at.layer_norm_back(f"{name}.output.LayerNorm", gy, saved.last, gradients)  # (N, d)  (bert.9)
    gu = at.linear_back(f"{name}.output.dense", g, saved.down, gradients) * saved.slope
    g = g + at.linear_back(f"{name}.intermediate.dense", gu, saved.up, gradients)  # (N, d)  (bert.10)
    g = at.layer_norm_back(f"{name}.attention.output.LayerNorm", g, saved.norm, gradients)  # (N, d)  (bert.11)
    go = at.linear_back(f"{name}.attention.output.dense", g, saved.dense, gradients)
    gq, gk, gv, _ = at.op(attention_backward)(
        split_heads(go, form.heads),
        saved.attention,
        starts=rows.starts,
        scale=(go.shape[1] // form.heads) ** -0.5,
        causal=False,
    )
    for part, each, read in (("query", gq, saved.query), ("key", gk, saved.key), ("value", gv, saved.value)):
        g = g + at.linear_back(f"{name}.attention.self.{part}", join_heads(each), read, gradients)  # (bert.12)
    return g


# ---- the pooler --------------------------------------------------------------------------------------------


class PoolerSaved(NamedTuple):
    """What pooler_backward reads."""

    first: Any  # (S,)  the row that each sequence is represented by
    N: int
    dense: Any
    y: Array  # (S, d)


def pooler_forward(at: Pass, h: Array, rows: Rows, name: str) -> tuple[Array, PoolerSaved]:
    """One vector for each sequence, y = tanh(W h[first row] + b).

    h : (N, d), name : that of the linear layer -> y : (S, d), and the saved activations
    """
    first = np.array(rows.starts[:-1], "int64")
    u, dense = at.linear(name, pick_forward(h, first), one_row_each(rows))  # (S, d)  (bert.6)
    y = tanh_forward(u)  # (S, d)  (bert.7)
    return y, PoolerSaved(first, h.shape[0], dense, y)


def pooler_backward(gy: Array, saved: PoolerSaved, at: Pass, gradients: Gradients, name: str) -> Array:
    """Adjoint of pooler_forward: gy : (S, d) -> gh : (N, d), 0 in every row but the first ones."""
    g = at.linear_back(name, tanh_backward(gy, saved.y), saved.dense, gradients)  # (S, d)  (bert.13)
    return pick_backward(g, saved.first, saved.N)


def one_row_each(rows: Rows) -> Rows:
    """The rows of an array that has one row for each sequence."""
    return Rows(tuple(range(len(rows.index) + 1)), rows.index)
