"""Which functions compute a linear layer and the operations beside it: the reference's, or lx.fast's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..backend import Array
from ..fast import lora_linear_backward as fast_backward
from ..fast import lora_linear_forward as fast_forward
from ..fast.general import INSTEAD
from ..layer import lora_linear_backward, lora_linear_forward
from ..params import Adapter, Linear


class Pair(NamedTuple):
    """A forward of a LoRA linear layer and its adjoint, with the arguments of the reference.

    instead : functions that stand in for operations of ops/ on the host, by the operation
    there : gives those that do on a device
    """

    forward: Callable[..., tuple[Array, Any]]
    backward: Callable[..., tuple[Array, Adapter]]
    instead: Mapping[Callable[..., Any], Callable[..., Any]] = {}
    there: Callable[[], Mapping[Callable[..., Any], Callable[..., Any]]] = dict


def _fast_forward(x: Array, base: Linear, adapter: Adapter, *, scaling: float, mask: Any) -> tuple[Array, Any]:
    y, saved = fast_forward(x, base, adapter, scaling=scaling, dropout=mask)
    return y, saved


def _on_device() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Read where there is a device alone: nobody else waits for it."""
    from ..fast.device import ON_DEVICE

    return ON_DEVICE


REFERENCE = Pair(lora_linear_forward, lora_linear_backward)
FAST = Pair(_fast_forward, fast_backward, INSTEAD, _on_device)
PAIRS: Mapping[str, Pair] = {"reference": REFERENCE, "fast": FAST}
