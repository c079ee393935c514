"""A linear layer on one token: the reference's numbers, without its checks, and with norms of DoRA kept.

A prompt's many rows go through whichever pair of functions is asked for, which checks everything; tokens that
follow meet the same adapters, one row at a time, where checks would take longer than products.
"""

from typing import Any

from ..backend import Array, dtype_name
from ..layer import lora_linear_forward
from ..models.pairs import PAIRS, Pair
from ..ops.dora import magnitude_forward, row_norm_forward
from ..ops.linear import linear_forward
from ..ops.lora import delta_forward, lora_forward
from ..params import Adapter, Linear


class OneRow:
    """The pair of a pass that writes: forward for one row, of an engine for more; there is no backward."""

    def __init__(self, engine: str) -> None:
        """engine : of PAIRS"""
        self._many = PAIRS[engine].forward
        self._norms: dict[int, tuple[Adapter, Array]] = {}  # by id of the adapter, which is held as well

    def pair(self) -> Pair:
        """As a Pass takes it."""
        return Pair(self.forward, _no_backward)

    def forward(
        self, x: Array, base: Linear, adapter: Adapter, *, scaling: float, mask: Any
    ) -> tuple[Array, Any]:
        """What lora_linear_forward gives without a mask, to the bit on one row : (1, d_in) -> (1, d_out)."""
        if x.shape[0] > 1:
            return self._many(x, base, adapter, scaling=scaling, mask=mask)
        A, B, b = adapter.A, adapter.B, base.b if adapter.b is None else adapter.b
        if A is None or B is None or dtype_name(A) != dtype_name(x):
            return lora_linear_forward(x, base, adapter, scaling=scaling, mask=mask)
        P = linear_forward(x, base.W)  # (1, d_out)  (linear.6)
        t, saved = lora_forward(x, A, B, adapter.bB, scaling=scaling)
        if adapter.m is not None:
            n = self._norm(base, adapter, scaling)
            t, _ = magnitude_forward(P, t, m=adapter.m, n=n)
        return (P if b is None else P + b) + t, saved  # (linear.7)

    def _norm(self, base: Linear, adapter: Adapter, scaling: float) -> Array:
        """The row norms of W + s·BA, which no token changes: (d_out,)."""
        if id(adapter) not in self._norms and adapter.A is not None and adapter.B is not None:
            V = base.W + delta_forward(adapter.A, adapter.B, scaling=scaling)
            self._norms[id(adapter)] = adapter, row_norm_forward(V)
        return self._norms[id(adapter)][1]


def _no_backward(*_: Any) -> Any:
    raise TypeError("backward: expected none of a text that is written, got a call")
