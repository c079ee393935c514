"""What several families of models share: heads of attention, positions, activations by their names."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..backend import Array, dtype_name, from_host, namespace_of, to_host
from ..errors import ConfigError
from ..ops.activation import (
    gelu_backward,
    gelu_forward,
    gelu_tanh_backward,
    gelu_tanh_forward,
    relu_backward,
    relu_forward,
    silu_backward,
    silu_forward,
    tanh_backward,
    tanh_forward,
)
from .passes import Pass
from .records import Rows

Kept = TypeVar("Kept")


def kept(keep: str, x: Array, block: Kept) -> Kept | Array | None:
    """What is kept of a block for the backward pass: all it saved, its input x, or nothing."""
    return block if keep == "all" else x if keep == "inputs" else None


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


def positions(rows: Rows, like: Array, *, first: int, most: int) -> Array:
    """The number of each token in its sequence, from `first` on: (N,), where `like` lives.

    Raises ConfigError for a sequence that needs a number past most − 1, the last that the model has a row for.
    """
    for i, length in enumerate(rows.lengths):
        if first + length > most:
            raise ConfigError(
                f"batch: expected sequences of at most {most - first} tokens, set by the model's positions, "
                f"got {length} in sequence {i}"
            )
    parts = [np.arange(first, first + length) for length in rows.lengths]
    return from_host(np.concatenate([np.zeros(0, "int64"), *parts]), like)  # type: ignore[no-any-return]


def check_ids(name: str, ids: Array, count: int, who: str) -> None:
    """Raise ConfigError where an id is none of 0 to count − 1; ids are read on the host."""
    if not dtype_name(ids).startswith(("int", "uint")):
        raise ConfigError(f"{name}: expected integers, got {dtype_name(ids)}")
    host = to_host(ids)
    wrong = (host < 0) | (host >= count)
    if wrong.any():
        first = int(wrong.argmax())
        raise ConfigError(
            f"{name}: expected numbers from 0 to {count - 1}, set by {who}, got {host[first]} in row {first}"
        )


# ---- activations -------------------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An entry-wise function and its adjoint, which reads the function's input."""

    forward: Callable[[Array], Array]  # u -> y
    backward: Callable[[Array, Array], Array]  # gy, u -> gu


def _tanh_back(gy: Array, u: Array) -> Array:
    return tanh_backward(gy, tanh_forward(u))


_ERF = Activation(gelu_forward, gelu_backward)
_TANH = Activation(gelu_tanh_forward, gelu_tanh_backward)
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
