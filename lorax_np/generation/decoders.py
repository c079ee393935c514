"""How each family goes on from the tokens so far to the next.  Derivation: specs/generation.md.

A decoder's rows are those of models/, computed for new tokens alone: what is written here is the order of a
block's operations, with keys and values of earlier tokens from the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, cast, to_host
from ..errors import ConfigError
from ..models.gpt2 import PLACES, WORDS, gpt2_of
from ..models.llama import EMBEDDING, NORM, Turn
from ..models.moe import mixture_forward
from ..models.parts import join_heads, split_heads
from ..models.passes import Pass
from ..models.records import Batch, Model, Rows
from ..models.t5 import stack_forward
from ..models.t5_block import READ, Memory
from ..models.t5_greedy import start as t5_start
from ..models.t5_greedy import step as t5_next
from ..models.tasks import head_of
from ..ops.activation import swiglu_forward
from ..ops.attention import attention_forward
from ..ops.rope import rope_forward, rope_table
from .cache import Cache

CHUNK = 512  # tokens of a prompt that are computed at once
LONGEST = "max_position_embeddings"

Step = tuple[Any, Any]  # logits z : (V,) on the host, and what the next step goes on from


class Writer(NamedTuple):
    """How a family writes one text.

    task  : whose head gives the logits
    begin : (model, at, ids) -> the logits of the first token that is written after ids, or in answer to them
    step  : (model, at, id, going) -> the logits of the token after id
    limit : config -> how many tokens a text may have, its prompt among them; None for any number
    apart : whether the prompt is a text of its own, which an encoder reads, not the beginning of what follows
    """

    task: str
    begin: Callable[[Model, Pass, Sequence[int]], Step]
    step: Callable[[Model, Pass, int, Any], Step]
    limit: Callable[[Mapping[str, Any]], int | None]
    apart: bool = False


# ---- llama -------------------------------------------------------------------------------------------------


def llama_rows(at: Pass, ids: Any, cache: Cache, *, experts: bool = False) -> Array:
    """h : (n, d) of new tokens, which stand behind those of the cache; they are in it afterwards.

    Row for row what llama_forward gives of all tokens, or moe_forward.  (generation.1)
    """
    c, new = at.config, len(ids)
    eps, rows, turn = c["rms_norm_eps"], Rows((0, new), (0,)), _turn(at, cache.count, new)
    h, _ = at.embedding(EMBEDDING, ids)
    for i in range(c["num_hidden_layers"]):
        name = f"model.layers.{i}"
        a, _ = at.rms_norm(f"{name}.input_layernorm", h, eps)
        h = h + _llama_attention(at, i, a, rows, turn, cache)
        h = mixture_forward(at, i, h, rows)[0] if experts else _llama_gated(at, i, h, rows)
    cache.advance(new)
    return at.rms_norm(NORM, h, eps)[0]


def _llama_gated(at: Pass, i: int, h: Array, rows: Rows) -> Array:
    name = f"model.layers.{i}"
    b, _ = at.rms_norm(f"{name}.post_attention_layernorm", h, at.config["rms_norm_eps"])
    u, w = (at.linear(f"{name}.mlp.{part}_proj", b, rows)[0] for part in ("gate", "up"))
    return h + at.linear(f"{name}.mlp.down_proj", swiglu_forward(u, w)[0], rows)[0]


def _llama_attention(at: Pass, i: int, a: Array, rows: Rows, turn: Turn, cache: Cache) -> Array:
    c, name = at.config, f"model.layers.{i}.self_attn"
    heads = {"q": c["num_attention_heads"], "k": c["num_key_value_heads"], "v": c["num_key_value_heads"]}
    x = {part: split_heads(at.linear(f"{name}.{part}_proj", a, rows)[0], n) for part, n in heads.items()}
    for part in ("q", "k"):
        if at.has(f"{name}.{part}_norm.weight"):
            x[part], _ = at.rms_norm(f"{name}.{part}_norm", x[part], c["rms_norm_eps"])
        x[part] = rope_forward(x[part], *turn)
    k, v = cache.extend(i, x["k"], x["v"])
    o = _looked(x["q"], k, v, scale=c["head_dim"] ** -0.5, window=c["windows"][i])
    return at.linear(f"{name}.o_proj", join_heads(o), rows)[0]


def _looked(q: Array, k: Array, v: Array, *, scale: float, window: int | None = None) -> Array:
    """What new tokens see of all: the last query stands beside the last key.  (attention.1) to (attention.6)"""
    bounds: dict[str, Any] = {"starts": (0, q.shape[0]), "key_starts": (0, k.shape[0])}
    return attention_forward(q, k, v, **bounds, scale=scale, causal=True, window=window)[0]


def _turn(at: Pass, first: int, new: int) -> Turn:
    """The angles of positions from `first` on."""
    rope = at.config["rope_parameters"]
    positions = at.placed(np.arange(first, first + new))
    cos, sin = rope_table(positions, at.config["head_dim"], theta=rope["rope_theta"], scaling=rope)
    return Turn(cast(cos, at.dtype), cast(sin, at.dtype))


# ---- gpt2 --------------------------------------------------------------------------------------------------


def gpt2_rows(at: Pass, ids: Any, cache: Cache) -> Array:
    """h : (n, d) of new tokens, as llama_rows; row for row what gpt2_forward gives of all tokens."""
    form, new = gpt2_of(at), len(ids)
    rows = Rows((0, new), (0,))

    def linear(name: str, x: Array) -> Array:
        return at.linear(name, x, rows, transposed=True)[0]

    place = np.arange(cache.count, cache.count + new)
    h = at.embedding(WORDS, ids)[0] + at.embedding(PLACES, place)[0]
    for i, scale in enumerate(form.scales):
        name, d = f"transformer.h.{i}", h.shape[1]
        n, _ = at.layer_norm(f"{name}.ln_1", h, form.eps)
        w = linear(f"{name}.attn.c_attn", n)  # (n, 3d)
        q, k, v = (split_heads(w[:, j * d : (j + 1) * d], form.heads) for j in range(3))
        k, v = cache.extend(i, k, v)
        h = h + linear(f"{name}.attn.c_proj", join_heads(_looked(q, k, v, scale=scale)))
        n, _ = at.layer_norm(f"{name}.ln_2", h, form.eps)
        h = h + linear(f"{name}.mlp.c_proj", form.act.forward(linear(f"{name}.mlp.c_fc", n)))
    cache.advance(new)
    return at.layer_norm("transformer.ln_f", h, form.eps)[0]


# ---- t5 ----------------------------------------------------------------------------------------------------


def _t5_begin(model: Model, at: Pass, ids: Sequence[int]) -> Step:
    """The encoder reads the prompt once; the decoder begins with its start token."""
    rows = Rows((0, len(ids)), (0,))
    m, _ = stack_forward(at, READ, np.array(ids, dtype="int64"), rows, "nothing")
    return _t5_step(model, at, at.config["decoder_start_token_id"], t5_start(at, Memory(m, rows)))


def _t5_step(model: Model, at: Pass, token: int, seen: Any) -> Step:
    z, seen = t5_next(at, np.array([token], dtype="int64"), (0,), seen)
    return to_host(z)[0], seen


# ---- the families ------------------------------------------------------------------------------------------


def _decoder(rows: Callable[[Pass, Any, Cache], Array], limit: str) -> Writer:
    """A family that writes on: the prompt is the beginning of its text."""

    def begin(model: Model, at: Pass, ids: Sequence[int]) -> Step:
        cache, host = Cache(), np.array(ids, dtype="int64")
        for start in range(0, len(host), CHUNK):
            h = rows(at, host[start : start + CHUNK], cache)
        return _logits(model, at, h[-1:, ...]), cache

    def step(model: Model, at: Pass, token: int, cache: Cache) -> Step:
        return _logits(model, at, rows(at, np.array([token], dtype="int64"), cache)), cache

    def longest(config: Mapping[str, Any]) -> int | None:
        found = config.get(limit)
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None

    return Writer("CAUSAL_LM", begin, step, longest)


def _logits(model: Model, at: Pass, h: Array) -> Any:
    """z : (V,) of one row h : (1, d), on the host."""
    batch = Batch(None, (0, 1), None, (0,))
    return to_host(head_of(model, "CAUSAL_LM").outputs(at, h, batch))[0]


WRITERS: Mapping[str, Writer] = {
    "llama": _decoder(llama_rows, LONGEST),
    "moe": _decoder(partial(llama_rows, experts=True), LONGEST),
    "gpt2": _decoder(gpt2_rows, "n_positions"),
    "t5": Writer("SEQ_2_SEQ_LM", _t5_begin, _t5_step, lambda config: None, apart=True),
}


def writer_of(model: Model) -> Writer:
    """How a model writes. Raises ConfigError for a family that does not, and for a model without the head."""
    if model.family not in WRITERS:
        raise ConfigError(
            f"model: expected a family that writes, one of {', '.join(WRITERS)}, got {model.family}, "
            "which only reads"
        )
    head_of(model, WRITERS[model.family].task)
    return WRITERS[model.family]
