"""The blocks of a T5: attention to itself and to a memory, a perceptron, and their adjoints.

Derivation: specs/encdec.md.
"""

from typing import Any, NamedTuple

from ..backend import Array
from ..ops.attention import AttentionSaved, attention_backward, attention_forward
from ..ops.norm import NormSaved
from ..ops.relative import Relative
from .parts import ACTIVATIONS, Activation, join_heads, joined, split_heads
from .passes import Pass
from .records import Gradients, Rows

READ, WRITE = "encoder", "decoder"


class T5(NamedTuple):
    """What the passes read of a model's config.json."""

    heads: int
    eps: float
    act: Activation
    gated: bool
    buckets: int
    farthest: int  # from which distance on all share the last bucket
    layers: dict[str, int]  # of each stack


class Memory(NamedTuple):
    """What the encoder made of a batch, and whose rows are whose."""

    h: Array  # (M, d)
    rows: Rows


class Sees(NamedTuple):
    """What attention looks at: its own sequence, or a memory; and how."""

    memory: Memory | None = None
    relative: Relative | None = None
    causal: bool = False


class AttentionHalf(NamedTuple):
    """Activations of attention, by the modules whose backward reads them."""

    norm: NormSaved
    q: Any
    k: Any
    v: Any
    attention: AttentionSaved
    o: Any


class DenseHalf(NamedTuple):
    """Activations of a perceptron."""

    norm: NormSaved
    up: Any
    gate: Any  # wi_1, which multiplies; None where there is none
    u: Array  # (N, d_ff)  before the activation
    w: Array | None  # (N, d_ff)  what it is multiplied by
    down: Any


class BlockSaved(NamedTuple):
    """Activations of one block."""

    own: AttentionHalf
    cross: AttentionHalf | None
    dense: DenseHalf


def t5_of(at: Pass) -> T5:
    """What the passes read, of config.json with defaults filled in."""
    config = at.config
    return T5(
        heads=config["num_heads"],
        eps=config["layer_norm_epsilon"],
        act=ACTIVATIONS[config["dense_act_fn"]],
        gated=config["is_gated_act"],
        buckets=config["relative_attention_num_buckets"],
        farthest=config["relative_attention_max_distance"],
        layers={READ: config["num_layers"], WRITE: config["num_decoder_layers"]},
    )


def block_forward(
    at: Pass, name: str, x: Array, rows: Rows, form: T5, relative: Relative, memory: Memory | None
) -> tuple[Array, BlockSaved]:
    """One block: attention to the own sequence, to the memory where there is one, and a perceptron.

    x : (N, d) -> y : (N, d), and the saved activations.
    """
    writes = memory is not None
    h, own = attention_half(at, f"{name}.layer.0", x, rows, form, Sees(None, relative, writes))
    cross = None
    if writes:
        h, cross = attention_half(at, f"{name}.layer.1", h, rows, form, Sees(memory))
    y, dense = dense_half(at, f"{name}.layer.{1 + writes}", h, rows, form)
    return y, BlockSaved(own, cross, dense)


def block_backward(
    at: Pass,
    name: str,
    gy: Array,
    saved: BlockSaved,
    rows: Rows,
    relative: Relative,
    gradients: Gradients,
    form: T5,
    memory: Memory | None,
) -> tuple[Array, Any, Array | None]:
    """Adjoint of block_forward: gy : (N, d) -> gx : (N, d), gR : (buckets, H), and gm : (M, d) or None."""
    writes, gm = memory is not None, None
    g = dense_back(at, f"{name}.layer.{1 + writes}", gy, saved.dense, gradients, form)
    if saved.cross is not None:
        g, gm, _ = attention_back(at, f"{name}.layer.1", g, saved.cross, rows, gradients, Sees(memory))
    own = Sees(None, relative, writes)
    g, _, gR = attention_back(at, f"{name}.layer.0", g, saved.own, rows, gradients, own)
    return g, gR, gm


def attention_half(
    at: Pass, layer: str, h: Array, rows: Rows, form: T5, sees: Sees
) -> tuple[Array, AttentionHalf]:
    """h : (N, d) -> h + o of what its norm sees: of its own sequence, or of the memory's."""
    name = attention_of(layer, sees)
    a, norm = at.rms_norm(f"{layer}.layer_norm", h, form.eps)  # (N, d)  (encdec.4)
    s, of = (a, rows) if sees.memory is None else sees.memory
    q, kept_q = at.linear(f"{name}.q", a, rows)  # (N, H·D)
    k, kept_k = at.linear(f"{name}.k", s, of)  # (M, H·D)
    v, kept_v = at.linear(f"{name}.v", s, of)
    q, k, v = (split_heads(each, form.heads) for each in (q, k, v))
    o, attention = at.op(attention_forward)(q, k, v, **_rule(rows, sees))  # (N, H, D)  (encdec.5)
    flat, attention = joined(o, attention)
    t, out = at.linear(f"{name}.o", flat, rows)
    return h + t, AttentionHalf(norm, kept_q, kept_k, kept_v, attention, out)  # (N, d)  (encdec.6)


def attention_back(
    at: Pass, layer: str, g: Array, saved: AttentionHalf, rows: Rows, gradients: Gradients, sees: Sees
) -> tuple[Array, Array | None, Any]:
    """Adjoint of attention_half: g : (N, d) -> gh : (N, d); gm : (M, d), None without a memory; and gR."""
    name = attention_of(layer, sees)
    go = split_heads(at.linear_back(f"{name}.o", g, saved.o, gradients), saved.attention.q.shape[1])
    gq, gk, gv, gR = at.op(attention_backward)(go, saved.attention, **_rule(rows, sees))  # (encdec.13)
    ga = at.linear_back(f"{name}.q", join_heads(gq), saved.q, gradients)
    gs = at.linear_back(f"{name}.k", join_heads(gk), saved.k, gradients)
    gs = gs + at.linear_back(f"{name}.v", join_heads(gv), saved.v, gradients)  # (M, d)  (encdec.14)
    ga = ga + gs if sees.memory is None else ga
    gh = g + at.rms_norm_back(f"{layer}.layer_norm", ga, saved.norm, gradients)  # (N, d)  (encdec.15)
    return gh, None if sees.memory is None else gs, gR


def attention_of(layer: str, sees: Sees) -> str:
    """The name of the attention in a layer."""
    return f"{layer}.SelfAttention" if sees.memory is None else f"{layer}.EncDecAttention"


def _rule(rows: Rows, sees: Sees) -> dict[str, Any]:
    """Who sees whom, and how scores are scaled: not at all."""
    keys = None if sees.memory is None else sees.memory.rows.starts
    return {
        "starts": rows.starts,
        "key_starts": keys,
        "scale": 1.0,
        "causal": sees.causal,
        "relative": sees.relative,
    }


def dense_half(at: Pass, layer: str, h: Array, rows: Rows, form: T5) -> tuple[Array, DenseHalf]:
    """h : (N, d) -> h + wo φ(wi b), or h + wo (φ(wi_0 b)∘wi_1 b), b its norm."""
    name, w, gate = f"{layer}.DenseReluDense", None, None
    b, norm = at.rms_norm(f"{layer}.layer_norm", h, form.eps)
    u, up = at.linear(f"{name}.wi_0" if form.gated else f"{name}.wi", b, rows)  # (N, d_ff)
    f = form.act.forward(u)
    if form.gated:
        w, gate = at.linear(f"{name}.wi_1", b, rows)
        f = f * w  # (N, d_ff)  (encdec.7)
    t, down = at.linear(f"{name}.wo", f, rows)
    return h + t, DenseHalf(norm, up, gate, u, w, down)  # (N, d)  (encdec.8)


def dense_back(at: Pass, layer: str, g: Array, saved: DenseHalf, gradients: Gradients, form: T5) -> Array:
    """Adjoint of dense_half: g : (N, d) -> gh : (N, d)."""
    name, u, w = f"{layer}.DenseReluDense", saved.u, saved.w
    gf = at.linear_back(f"{name}.wo", g, saved.down, gradients)  # (N, d_ff)
    if w is None:
        gb = at.linear_back(f"{name}.wi", form.act.backward(gf, u), saved.up, gradients)
    else:
        gb = at.linear_back(f"{name}.wi_0", form.act.backward(gf * w, u), saved.up, gradients)  # (encdec.11)
        gb = gb + at.linear_back(f"{name}.wi_1", gf * form.act.forward(u), saved.gate, gradients)
    return g + at.rms_norm_back(f"{layer}.layer_norm", gb, saved.norm, gradients)  # (N, d)  (encdec.12)
