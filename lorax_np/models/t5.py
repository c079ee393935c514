"""T5: a stack that reads, a stack that writes and looks at what was read, and their adjoints.

Derivation: specs/encdec.md.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, dtype_name, namespace_of, to_host
from ..errors import ConfigError, DtypeError
from ..ops.norm import NormSaved
from ..ops.relative import Relative
from ..ops.targets import IGNORED
from .parts import check_kept, first_block, to_keep
from .passes import Pass
from .records import Batch, Gradients, Rows
from .t5_block import READ, T5, WRITE, BlockSaved, Memory, block_backward, block_forward, t5_of
from .t5_config import BIAS, TABLE


class StackSaved(NamedTuple):
    """Activations of one stack."""

    rows: Rows
    words: Any
    relative: Relative
    table: Any  # what the lookup of all buckets saved
    blocks: tuple[Any, ...]  # of each block what it saved, or its input where it is computed again
    first: int  # the first block in or below which something trains
    norm: NormSaved


class T5Saved(NamedTuple):
    """What t5_backward reads."""

    encoder: StackSaved
    memory: Memory
    decoder: StackSaved


def t5_forward(at: Pass, batch: Batch, keep: str = "all") -> tuple[Array, T5Saved]:
    """The last hidden state of each token of the decoder, normed, as the head reads it.

    at : Pass      weights by name, what trains at them, config.json with defaults filled in
    batch : Batch  ids : (M,) to read; decoder_ids : (N,) to go on from, or None for those that labels mean
    keep : str     "all"; "inputs", of blocks, which the backward computes again; "nothing", where none follows

    Returns h : (N, d) and the saved activations. The model's own dropout is not applied (specs/encdec.md).
    Raises ConfigError for ids past the table, and for a batch without the decoder's sequences.
    Source: Raffel et al. 2019, arXiv:1910.10683; specs/encdec.md.
    """
    rows = batch.decoder_rows
    ids = decoder_input(at, batch.labels, rows) if batch.decoder_ids is None else batch.decoder_ids
    m, encoder = stack_forward(at, READ, batch.ids, batch.rows, keep)
    memory = Memory(m, batch.rows)
    h, decoder = stack_forward(at, WRITE, ids, rows, keep, memory)
    return h, T5Saved(encoder, memory, decoder)


def t5_backward(gh: Array, saved: T5Saved, at: Pass, gradients: Gradients) -> None:
    """Adjoint of t5_forward: gh : (N, d); adds the gradients of all that trains."""
    gm = stack_backward(gh, saved.decoder, at, WRITE, gradients, saved.memory)
    if gm is not None and _reads(at):
        stack_backward(gm, saved.encoder, at, READ, gradients)


def decoder_input(at: Pass, labels: Any, rows: Rows) -> Any:
    """What the decoder reads to write labels : (N,): a start, then all labels but the last.  (encdec.1)

    Ids on the host; where a label is ignored, the id of padding.
    """
    if labels is None:
        raise ConfigError("batch: expected decoder_ids, or labels that say what they are, got neither")
    host = to_host(labels)
    if host.shape != (rows.count,):
        raise ConfigError(f"labels: expected {rows.count}, one for each row of the decoder, got {host.shape}")
    if host.dtype.kind not in "iu":
        raise DtypeError(f"labels: expected integers, got {dtype_name(host)}")
    if host.size and host.max() > np.iinfo("int64").max:  # which would come out negative
        raise ConfigError(f"labels: expected ids or −100, got {host.max()}")
    ids = np.full(rows.count, at.config["decoder_start_token_id"])
    for begin, end in pairwise(rows.starts):
        ids[begin + 1 : end] = host[begin : max(begin, end - 1)]
    ids[ids == IGNORED] = at.config["pad_token_id"]
    return ids


def _reads(at: Pass) -> bool:
    """Whether the encoder needs a backward."""
    return at.trains(TABLE) or at.trains(READ)


# ---- a stack -----------------------------------------------------------------------------------------------


def stack_forward(
    at: Pass, stack: str, ids: Any, rows: Rows, keep: str, memory: Memory | None = None
) -> tuple[Array, StackSaved]:
    """One stack: ids : (N,) -> y : (N, d), after its last norm, and the saved activations.

    Source: specs/encdec.md, (encdec.2) to (encdec.9).
    """
    form = t5_of(at)
    h, words = at.embedding(TABLE, ids)  # (N, d)  (encdec.2)
    relative, table = biases(at, stack, form)
    below = [TABLE] if memory is None else [TABLE, READ]
    first, blocks = first_block(at, below, f"{stack}.block", form.layers[stack]), []
    for i in range(form.layers[stack]):
        x = h
        h, block = block_forward(at, f"{stack}.block.{i}", x, rows, form, relative, memory)
        blocks.append(to_keep(keep if i >= first else "nothing", x, block))
        del block  # what is not kept makes room for the next block's
    y, norm = at.rms_norm(f"{stack}.final_layer_norm", h, form.eps)  # (N, d)  (encdec.9)
    return y, StackSaved(rows, words, relative, table, tuple(blocks), first, norm)


def stack_backward(
    gy: Array, saved: StackSaved, at: Pass, stack: str, gradients: Gradients, memory: Memory | None = None
) -> Array | None:
    """Adjoint of stack_forward: gy : (N, d) -> gm : (M, d), by the memory, or None without one.

    Both gm and the gradient by the table of biases are sums over the blocks. Source: specs/encdec.md.
    """
    form, xp = t5_of(at), namespace_of(gy=gy)
    check_kept(saved.blocks, saved.first)
    g = at.rms_norm_back(f"{stack}.final_layer_norm", gy, saved.norm, gradients)  # (N, d)  (encdec.10)
    gR, gm = xp.zeros_like(saved.relative.R), None if memory is None else xp.zeros_like(memory.h)
    for i in reversed(range(saved.first, form.layers[stack])):
        name, block = f"{stack}.block.{i}", saved.blocks[i]
        if not isinstance(block, BlockSaved):
            _, block = block_forward(at, name, block, saved.rows, form, saved.relative, memory)
        g, more, gs = block_backward(at, name, g, block, saved.rows, saved.relative, gradients, form, memory)
        gR = gR + more  # (buckets, H)  (encdec.16)
        gm = None if gm is None else gm + gs  # (M, d)  (encdec.17)
    at.embedding_back(f"{stack}.{BIAS}", gR, saved.table, gradients)
    at.embedding_back(TABLE, g, saved.words, gradients)  # (encdec.18), once for each stack
    return gm


def biases(at: Pass, stack: str, form: T5) -> tuple[Relative, Any]:
    """The biases of a stack, looked up in the table's whole length, with whatever trains there."""
    R, table = at.embedding(f"{stack}.{BIAS}", np.arange(form.buckets))  # (buckets, H)  (encdec.3)
    return Relative(R, bidirectional=stack == READ, max_distance=form.farthest), table
