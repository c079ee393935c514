"""What several families of models share: heads of attention, positions, activations by their names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..backend import Array, namespace_of, to_host
from ..errors import ConfigError, ShapeError
from ..ops.activation import (
    gelu_backward,
    gelu_forward,
    gelu_sloped,
    gelu_tanh_backward,
    gelu_tanh_forward,
    gelu_tanh_sloped,
    relu_backward,
    relu_forward,
    silu_backward,
    silu_forward,
    tanh_backward,
    tanh_forward,
)
from ..ops.attention import AttentionSaved
from .passes import Pass
from .records import Rows

Kept = TypeVar("Kept")


def to_keep(keep: str, x: Array, block: Kept) -> Kept | Array | None:
    """What is kept of a block for the backward pass: all it saved, its input x, or nothing."""
    return block if keep == "all" else x if keep == "inputs" else None


def check_kept(blocks: Sequence[object], first: int) -> None:
    """Raise TypeError where a backward follows a forward that kept nothing of the blocks it needs."""
    if any(block is None for block in blocks[first:]):
        raise TypeError("saved: expected what a forward kept for its backward, got that of keep='nothing'")


def first_block(at: Pass, below: Sequence[str], blocks: str, count: int) -> int:
    """The first of `count` blocks that needs a backward, since in or below it something trains; else count."""
    if any(at.trains(module) for module in below):
        return 0
    return next((i for i in range(count) if at.trains(f"{blocks}.{i}")), count)


def split_heads(x: Array, heads: int) -> Array:
    """(N, heads·D) -> (N, heads, D): the columns of each head are neighbours."""
    n, d = x.shape
    found: Array = namespace_of(x=x).reshape(x, (n, heads, d // heads))
    return found


def join_heads(x: Array) -> Array:
    """(N, heads, D) -> (N, heads·D), which is the adjoint of split_heads too."""
    n, heads, d = x.shape
    found: Array = namespace_of(x=x).reshape(x, (n, heads * d))
    return found


def joined(o: Array, saved: AttentionSaved) -> tuple[Array, AttentionSaved]:
    """Attention's output as rows (N, H·D), and what it saved, with a copy of o in its place if one was made."""
    flat = join_heads(o)
    return flat, saved._replace(o=split_heads(flat, o.shape[1]))


def positions(rows: Rows, *, first: int, most: int) -> Any:
    """The number of each token in its sequence, from `first` on: (N,), on the host.

    Raises ConfigError for a sequence that needs a number past most − 1, the last that the model has a row for.
    """
    for i, length in enumerate(rows.lengths):
        if first + length > most:
            raise ConfigError(
                f"batch: expected sequences of at most {most - first} tokens, set by the model's positions, "
                f"got {length} in sequence {i}"
            )
    return np.concatenate([np.zeros(0, "int64"), *(np.arange(first, first + n) for n in rows.lengths)])


def check_types(types: Any, N: int, count: int) -> None:
    """Raise ShapeError unless types are (N,), ConfigError where one is none of 0 to count − 1."""
    host = to_host(types)
    if host.shape != (N,):
        raise ShapeError(f"types: expected (N,) with N={N} set by starts, got {host.shape}")
    wrong = ((host < 0) | (host >= count)).nonzero()[0]
    if len(wrong):
        raise ConfigError(
            f"types: expected numbers from 0 to {count - 1}, set by type_vocab_size, "
            f"got {host[wrong[0]]} in row {wrong[0]}"
        )


# ---- activations -------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An entry-wise function f and its adjoint, which reads f's input, or f's slope."""

    forward: Callable[[Array], Array]  # u -> y
    backward: Callable[[Array, Array], Array]  # gy, u -> gu
    together: Callable[[Array], tuple[Array, Array]] | None = None  # u -> y, f′(u), where that is cheaper

    def sloped(self, at: Pass, u: Array) -> tuple[Array, Array]:
        """Return y and f′(u), which the backward multiplies by: as large as u, which need not be kept then."""
        if self.together is not None:
            return at.op(self.together)(u)
        return self.forward(u), self.backward(namespace_of(u=u).ones_like(u), u)


def activated(at: Pass, act: Activation, u: Array, *, kept: bool) -> tuple[Array, Array | None]:
    """y : (N, d_ff), and the slope at u where it is kept for a backward."""
    return act.sloped(at, u) if kept else (at.op(act.forward)(u), None)


def _tanh_back(gy: Array, u: Array) -> Array:
    return tanh_backward(gy, tanh_forward(u))


_ERF = Activation(gelu_forward, gelu_backward, gelu_sloped)
_TANH = Activation(gelu_tanh_forward, gelu_tanh_backward, gelu_tanh_sloped)
_SILU = Activation(silu_forward, silu_backward)

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": _ERF,
    "gelu_python": _ERF,
    "gelu_new": _TANH,
    "gelu_pytorch_tanh": _TANH,
    "gelu_python_tanh": _TANH,
    "relu": Activation(relu_forward, relu_backward),
    "silu": _SILU,
    "swish": _SILU,
    "tanh": Activation(tanh_forward, _tanh_back),
}
