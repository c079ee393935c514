"""The head of a model that writes: the next token of the decoder's sequences.  Derivation: specs/encdec.md."""

from dataclasses import replace

from ..backend import Array
from .family import Head
from .heads import causal_gradient, causal_loss, causal_outputs, causal_shapes
from .passes import Pass
from .records import Batch, Gradients


def written_outputs(at: Pass, h: Array, batch: Batch) -> Array:
    """Logits z : (N, V) of each row of the decoder.  (encdec.19)"""
    return causal_outputs(at, scale(at) * h, _written(batch))


def written_loss(at: Pass, h: Array, batch: Batch, n: int) -> Array:
    """Cross entropy of the decoder's rows that carry a label; labels stand beside the rows that give them."""
    return causal_loss(at, scale(at) * h, _written(batch), n)


def written_gradient(at: Pass, h: Array, batch: Batch, n: int, gradients: Gradients) -> tuple[Array, Array]:
    """The loss and gh : (N, d).  (encdec.20)"""
    loss, g = causal_gradient(at, scale(at) * h, _written(batch), n, gradients)
    return loss, scale(at) * g


def scale(at: Pass) -> float:
    """What the head's input is multiplied by: d^-½, or 1."""
    return float(at.config["d_model"]) ** -0.5 if at.config["scale_decoder_outputs"] else 1.0


def _written(batch: Batch) -> Batch:
    """The decoder's sequences as those of a decoder alone."""
    return replace(batch, starts=batch.decoder_rows.starts)


WRITTEN = Head(written_outputs, written_loss, written_gradient, causal_shapes)
