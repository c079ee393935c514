"""Starts of more than a draw: of W's structure, of a layer's inputs, or of the loss's gradient by W."""

from collections.abc import Callable, Mapping

from .corda import corda
from .eva import eva, eva_ranks
from .loftq import loftq
from .lora_ga import lora_ga
from .moments import Moments, input_moments
from .olora import olora
from .orthogonal import orthogonal
from .parts import Given, Start, check_rank, generator

BUILT: Mapping[str, Callable[[Given], Start]] = {
    "corda": corda,
    "eva": eva,
    "loftq": loftq,
    "lora_ga": lora_ga,
    "olora": olora,
    "orthogonal": orthogonal,
}

__all__ = ["BUILT", "Given", "Moments", "Start", "check_rank", "eva_ranks", "generator", "input_moments"]
