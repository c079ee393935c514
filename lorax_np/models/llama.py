"""The llama family: llama, mistral, qwen2, qwen3.  Derivation: specs/models.md.

A block adds to each row h what attention, and then what a gated product, makes of its norm; its backward adds
to the gradient of each row in the same two places, in the other order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, cast, namespace_of
from ..ops.activation import SwigluSaved, swiglu_backward, swiglu_forward
from ..ops.attention import AttentionSaved, attention_backward, attention_forward
from ..ops.norm import NormSaved
from ..ops.rope import rope_backward, rope_forward, rope_table
from .passes import Pass
from .records import Gradients, Rows

EMBEDDING, NORM = "model.embed_tokens", "model.norm"
ALL, INPUTS, NOTHING = "all", "inputs", "nothing"  # what is kept of blocks


class Turn(NamedTuple):
    """The angles by which positions turn queries and keys."""

    cos: Array  # (N, 1, D/2)
    sin: Array  # (N, 1, D/2)


class AttentionHalf(NamedTuple):
    """Activations of a block's first half, by the modules whose backward reads them."""

    norm: NormSaved
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_norm: NormSaved | None
    k_norm: NormSaved | None
    attention: AttentionSaved
    o_proj: Any


class GatedHalf(NamedTuple):
    """Activations of a block's second half."""

    norm: NormSaved
    gate_proj: Any
    up_proj: Any
    swiglu: SwigluSaved
    down_proj: Any


class Half(NamedTuple):
    """What a relative of llama has in the place of the gated product, such as experts.

    forward  : (at, i, h, rows) -> h : (N, d) and what the backward reads, of block i
    backward : (at, i, g, saved, gradients) -> g : (N, d); adds the gradients by what trains there
    """

    forward: Callable[[Pass, int, Array, Rows], tuple[Array, Any]]
    backward: Callable[[Pass, int, Array, Any, Gradients], Array]


class BlockSaved(NamedTuple):
    """Activations of one block; or its input alone, where the rest is computed again."""

    h: Array | None  # (N, d)
    attention: AttentionHalf | None
    gated: Any  # GatedHalf, or what another second half saved


class LlamaSaved(NamedTuple):
    """Activations that llama_backward reads."""

    rows: Rows
    turn: Turn
    embedding: Any
    first: int  # the first block that something trains in or below; the number of blocks where nothing does
    blocks: tuple[BlockSaved, ...]  # from the first on
    norm: NormSaved | None


def llama_forward(
    at: Pass, ids: Array, rows: Rows, *, keep: str = ALL, half: Half | None = None
) -> tuple[Array, LlamaSaved]:
    """The rows that a head reads, of token ids.

    ids : (N,)   token ids; their sequences lie as rows says, and none sees another
    keep : str   "all" activations; "inputs", those of blocks, whose backward computes them again; "nothing"
    half : Half  the second half of blocks; None for llama's own

    Returns h : (N, d), after the last norm, and what the backward reads: of blocks in which, and below which,
    nothing trains there is nothing.
    Source: Touvron et al. 2023, arXiv:2302.13971; specs/models.md.
    """
    eps, turn, first = at.config["rms_norm_eps"], _turn(at, rows), first_block(at)
    h, embedding = at.embedding(EMBEDDING, ids)  # (models.2)
    blocks = []
    for i in range(at.config["num_hidden_layers"]):
        x = h
        h, saved = _block_forward(at, i, x, rows, turn, half)
        if keep == ALL and i >= first:
            blocks.append(saved)
        elif keep == INPUTS and i >= first:
            blocks.append(BlockSaved(x, None, None))
        del saved  # what is not kept makes room for the next block's
    h, norm = at.rms_norm(NORM, h, eps)  # (models.10)
    if keep == NOTHING:
        return h, LlamaSaved(rows, turn, None, first, (), None)
    return h, LlamaSaved(rows, turn, embedding, first, tuple(blocks), norm)


def llama_backward(
    gh: Array, saved: LlamaSaved, at: Pass, gradients: Gradients, *, half: Half | None = None
) -> None:
    """Adjoint of llama_forward: gh : (N, d); adds the gradients by all that trains to gradients.

    It stops at the first block in which something trains. Source: specs/models.md.
    """
    if saved.norm is None:
        raise TypeError("saved: expected what llama_forward kept for a backward, got keep='nothing'")
    below = at.trains(EMBEDDING)
    if saved.first == at.config["num_hidden_layers"] and not below and not at.trains(NORM):
        return
    g = at.rms_norm_back(NORM, gh, saved.norm, gradients)  # (models.11)
    for i, block in reversed(list(enumerate(saved.blocks, saved.first))):
        if block.h is not None:
            _, block = _block_forward(at, i, block.h, saved.rows, saved.turn, half)  # (models.19)
        g = _block_backward(at, i, g, block, saved, gradients, half)
    if below:
        row = at.config["padding_row"]
        at.embedding_back(EMBEDDING, g, saved.embedding, gradients, padding=row)  # (models.18)


def first_block(at: Pass) -> int:
    """The first block that needs a backward."""
    L = int(at.config["num_hidden_layers"])
    if at.trains(EMBEDDING):
        return 0
    return next((i for i in range(L) if at.trains(f"model.layers.{i}")), L)


def _turn(at: Pass, rows: Rows) -> Turn:
    """The angles of all rows: positions count from 0 in each sequence.  (models.4)"""
    position = [np.arange(length) for length in rows.lengths]
    positions = at.placed(np.concatenate([np.arange(0), *position]))
    rope = at.config["rope_parameters"]
    cos, sin = rope_table(positions, at.config["head_dim"], theta=rope["rope_theta"], scaling=rope)
    return Turn(cast(cos, at.dtype), cast(sin, at.dtype))


# ---- one block ---------------------------------------------------------------------------------------------


def _block_forward(
    at: Pass, i: int, h: Array, rows: Rows, turn: Turn, half: Half | None
) -> tuple[Array, BlockSaved]:
    """h : (N, d) -> (N, d), and its activations."""
    h, attention = _attention_half(at, i, h, rows, turn)
    h, gated = _gated_half(at, i, h, rows) if half is None else half.forward(at, i, h, rows)
    return h, BlockSaved(None, attention, gated)


def _attention_half(at: Pass, i: int, h: Array, rows: Rows, turn: Turn) -> tuple[Array, AttentionHalf]:
    block, name, eps = f"model.layers.{i}", f"model.layers.{i}.self_attn", at.config["rms_norm_eps"]
    a, norm = at.rms_norm(f"{block}.input_layernorm", h, eps)  # (N, d)           (models.3)
    q, q_proj = at.linear(f"{name}.q_proj", a, rows)  # (N, H·D)
    k, k_proj = at.linear(f"{name}.k_proj", a, rows)  # (N, K·D)
    v, v_proj = at.linear(f"{name}.v_proj", a, rows)  # (N, K·D)
    q, k, v = _heads(at, q), _heads(at, k), _heads(at, v)  # (N, H, D), (N, K, D)
    q, q_norm = _head_norm(at, f"{name}.q_norm", q)
    k, k_norm = _head_norm(at, f"{name}.k_norm", k)
    q, k = rope_forward(q, *turn), rope_forward(k, *turn)  # (models.4)
    o, attention = at.op(attention_forward)(
        q, k, v, starts=rows.starts, **_rule(at, i)
    )  # (N, H, D)   (models.5)
    flat = _flat(o)  # where this had to copy o, the copy is kept in its place
    attention = attention._replace(o=_heads(at, flat))
    t, o_proj = at.linear(f"{name}.o_proj", flat, rows)
    h = h + t  # (N, d)           (models.6)
    return h, AttentionHalf(norm, q_proj, k_proj, v_proj, q_norm, k_norm, attention, o_proj)


def _gated_half(at: Pass, i: int, h: Array, rows: Rows) -> tuple[Array, GatedHalf]:
    block, name, eps = f"model.layers.{i}", f"model.layers.{i}.mlp", at.config["rms_norm_eps"]
    b, norm = at.rms_norm(f"{block}.post_attention_layernorm", h, eps)  # (N, d)           (models.7)
    u, gate_proj = at.linear(f"{name}.gate_proj", b, rows)  # (N, ff)
    w, up_proj = at.linear(f"{name}.up_proj", b, rows)  # (N, ff)
    f, swiglu = swiglu_forward(u, w)  # (N, ff)          (models.8)
    t, down_proj = at.linear(f"{name}.down_proj", f, rows)
    h = h + t  # (N, d)           (models.9)
    return h, GatedHalf(norm, gate_proj, up_proj, swiglu, down_proj)


def _block_backward(
    at: Pass,
    i: int,
    g: Array,
    block: BlockSaved,
    saved: LlamaSaved,
    gradients: Gradients,
    half: Half | None,
) -> Array:
    """Gradient by the rows that leave a block -> by those that entered it: (N, d)."""
    if block.attention is None or block.gated is None:
        raise TypeError("saved: expected a block's activations, got none")
    back = _gated_back if half is None else half.backward
    g = back(at, i, g, block.gated, gradients)
    return _attention_back(at, i, g, block.attention, saved.rows, saved.turn, gradients)


def _gated_back(at: Pass, i: int, g: Array, saved: GatedHalf, gradients: Gradients) -> Array:
    block, name = f"model.layers.{i}", f"model.layers.{i}.mlp"
    gf = at.linear_back(f"{name}.down_proj", g, saved.down_proj, gradients)  # (N, ff)   (models.12)
    gu, gw = swiglu_backward(gf, saved.swiglu)  # (N, ff)   undoes (models.8)
    gb = at.linear_back(f"{name}.up_proj", gw, saved.up_proj, gradients)
    gb = gb + at.linear_back(f"{name}.gate_proj", gu, saved.gate_proj, gradients)  # (N, d)    (models.13)
    return g + at.rms_norm_back(f"{block}.post_attention_layernorm", gb, saved.norm, gradients)  # (models.14)


def _attention_back(
    at: Pass, i: int, g: Array, saved: AttentionHalf, rows: Rows, turn: Turn, gradients: Gradients
) -> Array:
    block, name = f"model.layers.{i}", f"model.layers.{i}.self_attn"
    go = _heads(at, at.linear_back(f"{name}.o_proj", g, saved.o_proj, gradients))  # (N, H, D)
    gq, gk, gv, _ = at.op(attention_backward)(
        go, saved.attention, starts=rows.starts, **_rule(at, i)
    )  # (models.15)
    gq, gk = rope_backward(gq, *turn), rope_backward(gk, *turn)  # undoes (models.4)
    gq = _head_norm_back(at, f"{name}.q_norm", gq, saved.q_norm, gradients)
    gk = _head_norm_back(at, f"{name}.k_norm", gk, saved.k_norm, gradients)
    ga = at.linear_back(f"{name}.v_proj", _flat(gv), saved.v_proj, gradients)
    ga = ga + at.linear_back(f"{name}.k_proj", _flat(gk), saved.k_proj, gradients)
    ga = ga + at.linear_back(f"{name}.q_proj", _flat(gq), saved.q_proj, gradients)  # (N, d)    (models.16)
    return g + at.rms_norm_back(f"{block}.input_layernorm", ga, saved.norm, gradients)  # (models.17)


# ---- heads -------------------------------------------------------------------------------------------------


def _rule(at: Pass, i: int) -> dict[str, Any]:
    """Who sees whom in block i, and how scores are scaled: D^-½."""
    return {"scale": at.config["head_dim"] ** -0.5, "causal": True, "window": at.config["windows"][i]}


def _heads(at: Pass, x: Array) -> Array:
    """(N, H·D) -> (N, H, D)."""
    D = at.config["head_dim"]
    found: Array = namespace_of(x=x).reshape(x, (x.shape[0], x.shape[1] // D, D))
    return found


def _flat(x: Array) -> Array:
    """(N, H, D) -> (N, H·D)."""
    found: Array = namespace_of(x=x).reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))
    return found


def _head_norm(at: Pass, name: str, x: Array) -> tuple[Array, NormSaved | None]:
    """The norm of each head of qwen3's queries and keys; elsewhere none."""
    if not at.has(f"{name}.weight"):
        return x, None
    return at.rms_norm(name, x, at.config["rms_norm_eps"])


def _head_norm_back(at: Pass, name: str, gy: Array, saved: NormSaved | None, gradients: Gradients) -> Array:
    return gy if saved is None else at.rms_norm_back(name, gy, saved, gradients)
