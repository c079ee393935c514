"""Weights in 4 bits, as NF4, and in 8: their codes, and the numbers these stand for.  Spec: specs/quant.md.

On the host, in pieces that stay in a core's cache, so that no copy of a whole weight is made but the result.
"""

from .absmax import NESTED, Absmax, dynamic_levels, expand_absmax
from .int8 import Int8, dequantise_int8, quantise_int8
from .nf4 import BOUNDS, LEVELS, NF4, PAIRS, compress_absmax, dequantise_nf4, quantise_nf4
from .pieces import BLOCKS

__all__ = [
    "BLOCKS",
    "BOUNDS",
    "LEVELS",
    "NESTED",
    "NF4",
    "PAIRS",
    "Absmax",
    "Int8",
    "compress_absmax",
    "dequantise_int8",
    "dequantise_nf4",
    "dynamic_levels",
    "expand_absmax",
    "quantise_int8",
    "quantise_nf4",
]
