"""Operations of the general pass planned for a processor: what stands in for the reference's, one for one.

Each takes what its reference takes, of NumPy's arrays of one dtype, float32 or float64, and gives what that
gives, to rounding. Measured: specs/training_speed.md.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ...ops import activation as of_entries
from ...ops import attention as of_sequences
from ...ops import linear as of_columns
from ...ops import norm as of_rows
from .attention import attention_backward, attention_forward
from .gelu import gelu_forward, gelu_sloped
from .layer_norm import layer_norm_backward, layer_norm_forward
from .linear import linear_backward_x, linear_forward

INSTEAD: Mapping[Callable[..., Any], Callable[..., Any]] = {
    of_sequences.attention_forward: attention_forward,
    of_sequences.attention_backward: attention_backward,
    of_entries.gelu_forward: gelu_forward,
    of_entries.gelu_sloped: gelu_sloped,
    of_columns.linear_forward: linear_forward,
    of_columns.linear_backward_x: linear_backward_x,
    of_rows.layer_norm_forward: layer_norm_forward,
    of_rows.layer_norm_backward: layer_norm_backward,
}

__all__ = [
    "INSTEAD",
    "attention_backward",
    "attention_forward",
    "gelu_forward",
    "gelu_sloped",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_backward_x",
    "linear_forward",
]
