"""GPT-2: learned positions, blocks whose norms stand in front, weights stored transposed; and their adjoints.

Derivation: specs/gpt.md.
"""

from typing import Any, NamedTuple

from ..backend import Array, namespace_of
from ..ops.attention import AttentionSaved, attention_backward, attention_forward
from ..ops.norm import NormSaved
from .parts import (
    ACTIVATIONS,
    Activation,
    activated,
    check_kept,
    first_block,
    join_heads,
    joined,
    positions,
    split_heads,
    to_keep,
)
from .passes import Pass
from .records import Batch, Gradients, Rows

WORDS, PLACES = "transformer.wte", "transformer.wpe"


class Gpt2(NamedTuple):
    """What the passes read of a model's config.json."""

    heads: int
    eps: float
    act: Activation
    scales: tuple[float, ...]  # of each layer, what q·k is multiplied by


class BlockSaved(NamedTuple):
    """What a block's backward reads; entries are those of its layers, in the order of the forward pass."""

    first: NormSaved
    qkv: Any
    attention: AttentionSaved
    out: Any
    second: NormSaved
    up: Any
    slope: Any  # (N, d_ff)  of the activation at its input
    down: Any


class Gpt2Saved(NamedTuple):
    """What gpt2_backward reads."""

    rows: Rows
    words: Any
    places: Any
    blocks: tuple[Any, ...]  # of each block what it saved, or its input where it is computed again
    first: int  # the first block in or below which something trains
    norm: NormSaved


def gpt2_of(at: Pass) -> Gpt2:
    """What the passes read, of config.json with defaults filled in."""
    config = at.config
    scale = (config["n_embd"] // config["n_head"]) ** -0.5 if config["scale_attn_weights"] else 1.0
    by_layer = config["scale_attn_by_inverse_layer_idx"]
    return Gpt2(
        heads=config["n_head"],
        eps=config["layer_norm_epsilon"],
        act=ACTIVATIONS[config["activation_function"]],
        scales=tuple(scale / (i + 1) if by_layer else scale for i in range(config["n_layer"])),
    )


def gpt2_forward(at: Pass, batch: Batch, keep: str = "all") -> tuple[Array, Gpt2Saved]:
    """The last hidden state of each token, normed, as the output head reads it.

    at : Pass      weights by name, what trains at them, config.json with defaults filled in
    batch : Batch  ids : (N,)
    keep : str     "all"; "inputs", of blocks, which the backward computes again; "nothing", where none follows

    Returns h : (N, d) and the saved activations. The model's own dropout is not applied (specs/gpt.md).
    Raises ConfigError for ids and lengths past the tables.
    """
    form, rows, ids = gpt2_of(at), batch.rows, batch.ids
    place = positions(rows, first=0, most=at.config["n_positions"])
    e, words = at.embedding(WORDS, ids)
    p, places = at.embedding(PLACES, place)
    h = e + p  # (N, d)  (gpt.1)
    first, blocks = first_block(at, [WORDS, PLACES], "transformer.h", len(form.scales)), []
    for i, scale in enumerate(form.scales):
        x = h
        kept = keep == "all" and i >= first
        h, block = block_forward(at, f"transformer.h.{i}", x, rows, form, scale=scale, kept=kept)
        blocks.append(to_keep(keep if i >= first else "nothing", x, block))
        del block  # what is not kept makes room for the next block's
    y, norm = at.layer_norm("transformer.ln_f", h, form.eps)  # (N, d)  (gpt.6)
    return y, Gpt2Saved(rows, words, places, tuple(blocks), first, norm)


def gpt2_backward(gh: Array, saved: Gpt2Saved, at: Pass, gradients: Gradients) -> None:
    """Adjoint of gpt2_forward: gh : (N, d); adds the gradients of all that trains."""
    form = gpt2_of(at)
    check_kept(saved.blocks, saved.first)
    g = at.layer_norm_back("transformer.ln_f", gh, saved.norm, gradients)  # (N, d)  (gpt.7)
    for i, scale in reversed(list(enumerate(form.scales))[saved.first :]):
        name, block = f"transformer.h.{i}", saved.blocks[i]
        if not isinstance(block, BlockSaved):
            _, block = block_forward(at, name, block, saved.rows, form, scale=scale, kept=True)
        g = block_backward(at, name, g, block, saved.rows, gradients, form, scale=scale)
    at.embedding_back(WORDS, g, saved.words, gradients)  # (gpt.12), the same g for both
    at.embedding_back(PLACES, g, saved.places, gradients)


def block_forward(
    at: Pass, name: str, x: Array, rows: Rows, form: Gpt2, *, scale: float, kept: bool
) -> tuple[Array, BlockSaved]:
    """One block: attention, then a perceptron, each of a normed input, added to it.

    x : (N, d) -> y : (N, d), and the saved activations, of which a backward reads all if they are kept.
    Source: specs/gpt.md, (gpt.2) to (gpt.5).
    """
    d = x.shape[1]
    n, first = at.layer_norm(f"{name}.ln_1", x, form.eps)
    w, qkv = at.linear(f"{name}.attn.c_attn", n, rows, transposed=True)  # (N, 3d)  (gpt.2)
    q, k, v = (split_heads(w[:, i * d : (i + 1) * d], form.heads) for i in range(3))
    o, attention = at.op(attention_forward)(
        q, k, v, starts=rows.starts, scale=scale, causal=True
    )  # (N, H, D)  (gpt.3)
    flat, attention = joined(o, attention)
    a, out = at.linear(f"{name}.attn.c_proj", flat, rows, transposed=True)
    h = x + a  # (N, d)  (gpt.4)
    n, second = at.layer_norm(f"{name}.ln_2", h, form.eps)
    u, up = at.linear(f"{name}.mlp.c_fc", n, rows, transposed=True)
    f, slope = activated(at, form.act, u, kept=kept)
    w, down = at.linear(f"{name}.mlp.c_proj", f, rows, transposed=True)
    return h + w, BlockSaved(first, qkv, attention, out, second, up, slope, down)  # (N, d)  (gpt.5)


def block_backward(
    at: Pass,
    name: str,
    gy: Array,
    saved: BlockSaved,
    rows: Rows,
    gradients: Gradients,
    form: Gpt2,
    *,
    scale: float,
) -> Array:
    """Adjoint of block_forward: gy : (N, d) -> gx : (N, d). What was added to keeps its gradient as it is.

    Source: specs/gpt.md, (gpt.8) to (gpt.11).
    """

    def back(layer: str, g: Array, what: Any) -> Array:
        return at.linear_back(f"{name}.{layer}", g, what, gradients, transposed=True)

    gu = back("mlp.c_proj", gy, saved.down) * saved.slope  # (N, d_ff)  (gpt.8)
    gn = back("mlp.c_fc", gu, saved.up)
    g = gy + at.layer_norm_back(f"{name}.ln_2", gn, saved.second, gradients)  # (N, d)  (gpt.9)
    go = split_heads(back("attn.c_proj", g, saved.out), form.heads)
    parts = at.op(attention_backward)(go, saved.attention, starts=rows.starts, scale=scale, causal=True)[:3]
    gw = namespace_of(gy=gy).concat([join_heads(each) for each in parts], axis=1)  # (N, 3d)  (gpt.10)
    gn = back("attn.c_attn", gw, saved.qkv)
    return g + at.layer_norm_back(f"{name}.ln_1", gn, saved.first, gradients)  # (N, d)  (gpt.11)
