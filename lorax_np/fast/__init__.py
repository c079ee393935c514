"""The layer planned for speed: the same pair of functions as the reference, judged like a stranger's."""

from . import general
from .buffers import release
from .cpu import FastSaved, lora_linear_backward, lora_linear_forward
from .gemm import blas, engines
from .llama import LlamaPlan, llama_plan
from .merging import merge_into

__all__ = [
    "FastSaved",
    "LlamaPlan",
    "blas",
    "engines",
    "general",
    "llama_plan",
    "lora_linear_backward",
    "lora_linear_forward",
    "merge_into",
    "release",
]
