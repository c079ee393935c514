"""Writing with a T5, the likeliest token at each step: the encoder runs once, and keys are kept.

Derivation: specs/encdec.md.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, HostArray, from_host, namespace_of, to_host
from ..config import Site
from ..errors import ConfigError
from ..ops.attention import attention_forward
from ..ops.relative import Relative
from .pairs import PAIRS
from .parts import join_heads, split_heads
from .passes import Pass
from .records import Batch, Model, Rows, Trained
from .t5 import biases, stack_forward
from .t5_block import READ, WRITE, Memory, dense_half, t5_of
from .t5_config import TABLE
from .t5_head import written_outputs


class Keys(NamedTuple):
    """Keys and values of one attention, with the bounds of each sequence's."""

    k: Array  # (M, H, D)
    v: Array  # (M, H, D)
    starts: tuple[int, ...]


class Seen(NamedTuple):
    """What one block of the decoder goes on from."""

    own: Keys | None  # of the tokens so far; None before the first
    memory: Keys


def t5_greedy(
    model: Model,
    sites: Mapping[str, Site],
    trained: Trained,
    batch: Batch,
    *,
    most: int,
    engine: str = "fast",
) -> list[list[int]]:
    """What the model writes to each sequence of a batch, the likeliest token at each step.

    model : Model   of the t5 family
    batch : Batch   ids : (M,) to read; labels and decoder_ids are not looked at
    most : int      tokens of a sequence at most

    Returns S lists of ids, without the start and without the end token (config.json's eos_token_id). Of equally
    likely tokens the first in the vocabulary is taken. Raises ConfigError for most < 1 and for another family.
    Source: specs/encdec.md.

    >>> from lorax_np.models.load import model_of
    >>> from lorax_np.models.t5_config import t5_settings, t5_shapes
    >>> config = dict(model_type="t5", d_model=2, d_kv=2, d_ff=2, num_layers=1, num_heads=1, vocab_size=3)
    >>> tensors = {name: np.zeros(shape) for name, shape in t5_shapes(t5_settings(config, "")).items()}
    >>> tensors |= {name: np.ones(2) for name in tensors if name.endswith("norm.weight")}
    >>> tensors["shared.weight"] = np.array([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    >>> model = model_of(tensors, config)
    >>> t5_greedy(model, {}, Trained({}, {}), Batch(np.array([2, 1]), (0, 2), None, (0,)), most=3)
    [[2, 2, 2]]
    """
    if model.family != "t5":
        raise ConfigError(f"model: expected one of family t5, got {model.family!r}")
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ConfigError(f"most: expected how many tokens to write, at least 1, got {most!r}")
    at, S, ends = Pass(model, sites, trained, pair=PAIRS[engine]), len(batch.index), _ends(model)
    m, _ = stack_forward(at, READ, batch.ids, batch.rows, "nothing")
    seen = start(at, Memory(m, batch.rows))
    ids = np.full(S, at.config["decoder_start_token_id"])
    found: list[list[int]] = [[] for _ in range(S)]
    going = np.arange(S)  # the sequences that have not ended
    for _ in range(most):
        z, seen = step(at, ids, tuple(batch.index[i] for i in going), seen)
        ids = to_host(z).argmax(axis=1)
        on = np.flatnonzero(~np.isin(ids, ends))
        if len(on) < len(going):
            seen = [Seen(None if own is None else _of(own, on), _of(memory, on)) for own, memory in seen]
            going, ids = going[on], ids[on]
        for i, token in zip(going, ids, strict=True):
            found[i].append(int(token))
        if not len(going):
            break
    return found


def start(at: Pass, memory: Memory) -> list[Seen]:
    """What the decoder's blocks look at before the first token: the memory's keys, which stay."""
    form, (m, rows) = t5_of(at), memory
    names = [f"{WRITE}.block.{i}.layer.1.EncDecAttention" for i in range(form.layers[WRITE])]
    pairs = [
        [split_heads(at.linear(f"{name}.{part}", m, rows)[0], form.heads) for part in "kv"] for name in names
    ]
    return [Seen(None, Keys(k, v, rows.starts)) for k, v in pairs]


def step(at: Pass, ids: Any, index: tuple[int, ...], seen: list[Seen]) -> tuple[Array, list[Seen]]:
    """One more token of each sequence: ids : (S,) -> z : (S, V), logits of the token after it.

    index : the numbers of the sequences; seen : what start, or the step before, returned

    Returns z, and what the next step goes on from.
    """
    form, rows = t5_of(at), Rows(tuple(range(len(index) + 1)), index)
    h, _ = at.embedding(TABLE, ids)
    relative, _ = biases(at, WRITE, form)
    now = []
    for i, (own, memory) in enumerate(seen):
        name = f"{WRITE}.block.{i}"
        attention = f"{name}.layer.0.SelfAttention"
        a, _ = at.rms_norm(f"{name}.layer.0.layer_norm", h, form.eps)
        q, k, v = (split_heads(at.linear(f"{attention}.{p}", a, rows)[0], form.heads) for p in "qkv")
        own = _with(own, k, v)
        h = h + _looked(at, attention, q, own, rows, causal=True, relative=relative)
        attention = f"{name}.layer.1.EncDecAttention"
        a, _ = at.rms_norm(f"{name}.layer.1.layer_norm", h, form.eps)
        q = split_heads(at.linear(f"{attention}.q", a, rows)[0], form.heads)
        h = h + _looked(at, attention, q, memory, rows, causal=False, relative=None)
        h, _ = dense_half(at, f"{name}.layer.2", h, rows, form)
        now.append(Seen(own, memory))
    h, _ = at.rms_norm(f"{WRITE}.final_layer_norm", h, form.eps)
    return written_outputs(at, h, Batch(ids, rows.starts, None, index, decoder_starts=rows.starts)), now


def _looked(
    at: Pass, name: str, q: Array, keys: Keys, rows: Rows, *, causal: bool, relative: Relative | None
) -> Array:
    """What one query of each sequence, which stands beside the last key where it is causal, makes of keys."""
    o, _ = attention_forward(
        q,
        keys.k,
        keys.v,
        starts=rows.starts,
        key_starts=keys.starts,
        scale=1.0,
        causal=causal,
        relative=relative,
    )  # (S, H, D)  (encdec.21)
    return at.linear(f"{name}.o", join_heads(o), rows)[0]


def _with(own: Keys | None, k: Array, v: Array) -> Keys:
    """The keys so far, and one more of each sequence: k, v : (S, H, D)."""
    S = k.shape[0]
    if own is None:
        return Keys(k, v, tuple(range(S + 1)))
    xp, t = namespace_of(k=k), own.k.shape[0] // S
    tail = k.shape[1:]
    k, v = (
        xp.reshape(
            xp.concat([xp.reshape(old, (S, t, *tail)), new[:, None, :, :]], axis=1), (S * (t + 1), *tail)
        )
        for old, new in ((own.k, k), (own.v, v))
    )
    return Keys(k, v, tuple(i * (t + 1) for i in range(S + 1)))


def _of(keys: Keys, on: HostArray) -> Keys:
    """Keys and values of some of the sequences, by their places."""
    sizes = [keys.starts[i + 1] - keys.starts[i] for i in on]
    rows = np.concatenate([np.arange(keys.starts[i], keys.starts[i + 1]) for i in on] or [np.arange(0)])
    xp = namespace_of(k=keys.k)
    at = from_host(rows, keys.k)
    return Keys(xp.take(keys.k, at, axis=0), xp.take(keys.v, at, axis=0), (0, *accumulate(sizes)))


def _ends(model: Model) -> list[int]:
    """The ids that end a text."""
    said = model.config.get("eos_token_id", 1)
    found = said if isinstance(said, list) else [] if said is None else [said]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise ConfigError(f"eos_token_id: expected an id or a list of ids, got {said!r}")
    return found
